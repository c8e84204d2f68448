//! The client's address, behind trusted proxies. Pure.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// The address of the client: the peer, or, if the peer is a trusted proxy, the rightmost address in `X-Forwarded-For`
/// that is not a trusted proxy. Proxies append on the right, so an address that the client forged is never reached.
pub fn client<'a>(
    peer: IpAddr,
    forwarded_for: impl DoubleEndedIterator<Item = &'a str>,
    trusted_proxies: &[IpNet],
) -> IpAddr {
    let mut client = peer.to_canonical();
    let mut hops = forwarded_for.flat_map(|line| line.split(',')).rev();
    while contains(trusted_proxies, client)
        && let Some(hop) = hops.next()
    {
        // After an entry that cannot be parsed, the proxy that added it counts as the client.
        let Some(address) = parse_hop(hop) else { break };
        client = address;
    }
    client
}

/// Whether any of the networks contains the address. An IPv4 address that is mapped into IPv6 counts as itself.
pub fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address.to_canonical()))
}

/// An address, with or without a port.
fn parse_hop(hop: &str) -> Option<IpAddr> {
    let hop = hop.trim();
    let address = hop.parse().or_else(|_| hop.parse().map(|address: SocketAddr| address.ip()));
    let address = address.or_else(|_| hop.trim_start_matches('[').trim_end_matches(']').parse());
    address.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn from(peer: &str, lines: &[&str], trusted: &[&str]) -> String {
        let trusted: Vec<IpNet> = trusted.iter().map(|network| network.parse().unwrap()).collect();
        client(peer.parse().unwrap(), lines.iter().copied(), &trusted).to_string()
    }

    #[test]
    fn the_header_counts_only_from_trusted_proxies() {
        assert_eq!(from("203.0.113.9", &["1.1.1.1"], &[]), "203.0.113.9");
        assert_eq!(from("203.0.113.9", &["1.1.1.1"], &["10.0.0.0/8"]), "203.0.113.9");
        assert_eq!(from("10.0.0.1", &["1.1.1.1"], &["10.0.0.0/8"]), "1.1.1.1");
        assert_eq!(from("10.0.0.1", &[], &["10.0.0.0/8"]), "10.0.0.1");
    }

    #[test]
    fn the_rightmost_untrusted_hop_is_the_client() {
        let trusted = ["10.0.0.0/8", "fd00::/8"];
        assert_eq!(from("10.0.0.1", &["6.6.6.6, 1.1.1.1, 10.0.0.2"], &trusted), "1.1.1.1");
        assert_eq!(from("10.0.0.1", &["6.6.6.6", "1.1.1.1 ,fd00::1"], &trusted), "1.1.1.1");
        assert_eq!(from("10.0.0.1", &["10.0.0.3, 10.0.0.2"], &trusted), "10.0.0.3");
    }

    #[test]
    fn unusual_notations_are_read_and_garbage_is_ignored() {
        let trusted = ["10.0.0.0/8"];
        assert_eq!(from("::ffff:10.0.0.1", &["::ffff:1.1.1.1"], &trusted), "1.1.1.1");
        assert_eq!(from("10.0.0.1", &["1.1.1.1:1234"], &trusted), "1.1.1.1");
        assert_eq!(from("10.0.0.1", &["[2001:db8::1]:1234"], &trusted), "2001:db8::1");
        assert_eq!(from("10.0.0.1", &["[2001:db8::1]"], &trusted), "2001:db8::1");
        assert_eq!(from("10.0.0.1", &["1.1.1.1, unknown"], &trusted), "10.0.0.1");
        assert_eq!(from("10.0.0.1", &[""], &trusted), "10.0.0.1");
    }

    proptest! {
        #[test]
        fn the_header_of_an_untrusted_peer_never_counts(lines in proptest::collection::vec(".{0,60}", 0..4)) {
            let lines: Vec<_> = lines.iter().map(String::as_str).collect();
            prop_assert_eq!(from("203.0.113.9", &lines, &["10.0.0.0/8"]), "203.0.113.9");
        }

        #[test]
        fn the_address_that_the_proxy_adds_wins_over_forged_ones(
            written in "[0-9a-fA-F:., \\[\\]]{0,60}",
            client in any::<std::net::Ipv4Addr>(),
        ) {
            prop_assume!(client.octets()[0] != 10);
            let line = format!("{written}, {client}");
            prop_assert_eq!(from("10.0.0.1", &[&line], &["10.0.0.0/8"]), client.to_string());
            prop_assert_eq!(from("10.0.0.1", &[&written, &client.to_string()], &["10.0.0.0/8"]), client.to_string());
        }
    }
}
