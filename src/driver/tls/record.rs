//! TLS on a connection, without a buffer of its own: records are opened and sealed in memory that a thread's
//! connections share, and a connection keeps only what is between two states. What came of a record that is not whole
//! yet, and what was sealed and the kernel did not take; both are empty while nothing happens.
//!
//! rustls's unbuffered connection is what makes that possible: its buffered one keeps 4 KiB for its next read.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::rc::Rc;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic};
use socket2::SockRef;

use crate::driver::socket::{Rest, Share};
use crate::metrics::ShardMetrics;

/// Ciphertext that is opened at one time: at least one whole record, and no more plaintext than a session reads a turn.
const INCOMING_BYTES: usize = 64 << 10;
/// What may be kept of a message that is not whole yet: a record has at most 18,437 bytes (RFC 5246 §6.2.3), and a
/// client's greeting may take two of them.
const INCOMPLETE_BYTES_MAX: usize = 32 << 10;
/// Plaintext of one record at most (RFC 8446 §5.1).
const RECORD_BYTES_MAX: usize = 16 << 10;
/// Plaintext that is sealed at one time, and so about the most that is kept for a peer that does not read. A burst of one
/// record costs an eighth more for large frames, one of four saves nothing.
const BURST_BYTES_MAX: usize = 32 << 10;
/// Room for an alert, and the update of keys that may go before it.
const ALERT_BYTES_MAX: usize = 256;
/// What sealing adds to a record at most: header, explicit nonce, inner type and tag.
const RECORD_OVERHEAD_BYTES: usize = 64;
/// Room beside a burst and what its records add: for the keys' update, which goes first.
const BURST_ROOM_BYTES: usize = 4 << 10;

/// Memory that a thread's connections share.
pub(super) struct Scratch {
    incoming: RefCell<Box<[u8]>>,
    sealed: RefCell<Box<[u8]>>,
    metrics: Arc<ShardMetrics>,
}

impl Scratch {
    pub(super) fn new(metrics: Arc<ShardMetrics>) -> Self {
        Self {
            incoming: RefCell::new(vec![0; INCOMING_BYTES].into_boxed_slice()),
            sealed: RefCell::new(vec![0; BURST_BYTES_MAX + BURST_ROOM_BYTES].into_boxed_slice()),
            metrics,
        }
    }
}

/// The bytes under TLS: a socket that does not block.
pub(crate) trait Transport {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;
    fn send(&self, bytes: &[u8]) -> io::Result<usize>;
    fn finish(&self);
}

impl Transport for std::net::TcpStream {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut stream = self;
        stream.read(buffer)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut stream = self;
        stream.write(bytes)
    }

    fn finish(&self) {
        // The peer may be gone already: then there is nobody to tell.
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Transport for tokio::net::TcpStream {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read(buffer)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.try_write(bytes)
    }

    fn finish(&self) {
        let _ = SockRef::from(self).shutdown(Shutdown::Write);
    }
}

/// `None` if the kernel takes or has nothing now.
fn unless_blocked(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The server's side of one TLS connection.
///
/// A write claims bytes only once their ciphertext is with the kernel, but for this: what the kernel did not take of a
/// burst is kept in `outgoing`, and of the plaintext of that burst everything is claimed except, if it was all there
/// was to write, its last byte. So whoever writes still has something to write while anything is kept, comes back with
/// that byte, and is told that it was written when everything before it was.
pub(crate) struct Tls {
    connection: UnbufferedServerConnection,
    scratch: Rc<Scratch>,
    /// What came of a message that is not whole yet. rustls has places in it, and looks at them whenever it is asked for
    /// anything: it is given these bytes each time, also to seal.
    incomplete: Vec<u8>,
    /// What was opened and not read.
    plaintext: Vec<u8>,
    /// What was sealed and the kernel did not take.
    outgoing: Vec<u8>,
    /// What of it the thread's metrics know.
    counted_bytes: usize,
    /// The first byte of the next write has been sealed already.
    holds_back: bool,
    /// The peer sends nothing more.
    has_ended: bool,
    /// Nor do we.
    has_finished: bool,
    /// What comes is thrown away.
    is_deaf: bool,
    /// The peer broke the protocol: nothing is opened or sealed any more.
    is_broken: bool,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    /// The server's side of a connection that begins.
    pub(super) fn new(config: Arc<ServerConfig>, scratch: Rc<Scratch>) -> Result<Self, rustls::Error> {
        Ok(Self {
            connection: UnbufferedServerConnection::new(config)?,
            scratch,
            incomplete: Vec::new(),
            plaintext: Vec::new(),
            outgoing: Vec::new(),
            counted_bytes: 0,
            holds_back: false,
            has_ended: false,
            has_finished: false,
            is_deaf: false,
            is_broken: false,
        })
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whether the session was resumed from a ticket.
    pub(crate) fn is_resumed(&self) -> bool {
        self.connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    /// Bytes that are kept because a message is not whole yet.
    pub(crate) fn incomplete_bytes(&self) -> usize {
        if self.is_deaf { 0 } else { self.incomplete.len() }
    }

    /// Nothing more is kept of what comes, nor opened. What is kept already goes when there is nothing left to seal.
    pub(crate) fn turn_deaf(&mut self) {
        self.is_deaf = true;
    }

    /// Whether the peer has said that it sends nothing more, so that no readiness need follow.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether a byte that was sealed has not been claimed.
    pub(crate) fn holds_back(&self) -> bool {
        self.holds_back
    }

    /// What was opened and not read.
    pub(crate) fn unread(&self) -> &[u8] {
        &self.plaintext
    }

    /// That much of it was read now.
    pub(crate) fn consume(&mut self, bytes: usize) {
        self.plaintext.drain(..bytes);
        if self.plaintext.is_empty() {
            self.plaintext = Vec::new();
        }
    }

    /// What was opened and not read, taken out.
    pub(crate) fn take_unread(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.plaintext)
    }

    /// Reads what is there, as much as `buffer` holds.
    ///
    /// # Errors
    /// As the transport's; `InvalidData` if it is not TLS, or not what the keys say.
    pub(crate) fn read(&mut self, transport: &impl Transport, buffer: &mut [u8]) -> io::Result<Share> {
        if !self.plaintext.is_empty() {
            let bytes = self.plaintext.len().min(buffer.len());
            buffer[..bytes].copy_from_slice(&self.plaintext[..bytes]);
            self.consume(bytes);
            return Ok(Share { bytes, rest: Rest::More });
        }
        let mut bytes = 0;
        let mut over = Vec::new();
        let rest = self.receive(transport, &mut |opened| {
            let (fits, rest) = opened.split_at(opened.len().min(buffer.len() - bytes));
            buffer[bytes..bytes + fits.len()].copy_from_slice(fits);
            bytes += fits.len();
            over.extend_from_slice(rest);
        })?;
        self.plaintext = over;
        Ok(Share { bytes, rest: if self.plaintext.is_empty() { rest } else { Rest::More } })
    }

    /// Opens what is there, to be read later.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) fn fill(&mut self, transport: &impl Transport) -> io::Result<Rest> {
        let mut opened = self.take_unread();
        let rest = self.receive(transport, &mut |bytes| opened.extend_from_slice(bytes));
        self.plaintext = opened;
        rest
    }

    /// One read of the transport, and every whole record of it.
    fn receive(&mut self, transport: &impl Transport, sink: &mut dyn FnMut(&[u8])) -> io::Result<Rest> {
        if self.has_ended {
            return Ok(Rest::Ended);
        }
        let scratch = Rc::clone(&self.scratch);
        let buffer = &mut *scratch.incoming.borrow_mut();
        let before = self.incomplete.len();
        let Some(bytes) = unless_blocked(|| transport.receive(&mut buffer[before..]))? else {
            return Ok(Rest::Drained);
        };
        if bytes == 0 {
            self.has_ended = true;
            return Ok(Rest::Ended);
        }
        if self.is_deaf || self.is_broken {
            return Ok(Rest::More);
        }
        buffer[..before].copy_from_slice(&self.incomplete);
        let received = &mut buffer[..before + bytes];
        let mut has_opened = false;
        let opened = self.open(received, &mut |bytes| {
            has_opened = true;
            sink(bytes);
        });
        let kept = opened.and_then(|done| match received.len() - done {
            0..=INCOMPLETE_BYTES_MAX => Ok(received[done..].to_vec()),
            _ => Err(invalid("a message of the handshake is too large")),
        });
        self.incomplete = match kept {
            Ok(kept) => kept,
            Err(error) => {
                self.is_broken = true;
                self.incomplete = Vec::new();
                self.queue_alert();
                // Whoever cannot be told why does not hear it.
                let _ = self.flush(transport);
                return Err(error);
            }
        };
        self.flush(transport)?;
        Ok(match bytes {
            _ if self.has_ended => Rest::Ended,
            // What came told nothing: whether it was the last, only another read can tell.
            _ if !has_opened || bytes == INCOMING_BYTES - before => Rest::More,
            _ => Rest::Drained,
        })
    }

    /// Opens every whole record; returns how many bytes they were. What rustls has to say meanwhile is queued.
    fn open(&mut self, records: &mut [u8], sink: &mut dyn FnMut(&[u8])) -> io::Result<usize> {
        let mut done = 0;
        loop {
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(&mut records[done..]);
            let mut is_over = false;
            match state.map_err(invalid)? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(invalid)?;
                        discard += record.discard;
                        sink(record.payload);
                    }
                }
                ConnectionState::EncodeTlsData(message) => encode(message, &mut self.outgoing)?,
                ConnectionState::TransmitTlsData(transmit) => transmit.done(),
                ConnectionState::PeerClosed => self.has_ended = true,
                ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) | ConnectionState::Closed => {
                    is_over = true;
                }
                // Early data, which is not allowed, and what a later version may add.
                _ => return Err(invalid("unexpected state of TLS")),
            }
            done += discard;
            if is_over {
                return Ok(done);
            }
        }
    }

    /// Queues what rustls has to say after an error, the alert last. It is asked for nothing else then.
    fn queue_alert(&mut self) {
        while self.connection.wants_write() {
            let Ok(ConnectionState::EncodeTlsData(message)) = self.connection.process_tls_records(&mut []).state else {
                return;
            };
            // An alert that cannot be encoded is not sent.
            if encode(message, &mut self.outgoing).is_err() {
                return;
            }
        }
    }

    /// Hands the kernel what it did not take before. True if nothing is left of it.
    ///
    /// # Errors
    /// As the transport's.
    pub(crate) fn flush(&mut self, transport: &impl Transport) -> io::Result<bool> {
        while !self.outgoing.is_empty() {
            let Some(bytes) = unless_blocked(|| transport.send(&self.outgoing))? else { break };
            self.outgoing.drain(..bytes);
        }
        if self.outgoing.is_empty() {
            self.outgoing = Vec::new();
        }
        self.count();
        Ok(self.outgoing.is_empty())
    }

    /// Tells the thread's metrics, and by them the process's budget, how much is kept.
    fn count(&mut self) {
        let (before, now) = (self.counted_bytes as u64, self.outgoing.len() as u64);
        if before != now {
            self.scratch.metrics.sealed_bytes.lower(before);
            self.scratch.metrics.sealed_bytes.raise(now);
            self.counted_bytes = self.outgoing.len();
        }
    }

    /// Writes what the kernel takes; returns the bytes that the caller is rid of. Fewer than all means that it takes no
    /// more now.
    ///
    /// # Errors
    /// As the transport's; `WouldBlock` if nothing could be claimed.
    pub(crate) fn write(&mut self, transport: &impl Transport, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.is_broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if !self.flush(transport)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut plaintext = Cursor { slices, at: 0 };
        let mut claimed = 0;
        if std::mem::take(&mut self.holds_back) {
            claimed = plaintext.next(1).len();
        }
        let scratch = Rc::clone(&self.scratch);
        let sealed = &mut *scratch.sealed.borrow_mut();
        while claimed < total {
            let (bytes, length) = self.seal_burst(&mut plaintext, sealed)?;
            claimed += bytes;
            let taken = send_all(transport, &sealed[..length])?;
            if taken < length {
                self.outgoing = sealed[taken..length].to_vec();
                self.count();
                self.holds_back = claimed == total;
                claimed -= usize::from(self.holds_back);
                break;
            }
        }
        if claimed == 0 && total > 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(claimed) }
    }

    /// Seals the next burst; returns the bytes of plaintext and of ciphertext.
    fn seal_burst(&mut self, plaintext: &mut Cursor<'_, '_>, sealed: &mut [u8]) -> io::Result<(usize, usize)> {
        let (mut bytes, mut length) = (0, 0);
        loop {
            let room = sealed.len().saturating_sub(length + RECORD_OVERHEAD_BYTES + BURST_ROOM_BYTES / 2);
            let next = plaintext.next((BURST_BYTES_MAX - bytes).min(room).min(RECORD_BYTES_MAX));
            if next.is_empty() {
                return Ok((bytes, length));
            }
            length += self.seal(next, &mut sealed[length..])?;
            bytes += next.len();
        }
    }

    fn seal(&mut self, plaintext: &[u8], sealed: &mut [u8]) -> io::Result<usize> {
        self.with_traffic(|traffic| traffic.encrypt(plaintext, sealed))
    }

    /// Does what is possible once the handshake is over.
    fn with_traffic(
        &mut self,
        seal: impl FnOnce(&mut WriteTraffic<'_, ServerConnectionData>) -> Result<usize, EncryptError>,
    ) -> io::Result<usize> {
        loop {
            let UnbufferedStatus { discard, state } = self.connection.process_tls_records(&mut self.incomplete);
            match state.map_err(invalid)? {
                ConnectionState::WriteTraffic(mut traffic) => return seal(&mut traffic).map_err(invalid),
                ConnectionState::TransmitTlsData(transmit) => transmit.done(),
                ConnectionState::PeerClosed => self.has_ended = true,
                // What came was opened as it came, and nothing is written before the handshake is over.
                _ => return Err(io::ErrorKind::BrokenPipe.into()),
            }
            self.incomplete.drain(..discard);
        }
    }

    /// Says that nothing more is sent (RFC 8446 §6.1), if everything before it was: otherwise the peer is to see that
    /// something is missing.
    pub(crate) fn finish(&mut self, transport: &impl Transport) {
        if std::mem::replace(&mut self.has_finished, true) {
            return;
        }
        let is_whole = !self.is_broken && !self.is_handshaking() && !self.holds_back;
        if is_whole && matches!(self.flush(transport), Ok(true)) {
            let mut alert = [0; ALERT_BYTES_MAX];
            if let Ok(length) = self.with_traffic(|traffic| traffic.queue_close_notify(&mut alert)) {
                // A few bytes on an empty socket: whoever does not take them at once does not get them.
                let _ = send_all(transport, &alert[..length]);
            }
        }
        if self.is_deaf {
            self.incomplete = Vec::new();
        }
        transport.finish();
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.outgoing = Vec::new();
        self.count();
    }
}

/// Sends until it is all sent, or the kernel takes no more.
fn send_all(transport: &impl Transport, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        let Some(taken) = unless_blocked(|| transport.send(&bytes[sent..]))? else { break };
        sent += taken;
    }
    Ok(sent)
}

/// Puts a message of rustls's behind what is kept already.
fn encode(mut message: EncodeTlsData<'_, ServerConnectionData>, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let before = outgoing.len();
    loop {
        match message.encode(&mut outgoing[before..]) {
            Ok(bytes) => {
                outgoing.truncate(before + bytes);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needed)) if outgoing.len() < before + needed.required_size => {
                outgoing.resize(before + needed.required_size, 0);
            }
            Err(error) => return Err(invalid(error)),
        }
    }
}

/// Slices as one run of bytes.
struct Cursor<'s, 'b> {
    slices: &'s [IoSlice<'b>],
    /// Of the first slice.
    at: usize,
}

impl<'s> Cursor<'s, '_> {
    /// The next bytes that lie side by side, `bytes_max` at most; none at the end.
    fn next(&mut self, bytes_max: usize) -> &'s [u8] {
        while let [first, rest @ ..] = self.slices {
            let left = &first[self.at..];
            if left.is_empty() {
                (self.slices, self.at) = (rest, 0);
                continue;
            }
            let next = &left[..left.len().min(bytes_max)];
            self.at += next.len();
            return next;
        }
        &[]
    }
}

#[cfg(test)]
mod tests;
