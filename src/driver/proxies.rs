//! Proxies in front of the listeners: who is believed, and how a proxy says for whom a connection is (PROXY protocol,
//! version 2).

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// How a connection's header begins (§2.2).
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
const HEAD_BYTES: usize = 16;
/// What may follow: addresses, and what the proxy tells beside them.
const REST_BYTES_MAX: usize = 2048;

/// Who stands in front of the listeners.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// Addresses that are believed when they say for whom they speak. Default none.
    pub trusted: Vec<IpNet>,
    /// Whether every connection comes from one of them, and begins with who it is for. Default: no.
    pub introduction: Introduction,
}

/// How a connection begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Introduction {
    /// With what is spoken on it.
    #[default]
    None,
    /// With a header of the PROXY protocol, version 2, before TLS. It counts within `header_timeout`, and costs up to
    /// 2 KiB while it is read. Whoever is not trusted may not connect.
    ProxyV2,
}

impl Proxies {
    /// Whether `address` is believed.
    #[must_use]
    pub fn trusts(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted.iter().any(|trusted| trusted.contains(&address))
    }
}

/// Why a connection was not introduced.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IntroductionError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it does not begin with a header of the PROXY protocol, version 2")]
    NotProxyV2,
    #[error("its header has {0} bytes of addresses and more; at most {REST_BYTES_MAX}")]
    TooLong(usize),
    #[error("its header has no whole address")]
    NoAddress,
}

/// Reads the header, and nothing behind it. The client's address; None if the proxy speaks for itself (`LOCAL`), or for
/// somebody without an IP address.
///
/// # Cancel safety
/// None: dropped, a part of the header is lost.
pub(crate) async fn introduced(stream: &mut TcpStream) -> Result<Option<SocketAddr>, IntroductionError> {
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head).await?;
    let (command, rest_bytes) = command(&head)?;
    let mut rest = vec![0; rest_bytes];
    stream.read_exact(&mut rest).await?;
    client(command, head[13], &rest)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Local,
    Proxy,
}

/// The command, and how many bytes follow.
fn command(head: &[u8; HEAD_BYTES]) -> Result<(Command, usize), IntroductionError> {
    let command = match (head.starts_with(&SIGNATURE), head[12]) {
        (true, 0x20) => Command::Local,
        (true, 0x21) => Command::Proxy,
        _ => return Err(IntroductionError::NotProxyV2),
    };
    match usize::from(u16::from_be_bytes([head[14], head[15]])) {
        bytes if bytes > REST_BYTES_MAX => Err(IntroductionError::TooLong(bytes)),
        bytes => Ok((command, bytes)),
    }
}

/// Source address and port; what follows the addresses is not looked at.
fn client(command: Command, family: u8, rest: &[u8]) -> Result<Option<SocketAddr>, IntroductionError> {
    if command == Command::Local {
        return Ok(None);
    }
    let whole = |bytes: usize| rest.get(..bytes).ok_or(IntroductionError::NoAddress);
    let port = |port: &[u8]| port.first_chunk().map_or(0, |port| u16::from_be_bytes(*port));
    match family >> 4 {
        // Source, destination, and their ports.
        1 => {
            let addresses = whole(12)?;
            let source = addresses.first_chunk::<4>().ok_or(IntroductionError::NoAddress)?;
            Ok(Some(SocketAddr::new(IpAddr::from(*source), port(&addresses[8..]))))
        }
        2 => {
            let addresses = whole(36)?;
            let source = addresses.first_chunk::<16>().ok_or(IntroductionError::NoAddress)?;
            Ok(Some(SocketAddr::new(Ipv6Addr::from(*source).to_canonical(), port(&addresses[32..]))))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Option<SocketAddr>, String> {
        let (head, rest) = bytes.split_first_chunk().ok_or("short")?;
        let (kind, length) = command(head).map_err(|error| error.to_string())?;
        client(kind, head[13], rest.get(..length).ok_or("short")?).map_err(|error| error.to_string())
    }

    fn header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, rest].concat()
    }

    #[test]
    fn a_header_says_who_the_client_is() {
        let check = |command: u8, family: u8, rest: &[u8], expected: Option<&str>| {
            let expected = expected.map(|address| address.parse().unwrap());
            assert_eq!(read(&header(command, family, rest)), Ok(expected), "{command:#x} {family:#x}");
        };
        let four = [192, 0, 2, 7, 10, 0, 0, 1, 0x30, 0x39, 0, 80];
        check(0x21, 0x11, &four, Some("192.0.2.7:12345"));
        check(0x21, 0x12, &four, Some("192.0.2.7:12345"));
        // What else a proxy tells stands behind.
        check(0x21, 0x11, &[&four[..], &[3, 0, 4, 1, 2, 3, 4]].concat(), Some("192.0.2.7:12345"));
        let mut six = [0; 36];
        (six[0], six[1], six[15], six[33]) = (0x20, 0x01, 7, 9);
        check(0x21, 0x21, &six, Some("[2001::7]:9"));
        let mut mapped = [0; 36];
        mapped[10..16].copy_from_slice(&[0xff, 0xff, 192, 0, 2, 9]);
        check(0x21, 0x21, &mapped, Some("192.0.2.9:0"));
        // For itself, for nobody known, for a socket of its own machine.
        check(0x20, 0x11, &four, None);
        check(0x20, 0x00, &[], None);
        check(0x21, 0x00, &[], None);
        check(0x21, 0x31, &[0; 216], None);
    }

    #[test]
    fn anything_else_is_refused() {
        let check = |bytes: &[u8], part: &str| {
            let error = read(bytes).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        check(b"GET /healthz HTTP/1.1\r\n\r\n", "does not begin");
        check(b"PROXY TCP4 192.0.2.7 10.0.0.1 12345 80\r\n", "does not begin");
        check(&header(0x11, 0x11, &[0; 12]), "does not begin");
        check(&header(0x22, 0x11, &[0; 12]), "does not begin");
        check(&header(0x21, 0x11, &[0; 11]), "no whole address");
        check(&header(0x21, 0x21, &[0; 35]), "no whole address");
        check(&header(0x21, 0x11, &[0; REST_BYTES_MAX + 1]), "2049 bytes");
    }

    proptest::proptest! {
        /// Whatever comes is an address, nobody's, or refused; and never more is waited for than may be.
        #[test]
        fn any_bytes_behind_any_head_are_read_or_refused(
            head in proptest::array::uniform16(proptest::prelude::any::<u8>()),
            is_signed in proptest::prelude::any::<bool>(),
            rest in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
        ) {
            let mut head = head;
            if is_signed {
                head[..12].copy_from_slice(&SIGNATURE);
                head[12] = 0x20 | head[12] & 1;
            }
            let Ok((kind, bytes)) = command(&head) else { return Ok(()) };
            proptest::prop_assert!(is_signed && bytes <= REST_BYTES_MAX);
            let found = client(kind, head[13], &rest);
            let is_whole = rest.len() >= match head[13] >> 4 { 1 => 12, 2 => 36, _ => 0 };
            proptest::prop_assert_eq!(found.is_ok(), kind == Command::Local || is_whole);
        }
    }

    #[test]
    fn a_trusted_proxy_is_one_of_the_addresses_or_in_one_of_the_networks() {
        let trusted = ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"].map(|net| net.parse().unwrap()).to_vec();
        let proxies = Proxies { trusted, ..Proxies::default() };
        let check = |address: &str, expected: bool| {
            assert_eq!(proxies.trusts(address.parse().unwrap()), expected, "{address}");
        };
        check("10.255.0.1", true);
        check("::ffff:10.0.0.1", true);
        check("11.0.0.1", false);
        check("192.0.2.1", true);
        check("192.0.2.2", false);
        check("2001:db8:ffff::1", true);
        check("2001:db9::1", false);
        assert!(!Proxies::default().trusts("127.0.0.1".parse().unwrap()));
    }
}
