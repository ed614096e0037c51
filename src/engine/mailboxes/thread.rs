//! The thread that runs the mailboxes' shard: turns as a driver's, with hands in the place of sockets.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, Sleep};

use crate::engine::Engine;
use crate::engine::client::ClientText;
use crate::engine::mailboxes::hand::{Hand, Stirred};
use crate::engine::mailboxes::{SayError, TabMailbox};
use crate::fanout::session::Address;
use crate::fanout::shard::{Join, OpenError, Opening, Shard};
use crate::id::RoomName;
use crate::proto::disconnect::Disconnect;

/// Commands and hand-overs of one turn.
const TURN_COMMANDS_MAX: usize = 64;
const TURN_SESSIONS_MAX: usize = 256;

/// What a tab, or whoever wants one, asks of the shard.
#[derive(Debug)]
pub(super) enum Command {
    Open {
        opening: Box<Opening>,
        /// Who greets it, if it wants to be.
        greeter: Option<Engine>,
        tab: TabMailbox,
        reply: oneshot::Sender<Result<TabMailbox, OpenError>>,
    },
    Text {
        address: Address,
        text: String,
    },
    Join {
        address: Address,
        room: RoomName,
        reply: oneshot::Sender<Result<(), SayError>>,
    },
    Leave {
        address: Address,
        room: RoomName,
    },
}

pub(super) struct MailboxThread {
    shard: Shard,
    inbound: ClientText,
    commands: mpsc::Receiver<Command>,
    stirred: Arc<Stirred>,
    hands: Hands,
    tick: Pin<Box<Sleep>>,
    tick_interval: Duration,
}

impl MailboxThread {
    /// Starts it. What is returned turns false when it has ended.
    pub(super) fn start(
        engine: &Engine,
        index: u16,
        inbound: ClientText,
        (commands, stirred): (mpsc::Receiver<Command>, Arc<Stirred>),
    ) -> io::Result<watch::Receiver<bool>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let (hub, settings) = (Arc::clone(engine.hub()), engine.settings());
        let (sessions, bytes_budget) = (settings.sessions.clone(), settings.hub.bytes_budget);
        let (is_running, running) = watch::channel(true);
        let run = move || {
            runtime.block_on(async {
                let now = Instant::now().into_std();
                let mut thread = Self {
                    shard: Shard::new(hub, index, sessions, bytes_budget, now),
                    inbound,
                    commands,
                    stirred,
                    hands: Hands::default(),
                    tick: Box::pin(tokio::time::sleep(Duration::ZERO)),
                    tick_interval: Duration::ZERO,
                };
                poll_fn(|context| thread.poll(context)).await;
            });
            is_running.send_replace(false);
        };
        std::thread::Builder::new().name("mailboxes".to_owned()).spawn(run)?;
        Ok(running)
    }

    /// One turn. Ready once the shard has drained.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let now = Instant::now();
        let mut has_more = self.poll_commands(context);
        for hand in self.stirred.take(context) {
            self.look_at(&hand);
        }
        self.shard.handle_inbox(now.into_std());
        self.poll_tick(now, context);
        let Self { shard, hands, .. } = self;
        let mut sessions = 0;
        while sessions < TURN_SESSIONS_MAX
            && shard.poll_frames(|slot, given| hands.get(slot).is_none_or(|hand| hand.take(&given)))
        {
            sessions += 1;
        }
        while let Some((slot, ending)) = shard.poll_ended() {
            if let Some(hand) = hands.take(slot) {
                hand.end(ending);
            }
        }
        if shard.is_drained() {
            return Poll::Ready(());
        }
        has_more |= shard.has_work();
        if has_more || !shard.park(context.waker()) {
            context.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn poll_tick(&mut self, now: Instant, context: &mut Context<'_>) {
        loop {
            let is_due = self.tick.as_mut().poll(context).is_ready();
            if is_due {
                self.shard.handle_tick(now.into_std());
            } else if self.shard.tick_interval() == self.tick_interval {
                return;
            }
            // The next one, or an earlier one: a drain has begun.
            self.tick_interval = self.shard.tick_interval();
            self.tick.as_mut().reset(now + self.tick_interval);
        }
    }

    /// Whether there may be more.
    fn poll_commands(&mut self, context: &mut Context<'_>) -> bool {
        for _ in 0..TURN_COMMANDS_MAX {
            match self.commands.poll_recv(context) {
                Poll::Ready(Some(command)) => self.carry_out(command),
                Poll::Ready(None) | Poll::Pending => return false,
            }
        }
        true
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Open { opening, greeter, tab, reply } => {
                let greet = |address| greeter.map(|engine| engine.hello(address));
                let opened = self.shard.open(*opening, greet).map(|address| {
                    tab.hand.opened(address);
                    self.hands.put(address.slot(), Arc::clone(&tab.hand));
                    self.shard.handle_writable(address.slot());
                    tab
                });
                // One that nobody waits for any more is dropped, and so ends.
                drop(reply.send(opened));
            }
            Command::Text { address, text } => {
                if let Some(slot) = self.shard.slot_of(address) {
                    self.shard.handle_text(slot, &mut text.into_bytes(), &mut self.inbound);
                }
            }
            Command::Join { address, room, reply } => {
                // Whoever has gone does not wait for the answer.
                let _ = reply.send(self.join(address, &room));
            }
            Command::Leave { address, room } => {
                if let Some(slot) = self.shard.slot_of(address) {
                    self.shard.handle_leave(slot, &room);
                }
            }
        }
    }

    fn join(&mut self, address: Address, room: &RoomName) -> Result<(), SayError> {
        let slot = self.shard.slot_of(address).ok_or(SayError::Ended)?;
        let session = self.shard.session(slot).ok_or(SayError::Ended)?;
        if !session.identity().rooms.allows(room) {
            return Err(SayError::NotGranted);
        }
        match self.shard.handle_join(slot, room) {
            Join::Member => Ok(()),
            Join::Full => Err(SayError::TooManyRooms),
            Join::Ends => Err(SayError::Ended),
        }
    }

    /// A reader wants more, or is gone.
    fn look_at(&mut self, hand: &Hand) {
        let is_left = hand.look();
        let Some(slot) = hand.address().and_then(|address| self.shard.slot_of(address)) else { return };
        if is_left {
            self.shard.handle_lost(slot, Disconnect::Normal);
        } else {
            self.shard.handle_writable(slot);
        }
    }
}

/// The tabs' hands, by slot. Whoever is left when the thread ends is told.
#[derive(Default)]
struct Hands(Vec<Option<Arc<Hand>>>);

impl Hands {
    fn get(&self, slot: u32) -> Option<&Hand> {
        self.0.get(slot as usize)?.as_deref()
    }

    fn put(&mut self, slot: u32, hand: Arc<Hand>) {
        let slot = slot as usize;
        if slot >= self.0.len() {
            self.0.resize_with(slot + 1, || None);
        }
        self.0[slot] = Some(hand);
    }

    fn take(&mut self, slot: u32) -> Option<Arc<Hand>> {
        self.0.get_mut(slot as usize)?.take()
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        for hand in self.0.drain(..).flatten() {
            hand.end(Disconnect::InternalError);
        }
    }
}
