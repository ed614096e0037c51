//! A mailbox is a tab by the rules of every tab: order, bounds, resume, rooms, and an end that says why.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Barrier};
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::Value;
use tabcast::engine::mailboxes::{ConnectError, Mailboxes, SayError, StartError, TabMailbox};
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::hub::Drain;
use tabcast::fanout::registry::TooManyTabs;
use tabcast::fanout::session::{Identity, RoomGrant};
use tabcast::fanout::shard::{OpenError, Resume};
use tabcast::id::{ChannelId, RoomName, UserId};
use tabcast::platform::adapter::{BotIdentity, MessageHandler, Outlet, PlatformAdapter, Unanswered};
use tabcast::platform::message::IncomingMessage;
use tabcast::platform::webchat::WebChat;
use tabcast::proto::disconnect::Disconnect;
use tabcast::proto::limits::{HubLimits, SessionLimits};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

struct Rig {
    engine: Engine,
    bot: WebChat<Engine>,
    mailboxes: Mailboxes,
}

impl Rig {
    fn new(settings: EngineSettings) -> Self {
        Self::answered_by(Unanswered, settings)
    }

    fn answered_by(handler: impl MessageHandler, settings: EngineSettings) -> Self {
        let engine = Engine::new(settings);
        let bot = WebChat::new(Arc::new(engine.clone()), BotIdentity::default());
        let mailboxes = Mailboxes::start(&engine, handler).unwrap();
        Self { engine, bot, mailboxes }
    }

    fn identity(&self, user: &str, rooms: RoomGrant) -> Identity {
        Identity { rooms, ..Identity::new(UserId::parse(user).unwrap(), self.engine.now()) }
    }

    async fn connect(&self, user: &str) -> TabMailbox {
        self.mailboxes.connect(self.identity(user, RoomGrant::Any)).await.unwrap()
    }

    async fn send(&self, channel: &str, text: &str) {
        self.bot.send(&ChannelId::parse(channel).unwrap(), text).await.unwrap();
    }

    async fn wait_for_tabs(&self, count: usize) {
        let settled = async {
            while self.engine.hub().registry().total_connections() != count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, settled).await.unwrap();
    }
}

async fn next(tab: &mut TabMailbox) -> Option<Value> {
    let frame = timeout(PATIENCE, tab.next()).await.expect("in time")?;
    Some(serde_json::from_slice(frame.json()).unwrap())
}

#[tokio::test]
async fn tabs_of_several_users_hear_one_order_and_only_what_is_theirs() {
    let rig = Rig::new(EngineSettings::default());
    let lobby = RoomName::parse("lobby").unwrap();
    let mut tabs = Vec::new();
    for user in ["ann", "ann", "ben"] {
        let tab = rig.connect(user).await;
        tab.voice().join(&lobby).await.unwrap();
        tabs.push(tab);
    }
    let say = async |publisher: usize| {
        for n in 0..50 {
            rig.send("room:lobby", &format!("{publisher}:{n}")).await;
            tokio::task::yield_now().await;
        }
    };
    let hear = async |tab: &mut TabMailbox| {
        let mut texts = Vec::new();
        while texts.len() < 100 {
            texts.push(next(tab).await.unwrap()["text"].as_str().unwrap().to_owned());
        }
        texts
    };
    let [ann, another, ben] = &mut tabs[..] else { unreachable!("three tabs") };
    let (.., first, second, third) = tokio::join!(say(0), say(1), hear(ann), hear(another), hear(ben));
    assert_eq!((&first, &first), (&second, &third));
    for publisher in ["0:", "1:"] {
        let own = first.iter().filter_map(|text| text.strip_prefix(publisher));
        assert!(own.map(|n| n.parse::<usize>().unwrap()).eq(0..50), "{first:?}");
    }
    rig.send("ann", "for ann").await;
    rig.send("ben", "for ben").await;
    for (tab, text) in [(ann, "for ann"), (another, "for ann"), (ben, "for ben")] {
        assert_eq!(next(tab).await.unwrap()["text"], text);
    }
}

#[tokio::test]
async fn one_that_does_not_read_is_cut_and_gets_the_rest_when_it_comes_back() {
    let sessions = SessionLimits { queue_frames_max: 8, ..SessionLimits::default() };
    let rig = Rig::new(EngineSettings { sessions, ..EngineSettings::default() });
    let (mut slow, mut other) = (rig.connect("ann").await, rig.connect("ann").await);
    let (mut all, mut heard) = (Vec::new(), Vec::new());
    for n in 0..60 {
        rig.send("ann", &n.to_string()).await;
        // The one that reads has it before the next is said: it is never behind.
        all.push(next(&mut other).await.unwrap()["id"].as_str().unwrap().to_owned());
        if n < 3 {
            heard.push(next(&mut slow).await.unwrap()["id"].as_str().unwrap().to_owned());
        }
    }
    // What was handed over, and not read, went with its queue: a reader that never comes would keep it.
    let ended = async {
        while slow.ending().is_none() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, ended).await.unwrap();
    assert_eq!(next(&mut slow).await, None);
    assert_eq!(slow.ending(), Some(Disconnect::SlowConsumer));
    assert!(all.starts_with(&heard));
    assert_eq!(slow.voice().say("{}".to_owned()).await, Err(SayError::Ended));
    let resume = Resume::from_position(heard.last().map(String::as_str));
    let mut back = rig.mailboxes.reconnect(rig.identity("ann", RoomGrant::None), resume).await.unwrap();
    while heard.len() < all.len() {
        heard.push(next(&mut back).await.unwrap()["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(heard, all, "whole, and nothing twice");
    assert_eq!(other.ending(), None);
}

#[tokio::test]
async fn what_is_waiting_is_replaced_in_the_queue_and_large_frames_pass() {
    let rig = Rig::new(EngineSettings::default());
    let mut tab = rig.connect("ann").await;
    let channel = ChannelId::parse("ann").unwrap();
    let large = "x".repeat(300 << 10);
    let id = rig.bot.send(&channel, &large).await.unwrap();
    rig.send("ann", "behind").await;
    for step in 0..200 {
        assert!(rig.bot.edit_message(&channel, id, &format!("step {step}")).await.unwrap());
    }
    assert_eq!(next(&mut tab).await.unwrap()["text"], large);
    assert_eq!(next(&mut tab).await.unwrap()["text"], "behind");
    let mut edits = Vec::new();
    while edits.last().is_none_or(|last| last != "step 199") {
        edits.push(next(&mut tab).await.unwrap()["text"].as_str().unwrap().to_owned());
    }
    assert!(edits.len() < 200, "nobody gets every step who did not read them: {}", edits.len());
}

#[tokio::test]
async fn limits_and_grants_are_those_of_every_tab() {
    let sessions = SessionLimits { rooms_max: 1, message_bytes_max: 100, ..SessionLimits::default() };
    let hub = HubLimits { tabs_per_user_max: 2, ..HubLimits::default() };
    let rig = Rig::new(EngineSettings { sessions, hub, ..EngineSettings::default() });
    let rooms = RoomGrant::from_patterns(&["game-*".to_owned()]);
    let tab = rig.mailboxes.connect(rig.identity("ann", rooms)).await.unwrap();
    let second = rig.connect("ann").await;
    let third = rig.mailboxes.connect(rig.identity("ann", RoomGrant::None)).await;
    let limit = TooManyTabs { tabs_max: 2 };
    assert_eq!(third.err(), Some(ConnectError::Open(OpenError::TooManyTabs(limit))));
    let room = |name: &str| RoomName::parse(name).unwrap();
    let voice = tab.voice();
    assert_eq!(voice.join(&room("lobby")).await, Err(SayError::NotGranted));
    assert_eq!(voice.join(&room("game-1")).await, Ok(()));
    assert_eq!(voice.join(&room("game-2")).await, Err(SayError::TooManyRooms));
    assert_eq!(voice.leave(&room("game-1")).await, Ok(()));
    assert_eq!(voice.join(&room("game-2")).await, Ok(()));
    let long = "x".repeat(101);
    assert_eq!(voice.say(long).await, Err(SayError::TooLarge { bytes: 101, bytes_max: 100 }));
    // Who leaves is gone: from the user, from the rooms, and for whoever spoke for it.
    drop(tab);
    rig.wait_for_tabs(1).await;
    assert_eq!(voice.join(&room("game-1")).await, Err(SayError::Ended));
    assert_eq!(rig.engine.hub().room_count(), 0);
    drop(second);
    rig.wait_for_tabs(0).await;
    assert!(!rig.engine.is_online(&UserId::parse("ann").unwrap()).await);
}

#[tokio::test]
async fn an_end_says_why_and_a_shutdown_waits_for_the_readers() {
    let rig = Rig::new(EngineSettings::default());
    assert!(matches!(Mailboxes::start(&rig.engine, Unanswered), Err(StartError::Started)));
    let mut kicked = rig.connect("ann").await;
    rig.engine.end_sessions(&UserId::parse("ann").unwrap(), Disconnect::Kicked).await.unwrap();
    assert_eq!(next(&mut kicked).await, None);
    assert_eq!(kicked.ending(), Some(Disconnect::Kicked));
    let mut tab = rig.connect("ben").await;
    rig.send("ben", "last words").await;
    let drain = Drain { spread: Duration::ZERO, closes_per_second_max: u32::MAX, latest: Duration::ZERO };
    let read = async {
        assert_eq!(next(&mut tab).await.unwrap()["text"], "last words");
        assert_eq!(next(&mut tab).await.unwrap()["type"], "draining");
        assert_eq!(next(&mut tab).await, None);
        assert_eq!(tab.ending(), Some(Disconnect::ServiceRestart));
    };
    let ((), ended) = tokio::join!(read, timeout(PATIENCE, rig.mailboxes.shutdown(drain)));
    ended.unwrap();
    assert_eq!(rig.mailboxes.connect(rig.identity("ann", RoomGrant::None)).await.err(), Some(ConnectError::Ended));
    let without = EngineSettings { has_mailboxes: false, ..EngineSettings::default() };
    assert!(matches!(Mailboxes::start(&Engine::new(without), Unanswered), Err(StartError::NoShard)));
}

#[tokio::test]
async fn a_large_frame_that_nobody_reads_is_within_the_budget() {
    let hub = HubLimits { bytes_budget: 2 << 20, ..HubLimits::default() };
    let rig = Rig::new(EngineSettings { hub, ..EngineSettings::default() });
    let mut tab = rig.connect("ann").await;
    rig.send("ann", &"x".repeat(3 << 20)).await;
    let ended = async {
        while tab.ending().is_none() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, ended).await.unwrap();
    assert_eq!(tab.ending(), Some(Disconnect::OverBudget));
    assert_eq!(next(&mut tab).await, None);
}

/// Hangs for ever.
async fn hang(_: IncomingMessage, _: Arc<dyn PlatformAdapter>) {
    std::future::pending().await
}

#[tokio::test]
async fn a_handler_that_hangs_keeps_no_tab_from_being_told_to_come_back() {
    for is_dropped in [false, true] {
        let rig = Rig::answered_by(hang, EngineSettings::default());
        let mut tab = rig.connect("ann").await;
        tab.voice().say(r#"{"type":"message","text":"hi","client_id":"1"}"#.to_owned()).await.unwrap();
        assert_eq!(next(&mut tab).await.unwrap()["type"], "ack");
        assert_eq!(next(&mut tab).await.unwrap()["text"], "hi");
        let latest = if is_dropped { Duration::from_secs(3_600) } else { Duration::from_millis(200) };
        let drain = Drain { spread: Duration::ZERO, closes_per_second_max: u32::MAX, latest };
        let shutdown = async {
            let patience = if is_dropped { Duration::from_millis(50) } else { PATIENCE };
            assert_eq!(timeout(patience, rig.mailboxes.shutdown(drain)).await.is_err(), is_dropped);
        };
        let read = async {
            assert_eq!(next(&mut tab).await.unwrap()["type"], "draining");
            assert_eq!(next(&mut tab).await, None);
            assert_eq!(tab.ending(), Some(Disconnect::ServiceRestart));
        };
        tokio::join!(shutdown, read);
    }
}

#[tokio::test]
async fn a_limit_that_changes_is_that_of_open_tabs() {
    let rig = Rig::new(EngineSettings::default());
    let tab = rig.connect("ann").await;
    let voice = tab.voice();
    let limit = |message_bytes_max| {
        rig.engine.limit_sessions(SessionLimits { message_bytes_max, ..SessionLimits::default() });
    };
    let text = r#"{"type":"ping","client_id":"1"}"#.to_owned();
    limit(20);
    let too_large = SayError::TooLarge { bytes: text.len(), bytes_max: 20 };
    assert_eq!(voice.say(text.clone()).await, Err(too_large));
    limit(100);
    assert_eq!(voice.say(text).await, Ok(()));
}

#[tokio::test]
async fn limits_that_change_twice_at_once_are_one_and_the_same_everywhere() {
    // The mailboxes' shard is told last, which takes a while.
    let rig = Rig::new(EngineSettings { shards: 256, ..EngineSettings::default() });
    let mut tab = rig.connect("ann").await;
    let voice = tab.voice();
    let rooms = ["lobby", "game"].map(|name| RoomName::parse(name).unwrap());
    assert_eq!(voice.join(&rooms[0]).await, Ok(()));
    let limit = |rooms_max| {
        let sessions = SessionLimits::default();
        rig.engine.limit_sessions(SessionLimits { message_bytes_max: 100 + rooms_max, rooms_max, ..sessions });
    };
    let limit = &limit;
    for _ in 0..400 {
        let start = &Barrier::new(2);
        std::thread::scope(|scope| {
            for rooms_max in [1, 2] {
                scope.spawn(move || {
                    start.wait();
                    limit(rooms_max);
                });
            }
        });
        // Behind the limits, in the shard's inbox.
        rig.send("ann", "there").await;
        assert_eq!(next(&mut tab).await.unwrap()["text"], "there");
        let rooms_max = if voice.join(&rooms[1]).await.is_ok() { 2 } else { 1 };
        let hello: Value = serde_json::from_slice(rig.engine.hello(tab.address()).json()).unwrap();
        assert_eq!(
            hello["limits"]["message_bytes_max"],
            100 + rooms_max,
            "what tabs are told, and what their shard goes by"
        );
        assert_eq!(voice.leave(&rooms[1]).await, Ok(()));
    }
}

#[tokio::test]
async fn who_comes_back_is_told_that_rooms_were_not_kept_and_who_ends_joins_none() {
    let rig = Rig::new(EngineSettings::default());
    let mut tab = rig.connect("ann").await;
    rig.send("ann", "one").await;
    let position = next(&mut tab).await.unwrap()["id"].as_str().unwrap().to_owned();
    drop(tab);
    let lobby = RoomName::parse("lobby").unwrap();
    let resume = Resume::from_position(Some(&position));
    let mut back = rig.mailboxes.reconnect(rig.identity("ann", RoomGrant::Any), resume).await.unwrap();
    back.voice().join(&lobby).await.unwrap();
    let gap = next(&mut back).await.unwrap();
    assert_eq!((&gap["type"], &gap["reason"]), (&"gap".into(), &"room_not_kept".into()));
    // One that has yet to read what it had waiting is in no room any more, and joins none.
    let ending = rig.connect("ben").await;
    for n in 0..40 {
        rig.send("ben", &n.to_string()).await;
    }
    let ben = UserId::parse("ben").unwrap();
    rig.engine.end_sessions(&ben, Disconnect::Kicked).await.unwrap();
    rig.wait_for_tabs(1).await;
    assert_eq!(ending.ending(), None);
    assert_eq!(ending.voice().join(&lobby).await, Err(SayError::Ended));
}

#[test]
fn without_a_runtime_nothing_is_started() {
    let engine = Engine::new(EngineSettings::default());
    assert!(matches!(Mailboxes::start(&engine, Unanswered), Err(StartError::NoRuntime(_))));
}
