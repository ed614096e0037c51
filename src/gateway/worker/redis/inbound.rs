//! Messages of people onto the stream that workers read.
//!
//! Whatever waits goes out in one pipeline, in its order, and whoever waits for it is told of its own message. Over an
//! outage messages are kept, each for its time; what was under way when a connection was lost is appended again, and may
//! then be there twice.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use redis::{Cmd, Pipeline, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};

use crate::broker::redis::link::{Endpoint, Link, backoff, refused};
use crate::config::EnvelopeForm;
use crate::gateway::worker::redis::StreamSettings;
use crate::gateway::worker::redis::envelope;
use crate::gateway::worker::redis::stopped;
use crate::metrics::{Metrics, WorkerOutcome};
use crate::platform::adapter::{BoxFuture, MessageHandler, PlatformAdapter};
use crate::platform::message::IncomingMessage;
use crate::proto::event::Timestamp;

/// How long Redis may be away before a message is given up.
pub(crate) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// Messages that may wait to be appended.
const QUEUE_MESSAGES_MAX: usize = 4096;
/// Bytes of their envelopes. An empty queue admits any message.
const QUEUE_BYTES_MAX: u32 = 64 << 20;
/// The most messages of one pipeline.
const PIPELINE_MESSAGES_MAX: usize = 256;
/// Bytes after which a pipeline takes no more: they have to be answered within the time that an answer may take.
const PIPELINE_BYTES_MAX: usize = 4 << 20;

/// Why a message was not appended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum AppendError {
    /// Too much waits already: nothing was done.
    #[error("too many messages wait for Redis; nothing was appended, try again later")]
    Full,
    /// Redis did not take it within its time, or this node is going away. It may have been appended all the same.
    #[error("Redis cannot be reached; try again later")]
    Unavailable,
    /// Redis does not take it, in its words.
    #[error("Redis refused it: {0}")]
    Refused(String),
}

struct Job {
    envelope: Vec<u8>,
    until: Instant,
    done: oneshot::Sender<Result<(), AppendError>>,
    _room: OwnedSemaphorePermit,
}

/// Where messages go in.
pub(crate) struct Appender {
    jobs: mpsc::Sender<Job>,
    room: Arc<Semaphore>,
    form: EnvelopeForm,
    metrics: Arc<Metrics>,
}

impl Appender {
    /// Appends a message, and is ready once Redis has it, or did not take it within `time`.
    ///
    /// # Errors
    /// [`AppendError`].
    ///
    /// # Cancel safety
    /// Dropped early, the message may or may not be appended.
    pub(crate) async fn append_within(&self, message: &IncomingMessage, time: Duration) -> Result<(), AppendError> {
        let result = self.enqueue(message, time).await;
        let streams = &self.metrics.engine.streams_of_workers;
        if result.is_ok() { &streams.appended } else { &streams.append_failures }.increment();
        result
    }

    async fn enqueue(&self, message: &IncomingMessage, time: Duration) -> Result<(), AppendError> {
        let place = match self.jobs.try_reserve() {
            Ok(place) => place,
            Err(mpsc::error::TrySendError::Full(())) => return Err(AppendError::Full),
            Err(mpsc::error::TrySendError::Closed(())) => return Err(AppendError::Unavailable),
        };
        let envelope = envelope::encode(message, self.form, Timestamp::from(SystemTime::now()));
        let bytes = u32::try_from(envelope.len()).unwrap_or(u32::MAX).min(QUEUE_BYTES_MAX);
        let room = Arc::clone(&self.room).try_acquire_many_owned(bytes).map_err(|_| AppendError::Full)?;
        let (done, answer) = oneshot::channel();
        place.send(Job { envelope, until: Instant::now() + time, done, _room: room });
        answer.await.unwrap_or(Err(AppendError::Unavailable))
    }
}

/// Makes both ends. Nothing is appended before [`Appending::run`] runs.
pub(super) fn appender(
    endpoint: &Endpoint,
    settings: &StreamSettings,
    metrics: Arc<Metrics>,
    shutdown: watch::Receiver<bool>,
) -> (Appender, Appending) {
    let (sender, jobs) = mpsc::channel(QUEUE_MESSAGES_MAX);
    // A permit is a byte.
    let room = Arc::new(Semaphore::new(QUEUE_BYTES_MAX as usize));
    let appending = Appending {
        link: Link::new(endpoint.clone(), "inbound"),
        stream: settings.inbound_stream.clone(),
        group: settings.inbound_group.clone(),
        entries_max: settings.entries_max,
        jobs,
        waiting: VecDeque::new(),
        group_state: Group::Unknown,
        shutdown,
    };
    (Appender { jobs: sender, room, form: settings.form, metrics }, appending)
}

/// The workers' group, as far as it is known: a stream without it would lose what comes before its first worker.
enum Group {
    /// Nobody looked, or Redis was away since: it may have come back empty.
    Unknown,
    There,
    /// It could not be made, in the words of Redis. It is tried again with the next message.
    Refused(String),
}

/// Sends to Redis what comes in at the [`Appender`].
pub(super) struct Appending {
    link: Link,
    stream: String,
    group: String,
    entries_max: usize,
    jobs: mpsc::Receiver<Job>,
    /// The next pipeline; over an outage the last one.
    waiting: VecDeque<Job>,
    group_state: Group,
    shutdown: watch::Receiver<bool>,
}

impl Appending {
    /// Runs until the shutdown was announced and nothing waits.
    pub(super) async fn run(mut self) {
        loop {
            let has_work = self.fill() || matches!(self.group_state, Group::Unknown);
            if has_work {
                if !self.send().await {
                    self.link.pause().await;
                }
                if self.is_over() {
                    return;
                }
                continue;
            }
            tokio::select! {
                job = self.jobs.recv() => match job {
                    Some(job) => self.waiting.push_back(job),
                    None => return,
                },
                () = stopped(&mut self.shutdown), if !self.jobs.is_closed() => self.jobs.close(),
            }
        }
    }

    /// Without anything to do an outage does not hold up the shutdown.
    fn is_over(&mut self) -> bool {
        if super::is_stopping(&self.shutdown) {
            self.jobs.close();
        }
        self.jobs.is_closed() && self.jobs.is_empty() && self.waiting.is_empty()
    }

    /// Moves what fits into the next pipeline, and gives up what nobody waits for any more, or waited for too long.
    fn fill(&mut self) -> bool {
        let now = Instant::now();
        let keep = |job: Job| match job {
            job if job.done.is_closed() => None,
            job if job.until <= now => {
                // Whoever waited may be gone by now.
                drop(job.done.send(Err(AppendError::Unavailable)));
                None
            }
            job => Some(job),
        };
        self.waiting = self.waiting.drain(..).filter_map(keep).collect();
        let mut bytes: usize = self.waiting.iter().map(|job| job.envelope.len()).sum();
        while self.waiting.len() < PIPELINE_MESSAGES_MAX && bytes < PIPELINE_BYTES_MAX {
            let Ok(job) = self.jobs.try_recv() else { break };
            if let Some(job) = keep(job) {
                bytes += job.envelope.len();
                self.waiting.push_back(job);
            }
        }
        !self.waiting.is_empty()
    }

    /// Sends what waits; what has to be said again stays. False if that should not be at once.
    async fn send(&mut self) -> bool {
        let makes_group = !matches!(self.group_state, Group::There);
        let mut pipeline = Pipeline::with_capacity(self.waiting.len() + 1);
        if makes_group {
            pipeline.add_command(create_group(&self.stream, &self.group));
        }
        for job in &self.waiting {
            let mut append = redis::cmd("XADD");
            // A stream that is gone is made again together with its group.
            append.arg(&self.stream).arg("NOMKSTREAM").arg("MAXLEN").arg("~").arg(self.entries_max);
            append.arg("*").arg("e").arg(&job.envelope);
            pipeline.add_command(append);
        }
        let Ok(answers) = self.link.run_in_slot(&pipeline).await else {
            self.group_state = Group::Unknown;
            return false;
        };
        let mut answers = answers.into_iter();
        if makes_group {
            let reason = answers.next().as_ref().and_then(refused).filter(|reason| !reason.starts_with("BUSYGROUP"));
            if let Some(reason) = &reason
                && !matches!(self.group_state, Group::Refused(_))
            {
                tracing::warn!(group = self.group, reason, "the group of workers cannot be made");
            }
            self.group_state = reason.map_or(Group::There, Group::Refused);
        }
        for answer in answers {
            let Some(job) = self.waiting.pop_front() else { break };
            self.settle(job, &answer);
        }
        self.waiting.is_empty()
    }

    fn settle(&mut self, job: Job, answer: &Value) {
        let result = match (refused(answer), answer, &self.group_state) {
            (Some(reason), ..) if is_passing(&reason) => None,
            (Some(reason), ..) => Some(Err(AppendError::Refused(reason))),
            // There is no stream.
            (None, Value::Nil, Group::Refused(reason)) => Some(Err(AppendError::Refused(reason.clone()))),
            (None, Value::Nil, _) => {
                self.group_state = Group::Unknown;
                None
            }
            (None, ..) => Some(Ok(())),
        };
        match result {
            // Whoever waited may be gone by now.
            Some(result) => drop(job.done.send(result)),
            None => self.waiting.push_back(job),
        }
    }
}

/// What a server refuses now and may take soon: no memory, no disk, no replica.
fn is_passing(reason: &str) -> bool {
    ["OOM", "MISCONF", "NOREPLICAS"].iter().any(|code| reason.starts_with(code))
}

/// Makes a group that begins with the first entry, and its stream.
pub(super) fn create_group(stream: &str, group: &str) -> Cmd {
    let mut create = redis::cmd("XGROUP");
    create.arg("CREATE").arg(stream).arg(group).arg("0").arg("MKSTREAM");
    create
}

/// `worker = "redis"`: each message is appended, before the next one of its channel.
pub(crate) struct RedisWorker {
    appender: Arc<Appender>,
    /// # Ordering
    /// Relaxed: it only keeps the log from telling the same twice.
    is_failing: Arc<AtomicBool>,
}

impl RedisWorker {
    pub(crate) fn new(appender: Arc<Appender>) -> Self {
        Self { appender, is_failing: Arc::default() }
    }
}

impl MessageHandler for RedisWorker {
    fn handle(&self, message: IncomingMessage, _adapter: Arc<dyn PlatformAdapter>) -> BoxFuture<'static, ()> {
        let (appender, is_failing) = (Arc::clone(&self.appender), Arc::clone(&self.is_failing));
        Box::pin(async move {
            let result = deliver(&appender, &message).await;
            let outcome = if result.is_ok() { WorkerOutcome::Delivered } else { WorkerOutcome::Failed };
            appender.metrics.engine.worker_messages.of(outcome).increment();
            let did_fail = is_failing.swap(result.is_err(), Ordering::Relaxed);
            match result {
                Err(error) if !did_fail => {
                    tracing::warn!(%error, message_id = %message.message_id, "messages for workers are dropped");
                }
                Ok(()) if did_fail => tracing::info!("messages reach the stream of workers again"),
                Ok(()) | Err(_) => {}
            }
        })
    }
}

/// Appends a message, also if that has to wait for room.
async fn deliver(appender: &Appender, message: &IncomingMessage) -> Result<(), AppendError> {
    let until = Instant::now() + MESSAGE_TIMEOUT;
    let mut attempts = 0;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match appender.append_within(message, left).await {
            Err(AppendError::Full) if !left.is_zero() => sleep(backoff(attempts)).await,
            result => return result,
        }
        attempts += 1;
    }
}
