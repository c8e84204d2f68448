//! Who may stay when places are short: a table of the open connections. Pure but for a lock; takes `now`.
//!
//! A connection is *half-open* until it has sent its first complete request head, TLS included; then it is *known*, and
//! *trusted* once its handler vouches for it. When the limit is reached, the newest half-open connection gives way to the
//! next one, and where there are none, the newest known one: so a flood displaces itself, and trusted senders stay.
//! A newcomer has a second before it goes, as long as there are others and newcomers are not the flood themselves.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Enough for a TLS handshake and a request from the other side of the world.
const FAIR_CHANCE: Duration = Duration::from_secs(1);

/// One in so many candidates being half-open is a flood of them.
const MANY: usize = 8;

/// Whoever has an IPv6 address usually has the 2^64 around it (RFC 6177).
const IPV6_SOURCE_BITS: u32 = 64;

/// Places by limit.
pub struct Admission {
    total_max: usize,
    source_max: usize,
    /// Proxies: many senders behind one address.
    unlimited_sources: Vec<IpNet>,
    table: Mutex<Table>,
    left: Notify,
}

/// How far a connection has come. The first ones give way first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    HalfOpen,
    Known,
    Trusted,
}

#[derive(Default)]
struct Table {
    next_id: u64,
    connections: HashMap<u64, Connection>,
    candidates: Candidates,
    sources: HashMap<IpAddr, Source>,
}

struct Connection {
    source: IpAddr,
    since: Instant,
    standing: Standing,
    evicted: CancellationToken,
}

#[derive(Default)]
struct Source {
    open: usize,
    candidates: Candidates,
}

/// Connections that may have to go, by age.
#[derive(Default)]
struct Candidates {
    half_open: BTreeSet<(Instant, u64)>,
    known: BTreeSet<(Instant, u64)>,
}

/// A newcomer's fate.
pub enum Admitted {
    /// It has a place. The flag tells whether another one had to go for it.
    Yes { place: Place, evicted: bool },
    /// All places of its source are taken by trusted connections.
    SourceFull,
}

/// A connection's place in the table; given back when it is dropped.
pub struct Place {
    admission: Arc<Admission>,
    id: u64,
    evicted: CancellationToken,
}

/// How many connections there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    pub half_open: usize,
    /// Known or trusted.
    pub established: usize,
}

impl Admission {
    pub fn new(total_max: usize, source_max: usize, unlimited_sources: Vec<IpNet>) -> Arc<Self> {
        Arc::new(Self { total_max, source_max, unlimited_sources, table: Mutex::default(), left: Notify::new() })
    }

    /// Returns once a newcomer could be admitted: there is a place, or somebody who can go.
    pub async fn room(&self) {
        loop {
            let left = self.left.notified();
            let full = {
                let table = self.table();
                table.connections.len() >= self.total_max && table.candidates.is_empty()
            };
            if !full {
                return;
            }
            left.await;
        }
    }

    /// Gives the peer a place, if need be that of another.
    pub fn admit(self: &Arc<Self>, peer: IpAddr, now: Instant) -> Admitted {
        let source = source(peer);
        let mut table = self.table();
        let mut evicted = false;
        let open = table.sources.get(&source).map_or(0, |source| source.open);
        if open >= self.source_max && !self.unlimited_sources.iter().any(|proxy| proxy.contains(&peer.to_canonical())) {
            match table.sources.get(&source).and_then(|source| source.candidates.choose(now)) {
                Some(id) => evicted = table.evict(id),
                None => return Admitted::SourceFull,
            }
        }
        if table.connections.len() >= self.total_max
            && let Some(id) = table.candidates.choose(now)
        {
            evicted = table.evict(id);
        }
        let token = CancellationToken::new();
        let id = table.insert(Connection { source, since: now, standing: Standing::HalfOpen, evicted: token.clone() });
        Admitted::Yes { place: Place { admission: Arc::clone(self), id, evicted: token }, evicted }
    }

    /// Makes room where something else than places is short. Returns whether somebody had to go.
    pub fn evict_one(&self, now: Instant) -> bool {
        let mut table = self.table();
        table.candidates.choose(now).is_some_and(|id| table.evict(id))
    }

    pub fn census(&self) -> Census {
        let table = self.table();
        let half_open = table.candidates.half_open.len();
        Census { half_open, established: table.connections.len() - half_open }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, connection: Connection) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.sources.entry(connection.source).or_default().open += 1;
        self.list(&connection, id);
        self.connections.insert(id, connection);
        id
    }

    fn evict(&mut self, id: u64) -> bool {
        let connection = self.remove(id);
        if let Some(connection) = &connection {
            connection.evicted.cancel();
        }
        connection.is_some()
    }

    fn remove(&mut self, id: u64) -> Option<Connection> {
        let connection = self.connections.remove(&id)?;
        self.unlist(&connection, id);
        if let Some(source) = self.sources.get_mut(&connection.source) {
            source.open -= 1;
            if source.open == 0 {
                self.sources.remove(&connection.source);
            }
        }
        Some(connection)
    }

    fn list(&mut self, connection: &Connection, id: u64) {
        let key = (connection.since, id);
        let Self { candidates, sources, .. } = self;
        let of_source = sources.get_mut(&connection.source).map(|source| &mut source.candidates);
        for candidates in std::iter::once(candidates).chain(of_source) {
            match connection.standing {
                Standing::HalfOpen => candidates.half_open.insert(key),
                Standing::Known => candidates.known.insert(key),
                Standing::Trusted => false,
            };
        }
    }

    fn unlist(&mut self, connection: &Connection, id: u64) {
        let key = (connection.since, id);
        let Self { candidates, sources, .. } = self;
        let of_source = sources.get_mut(&connection.source).map(|source| &mut source.candidates);
        for candidates in std::iter::once(candidates).chain(of_source) {
            candidates.half_open.remove(&key);
            candidates.known.remove(&key);
        }
    }
}

impl Candidates {
    fn is_empty(&self) -> bool {
        self.half_open.is_empty() && self.known.is_empty()
    }

    /// The newest half-open one that has had its chance. Where all of them are younger: the newest of them if there are many,
    /// for then it is they that flood; and otherwise the newest known one, which has had its chance.
    fn choose(&self, now: Instant) -> Option<u64> {
        let chance_over = now.checked_sub(FAIR_CHANCE);
        let fair = |tier: &BTreeSet<(Instant, u64)>| {
            chance_over.and_then(|until| tier.range(..=(until, u64::MAX)).next_back().copied())
        };
        let many = self.half_open.len() * MANY >= self.half_open.len() + self.known.len();
        let chosen = fair(&self.half_open)
            .or_else(|| self.half_open.last().copied().filter(|_| many))
            .or_else(|| fair(&self.known))
            .or_else(|| self.half_open.last().copied())
            .or_else(|| self.known.last().copied());
        chosen.map(|(_, id)| id)
    }
}

impl Place {
    /// From now on it has at least this standing.
    pub fn rise_to(&self, standing: Standing) {
        let mut table = self.admission.table();
        if let Some(mut connection) = table.connections.remove(&self.id) {
            table.unlist(&connection, self.id);
            connection.standing = connection.standing.max(standing);
            table.list(&connection, self.id);
            table.connections.insert(self.id, connection);
        }
    }

    /// Resolves when the place has been given to another.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.table().remove(self.id);
        self.admission.left.notify_waiters();
    }
}

/// What counts as one source.
fn source(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> (128 - IPV6_SOURCE_BITS) << (128 - IPV6_SOURCE_BITS)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(total_max: usize, source_max: usize) -> Arc<Admission> {
        Admission::new(total_max, source_max, vec!["10.0.0.0/8".parse().unwrap()])
    }

    /// The place of an admitted peer, and whether another one went for it.
    fn admit(admission: &Arc<Admission>, peer: &str, now: Instant) -> Option<(Place, bool)> {
        match admission.admit(peer.parse().unwrap(), now) {
            Admitted::Yes { place, evicted } => Some((place, evicted)),
            Admitted::SourceFull => None,
        }
    }

    fn is_evicted(place: &Place) -> bool {
        place.evicted.is_cancelled()
    }

    #[test]
    fn the_newest_half_open_connection_gives_way_and_established_ones_stay() {
        let (admission, start) = (admission(3, 100), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let (established, _) = admit(&admission, "192.0.2.1", start).unwrap();
        established.rise_to(Standing::Trusted);
        let (older, _) = admit(&admission, "192.0.2.2", at(1)).unwrap();
        let (newer, _) = admit(&admission, "192.0.2.3", at(2)).unwrap();
        let (newcomer, evicted) = admit(&admission, "192.0.2.4", at(10)).unwrap();
        assert!(evicted && is_evicted(&newer) && !is_evicted(&older) && !is_evicted(&established));
        assert_eq!(admission.census(), Census { half_open: 2, established: 1 });
        // The newcomer has its chance: the one before goes first.
        let (_another, _) = admit(&admission, "192.0.2.5", at(10)).unwrap();
        assert!(is_evicted(&older) && !is_evicted(&newcomer));
        drop((newer, older));
        assert_eq!(admission.census().half_open, 2, "who was evicted gives nothing back");
    }

    #[test]
    fn who_is_known_goes_when_nobody_is_half_open_and_who_is_trusted_stays() {
        let (admission, start) = (admission(3, 100), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let places: Vec<_> = (0..3).map(|n| admit(&admission, "192.0.2.1", at(n)).unwrap().0).collect();
        places[0].rise_to(Standing::Known);
        places[1].rise_to(Standing::Trusted);
        places[1].rise_to(Standing::Known);
        let (fourth, _) = admit(&admission, "192.0.2.2", at(10)).unwrap();
        assert!(is_evicted(&places[2]), "the half-open one");
        fourth.rise_to(Standing::Known);
        let (_fifth, _) = admit(&admission, "192.0.2.3", at(20)).unwrap();
        assert!(is_evicted(&fourth), "the newest of the known ones");
        assert!(!is_evicted(&places[0]) && !is_evicted(&places[1]), "once trusted, always trusted");
        assert!(admission.evict_one(at(30)) && admission.evict_one(at(30)) && !admission.evict_one(at(30)));
        assert!(!is_evicted(&places[1]));
    }

    #[test]
    fn an_honest_newcomer_is_not_displaced_by_a_flood_of_known_ones() {
        let (admission, start) = (admission(20, 100), Instant::now());
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let flood: Vec<_> = (0..19).map(|n| admit(&admission, "192.0.2.1", at(n)).unwrap().0).collect();
        flood.iter().for_each(|place| place.rise_to(Standing::Known));
        let (honest, _) = admit(&admission, "192.0.2.2", at(5000)).unwrap();
        let (next, _) = admit(&admission, "192.0.2.1", at(5001)).unwrap();
        assert!(!is_evicted(&honest) && is_evicted(&flood[18]));
        next.rise_to(Standing::Known);
        let _more: Vec<_> = (2..20).map(|n| admit(&admission, "192.0.2.1", at(5000 + n)).unwrap().0).collect();
        assert!(!is_evicted(&honest), "those that came after it are the flood");
    }

    #[test]
    fn a_burst_displaces_itself() {
        let (admission, now) = (admission(2, 100), Instant::now());
        let (first, _) = admit(&admission, "192.0.2.1", now).unwrap();
        let (second, _) = admit(&admission, "192.0.2.1", now).unwrap();
        let (third, _) = admit(&admission, "192.0.2.1", now).unwrap();
        assert!(!is_evicted(&first) && is_evicted(&second) && !is_evicted(&third));
    }

    #[test]
    fn a_source_displaces_its_own_and_proxies_are_not_limited() {
        let (admission, now) = (admission(100, 2), Instant::now());
        let (neighbour, _) = admit(&admission, "192.0.2.9", now).unwrap();
        let (established, _) = admit(&admission, "2001:db8::1", now).unwrap();
        established.rise_to(Standing::Trusted);
        let (idle, _) = admit(&admission, "2001:db8::2", now).unwrap();
        let (third, evicted) = admit(&admission, "2001:db8::3", now).unwrap();
        assert!(evicted && is_evicted(&idle) && !is_evicted(&neighbour));
        third.rise_to(Standing::Trusted);
        assert!(admit(&admission, "2001:db8::4", now).is_none(), "a /64 is one source");
        assert!(admit(&admission, "2001:db8:0:1::1", now).is_some());
        drop(established);
        let back = admit(&admission, "2001:db8::5", now);
        assert!(back.is_some_and(|(_, evicted)| !evicted), "a place was given back");
        let proxied: Vec<_> = (0..10).map(|_| admit(&admission, "::ffff:10.0.0.1", now)).collect();
        assert!(proxied.iter().all(|admitted| admitted.as_ref().is_some_and(|(_, evicted)| !evicted)));
    }

    #[tokio::test]
    async fn without_half_open_connections_the_next_one_waits() {
        let (admission, now) = (admission(1, 100), Instant::now());
        let (place, _) = admit(&admission, "192.0.2.1", now).unwrap();
        admission.room().await;
        place.rise_to(Standing::Trusted);
        let waiting = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.room().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(place);
        waiting.await.unwrap();
    }
}
