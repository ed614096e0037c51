//! A connection in memory, whose kernel takes and gives as few bytes as it likes, against what was said at both ends.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use proptest::prelude::*;
use rcgen::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};

use super::*;
use crate::driver::tls::Acceptor;
use crate::driver::tls::certificates::Certificates;

/// The kernel between the two.
#[derive(Default)]
struct Pipe {
    to_server: RefCell<VecDeque<u8>>,
    to_client: RefCell<VecDeque<u8>>,
    /// What is taken of the server until it is told to wait.
    room: Cell<usize>,
    is_finished: Cell<bool>,
}

impl Transport for Pipe {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.to_server.borrow_mut().read(buffer)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            bytes => Ok(bytes),
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        assert!(!self.is_finished.get(), "written after the end");
        let taken = bytes.len().min(self.room.get());
        if taken == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room.set(self.room.get() - taken);
        self.to_client.borrow_mut().extend(&bytes[..taken]);
        Ok(taken)
    }

    fn finish(&self) {
        self.is_finished.set(true);
    }
}

struct Ends {
    pipe: Pipe,
    server: Tls,
    client: ClientConnection,
    metrics: Arc<ShardMetrics>,
    /// Of the server, as a session's queue: what is not claimed yet.
    queue: Vec<u8>,
    /// What was said, and what came of it.
    said: [Vec<u8>; 2],
    heard: [Vec<u8>; 2],
}

impl Ends {
    fn new(version: &'static SupportedProtocolVersion, fragment: Option<usize>) -> Self {
        let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let now = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        let certificates =
            Certificates::from_pem(cert.pem().as_bytes(), signing_key.serialize_pem().as_bytes(), now).unwrap();
        let metrics = Arc::<ShardMetrics>::default();
        let acceptor = Acceptor::new(Arc::new(certificates)).unwrap();
        let server = Tls::new(acceptor.0, Rc::new(Scratch::new(Arc::clone(&metrics)))).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.max_fragment_size = fragment;
        let client = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        let (said, heard) = Default::default();
        Self { pipe: Pipe::default(), server, client, metrics, queue: Vec::new(), said, heard }
    }

    /// The client reads what is there, and sends what it has to.
    fn turn_client(&mut self) {
        let mut came = std::mem::take(&mut *self.pipe.to_client.borrow_mut());
        while !came.is_empty() {
            self.client.read_tls(&mut came).unwrap();
            self.client.process_new_packets().unwrap();
            let mut text = vec![0; 1 << 20];
            while let Ok(bytes @ 1..) = self.client.reader().read(&mut text) {
                self.heard[1].extend_from_slice(&text[..bytes]);
            }
        }
        while self.client.wants_write() {
            self.client.write_tls(&mut *self.pipe.to_server.borrow_mut()).unwrap();
        }
    }

    /// The server gets `bytes` of what is on its way.
    fn turn_server(&mut self, bytes: usize) -> io::Result<()> {
        let later = {
            let mut on_the_way = self.pipe.to_server.borrow_mut();
            let bytes = bytes.min(on_the_way.len());
            on_the_way.split_off(bytes)
        };
        let mut buffer = [0; 1000];
        let read = loop {
            match self.server.read(&self.pipe, &mut buffer) {
                Ok(share) => {
                    self.heard[0].extend_from_slice(&buffer[..share.bytes]);
                    if share.rest != Rest::More {
                        break Ok(());
                    }
                }
                Err(error) => break Err(error),
            }
        };
        self.pipe.to_server.borrow_mut().extend(later);
        assert!(self.server.incomplete.len() <= INCOMPLETE_BYTES_MAX);
        read
    }

    /// As a shard does: everything that is queued, in slices, until the kernel takes no more.
    fn write(&mut self, slice_bytes: usize) {
        if !self.server.flush(&self.pipe).unwrap() || self.queue.is_empty() {
            return;
        }
        let slices: Vec<_> = self.queue.chunks(slice_bytes).map(IoSlice::new).collect();
        match self.server.write(&self.pipe, &slices) {
            Ok(claimed) => {
                assert!(claimed > 0);
                assert_eq!(
                    claimed == self.queue.len(),
                    self.server.outgoing.is_empty(),
                    "claimed too early or too late"
                );
                self.queue.drain(..claimed);
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        assert!(self.server.outgoing.len() <= BURST_BYTES_MAX + BURST_ROOM_BYTES);
        assert_eq!(self.metrics.sealed_bytes.value(), self.server.outgoing.len() as u64);
    }

    fn shake_hands(&mut self) {
        self.pipe.room.set(usize::MAX);
        for _ in 0..10_000 {
            self.turn_client();
            self.turn_server(61).unwrap();
        }
        assert!(!self.client.is_handshaking() && !self.server.is_handshaking());
        self.pipe.room.set(0);
    }
}

#[derive(Debug, Clone)]
enum Step {
    ServerSays { bytes: usize, slice_bytes: usize },
    ClientSays { bytes: usize },
    ClientChangesKeys,
    Room { bytes: usize },
    Arrives { bytes: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let size = || prop_oneof![1usize..5, 1usize..2_000, 16_000usize..17_000, 30_000usize..100_000];
    prop_oneof![
        3 => (size(), prop_oneof![1usize..5, 100usize..50_000])
            .prop_map(|(bytes, slice_bytes)| Step::ServerSays { bytes, slice_bytes: slice_bytes.max(bytes / 64) }),
        2 => size().prop_map(|bytes| Step::ClientSays { bytes }),
        1 => Just(Step::ClientChangesKeys),
        4 => size().prop_map(|bytes| Step::Room { bytes }),
        3 => size().prop_map(|bytes| Step::Arrives { bytes }),
    ]
}

fn check(steps: Vec<Step>, version: &'static SupportedProtocolVersion, fragment: Option<usize>) {
    let mut ends = Ends::new(version, fragment);
    ends.shake_hands();
    let mut slices = 1_000;
    for (number, step) in steps.into_iter().enumerate() {
        let text = |bytes| (0..bytes).map(move |at: usize| u8::try_from((at * 7 + number) % 256).unwrap());
        match step {
            Step::ServerSays { bytes, slice_bytes } => {
                slices = slice_bytes;
                ends.queue.extend(text(bytes));
                ends.said[1].extend(text(bytes));
                // A shard that is told that the kernel takes no more does not ask again before it does.
                if ends.server.outgoing.is_empty() {
                    ends.write(slice_bytes);
                }
            }
            Step::ClientSays { bytes } => {
                let text: Vec<u8> = text(bytes).collect();
                // Its buffer has a bound of its own.
                let taken = ends.client.writer().write(&text).unwrap();
                ends.said[0].extend_from_slice(&text[..taken]);
                ends.turn_client();
            }
            Step::ClientChangesKeys => {
                // TLS 1.2 has no such thing.
                let _ = ends.client.refresh_traffic_keys();
                ends.turn_client();
            }
            Step::Room { bytes } => {
                ends.pipe.room.set(bytes);
                ends.write(slices);
                ends.turn_client();
            }
            Step::Arrives { bytes } => ends.turn_server(bytes).unwrap(),
        }
    }
    ends.pipe.room.set(usize::MAX);
    ends.turn_server(usize::MAX).unwrap();
    ends.write(slices);
    ends.write(slices);
    assert!(ends.queue.is_empty() && ends.server.outgoing.is_empty() && !ends.server.holds_back);
    ends.server.finish(&ends.pipe);
    ends.turn_client();
    assert!(ends.client.process_new_packets().unwrap().peer_has_closed(), "no goodbye");
    for (said, heard) in ends.said.iter().zip(&ends.heard) {
        assert!(said == heard, "{} bytes were said and {} heard", said.len(), heard.len());
    }
    assert_eq!((ends.server.incomplete.len(), ends.metrics.sealed_bytes.value()), (0, 0));
}

/// Whether nobody looks at the byte: it is a record's version (RFC 8446 §5.1), or the type outside of a sealed one, which says
/// nothing since TLS 1.3, as the one inside counts (§5.2).
fn is_ignored(records: &[u8], at: usize, is_old: bool) -> bool {
    let mut start = 0;
    while let Some(&[kind, _, _, high, low]) = records.get(start..start + 5) {
        if (start + 1..start + 3).contains(&at) || (at == start && kind == 23 && !is_old) {
            return true;
        }
        start += 5 + usize::from(u16::from_be_bytes([high, low]));
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn everything_that_was_said_is_heard_once_and_in_order(
        steps in proptest::collection::vec(step(), 0..40),
        is_old in any::<bool>(),
        fragment in prop_oneof![Just(None), Just(Some(64)), Just(Some(5_000))],
    ) {
        check(steps, if is_old { &rustls::version::TLS12 } else { &rustls::version::TLS13 }, fragment);
    }

    #[test]
    fn what_was_changed_on_its_way_ends_the_connection_and_nothing_else(
        at in 0usize..4_000, flip in 1u8.., piece in 1usize..600, is_old in any::<bool>(), fragment in prop_oneof![Just(None), Just(Some(64))],
    ) {
        let mut ends = Ends::new(if is_old { &rustls::version::TLS12 } else { &rustls::version::TLS13 }, fragment);
        ends.pipe.room.set(usize::MAX);
        let (mut passed, mut is_broken) = (0, false);
        let mut records = Vec::new();
        for _ in 0..200 {
            let before = ends.pipe.to_server.borrow().len();
            // A client that is told of its error says no more.
            if ends.client.wants_write() || !is_broken {
                let mut came = std::mem::take(&mut *ends.pipe.to_client.borrow_mut());
                while !came.is_empty() && ends.client.read_tls(&mut came).is_ok() {
                    is_broken |= ends.client.process_new_packets().is_err();
                }
                if !ends.client.is_handshaking() {
                    let _ = ends.client.writer().write(&[7; 100]);
                }
                while ends.client.wants_write() {
                    ends.client.write_tls(&mut *ends.pipe.to_server.borrow_mut()).unwrap();
                }
            }
            let sent = ends.pipe.to_server.borrow().len() - before;
            records.extend(ends.pipe.to_server.borrow().iter().skip(before));
            if (passed..passed + sent).contains(&at) {
                ends.pipe.to_server.borrow_mut()[before + at - passed] ^= flip;
            }
            passed += sent;
            is_broken |= ends.turn_server(piece).is_err();
            let _ = ends.server.write(&ends.pipe, &[IoSlice::new(b"text")]);
        }
        // What has not come yet, or not the whole of its record, is not looked at yet.
        let looked_at = passed - ends.pipe.to_server.borrow().len() - ends.server.incomplete.len();
        let is_unseen = looked_at <= at || is_ignored(&records, at, is_old);
        prop_assert!(is_broken || is_unseen || ends.client.is_handshaking());
        ends.server.finish(&ends.pipe);
        prop_assert!(ends.heard[0].iter().all(|byte| *byte == 7));
    }
}

#[test]
fn an_idle_connection_keeps_no_buffer() {
    let mut ends = Ends::new(&rustls::version::TLS13, None);
    ends.shake_hands();
    ends.pipe.room.set(usize::MAX);
    ends.queue = vec![1; 100_000];
    ends.write(10_000);
    let Tls { incomplete, plaintext, outgoing, .. } = &ends.server;
    assert_eq!((incomplete.capacity(), plaintext.capacity(), outgoing.capacity()), (0, 0, 0));
    assert!(size_of::<Tls>() <= 1_536, "{}", size_of::<Tls>());
}

#[test]
fn a_session_that_is_to_be_told_of_its_end_is_told_with_half_a_record_before_it() {
    let mut ends = Ends::new(&rustls::version::TLS13, None);
    ends.shake_hands();
    ends.client.writer().write_all(&[1; 5_000]).unwrap();
    ends.turn_client();
    ends.turn_server(3_000).unwrap();
    assert_eq!(ends.server.incomplete_bytes(), 3_000);
    ends.server.turn_deaf();
    assert_eq!(ends.server.incomplete_bytes(), 0);
    ends.turn_server(usize::MAX).unwrap();
    ends.pipe.room.set(usize::MAX);
    ends.queue = b"because".to_vec();
    ends.write(100);
    ends.server.finish(&ends.pipe);
    ends.turn_client();
    assert_eq!((ends.heard[1].as_slice(), ends.heard[0].len()), (&b"because"[..], 0));
    assert_eq!(ends.server.incomplete.capacity(), 0);
}
