//! A table of the open connections, which decides whom to evict when places run short. Pure except for a lock; takes
//! `now`.
//!
//! A connection is *half-open* until its first complete request head, TLS included. Then it is *known*. It is *trusted*
//! once its sender has sent an event that was accepted. When all places are taken, a new connection evicts another one.
//! Whom to evict, in this order:
//!
//! 1. the newest half-open connection that is at least [`FAIR_CHANCE`] old;
//! 2. the newest half-open connection, if at least one in [`MANY`] of those that may be evicted is half-open: then the
//!    half-open connections are the flood;
//! 3. the newest known connection that is at least [`FAIR_CHANCE`] old;
//! 4. the newest half-open connection;
//! 5. the newest known connection.
//!
//! A trusted sender is never evicted. Among the connections of one source, which has a limit of its own, the order is
//! the same.

use std::collections::{BTreeSet, HashMap};
use std::iter;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Minimum age of a connection before it is evicted, if others can be: enough for a TLS handshake and a request from
/// the other side of the world.
const FAIR_CHANCE: Duration = Duration::from_secs(1);

/// The half-open connections are many if at least one connection in this number is half-open. In normal traffic far
/// fewer are.
const MANY: usize = 8;

/// A client with one IPv6 address usually has the whole /64 (RFC 6177).
const IPV6_SOURCE_BITS: u32 = 64;

/// Gives out places for connections, within limits.
pub struct Admission {
    total_max: usize,
    source_max: usize,
    /// Networks of proxies, where many senders share one address.
    unlimited_sources: Vec<IpNet>,
    table: Mutex<Table>,
    left: Notify,
    other_protocol: AtomicU64,
    failed: AtomicU64,
}

/// How far a connection has come. The lower ones are evicted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trust {
    HalfOpen,
    Known,
    TrustedSender,
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
    evicted: CancellationToken,
}

#[derive(Default)]
struct Source {
    open: usize,
    candidates: Candidates,
}

/// Connections that may be evicted, the oldest first.
#[derive(Default)]
struct Candidates {
    half_open: BTreeSet<(Instant, u64)>,
    known: BTreeSet<(Instant, u64)>,
}

/// A connection's place in the table. Dropping it frees the place.
pub struct Place {
    admission: Arc<Admission>,
    id: u64,
    /// A [`Trust`]. It is written under the table's lock, and read without.
    trust: AtomicU8,
    evicted: CancellationToken,
}

/// How many connections are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Connections before their first complete request head.
    pub half_open: usize,
    /// Connections that are known or trusted.
    pub established: usize,
}

impl Admission {
    /// A table without connections. `unlimited_sources` are proxies, to which the limit per source does not apply.
    pub fn new(total_max: usize, source_max: usize, unlimited_sources: Vec<IpNet>) -> Arc<Self> {
        Arc::new(Self {
            total_max,
            source_max,
            unlimited_sources,
            table: Mutex::default(),
            left: Notify::new(),
            other_protocol: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    /// Resolves when a new connection could be admitted: a place is free, or a connection can be evicted.
    pub async fn room(&self) {
        loop {
            let left = self.left.notified();
            let is_full = {
                let table = self.table();
                table.connections.len() >= self.total_max && table.candidates.is_empty()
            };
            if !is_full {
                return;
            }
            left.await;
        }
    }

    /// Gives the peer a place, if necessary that of an evicted connection. `None`: trusted senders have all places of
    /// its source.
    pub fn admit(self: &Arc<Self>, peer: IpAddr, now: Instant) -> Option<Place> {
        let source = source(peer);
        let mut table = self.table();
        let open = table.sources.get(&source).map_or(0, |source| source.open);
        let is_limited = !self.unlimited_sources.iter().any(|proxies| proxies.contains(&peer.to_canonical()));
        if is_limited && open >= self.source_max {
            let victim = table.sources.get(&source)?.candidates.choose(now)?;
            table.evict(victim);
        } else if table.connections.len() >= self.total_max
            && let Some(victim) = table.candidates.choose(now)
        {
            table.evict(victim);
        }
        let evicted = CancellationToken::new();
        let id = table.insert(Connection { source, since: now, evicted: evicted.clone() });
        let trust = AtomicU8::new(Trust::HalfOpen as u8);
        Some(Place { admission: Arc::clone(self), id, trust, evicted })
    }

    /// Evicts a connection, if any may be evicted, because the process is short of something other than places.
    pub fn evict_one(&self, now: Instant) {
        let mut table = self.table();
        if let Some(victim) = table.candidates.choose(now) {
            table.evict(victim);
        }
    }

    /// How many connections are open.
    pub fn counts(&self) -> ConnectionCounts {
        let table = self.table();
        let half_open = table.candidates.half_open.len();
        ConnectionCounts { half_open, established: table.connections.len() - half_open }
    }

    /// Counts a connection that was refused because of its protocol: the PROXY protocol, or TLS on a plain port.
    pub(super) fn refused_other_protocol(&self) {
        self.other_protocol.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection whose TLS handshake failed, or that was not HTTP/1.
    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// How many connections failed in the TLS handshake, or were not HTTP/1.
    pub fn failures(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// How many connections were refused because of their protocol.
    pub fn other_protocol(&self) -> u64 {
        self.other_protocol.load(Ordering::Relaxed)
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
        for candidates in self.candidates_with(connection.source) {
            candidates.half_open.insert((connection.since, id));
        }
        self.connections.insert(id, connection);
        id
    }

    fn evict(&mut self, id: u64) {
        if let Some(connection) = self.remove(id) {
            connection.evicted.cancel();
        }
    }

    fn remove(&mut self, id: u64) -> Option<Connection> {
        let connection = self.connections.remove(&id)?;
        for candidates in self.candidates_with(connection.source) {
            candidates.remove(&(connection.since, id));
        }
        if let Some(source) = self.sources.get_mut(&connection.source) {
            source.open -= 1;
            if source.open == 0 {
                self.sources.remove(&connection.source);
            }
        }
        Some(connection)
    }

    /// Moves a connection to the candidates of this trust. Trusted senders are not candidates.
    fn raise(&mut self, id: u64, trust: Trust) {
        let Some((source, since)) = self.connections.get(&id).map(|connection| (connection.source, connection.since))
        else {
            return;
        };
        for candidates in self.candidates_with(source) {
            candidates.remove(&(since, id));
            if trust == Trust::Known {
                candidates.known.insert((since, id));
            }
        }
    }

    /// The candidates of all sources, and those of this source.
    fn candidates_with(&mut self, source: IpAddr) -> impl Iterator<Item = &mut Candidates> {
        let of_source = self.sources.get_mut(&source).map(|source| &mut source.candidates);
        iter::once(&mut self.candidates).chain(of_source)
    }
}

impl Candidates {
    fn is_empty(&self) -> bool {
        self.half_open.is_empty() && self.known.is_empty()
    }

    fn remove(&mut self, key: &(Instant, u64)) {
        self.half_open.remove(key);
        self.known.remove(key);
    }

    /// Whom to evict, in the order of the module's list.
    fn choose(&self, now: Instant) -> Option<u64> {
        let newest_until =
            |tier: &BTreeSet<(Instant, u64)>, until| tier.range(..=(until, u64::MAX)).next_back().copied();
        let has_had_its_chance = |tier| now.checked_sub(FAIR_CHANCE).and_then(|until| newest_until(tier, until));
        let are_many = self.half_open.len() * MANY >= self.half_open.len() + self.known.len();
        let chosen = has_had_its_chance(&self.half_open)
            .or_else(|| self.half_open.last().copied().filter(|_| are_many))
            .or_else(|| has_had_its_chance(&self.known))
            .or_else(|| self.half_open.last().copied())
            .or_else(|| self.known.last().copied());
        chosen.map(|(_, id)| id)
    }
}

impl Place {
    /// Raises the trust in the connection to at least this. Locks the table only if that changes something.
    pub fn raise_to(&self, trust: Trust) {
        if self.trust.load(Ordering::Relaxed) >= trust as u8 {
            return;
        }
        let mut table = self.admission.table();
        if self.trust.fetch_max(trust as u8, Ordering::Relaxed) < trust as u8 {
            table.raise(self.id, trust);
        }
    }

    /// Resolves when the place has been given to another connection.
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

/// The addresses that count as one source.
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

    fn admit(admission: &Arc<Admission>, peer: &str, now: Instant) -> Option<Place> {
        admission.admit(peer.parse().unwrap(), now)
    }

    fn is_evicted(place: &Place) -> bool {
        place.evicted.is_cancelled()
    }

    #[test]
    fn the_newest_half_open_connection_is_evicted_and_established_ones_stay() {
        let (admission, start) = (admission(3, 100), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let established = admit(&admission, "192.0.2.1", start).unwrap();
        established.raise_to(Trust::TrustedSender);
        let older = admit(&admission, "192.0.2.2", at(1)).unwrap();
        let newer = admit(&admission, "192.0.2.3", at(2)).unwrap();
        let newcomer = admit(&admission, "192.0.2.4", at(10)).unwrap();
        assert!(is_evicted(&newer) && !is_evicted(&older) && !is_evicted(&established));
        assert_eq!(admission.counts(), ConnectionCounts { half_open: 2, established: 1 });
        // The newcomer has its chance: the older connection is evicted first.
        let _another = admit(&admission, "192.0.2.5", at(10)).unwrap();
        assert!(is_evicted(&older) && !is_evicted(&newcomer));
        drop((newer, older));
        assert_eq!(admission.counts().half_open, 2, "an evicted connection frees no second place");
    }

    #[test]
    fn known_connections_are_evicted_when_none_is_half_open_and_trusted_ones_stay() {
        let (admission, start) = (admission(3, 100), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let places: Vec<_> = (0..3).map(|n| admit(&admission, "192.0.2.1", at(n)).unwrap()).collect();
        places[0].raise_to(Trust::Known);
        places[1].raise_to(Trust::TrustedSender);
        places[1].raise_to(Trust::Known);
        let fourth = admit(&admission, "192.0.2.2", at(10)).unwrap();
        assert!(is_evicted(&places[2]), "the half-open one");
        fourth.raise_to(Trust::Known);
        let fifth = admit(&admission, "192.0.2.3", at(20)).unwrap();
        assert!(is_evicted(&fourth), "the newest of the known ones");
        assert!(!is_evicted(&places[0]) && !is_evicted(&places[1]), "once trusted, always trusted");
        (0..3).for_each(|_| admission.evict_one(at(30)));
        assert!(is_evicted(&places[0]) && is_evicted(&fifth) && !is_evicted(&places[1]));
    }

    #[test]
    fn an_honest_newcomer_is_not_evicted_by_a_flood_of_known_ones() {
        let (admission, start) = (admission(20, 100), Instant::now());
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let flood: Vec<_> = (0..19).map(|n| admit(&admission, "192.0.2.1", at(n)).unwrap()).collect();
        flood.iter().for_each(|place| place.raise_to(Trust::Known));
        let honest = admit(&admission, "192.0.2.2", at(5000)).unwrap();
        let next = admit(&admission, "192.0.2.1", at(5001)).unwrap();
        assert!(!is_evicted(&honest) && is_evicted(&flood[18]));
        next.raise_to(Trust::Known);
        let _more: Vec<_> = (2..20).map(|n| admit(&admission, "192.0.2.1", at(5000 + n)).unwrap()).collect();
        assert!(!is_evicted(&honest), "the connections after it are the flood");
    }

    #[test]
    fn a_burst_evicts_itself() {
        let (admission, now) = (admission(2, 100), Instant::now());
        let first = admit(&admission, "192.0.2.1", now).unwrap();
        let second = admit(&admission, "192.0.2.1", now).unwrap();
        let third = admit(&admission, "192.0.2.1", now).unwrap();
        assert!(!is_evicted(&first) && is_evicted(&second) && !is_evicted(&third));
    }

    #[test]
    fn a_source_evicts_its_own_and_proxies_are_not_limited() {
        let (admission, now) = (admission(100, 2), Instant::now());
        let neighbour = admit(&admission, "192.0.2.9", now).unwrap();
        let established = admit(&admission, "2001:db8::1", now).unwrap();
        established.raise_to(Trust::TrustedSender);
        let idle = admit(&admission, "2001:db8::2", now).unwrap();
        let third = admit(&admission, "2001:db8::3", now).unwrap();
        assert!(is_evicted(&idle) && !is_evicted(&neighbour));
        third.raise_to(Trust::TrustedSender);
        assert!(admit(&admission, "2001:db8::4", now).is_none(), "a /64 is one source");
        assert!(admit(&admission, "2001:db8:0:1::1", now).is_some());
        drop(established);
        let _back = admit(&admission, "2001:db8::5", now).unwrap();
        assert!(!is_evicted(&third), "a place is free again");
        let proxied: Vec<_> = (0..10).map(|_| admit(&admission, "::ffff:10.0.0.1", now).unwrap()).collect();
        assert!(!proxied.iter().any(is_evicted));
    }

    #[tokio::test]
    async fn with_trusted_senders_only_the_next_connection_waits() {
        let (admission, now) = (admission(1, 100), Instant::now());
        let place = admit(&admission, "192.0.2.1", now).unwrap();
        admission.room().await;
        place.raise_to(Trust::TrustedSender);
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
