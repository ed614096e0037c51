//! Random steps over two shards against what must hold whatever happens.

use std::collections::HashMap;

use proptest::prelude::*;
use proptest::sample::Index;

use super::rig::{CLOSE, Got, PING, PONG, Rig, TEXT, client_frame, deflated_client_frame, edit, message, typing};
use crate::fanout::session::Address;
use crate::fanout::shard::Wire;
use crate::id::{ChannelId, MessageId, RoomName, UserId};
use crate::proto::disconnect::Disconnect;
use crate::proto::event::Notice;
use crate::proto::frame::Frame;
use crate::proto::limits::SessionLimits;

#[derive(Debug, Clone)]
enum Step {
    Open { shard: u16, user: u8, wire: Wire },
    Join { tab: Index, room: u8 },
    Leave { tab: Index, room: u8 },
    Say { tab: Index },
    Ping { tab: Index },
    Pong { tab: Index },
    Close { tab: Index },
    Split { tab: Index, at: usize },
    Garbage { tab: Index, bytes: Vec<u8> },
    ToUser { user: u8, what: What },
    ToRoom { room: u8, what: What },
    ToTab { tab: Index, what: What },
    End { user: u8 },
    Turn,
    Stall { tab: Index, room: usize },
    Writable { tab: Index, room: usize },
    Wait { seconds: u64 },
    Lose { tab: Index },
    EndOfInput { tab: Index },
}

#[derive(Debug, Clone, Copy)]
enum What {
    Message { bytes: usize },
    Edit { key: usize, bytes: usize },
    Typing { active: bool },
    Control,
}

fn what() -> impl Strategy<Value = What> {
    let bytes = prop_oneof![8 => 0usize..200, 1 => 1_000usize..4_000];
    prop_oneof![
        4 => bytes.clone().prop_map(|bytes| What::Message { bytes }),
        3 => (0..3usize, bytes).prop_map(|(key, bytes)| What::Edit { key, bytes }),
        2 => any::<bool>().prop_map(|active| What::Typing { active }),
        1 => Just(What::Control),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let tab = || any::<Index>();
    let wire = prop_oneof![
        2 => Just(Wire::WebSocket),
        2 => Just(Wire::DeflatedWebSocket),
        1 => Just(Wire::EventStream)
    ];
    let room = || prop_oneof![3 => 0usize..300, 1 => Just(usize::MAX)];
    let publish = prop_oneof![
        4 => (0..3u8, what()).prop_map(|(user, what)| Step::ToUser { user, what }),
        3 => (0..4u8, what()).prop_map(|(room, what)| Step::ToRoom { room, what }),
        2 => (tab(), what()).prop_map(|(tab, what)| Step::ToTab { tab, what }),
    ];
    let client = prop_oneof![
        4 => (tab(), 0..4u8).prop_map(|(tab, room)| Step::Join { tab, room }),
        2 => (tab(), 0..4u8).prop_map(|(tab, room)| Step::Leave { tab, room }),
        3 => tab().prop_map(|tab| Step::Say { tab }),
        2 => tab().prop_map(|tab| Step::Ping { tab }),
        4 => tab().prop_map(|tab| Step::Pong { tab }),
        1 => tab().prop_map(|tab| Step::Close { tab }),
        2 => (tab(), 1..12usize).prop_map(|(tab, at)| Step::Split { tab, at }),
        1 => (tab(), proptest::collection::vec(any::<u8>(), 1..20)).prop_map(|(tab, bytes)| Step::Garbage { tab, bytes }),
    ];
    let world = prop_oneof![
        4 => (tab(), room()).prop_map(|(tab, room)| Step::Stall { tab, room }),
        6 => (tab(), room()).prop_map(|(tab, room)| Step::Writable { tab, room }),
        2 => (1..30u64).prop_map(|seconds| Step::Wait { seconds }),
        1 => tab().prop_map(|tab| Step::Lose { tab }),
        1 => tab().prop_map(|tab| Step::EndOfInput { tab }),
        1 => (0..3u8).prop_map(|user| Step::End { user }),
    ];
    prop_oneof![
        3 => (0..2u16, 0..3u8, wire).prop_map(|(shard, user, wire)| Step::Open { shard, user, wire }),
        9 => publish,
        5 => client,
        5 => world,
        6 => Just(Step::Turn),
    ]
}

/// What one tab must see, if it sees all.
#[derive(Default)]
struct Expected {
    ordered: Vec<usize>,
    edits: HashMap<usize, Vec<usize>>,
}

/// A post that waits in the inboxes, and whom it was for when it was posted.
struct Waiting {
    number: usize,
    what: What,
    target: Target,
}

enum Target {
    Tabs(Vec<Address>),
    Room { name: RoomName, number: u64, shards: Vec<u16> },
}

struct Model {
    rig: Rig,
    expected: Vec<Expected>,
    waiting: Vec<Waiting>,
    keys: [MessageId; 3],
    next: usize,
}

impl Model {
    fn new() -> Self {
        let limits =
            SessionLimits { queue_frames_max: 6, queue_bytes_max: 4_000, rooms_max: 2, ..SessionLimits::default() };
        let keys = [MessageId::random(), MessageId::random(), MessageId::random()];
        Self { rig: Rig::with(2, limits, usize::MAX), expected: Vec::new(), waiting: Vec::new(), keys, next: 0 }
    }

    fn frame(&mut self, what: What) -> Frame {
        self.next += 1;
        let text = |bytes: usize| format!("{} {}", self.next, "x".repeat(bytes));
        let mut frame = match what {
            What::Message { bytes } => message(&text(bytes)),
            What::Edit { key, bytes } => edit(self.keys[key], &text(bytes)),
            What::Typing { active } => typing(active, "u"),
            What::Control => Frame::notice(&Notice::Pong { client_id: None }),
        };
        // Some have the compressed form and some have none, whoever reads them.
        if self.next.is_multiple_of(2) {
            frame.deflate();
        }
        frame
    }

    fn post(&mut self, channel: &str, what: What) {
        let channel = ChannelId::parse(channel).unwrap();
        let target = match &channel {
            ChannelId::User(user) => {
                let sessions = self.rig.hub.registry().get_sessions(user);
                Target::Tabs(sessions.iter().flat_map(|all| all.iter()).map(|session| session.address()).collect())
            }
            ChannelId::Room(name) => match self.rig.hub.rooms().find(name) {
                None => Target::Tabs(Vec::new()),
                Some(room) => {
                    let shards = room.shards().map(|(shard, _)| u16::try_from(shard).unwrap()).collect();
                    Target::Room { name: name.clone(), number: room.number(), shards }
                }
            },
            ChannelId::Stream(_) => unreachable!(),
        };
        let frame = self.frame(what);
        self.rig.hub.post(&channel, &frame).expect("there is room");
        self.waiting.push(Waiting { number: self.next, what, target });
    }

    fn members(&self, name: &RoomName) -> Vec<usize> {
        (0..self.rig.tabs.len())
            .filter(|tab| {
                let address = self.rig.tabs[*tab].address;
                self.rig.is_open(*tab)
                    && self.rig.shards[usize::from(address.shard())].rooms_of(address.slot()).contains(name)
            })
            .collect()
    }

    fn turn(&mut self) {
        for Waiting { number, what, target } in std::mem::take(&mut self.waiting) {
            let tabs: Vec<usize> = match target {
                Target::Tabs(addresses) => (0..self.rig.tabs.len())
                    .filter(|tab| addresses.contains(&self.rig.tabs[*tab].address) && self.rig.is_open(*tab))
                    .collect(),
                Target::Room { name, number, shards } => {
                    let same = self.rig.hub.rooms().find(&name).is_some_and(|room| room.number() == number);
                    let mut members = if same { self.members(&name) } else { Vec::new() };
                    members.retain(|tab| shards.contains(&self.rig.tabs[*tab].address.shard()));
                    members
                }
            };
            for tab in tabs {
                match what {
                    What::Message { .. } => self.expected[tab].ordered.push(number),
                    What::Edit { key, .. } => self.expected[tab].edits.entry(key).or_default().push(number),
                    What::Typing { .. } | What::Control => {}
                }
            }
        }
        self.rig.turn();
    }

    fn receive(&mut self, tab: usize, bytes: &[u8]) {
        self.rig.receive(tab, bytes);
        for (address, said) in std::mem::take(&mut self.rig.ear.answered) {
            assert_eq!(address, self.rig.tabs[tab].address);
            if let Some(number) = said.split(' ').next().and_then(|number| number.parse().ok()) {
                self.expected[tab].ordered.push(number);
            }
        }
        for (address, _) in std::mem::take(&mut self.rig.ear.heard) {
            assert_eq!(address, self.rig.tabs[tab].address);
        }
    }

    fn run(&mut self, step: Step) {
        let count = self.rig.tabs.len();
        let pick = |tab: Index| if count == 0 { None } else { Some(tab.index(count)) };
        let text = |text: String| client_frame(TEXT, text.as_bytes());
        match step {
            Step::Open { shard, user, wire } => {
                if let Ok(tab) = self.rig.try_open(shard, &format!("u{user}"), wire) {
                    self.expected.push(Expected::default());
                    self.rig.writable(tab, usize::MAX);
                }
            }
            Step::ToUser { user, what } => self.post(&format!("u{user}"), what),
            Step::ToRoom { room, what } => self.post(&format!("room:r{room}"), what),
            Step::End { user } => {
                let channel = ChannelId::User(UserId::parse(&format!("u{user}")).unwrap());
                self.rig.hub.end_sessions(&channel, Disconnect::Kicked).unwrap();
            }
            Step::Turn => self.turn(),
            Step::Wait { seconds } => self.rig.wait(seconds),
            Step::ToTab { tab, what } => {
                let Some(tab) = pick(tab) else { return };
                let (frame, address) = (self.frame(what), self.rig.tabs[tab].address);
                self.rig.hub.post_to_session(address, &frame).unwrap();
                self.waiting.push(Waiting { number: self.next, what, target: Target::Tabs(vec![address]) });
            }
            Step::Join { tab, room } => {
                pick(tab).into_iter().for_each(|t| self.receive(t, &text(format!("join r{room}"))))
            }
            Step::Leave { tab, room } => {
                pick(tab).into_iter().for_each(|t| self.receive(t, &text(format!("leave r{room}"))));
            }
            Step::Say { tab } => {
                self.next += 1;
                let say = format!("say {} reply", self.next);
                let Some(tab) = pick(tab) else { return };
                let is_deflated = self.rig.tabs[tab].wire == Wire::DeflatedWebSocket && self.next.is_multiple_of(3);
                let frame = if is_deflated { deflated_client_frame(say.as_bytes()) } else { text(say) };
                self.receive(tab, &frame);
            }
            Step::Ping { tab } => pick(tab).into_iter().for_each(|t| self.receive(t, &client_frame(PING, b"p"))),
            Step::Pong { tab } => pick(tab).into_iter().for_each(|t| self.receive(t, &client_frame(PONG, b""))),
            Step::Close { tab } => pick(tab).into_iter().for_each(|t| self.receive(t, &client_frame(CLOSE, b""))),
            Step::Split { tab, at } => {
                let frame = text("join r1".to_owned());
                pick(tab).into_iter().for_each(|t| {
                    self.receive(t, &frame[..at]);
                    self.receive(t, &frame[at..]);
                });
            }
            Step::Garbage { tab, bytes } => pick(tab).into_iter().for_each(|t| self.receive(t, &bytes)),
            Step::Stall { tab, room } => pick(tab).into_iter().for_each(|t| self.rig.stall(t, room)),
            Step::Writable { tab, room } => pick(tab).into_iter().for_each(|t| self.rig.writable(t, room)),
            Step::Lose { tab } => pick(tab).into_iter().for_each(|t| self.rig.lose(t)),
            Step::EndOfInput { tab } => pick(tab).into_iter().for_each(|t| {
                if !self.rig.tabs[t].gone {
                    let (shard, slot) = self.rig.shard_of(t);
                    shard.handle_end_of_input(slot);
                    self.rig.flush();
                }
            }),
        }
    }

    fn check_sums(&self) {
        self.rig.check_gauges();
        let deflates = |tab: &usize| self.rig.tabs[*tab].wire == Wire::DeflatedWebSocket && self.rig.is_open(*tab);
        let deflating = (0..self.rig.tabs.len()).filter(deflates).count();
        assert_eq!(self.rig.hub.deflating().sessions(), deflating);
        let open = (0..self.rig.tabs.len()).filter(|tab| self.rig.is_open(*tab)).count();
        assert_eq!(self.rig.hub.registry().total_connections(), open);
        for room in 0..4 {
            let name = RoomName::parse(&format!("r{room}")).unwrap();
            let counted =
                self.rig.hub.rooms().find(&name).map(|room| room.shards().map(|(_, count)| count).sum::<u32>());
            let members = self.members(&name).len();
            assert_eq!(counted, if members == 0 { None } else { u32::try_from(members).ok() });
        }
    }

    /// Everybody reads to the end; then each tab's bytes are compared with what was published.
    fn check_streams(&mut self) {
        self.turn();
        for tab in 0..self.rig.tabs.len() {
            let was_gone = self.rig.tabs[tab].gone;
            self.rig.writable(tab, usize::MAX);
            let (is_open, got) = (self.rig.is_open(tab), self.rig.got(tab));
            let (mut ordered, mut edits): (Vec<usize>, HashMap<usize, Vec<usize>>) = Default::default();
            for (place, got) in got.iter().enumerate() {
                let number = || got.text().and_then(|text| text.split(' ').next()?.parse().ok()).expect("a number");
                match got.kind() {
                    "message" => ordered.push(number()),
                    "edit" => {
                        let Got::Json(json) = got else { unreachable!() };
                        let key = self.keys.iter().position(|key| json["id"] == key.to_string()).expect("a key");
                        edits.entry(key).or_default().push(number());
                    }
                    _ => {}
                }
                let is_end = matches!(got, Got::Close(..) | Got::LastChunk);
                assert!(!is_end || place + 1 == self.rig.got(tab).len(), "nothing comes after the end");
            }
            let expected = &self.expected[tab];
            assert!(expected.ordered.starts_with(&ordered), "tab {tab}: {ordered:?} of {:?}", expected.ordered);
            for (key, versions) in &edits {
                assert!(versions.is_sorted(), "an edit goes forward only");
                assert!(versions.iter().all(|version| expected.edits[key].contains(version)));
            }
            if is_open {
                assert_eq!(ordered, expected.ordered);
                for (key, versions) in &expected.edits {
                    assert_eq!(edits[key].last(), versions.last(), "the last edit is not lost");
                }
            }
            if !was_gone {
                assert_eq!(self.rig.torn_bytes(tab), 0);
                let is_ended = matches!(got.last(), Some(Got::Close(..) | Got::LastChunk));
                assert_eq!(is_ended, !is_open, "who is cut is told so");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_frames_arrive_once_and_in_order_or_the_tab_is_told(
        steps in proptest::collection::vec(step(), 1..120)
    ) {
        let mut model = Model::new();
        for shard in 0..2 {
            model.run(Step::Open { shard, user: 0, wire: Wire::WebSocket });
        }
        for step in steps {
            model.run(step);
            model.check_sums();
        }
        model.check_streams();
    }
}
