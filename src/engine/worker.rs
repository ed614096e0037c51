//! A worker in this process: what runs a [`MessageHandler`] for each message that a person sends.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinSet};
use tokio::time::MissedTickBehavior;

use crate::engine::Engine;
use crate::engine::client::{ClientTexts, HandoverLimits};
use crate::engine::intake::{Intake, IntakeSettings};
use crate::platform::adapter::{BotIdentity, MessageHandler, Outlet};
use crate::platform::dispatch::{DispatchLimits, Inlet, Runner, dispatch};
use crate::platform::message::IncomingMessage;
use crate::platform::webchat::WebChat;

/// How often streams are looked at that were silent for too long.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What a worker is started with.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    /// Who answers: the sender of its messages, and who is addressed in a room.
    pub bot: BotIdentity,
    /// Whether a person's own message goes to all tabs of that person. Default true. In a room it always goes to all.
    pub echo_to_tabs: bool,
    /// How much may be on its way from tabs to the worker's queue.
    pub handover: HandoverLimits,
    /// How much may wait in that queue.
    pub queue: DispatchLimits,
    /// Ids of clients that are remembered for 5 minutes, so that a repeat is not handed on twice. Default 10,000; each
    /// costs about 640 bytes at most.
    pub client_ids_max: usize,
}

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            bot: BotIdentity::default(),
            echo_to_tabs: true,
            handover: HandoverLimits::default(),
            queue: DispatchLimits::default(),
            client_ids_max: 10_000,
        }
    }
}

/// There is no runtime here that could run the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a worker is started within a tokio runtime with timers, which then runs it")]
pub struct NoRuntime;

/// Tabs' messages on their way to a [`MessageHandler`]: acked, echoed and handed on, in this order, those of one channel
/// one after the other. It runs on the runtime that it was started in, until whatever has its [`texts`](Self::texts) is
/// gone and all that was accepted is handled.
///
/// ```
/// use std::sync::Arc;
/// use tabcast::engine::worker::Worker;
/// use tabcast::engine::{Engine, EngineSettings};
/// use tabcast::id::ChannelId;
/// use tabcast::platform::adapter::PlatformAdapter;
/// use tabcast::platform::message::IncomingMessage;
///
/// async fn answer(message: IncomingMessage, bot: Arc<dyn PlatformAdapter>) {
///     let Ok(channel) = ChannelId::parse(&message.channel_id) else { return };
///     let _ = bot.send(&channel, &format!("You said: {}", message.text)).await;
/// }
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(async {
/// let engine = Engine::new(EngineSettings::default());
/// let worker = Worker::start(&engine, answer)?;
/// assert_eq!(worker.inlet().counts().pending, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Worker {
    inlet: Inlet,
    texts: ClientTexts,
}

impl Worker {
    /// Starts a worker with the default settings.
    ///
    /// # Errors
    /// [`NoRuntime`]: nothing was started.
    pub fn start(engine: &Engine, handler: impl MessageHandler) -> Result<Self, NoRuntime> {
        Self::start_with(engine, handler, WorkerSettings::default())
    }

    /// Starts a worker.
    ///
    /// # Errors
    /// [`NoRuntime`]: nothing was started.
    pub fn start_with(
        engine: &Engine,
        handler: impl MessageHandler,
        settings: WorkerSettings,
    ) -> Result<Self, NoRuntime> {
        let runtime = Handle::try_current().map_err(|_| NoRuntime)?;
        let WorkerSettings { bot, echo_to_tabs, handover, queue, client_ids_max } = settings;
        let chat = Arc::new(WebChat::new(Arc::new(engine.clone()), bot.clone()));
        let (inlet, runner) = dispatch(Arc::new(handler), chat, queue);
        let intake = IntakeSettings { bot, echo_to_tabs, handover, client_ids_max, durable: None };
        let (intake, texts) = Intake::new(engine.clone(), inlet.clone(), intake);
        runtime.spawn(run(runner));
        let (engine, ends) = (engine.clone(), inlet.clone());
        runtime.spawn(async move {
            tokio::select! {
                () = intake.run() => {}
                () = look_after(engine, ends.clone()) => {}
            }
            ends.end();
        });
        Ok(Self { inlet, texts })
    }

    /// What understands tabs' texts on a shard: for whoever runs shards in a way of their own.
    #[must_use]
    pub fn texts(&self) -> &ClientTexts {
        &self.texts
    }

    /// The worker's queue.
    #[must_use]
    pub fn inlet(&self) -> &Inlet {
        &self.inlet
    }

    /// Accepts nothing more, and waits until all that was accepted is handled. Put it under a deadline: a handler may
    /// hang.
    ///
    /// # Cancel safety
    /// Dropped, nothing more is accepted, and what was is handled all the same.
    pub async fn finish(&self) {
        self.inlet.close();
        self.inlet.drained().await;
    }
}

/// Tells the worker of streams that nobody reads any more, and ends those that were silent for too long. Never ready.
///
/// # Cancel safety
/// Dropping it loses nothing.
pub(crate) async fn look_after(engine: Engine, inlet: Inlet) {
    let mut sweeps = tokio::time::interval(SWEEP_INTERVAL);
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            cancelled = engine.hub().next_cancelled() => {
                let cancel = IncomingMessage::cancel(&cancelled.request, &cancelled.owner, engine.now());
                inlet.cancel(cancel);
            }
            _ = sweeps.tick() => engine.hub().sweep_streams(),
        }
    }
}

/// Runs the lanes of a worker's queue, each on a task of its own, until the inlet has ended and all is handled.
///
/// # Cancel safety
/// Dropping it ends the lanes where they are: what they were handling is lost, and what waits is not handled.
pub async fn run(mut runner: Runner) {
    let mut lanes = JoinSet::new();
    loop {
        tokio::select! {
            lane = runner.next() => match lane {
                Some(lane) => {
                    lanes.spawn(lane.run());
                }
                None => break,
            },
            Some(ended) = lanes.join_next(), if !lanes.is_empty() => report(ended),
        }
    }
    while let Some(ended) = lanes.join_next().await {
        report(ended);
    }
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a message handler panicked; its message is lost");
    }
}
