//! What is done while it is this node's turn: first what is pending, whoever had it, then what is new, one entry after
//! the other in the order of the stream.
//!
//! Entries may be pending with a consumer that reads no more: one of a node that died, or a read of our own whose
//! answer was lost with its connection, or one that was still waiting at the server when another node took over. So
//! each beginning takes a new consumer name and claims everything for it, and after each read Redis is asked whether
//! another consumer has anything: then the entries just read are left alone, and all begins again, in order.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Pipeline, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::sleep;

use crate::broker::redis::link::refused;
use crate::gateway::worker::redis::acks::{Flight, Flown};
use crate::gateway::worker::redis::entries::{Entry, EntryId, has_strays, of_claim, of_read};
use crate::gateway::worker::redis::envelope::{Malformed, Outbound, decode};
use crate::gateway::worker::redis::hand_off::{HandOffError, Settled};
use crate::gateway::worker::redis::inbound::create_group;
use crate::gateway::worker::redis::lease::{Lease, Tenure};
use crate::gateway::worker::redis::outbound::{Consumer, End};
use crate::gateway::worker::redis::{is_stopping, stopped};
use crate::metrics::streams::StreamMetrics;
use crate::traces;

/// How long a read waits at the server.
pub(super) const BLOCK: Duration = Duration::from_secs(1);
/// Entries that may be handed on and not acknowledged. Past it nothing is read.
pub(super) const UNACKED_MAX: usize = 4096;
/// The most entries of one read.
const COUNT_MAX: usize = 256;
/// About how many bytes one read is to have, by the mean of the last one: with large entries it asks for fewer.
const READ_BYTES: usize = 16 << 20;
/// About how many entries are kept that could not be handled.
const DEAD_MAX: usize = 10_000;
/// The first pause before what there was no room for is tried again; it doubles.
const ROOM_PAUSE_MIN: Duration = Duration::from_millis(10);
/// The longest.
const ROOM_PAUSE_MAX: Duration = Duration::from_millis(250);

/// Deletes consumers without pending entries but the one that is named: nothing of theirs is lost, and they do not
/// become ever more.
const TIDY: &str = "
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers.err then return 0 end
for _, consumer in ipairs(consumers) do
  local fields = {}
  for i = 1, #consumer, 2 do fields[consumer[i]] = consumer[i + 1] end
  if fields.name ~= ARGV[2] and fields.pending == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], fields.name)
  end
end
return 1";

/// The reading of one turn.
pub(super) struct Reader<'t> {
    consumer: &'t Consumer,
    lease: &'t Lease,
    tenure: &'t Tenure,
    flight: &'t Flight,
    flown: mpsc::Sender<Flown>,
    places: Arc<Semaphore>,
    shutdown: watch::Receiver<bool>,
    /// How often it began: a part of the name that it reads by.
    beginnings: u64,
    name: String,
    /// How many entries the next read asks for.
    count: usize,
}

impl<'t> Reader<'t> {
    pub(super) fn new(
        consumer: &'t Consumer,
        lease: &'t Lease,
        tenure: &'t Tenure,
        flight: &'t Flight,
        flown: mpsc::Sender<Flown>,
    ) -> Self {
        let (places, shutdown) = (Arc::new(Semaphore::new(UNACKED_MAX)), consumer.shutdown.clone());
        let (beginnings, name, count) = (0, String::new(), COUNT_MAX / 4);
        Self { consumer, lease, tenure, flight, flown, places, shutdown, beginnings, name, count }
    }

    /// Reads until the turn is over.
    ///
    /// # Cancel safety
    /// What was read and not acknowledged comes again.
    pub(super) async fn run(&mut self) -> End {
        let turn = async {
            loop {
                self.begin().await?;
                self.follow().await?;
            }
        };
        let Err::<Infallible, End>(end) = turn.await;
        end
    }

    /// Takes over whatever is pending, and handles it.
    async fn begin(&mut self) -> Result<(), End> {
        self.renew().await?;
        self.beginnings += 1;
        self.name = format!("{}:{}", self.tenure.value, self.beginnings);
        let names = &self.consumer.names;
        let made = self.ask(create_group(&names.stream, &names.group)).await?;
        if let Some(reason) = refused(&made).filter(|reason| !reason.starts_with("BUSYGROUP")) {
            return Err(End::Refused(reason));
        }
        let mut next = EntryId::parse("0-0");
        while let Some(start) = next {
            // What is acknowledged while this is asked may be in the answer all the same.
            let under_way = self.flight.ids();
            let answer = self.claim(start).await?;
            if let Some(reason) = refused(&answer) {
                return Err(End::Refused(reason));
            }
            let claimed = of_claim(answer).ok_or_else(|| End::Refused("XAUTOCLAIM has no such answer".to_owned()))?;
            if claimed.gone > 0 {
                let (stream, entries) = (&names.stream, claimed.gone);
                tracing::warn!(stream, entries, "the stream was cut before these were acknowledged");
            }
            next = claimed.next;
            let mut entries = claimed.entries;
            self.adapt(&entries);
            entries.retain(|entry| !under_way.contains(&entry.id));
            Box::pin(self.take(entries, Source::Claim)).await?;
        }
        let mut tidy = redis::cmd("EVAL");
        tidy.arg(TIDY).arg(1).arg(&names.stream).arg(&names.group).arg(&self.name);
        self.ask(tidy).await?;
        Ok(())
    }

    /// Claims what is pending from there on: less at a time for as long as there is no answer, which may be too large.
    async fn claim(&mut self, start: EntryId) -> Result<Value, End> {
        loop {
            self.check()?;
            let names = &self.consumer.names;
            let mut claim = redis::cmd("XAUTOCLAIM");
            claim.arg(&names.stream).arg(&names.group).arg(&self.name).arg(0).arg(start.to_string());
            claim.arg("COUNT").arg(self.count);
            let mut pipeline = Pipeline::with_capacity(1);
            pipeline.add_command(claim);
            match self.consumer.commands.run(&pipeline).await {
                Ok(mut answers) => return Ok(answers.pop().unwrap_or(Value::Nil)),
                Err(_) => {
                    self.count = (self.count / 4).max(1);
                    self.idle(self.consumer.commands.pause()).await?;
                }
            }
        }
    }

    /// Whether the lease is ours, as Redis sees it: it may have lost its memory together with a connection.
    async fn renew(&self) -> Result<(), End> {
        loop {
            self.check()?;
            match self.lease.renew(self.tenure).await {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(End::Lost),
                Err(_) => self.lease.pause().await,
            }
        }
    }

    /// Handles what is new, until there is a reason to begin again.
    async fn follow(&mut self) -> Result<(), End> {
        loop {
            self.check()?;
            let (names, reading) = (&self.consumer.names, &self.consumer.reading);
            let mut read = redis::cmd("XREADGROUP");
            read.arg("GROUP").arg(&names.group).arg(&self.name).arg("COUNT").arg(self.count);
            read.arg("BLOCK").arg(BLOCK.as_millis().to_string()).arg("STREAMS").arg(&names.stream).arg(">");
            let mut pipeline = Pipeline::with_capacity(1);
            pipeline.add_command(read);
            let answers = tokio::select! {
                answers = reading.run(&pipeline) => answers,
                () = stopped(&mut self.shutdown) => return Err(End::Stopped),
            };
            let Ok(answer) = answers.map(|mut answers| answers.pop().unwrap_or(Value::Nil)) else {
                self.count = (self.count / 4).max(1);
                self.idle(reading.pause()).await?;
                return Ok(());
            };
            if let Some(reason) = refused(&answer) {
                return Err(End::Refused(reason));
            }
            let entries = of_read(answer);
            self.adapt(&entries);
            if Box::pin(self.take(entries, Source::Read)).await? == Taken::Strays {
                return Ok(());
            }
        }
    }

    /// How many entries the next read may ask for.
    fn adapt(&mut self, entries: &[Entry]) {
        let bytes: usize = entries.iter().map(|entry| entry.envelope.as_ref().map_or(0, Vec::len)).sum();
        let mean = (bytes / entries.len().max(1)).max(1);
        self.count = (READ_BYTES / mean).clamp(1, COUNT_MAX).min(self.count * 2);
    }

    /// Handles entries in their order.
    async fn take(&mut self, mut entries: Vec<Entry>, source: Source) -> Result<Taken, End> {
        entries.retain(|entry| !self.flight.has(entry.id));
        if entries.is_empty() && source == Source::Claim {
            return Ok(Taken::All);
        }
        let read: Vec<Read<'_>> = entries.iter().map(|entry| Read::new(entry, self.consumer.entry_bytes_max)).collect();
        let Some(known) = self.known(&read, source).await? else { return Ok(Taken::Strays) };
        self.streams().read.add(u64::try_from(read.len()).unwrap_or_default());
        let mut sent: HashSet<String> = HashSet::new();
        for (Read { entry, outbound }, is_known) in read.into_iter().zip(known) {
            self.check()?;
            match outbound {
                Err(malformed) => self.bury(entry, None, &malformed.to_string()).await?,
                Ok(outbound) => {
                    let key = outbound.message_key().map(str::to_owned);
                    if is_known || key.as_ref().is_some_and(|key| sent.contains(key)) {
                        self.streams().doubled.increment();
                        let place = self.place().await?;
                        self.fly(entry.id, None, Box::pin(ready(())), place)?;
                    } else if self.post(entry, outbound).await? {
                        sent.extend(key);
                    }
                }
            }
        }
        Ok(Taken::All)
    }

    /// Which of them are doubles of something earlier; in the same round trip whether another consumer has any entries:
    /// then nothing.
    async fn known(&self, read: &[Read<'_>], source: Source) -> Result<Option<Vec<bool>>, End> {
        let names = &self.consumer.names;
        // Before Redis is asked: what is acknowledged in between is found there.
        let key =
            |one: &Read<'_>| one.outbound.as_ref().ok().and_then(|outbound| outbound.message_key().map(str::to_owned));
        let keys: Vec<Option<String>> = read.iter().map(key).collect();
        let mut known: Vec<bool> =
            keys.iter().map(|key| key.as_ref().is_some_and(|key| self.flight.has_key(key))).collect();
        let mut pipeline = Pipeline::with_capacity(2);
        if source == Source::Read {
            pipeline.cmd("XPENDING").arg(&names.stream).arg(&names.group);
        }
        let asked: Vec<usize> = (0..keys.len()).filter(|at| keys[*at].is_some()).collect();
        if !asked.is_empty() {
            pipeline.cmd("MGET").arg(keys.iter().flatten().map(|key| names.message_key(key)).collect::<Vec<_>>());
        }
        if pipeline.is_empty() {
            return Ok(Some(known));
        }
        let answers = self.ask_all(&pipeline).await?;
        if let Some(reason) = answers.iter().find_map(refused) {
            return Err(End::Refused(reason));
        }
        let mut answers = answers.into_iter();
        if source == Source::Read && answers.next().is_some_and(|summary| has_strays(&summary, &self.name)) {
            return Ok(None);
        }
        if let Some(Value::Array(values)) = answers.next() {
            for (at, value) in asked.into_iter().zip(values) {
                known[at] |= value != Value::Nil;
            }
        }
        Ok(Some(known))
    }

    /// Hands an entry on. False if it was set aside.
    async fn post(&mut self, entry: &Entry, mut outbound: Outbound<'_>) -> Result<bool, End> {
        let place = self.place().await?;
        let stream = &self.consumer.names.stream;
        outbound.id.get_or_insert_with(|| entry.id.message_id(stream));
        let key = outbound.message_key().map(Box::<str>::from);
        let mut pause = ROOM_PAUSE_MIN;
        loop {
            self.check()?;
            let trace = outbound.trace.as_deref();
            let reason = match traces::over(trace, self.consumer.hand_off.hand_off(&outbound)).await {
                Ok(settled) => {
                    self.streams().handed_off.increment();
                    let trace_id = outbound.trace_id();
                    tracing::debug!(entry = %entry.id, channel = %outbound.channel, trace_id, "a worker's entry was posted");
                    return self.fly(entry.id, key, settled, place).map(|()| true);
                }
                Err(HandOffError::Overloaded) => {
                    self.idle(sleep(pause)).await?;
                    pause = (pause * 2).min(ROOM_PAUSE_MAX);
                    continue;
                }
                Err(HandOffError::Closed) => return Err(End::Closed),
                Err(HandOffError::TooLarge(reason) | HandOffError::Bad(reason)) => reason,
            };
            drop(place);
            return self.bury(entry, key.as_deref(), &reason).await.map(|()| false);
        }
    }

    /// Sets an entry aside that cannot be handled, and then has it acknowledged. Its key is not remembered: a better
    /// entry may come with it.
    async fn bury(&mut self, entry: &Entry, key: Option<&str>, reason: &str) -> Result<(), End> {
        tracing::debug!(entry = %entry.id, reason, "a worker's entry is set aside");
        let envelope = entry.envelope.as_deref().unwrap_or_default();
        let envelope = &envelope[..envelope.len().min(self.consumer.entry_bytes_max)];
        let mut append = redis::cmd("XADD");
        append.arg(&self.consumer.names.dead).arg("MAXLEN").arg("~").arg(DEAD_MAX).arg("*");
        append.arg("e").arg(envelope).arg("reason").arg(reason).arg("id").arg(entry.id.to_string());
        if let Some(key) = key {
            append.arg("key").arg(key);
        }
        if let Some(reason) = refused(&self.ask(append).await?) {
            return Err(End::Refused(reason));
        }
        self.streams().dead.increment();
        let place = self.place().await?;
        self.fly(entry.id, None, Box::pin(ready(())), place)
    }

    fn fly(
        &self,
        id: EntryId,
        key: Option<Box<str>>,
        settled: Settled,
        place: OwnedSemaphorePermit,
    ) -> Result<(), End> {
        self.flight.add(id, key.as_deref());
        // There is one place in the queue for each permit, so that it is never full; closed is the end of the turn.
        self.flown.try_send(Flown { id, key, settled, place }).map_err(|_| End::Lost)
    }

    async fn place(&mut self) -> Result<OwnedSemaphorePermit, End> {
        tokio::select! {
            // The semaphore is never closed.
            place = Arc::clone(&self.places).acquire_owned() => place.map_err(|_| End::Lost),
            () = stopped(&mut self.shutdown) => Err(End::Stopped),
        }
    }

    /// Whether the turn goes on.
    fn check(&self) -> Result<(), End> {
        match (is_stopping(&self.shutdown), self.tenure.is_good()) {
            (true, _) => Err(End::Stopped),
            (false, true) => Ok(()),
            (false, false) => Err(End::Lost),
        }
    }

    async fn idle(&self, pause: impl Future<Output = ()>) -> Result<(), End> {
        let mut shutdown = self.shutdown.clone();
        tokio::select! {
            () = pause => self.check(),
            () = stopped(&mut shutdown) => Err(End::Stopped),
        }
    }

    /// One command that may be carried out twice.
    async fn ask(&self, command: Cmd) -> Result<Value, End> {
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.add_command(command);
        let answers = self.ask_all(&pipeline).await?;
        Ok(answers.into_iter().next().unwrap_or(Value::Nil))
    }

    /// Commands that may be carried out twice, until they are answered.
    async fn ask_all(&self, pipeline: &Pipeline) -> Result<Vec<Value>, End> {
        loop {
            self.check()?;
            match self.consumer.commands.run(pipeline).await {
                Ok(answers) => return Ok(answers),
                Err(_) => self.idle(self.consumer.commands.pause()).await?,
            }
        }
    }

    fn streams(&self) -> &'t StreamMetrics {
        &self.consumer.metrics.engine.streams_of_workers
    }
}

/// Where entries come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// They were pending.
    Claim,
    /// They are new.
    Read,
}

/// Whether they were handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    All,
    /// None of them: another consumer has entries, which may be earlier.
    Strays,
}

/// An entry and what it says.
struct Read<'e> {
    entry: &'e Entry,
    outbound: Result<Outbound<'e>, Malformed>,
}

impl<'e> Read<'e> {
    fn new(entry: &'e Entry, bytes_max: usize) -> Self {
        let envelope = entry.envelope.as_deref().ok_or(Malformed::NoEnvelope);
        Self { entry, outbound: envelope.and_then(|bytes| decode(bytes, bytes_max)) }
    }
}
