//! TCP ports that stay free while a server is stopped and started again.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::sync::{LazyLock, Mutex, PoisonError};

/// Below the range from which Linux takes the ports of outgoing connections (from 32768 on). Any client could take a
/// port of that range while its server is down, and a client that keeps trying could even connect to itself.
const RANGE: Range<u16> = 20000..32000;

static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);

/// A port of 127.0.0.1 that no process listens on and that this function has not returned before.
pub fn free() -> u16 {
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let port = fastrand::u16(RANGE);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() && given.insert(port) {
            return port;
        }
    }
}
