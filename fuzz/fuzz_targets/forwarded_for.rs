//! X-Forwarded-For as any client may write it: it counts only from trusted proxies, and what a client writes never
//! displaces what the proxy has added.
//!
//! Input: lines.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prism_relay::ingress::source;

fuzz_target!(|input: &[u8]| {
    let text = String::from_utf8_lossy(input);
    let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
    let stranger = "203.0.113.9".parse().unwrap();
    assert_eq!(source::client(stranger, text.lines(), &trusted), stranger);
    let proxy = "::ffff:10.0.0.1".parse().unwrap();
    let lines = text.lines().chain(["198.51.100.7"]);
    let client = source::client(proxy, lines.rev().collect::<Vec<_>>().into_iter().rev(), &trusted);
    assert_eq!(client.to_string(), "198.51.100.7");
    let client = source::client(proxy, text.lines(), &trusted);
    assert_eq!(client, client.to_canonical());
});
