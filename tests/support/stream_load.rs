//! Many answers of `/v1` at once: a worker that lets all of them grow at a steady rate, and readers that miss nothing.
//!
//! What grows says where it belongs: `12@3456789;` is a stream's twelfth piece, due 3,456,789 µs after the start. A
//! piece that comes late was late against that moment, whatever the worker or the reader waited for meanwhile.

use std::fmt::Write as _;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet, LocalSet, spawn_local};

/// Pieces of one message: then the next one begins, as texts of edits are whole.
const PIECES_OF_MESSAGE: u64 = 32;
/// Between two batches of one worker.
const TICK: Duration = Duration::from_millis(10);
/// Connections of the worker; each has its own share of the streams, so that order within a stream is kept.
const WORKERS: usize = 4;
/// Requests that are opened at once: they are connections until they are sessions.
const OPENING: usize = 64;
/// For the last pieces after the last was sent.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is to be carried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) streams: usize,
    /// Pieces a second, of all streams together.
    pub(crate) rate: u64,
    pub(crate) duration: Duration,
}

/// What was carried.
#[derive(Debug)]
pub(crate) struct Carried {
    pub(crate) sent: u64,
    /// Pieces that came, each in its place.
    pub(crate) received: u64,
    /// Streams with a piece that was missing, doubled or out of its place, or without a good end.
    pub(crate) broken: usize,
    /// Records that the pieces came in: fewer, where several were waiting.
    pub(crate) records: u64,
    /// From the moment that a piece was due, in µs, sorted.
    pub(crate) latencies: Vec<u32>,
    /// From the first piece to the last answer of the worker's.
    pub(crate) took: Duration,
}

impl Carried {
    pub(crate) fn latency(&self, part: f64) -> Duration {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index below the length")]
        let index = (self.latencies.len() as f64 * part) as usize;
        let micros = self.latencies.get(index.min(self.latencies.len().saturating_sub(1)));
        Duration::from_micros(micros.copied().unwrap_or(u32::MAX).into())
    }
}

#[expect(clippy::disallowed_methods, reason = "a client with real sockets is at the edge")]
fn now() -> Instant {
    Instant::now()
}

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, what.into())
}

/// Opens the streams, lets them grow, ends them. `around` is called before and after the growth.
///
/// # Errors
/// A connection was lost, an answer is not what it should be, or what was sent did not come in time.
pub(crate) fn run(gateway: SocketAddr, load: Load, mut around: impl FnMut()) -> Result<Carried> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let mut streams = open(gateway, load.streams).await?;
        let start = now();
        around();
        let mut workers = JoinSet::new();
        let share = load.streams.div_ceil(WORKERS);
        let channels: Vec<_> = streams.iter().map(|stream| stream.id.clone()).collect();
        for (number, ids) in channels.chunks(share).enumerate() {
            let (ids, rate) = (ids.to_vec(), load.rate as f64 * ids.len() as f64 / load.streams as f64);
            let offset = TICK * u32::try_from(number).unwrap_or(0) / 4;
            let pace = Pace { start: start + offset, origin: start, rate, duration: load.duration };
            workers.spawn_local(async move { work(Connection::open(gateway).await?, ids, pace).await });
        }
        let readers: Vec<_> = streams.drain(..).map(|stream| spawn_local(stream.read(start))).collect();
        let mut sent = Vec::new();
        while let Some(worked) = workers.join_next().await {
            sent.extend(worked.map_err(Error::other)??);
        }
        let took = start.elapsed();
        around();
        collect(readers, &sent, took).await
    })
}

async fn collect(readers: Vec<JoinHandle<Result<Read>>>, sent: &[(Rc<str>, u64)], took: Duration) -> Result<Carried> {
    let sent_of: std::collections::HashMap<_, _> = sent.iter().map(|(id, pieces)| (id, *pieces)).collect();
    let total = sent.iter().map(|(_, pieces)| pieces).sum();
    let mut carried = Carried { sent: total, received: 0, broken: 0, records: 0, latencies: Vec::new(), took };
    for reader in readers {
        let read = tokio::time::timeout(PATIENCE, reader).await.map_err(Error::other)?.map_err(Error::other)??;
        carried.received += read.pieces;
        carried.records += read.records;
        carried.broken += usize::from(!read.is_whole || sent_of.get(&read.id) != Some(&read.pieces));
        carried.latencies.extend(read.latencies);
    }
    carried.latencies.sort_unstable();
    Ok(carried)
}

/// Opens streams; the gateway has accepted all of them.
pub(crate) async fn open(gateway: SocketAddr, count: usize) -> Result<Vec<Stream>> {
    let mut streams = Vec::with_capacity(count);
    let mut opening = JoinSet::new();
    for number in 0..count {
        if number >= OPENING {
            streams.push(opening.join_next().await.ok_or_else(|| wrong("none is opening"))?.map_err(Error::other)??);
        }
        opening.spawn_local(Stream::open(gateway));
    }
    while let Some(opened) = opening.join_next().await {
        streams.push(opened.map_err(Error::other)??);
    }
    Ok(streams)
}

/// A connection, and what came over it and was not looked at yet.
struct Connection {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(gateway: SocketAddr) -> Result<Self> {
        let socket = TcpStream::connect(gateway).await?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, buffer: Vec::new() })
    }

    async fn post(&mut self, path: &str, content_type: &str, body: &[u8]) -> Result<()> {
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\n\r\n"
        );
        self.socket.write_all(&[head.as_bytes(), body].concat()).await
    }

    /// Reads more. False at the end.
    async fn fill(&mut self) -> Result<bool> {
        Ok(self.socket.read_buf(&mut self.buffer).await? > 0)
    }

    async fn take_to(&mut self, end: &[u8]) -> Result<Vec<u8>> {
        loop {
            if let Some(at) = self.buffer.windows(end.len()).position(|bytes| bytes == end) {
                return Ok(self.buffer.drain(..at + end.len()).collect());
            }
            if !self.fill().await? {
                return Err(wrong("it ended early"));
            }
        }
    }

    async fn take(&mut self, bytes: usize) -> Result<Vec<u8>> {
        while self.buffer.len() < bytes {
            if !self.fill().await? {
                return Err(wrong("it ended early"));
            }
        }
        Ok(self.buffer.drain(..bytes).collect())
    }

    async fn head(&mut self) -> Result<String> {
        let head = String::from_utf8(self.take_to(b"\r\n\r\n").await?).map_err(Error::other)?;
        if head.starts_with("HTTP/1.1 200 ") { Ok(head) } else { Err(wrong(head)) }
    }

    /// An HTTP chunk's content; nothing is the last.
    async fn chunk(&mut self) -> Result<Vec<u8>> {
        let size = self.take_to(b"\r\n").await?;
        let size = std::str::from_utf8(&size).ok().and_then(|size| usize::from_str_radix(size.trim_end(), 16).ok());
        let size = size.ok_or_else(|| wrong("a chunk without a size"))?;
        let mut chunk = self.take(size + 2).await?;
        if chunk.split_off(size) != b"\r\n" {
            return Err(wrong("a chunk without an end"));
        }
        Ok(chunk)
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// An answer that is being read.
pub(crate) struct Stream {
    id: Rc<str>,
    connection: Connection,
}

/// What came over one stream.
struct Read {
    id: Rc<str>,
    pieces: u64,
    records: u64,
    latencies: Vec<u32>,
    is_whole: bool,
}

impl Stream {
    async fn open(gateway: SocketAddr) -> Result<Self> {
        let mut connection = Connection::open(gateway).await?;
        let body = br#"{"messages":[{"role":"user","content":"go"}],"stream":true}"#;
        connection.post("/v1/chat/completions", "application/json", body).await?;
        let head = connection.head().await?;
        let id = header(&head, "x-request-id").ok_or_else(|| wrong("an answer without an id"))?.into();
        connection.chunk().await?;
        // It keeps no memory while it waits, so that the client is not what is measured.
        connection.buffer = Vec::new();
        Ok(Self { id, connection })
    }

    async fn read(mut self, start: Instant) -> Result<Read> {
        let mut read = Read { id: self.id, pieces: 0, records: 0, latencies: Vec::new(), is_whole: true };
        let mut is_done = false;
        loop {
            let chunk = self.connection.chunk().await?;
            if chunk.is_empty() {
                break;
            }
            let late = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
            let text = std::str::from_utf8(&chunk).map_err(Error::other)?;
            for record in text.split_terminator("\n\n").filter(|record| !record.starts_with(':')) {
                is_done = record == "data: [DONE]";
                let Some((_, rest)) = record.split_once("\"content\":\"") else { continue };
                let content = rest.split('"').next().unwrap_or_default();
                read.records += 1;
                read.take(content.strip_prefix("\\n\\n").unwrap_or(content), late);
            }
        }
        read.is_whole &= is_done && !self.connection.fill().await?;
        Ok(read)
    }
}

impl Read {
    /// Looks at the pieces of one record, all of one message.
    fn take(&mut self, content: &str, now: u64) {
        for piece in content.split_terminator(';') {
            let numbers = piece.split_once('@').map(|(number, due)| (number.parse::<u64>(), due.parse::<u64>()));
            let Some((Ok(number), Ok(due))) = numbers else {
                self.is_whole = false;
                return;
            };
            self.is_whole &= self.pieces == number;
            self.pieces += 1;
            self.latencies.push(u32::try_from(now.saturating_sub(due)).unwrap_or(u32::MAX));
        }
    }
}

/// When which piece is due.
#[derive(Clone, Copy)]
struct Pace {
    start: Instant,
    /// What due moments are counted from.
    origin: Instant,
    /// Pieces a second.
    rate: f64,
    duration: Duration,
}

/// A stream as the worker sees it.
struct Growing {
    id: Rc<str>,
    message: String,
    text: String,
    pieces: u64,
}

impl Growing {
    fn new(id: Rc<str>) -> Self {
        Self { id, message: String::new(), text: String::new(), pieces: 0 }
    }

    /// One more piece: a line of a batch.
    fn grow(&mut self, due: Duration, batch: &mut String) {
        if self.pieces.is_multiple_of(PIECES_OF_MESSAGE) {
            // A message that a stream does not know yet begins with an edit as well as with itself.
            self.message = uuid::Uuid::new_v4().to_string();
            self.text.clear();
        }
        // Writing to a string cannot fail.
        let _ = write!(self.text, "{}@{};", self.pieces, due.as_micros());
        self.pieces += 1;
        let Self { id, message, text, .. } = self;
        let _ = writeln!(batch, r#"{{"op":"edit","channel_id":"sse:{id}","message_id":"{message}","text":"{text}"}}"#);
    }
}

/// Lets its streams grow, one after the other, a batch each tick; then ends them. Returns what each was sent.
async fn work(mut connection: Connection, ids: Vec<Rc<str>>, pace: Pace) -> Result<Vec<(Rc<str>, u64)>> {
    let mut streams: Vec<_> = ids.into_iter().map(Growing::new).collect();
    let (mut next, mut sent, mut tick) = (0, 0_u64, 0_u32);
    while TICK * tick < pace.duration {
        let at = pace.start + TICK * tick;
        tick += 1;
        tokio::time::sleep_until(at.into()).await;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive count")]
        let due = ((TICK * tick).as_secs_f64() * pace.rate) as u64;
        let mut batch = String::new();
        let lines = due.saturating_sub(sent);
        for _ in 0..lines {
            streams[next].grow(at - pace.origin, &mut batch);
            next = (next + 1) % streams.len();
        }
        sent += lines;
        post(&mut connection, &batch, lines).await?;
    }
    let ends: String =
        streams.iter().map(|stream| format!("{{\"op\":\"end\",\"channel_id\":\"sse:{}\"}}\n", stream.id)).collect();
    post(&mut connection, &ends, streams.len() as u64).await?;
    Ok(streams.into_iter().map(|stream| (stream.id, stream.pieces)).collect())
}

/// A batch, all of which must be taken.
async fn post(connection: &mut Connection, batch: &str, lines: u64) -> Result<()> {
    if lines == 0 {
        return Ok(());
    }
    connection.post("/api/batch", "application/x-ndjson", batch.as_bytes()).await?;
    let head = connection.head().await?;
    let length = header(&head, "content-length").and_then(|length| length.parse().ok());
    let answer = connection.take(length.ok_or_else(|| wrong("an answer without a length"))?).await?;
    let taken = answer.windows(16).filter(|bytes| bytes == b"\"delivered\":true").count() as u64;
    if taken == lines { Ok(()) } else { Err(wrong(format!("{taken} of {lines} lines were taken"))) }
}
