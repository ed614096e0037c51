//! Clients by their addresses: which one a request is from, how many sessions each has, and how fast they ask for more.

mod rates;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use http::HeaderMap;

use crate::config::ProxyProtocol;
use crate::config::Settings;
use crate::driver::addresses::{AddressCounts, Place, TooManyOfAddress};
use crate::driver::clock;
use crate::driver::proxies::{Introduction, Proxies};
use crate::gateway::clients::rates::{AddressRates, SaidRates, TotalRate};
use crate::id::UserId;

/// What a proxy says about the one before it: the last entry is who spoke to the proxy itself.
const FORWARDED_FOR: &str = "x-forwarded-for";

/// Who asks for more sessions in the time than may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TooFast {
    #[error("this address asks for sessions too fast; try again later (behind a proxy of yours: see trusted_proxies)")]
    Address,
    #[error("too many ask this node for sessions now; try again later")]
    Everybody,
}

/// Limits per address, and of handshakes. In development mode there are none.
#[derive(Debug)]
pub(crate) struct Clients {
    proxies: Proxies,
    sessions: Option<Arc<AddressCounts>>,
    handshakes: TotalRate,
    handshakes_of_address: AddressRates,
    bad_keys: AddressRates,
    said: SaidRates,
    start: Instant,
    /// Somebody who is not believed has said for whom it speaks.
    is_told: AtomicBool,
}

impl Clients {
    pub(crate) fn new(settings: &Settings) -> Self {
        let limit = |limit| settings.outside_development(limit);
        Self {
            proxies: proxies(settings),
            // Without a limit they are counted all the same: one that comes later holds for all of them.
            sessions: (!settings.is_development()).then(|| AddressCounts::counting(settings.tabs_per_address_max)),
            handshakes: TotalRate::new(limit(settings.handshakes_per_second_max)),
            handshakes_of_address: AddressRates::new(limit(settings.handshakes_per_address_per_second_max)),
            bad_keys: AddressRates::new(limit(settings.bad_keys_per_address_per_second_max)),
            said: SaidRates::new(
                limit(settings.inbound_messages_per_second_max),
                limit(settings.inbound_bytes_per_second_max),
            ),
            start: clock::now(),
            is_told: AtomicBool::new(false),
        }
    }

    /// Takes over the limits of `settings`, for whoever comes from now on. In development mode there stay none.
    pub(crate) fn reload(&self, settings: &Settings) {
        let limit = |limit| settings.outside_development(limit);
        if let Some(sessions) = &self.sessions {
            sessions.limit(limit(settings.tabs_per_address_max));
        }
        self.handshakes.limit(limit(settings.handshakes_per_second_max));
        self.handshakes_of_address.limit(limit(settings.handshakes_per_address_per_second_max));
        self.bad_keys.limit(limit(settings.bad_keys_per_address_per_second_max));
        self.said.limit(limit(settings.inbound_messages_per_second_max), limit(settings.inbound_bytes_per_second_max));
    }

    /// The client's address: that of the peer, or what trusted proxies say, from the last to the first. Whoever is not
    /// trusted is not believed, and neither is what stands before the first address that is none of a proxy. `Forwarded`
    /// (RFC 7239) is not looked at: proxies hand it on unseen, and of two headers only one can be right. With the PROXY
    /// protocol the peer is who its header names, and no other header counts.
    pub(crate) fn address_of(&self, headers: &HeaderMap, peer: IpAddr) -> IpAddr {
        let mut client = peer.to_canonical();
        if self.proxies.introduction != Introduction::None {
            return client;
        }
        if self.sessions.is_some() && headers.contains_key(FORWARDED_FOR) && !self.proxies.trusts(client) {
            self.tell_of_stranger(client);
            return client;
        }
        for hops in headers.get_all(FORWARDED_FOR).iter().rev() {
            // What a client put in front may be anything; what a proxy put behind it counts all the same.
            for hop in hops.as_bytes().rsplit(|byte| *byte == b',') {
                if !self.proxies.trusts(client) {
                    return client;
                }
                let hop = std::str::from_utf8(hop).ok().and_then(|hop| hop_address(hop.trim()));
                let Some(hop) = hop else { return client };
                client = hop;
            }
        }
        client
    }

    /// Perhaps a proxy that the settings forgot: its clients would soon be refused, and nobody would know why. Said once, as
    /// anybody can cause it.
    ///
    /// # Ordering
    /// Relaxed: it says nothing about any other memory.
    fn tell_of_stranger(&self, peer: IpAddr) {
        if !self.is_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                %peer,
                "X-Forwarded-For comes from an address that is none of trusted_proxies: if it is a proxy, all of its \
                 clients share the limits of one address"
            );
        }
    }

    /// A place among the sessions of an address. None if nobody counts them.
    pub(crate) fn place(&self, client: IpAddr) -> Result<Option<Place>, TooManyOfAddress> {
        self.sessions.as_ref().map(|sessions| sessions.take(client)).transpose()
    }

    /// Counts what a user says by a request, or refuses it.
    pub(crate) fn may_say(&self, user: &UserId, bytes: usize, now: Instant) -> bool {
        self.said.take(user, bytes, now.saturating_duration_since(self.start))
    }

    /// Whether any key of this address is looked at: it has not just shown too many that are not known here.
    pub(crate) fn may_show_key(&self, client: IpAddr, now: Instant) -> bool {
        self.bad_keys.has_room(client, now.saturating_duration_since(self.start))
    }

    /// Counts a key that is not known here.
    pub(crate) fn count_bad_key(&self, client: IpAddr, now: Instant) {
        self.bad_keys.take(client, now.saturating_duration_since(self.start));
    }

    /// Counts a request for a session, or refuses it.
    pub(crate) fn admit(&self, client: IpAddr, now: Instant) -> Result<(), TooFast> {
        let now = now.saturating_duration_since(self.start);
        if !self.handshakes_of_address.take(client, now) {
            return Err(TooFast::Address);
        }
        if self.handshakes.take(now) { Ok(()) } else { Err(TooFast::Everybody) }
    }
}

/// Who stands in front of the listeners.
pub(crate) fn proxies(settings: &Settings) -> Proxies {
    let introduction = match settings.proxy_protocol {
        ProxyProtocol::Off => Introduction::None,
        ProxyProtocol::V2 => Introduction::ProxyV2,
    };
    Proxies { trusted: settings.trusted_proxies.clone(), introduction }
}

/// An address as it stands in `X-Forwarded-For`: some proxies add a port, and brackets with it.
fn hop_address(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(hop);
    let address = bare.parse().or_else(|_| hop.parse().map(|address: SocketAddr| address.ip()));
    address.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::HeaderValue;

    use super::*;
    use crate::config::{Machine, Sources};

    fn clients(toml: &str) -> Clients {
        let toml = format!("api_keys = ['k']\n{toml}");
        let settings = Sources::new().with_toml(&toml).load(Machine { cores: 1, open_files_max: 1000 });
        Clients::new(&settings.unwrap())
    }

    #[test]
    fn only_trusted_proxies_say_who_a_client_is() {
        let clients = clients("trusted_proxies = ['10.0.0.0/8', '2001:db8::1']");
        let check = |peer: &str, forwarded: &[&str], expected: &str| {
            let mut headers = HeaderMap::new();
            for hops in forwarded {
                headers.append(FORWARDED_FOR, HeaderValue::from_bytes(hops.as_bytes()).unwrap());
            }
            let client = clients.address_of(&headers, peer.parse().unwrap());
            assert_eq!(client, expected.parse::<IpAddr>().unwrap(), "{peer} {forwarded:?}");
        };
        // A client that says so itself.
        check("192.0.2.1", &["198.51.100.7"], "192.0.2.1");
        check("192.0.2.1", &["10.0.0.1"], "192.0.2.1");
        check("10.0.0.1", &["198.51.100.7"], "198.51.100.7");
        check("::ffff:10.0.0.1", &["198.51.100.7"], "198.51.100.7");
        check("2001:db8::1", &["2001:db8::2"], "2001:db8::2");
        // Behind two proxies; what stands before the client's own address is what it made up.
        check("10.0.0.1", &["198.51.100.7, 10.0.0.2"], "198.51.100.7");
        check("10.0.0.1", &["10.9.9.9, 203.0.113.1, 198.51.100.7 ,10.0.0.2"], "198.51.100.7");
        check("10.0.0.1", &["203.0.113.1", "198.51.100.7", "10.0.0.2"], "198.51.100.7");
        check("10.0.0.1", &["203.0.113.1, 198.51.100.7", "10.0.0.2"], "198.51.100.7");
        // As proxies write it.
        check("10.0.0.1", &["198.51.100.7:4711"], "198.51.100.7");
        check("10.0.0.1", &["[2001:db8::9]:4711"], "2001:db8::9");
        check("10.0.0.1", &["[2001:db8::9]"], "2001:db8::9");
        check("10.0.0.1", &["::ffff:198.51.100.7"], "198.51.100.7");
        // Nothing that could be believed: the last that is known.
        check("10.0.0.1", &[], "10.0.0.1");
        check("10.0.0.1", &["unknown"], "10.0.0.1");
        check("10.0.0.1", &["198.51.100.7, unknown, 10.0.0.2"], "10.0.0.2");
        check("10.0.0.1", &["198.51.100.7, é"], "10.0.0.1");
        check("10.0.0.1", &["é, 198.51.100.7"], "198.51.100.7");
        check("10.0.0.1", &["198.51.100.7,"], "10.0.0.1");
        check("10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3");
    }

    #[test]
    fn an_address_waits_before_everybody_does() {
        let limits = "handshakes_per_second_max = 3\nhandshakes_per_address_per_second_max = 2";
        let clients = clients(limits);
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let now = clients.start + Duration::from_secs(5);
        assert_eq!([one, one, one].map(|client| clients.admit(client, now)), [Ok(()), Ok(()), Err(TooFast::Address)]);
        assert_eq!([other, other].map(|client| clients.admit(client, now)), [Ok(()), Err(TooFast::Everybody)]);
        assert_eq!(clients.admit(one, now + Duration::from_millis(501)), Ok(()));
    }

    #[test]
    fn an_address_that_shows_wrong_keys_is_not_looked_at_for_a_while() {
        let clients = clients("bad_keys_per_address_per_second_max = 2");
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let now = clients.start + Duration::from_secs(5);
        for is_looked_at in [true, true, false, false] {
            assert_eq!(clients.may_show_key(one, now), is_looked_at);
            clients.count_bad_key(one, now);
        }
        assert!(clients.may_show_key(other, now));
        assert!(clients.may_show_key(one, now + Duration::from_millis(500)), "what was not looked at does not count");
    }

    #[test]
    fn limits_that_are_read_again_hold_for_who_comes_next() {
        let clients = clients("handshakes_per_address_per_second_max = 0\ntabs_per_address_max = 0");
        let one = IpAddr::from([192, 0, 2, 1]);
        let _places: Vec<_> = (0..3).map(|_| clients.place(one).unwrap().unwrap()).collect();
        assert!((0..1_000).all(|_| clients.admit(one, clients.start) == Ok(())));
        let settings = "api_keys = ['k']\nhandshakes_per_address_per_second_max = 1\ntabs_per_address_max = 3";
        clients.reload(&Sources::new().with_toml(settings).load(Machine { cores: 1, open_files_max: 1000 }).unwrap());
        assert!(clients.place(one).is_err());
        let later = clients.start + Duration::from_secs(10);
        assert_eq!([clients.admit(one, later), clients.admit(one, later)], [Ok(()), Err(TooFast::Address)]);
    }

    #[test]
    fn in_development_mode_there_are_no_limits() {
        let settings = Sources::new().with_toml(
            "handshakes_per_second_max = 1\ntabs_per_address_max = 1\nbad_keys_per_address_per_second_max = 1",
        );
        let clients = Clients::new(&settings.load(Machine { cores: 1, open_files_max: 1000 }).unwrap());
        let one = IpAddr::from([127, 0, 0, 1]);
        assert!((0..1_000).all(|_| clients.admit(one, clients.start) == Ok(())));
        (0..9).for_each(|_| clients.count_bad_key(one, clients.start));
        assert!(clients.may_show_key(one, clients.start));
        assert!(clients.place(one).unwrap().is_none());
    }
}
