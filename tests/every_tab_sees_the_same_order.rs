//! Shards on real threads, publishers on others: all tabs of a user, and of a room, see one order.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use support::shards::Shards;
use support::{Client, Seen};
use tabcast::fanout::hub::Hub;
use tabcast::id::{ChannelId, MessageId};
use tabcast::proto::event::{Event, Timestamp};
use tabcast::proto::frame::Frame;

const SHARDS: usize = 4;
const TABS: usize = 12;
const PUBLISHERS: usize = 6;
const PER_PUBLISHER: usize = 200;

/// Posts to the user and to the room in turn, each text being `channel publisher number`.
fn publish(hub: &Hub, publisher: usize) {
    for number in 0..PER_PUBLISHER {
        for name in ["webchat:u", "room:r"] {
            let channel = ChannelId::parse(name).unwrap();
            let text = format!("{name} {publisher} {number}");
            let (id, timestamp) = (MessageId::random(), Timestamp::from_micros(0));
            let frame = Frame::encode(&Event::Message { id, text: &text, sender: "s", reply_to: None, timestamp });
            while hub.post(&channel, &frame).is_err() {
                std::thread::yield_now();
            }
        }
    }
}

/// The texts of one channel, in the order in which the tab saw them.
fn read(mut tab: Client) -> [Vec<String>; 2] {
    let mut seen = [Vec::new(), Vec::new()];
    while seen.iter().map(Vec::len).sum::<usize>() < 2 * PUBLISHERS * PER_PUBLISHER {
        let text = tab.json()["text"].as_str().unwrap().to_owned();
        seen[usize::from(text.starts_with("room:"))].push(text);
    }
    // Nothing was doubled: what comes next is the end.
    loop {
        match tab.frame() {
            Seen::Text(text) => assert!(text.starts_with(br#"{"type":"draining","#), "{text:?}"),
            Seen::Close(code, _) => break assert_eq!(code, 1012),
            Seen::Ping(_) => {}
            Seen::End => panic!("no close"),
        }
    }
    seen
}

#[test]
fn with_many_publishers_and_several_shards() {
    let shards = Shards::start(SHARDS);
    let tabs: Vec<_> = (0..TABS)
        .map(|_| {
            let mut tab = Client::tab(shards.address(), "user=u");
            tab.send(&json!({"join": "r"}));
            assert_eq!(tab.json()["type"], "pong");
            tab
        })
        .collect();
    let sessions = shards.hub.registry().get_sessions(&tabcast::id::UserId::parse("u").unwrap()).unwrap();
    let mut on: Vec<_> = sessions.iter().map(|session| session.address().shard()).collect();
    on.sort_unstable();
    on.dedup();
    assert!(on.len() > 1, "the kernel gave all tabs to one shard");
    let readers: Vec<_> = tabs.into_iter().map(|tab| std::thread::spawn(move || read(tab))).collect();
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let hub = Arc::clone(&shards.hub);
            std::thread::spawn(move || publish(&hub, publisher))
        })
        .collect();
    publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
    assert_eq!(shards.drain(Duration::ZERO, Duration::from_secs(10)), 0);
    let seen: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    for (channel, name) in ["webchat:u", "room:r"].into_iter().enumerate() {
        for tab in &seen[1..] {
            assert!(tab[channel] == seen[0][channel], "two tabs saw two orders");
        }
        for publisher in 0..PUBLISHERS {
            let own = format!("{name} {publisher} ");
            let expected = (0..PER_PUBLISHER).map(|number| format!("{own}{number}"));
            assert!(seen[0][channel].iter().filter(|text| text.starts_with(&own)).cloned().eq(expected));
        }
    }
}
