//! What is published, by workers and by people, and what a publish has to answer.

use std::sync::Arc;

use tabcast::id::MessageId;
use tabcast::proto::delivery::PublishError;
use tabcast::proto::event::{Button, Event, Notice, Timestamp};
use tabcast::proto::frame::Frame;

use super::Violation;
use super::client::Client;
use super::oracle::{USERS, What};
use super::world::{Between, Handed, World, channel_id};

impl World {
    pub(super) fn publish_something(&mut self) -> Result<bool, Violation> {
        let (node, channel) = (self.pick_node(), self.pick_channel());
        let what = match self.dice.below(12) {
            0..5 => What::Message,
            5 => What::File,
            6..10 => self.pick_edit(channel).unwrap_or(What::Message),
            _ => What::Typing,
        };
        let bytes = match self.dice.below(20) {
            0 => self.dice.between(2_000, 12_000),
            1..6 => self.dice.between(100, 900),
            _ => self.dice.below(60),
        };
        self.publish(node, channel, what, bytes)
    }

    pub(super) fn pick_edit(&mut self, channel: usize) -> Option<What> {
        let is_it = |number: &usize| {
            let publication = &self.oracle.publications[*number];
            publication.channel == channel && publication.what == What::Message
        };
        let recent: Vec<usize> = (0..self.oracle.publications.len()).rev().filter(is_it).take(3).collect();
        self.dice.pick(&recent).map(What::Edit)
    }

    /// Publishes on a node. False if it was refused.
    pub(super) fn publish(&mut self, node: usize, channel: usize, what: What, bytes: usize) -> Result<bool, Violation> {
        let id = match what {
            What::Edit(message) => self.oracle.publications[message].id,
            _ => MessageId::from_u128(u128::from(self.dice.next()) << 64 | u128::from(self.dice.next())),
        };
        // Quotes and separators are six bytes in the worst case.
        let bytes_max = 6 * bytes + 400;
        let number = self.oracle.publish(node, channel, what, (id, bytes_max));
        let filling = if self.dice.one_in(2) { "x" } else { "é\"\u{2028}" };
        let text = format!("#{number} {}", filling.repeat(bytes / filling.len()));
        let timestamp = Timestamp::from_micros(1_700_000_000_500_000);
        let (sender, data) = (if channel < USERS { "star" } else { "u0" }, vec![7; bytes]);
        let buttons = [Button { label: "yes".to_owned(), custom_id: "y".to_owned(), ..Button::default() }];
        let event = match what {
            What::Message if number.is_multiple_of(5) => {
                Event::Buttons { id, text: &text, sender, reply_to: None, buttons: &buttons, timestamp }
            }
            What::Message => Event::Message { id, text: &text, sender, reply_to: None, timestamp },
            What::File => {
                let filename = &text[..text.find(' ').unwrap() + 1];
                Event::File { id, filename, mimetype: "a/b", data: &data, timestamp }
            }
            What::Edit(_) => Event::Edit { id, text: &text, timestamp },
            What::Typing => Event::Typing { active: number.is_multiple_of(2) },
        };
        self.largest_frame = self.largest_frame.max(bytes_max);
        let addressed = self.oracle.addressed(node, channel);
        let others: Vec<usize> = self.live_nodes().into_iter().filter(|other| *other != node).collect();
        let engine = self.node(node).engine.clone();
        let result = engine.try_publish(&channel_id(channel), event);
        self.trace.note(format!("node {node} publishes #{number} {what:?} of {bytes} bytes to {channel}: {result:?}"));
        self.trace.counts.published += 1;
        match result {
            Ok(delivery) if delivery.tabs == addressed => {
                self.oracle.posted(node, number)?;
                self.spread(node, number, &others)?;
                Ok(true)
            }
            Err(PublishError::Overloaded) if engine.hub().waiting_posts() > 0 => {
                self.trace.counts.overloaded += 1;
                Ok(false)
            }
            Err(PublishError::SpoolFull) if addressed == 0 => {
                self.trace.counts.spool_full += 1;
                Ok(false)
            }
            Err(error) => {
                let text = format!("#{number} was refused on node {node} with nothing in the way: {error}");
                Err(Violation::new("what_is_refused_has_a_reason", text))
            }
            Ok(delivery) => {
                let text = format!("#{number} went to {addressed} tabs of node {node} by the book, and {delivery:?}");
                Err(Violation::new("the_registry_has_who_is_there", text))
            }
        }
    }

    /// What was posted on one node is on its way to the others; by memory it is there.
    pub(super) fn spread(&mut self, node: usize, number: usize, others: &[usize]) -> Result<(), Violation> {
        if let Between::Network(network) = &self.between {
            if network.took_last() {
                self.oracle.forwarded(number, others.iter().copied());
            }
            return Ok(());
        }
        for other in others {
            let there = self.node(*other);
            let refused = there.engine.metrics().engine.refused_forwards.value();
            if std::mem::replace(&mut there.refused_forwards, refused) == refused {
                self.oracle.posted(*other, number)?;
            } else {
                let is_to_user = self.oracle.publications[number].channel < USERS;
                self.oracle.found_loss(*other, (node, is_to_user), |lost| lost == number);
            }
        }
        self.trace.note(format!("#{number} is on all nodes but {node}"));
        Ok(())
    }

    /// Two nodes change one message, which is on its way to one of them.
    pub(super) fn rewrite(&mut self) -> Result<(), Violation> {
        let (first, second, channel) = (self.pick_node(), self.pick_node(), self.pick_channel());
        let message = self.oracle.publications.len();
        if self.publish(first, channel, What::Message, 10)? {
            for node in [second, first] {
                self.publish(node, channel, What::Edit(message), 10)?;
            }
        }
        Ok(())
    }

    pub(super) fn burst(&mut self) -> Result<(), Violation> {
        let (node, channel) = (self.pick_node(), self.pick_channel());
        for _ in 0..self.dice.between(5, 50) {
            let what = match self.dice.below(8) {
                0 | 1 => self.pick_edit(channel),
                2 => Some(What::Typing),
                _ => None,
            };
            let bytes = self.dice.below(300);
            if !self.publish(node, channel, what.unwrap_or(What::Message), bytes)? {
                break;
            }
        }
        Ok(())
    }

    /// The worker's queue takes what people said: the ack to whoever said it, then the echo to all of that user's tabs.
    pub(crate) fn hand_on(&mut self) -> Result<(), Violation> {
        for Handed { node, address, user, client_id } in std::mem::take(&mut self.handed) {
            if self.nodes[node].is_none() {
                continue;
            }
            let hub = Arc::clone(self.node(node).engine.hub());
            let ack = client_id.map(|id| Frame::notice(&Notice::Ack { client_id: &id, id: None }));
            let refused = ack.is_some_and(|ack| hub.post_to_session(address, &ack).is_err());
            if refused && hub.waiting_posts() == 0 {
                return Err(Violation::new("what_is_refused_has_a_reason", format!("an ack to {address:?}")));
            }
            if refused {
                // Whoever said it is not told, and does not wait for ever.
                let same = |client: &Client| client.node == node && client.address == address;
                if let Some(tab) = self.clients.iter().position(same) {
                    self.oracle.tabs[tab].asked.clear();
                }
            }
            self.publish(node, user, What::Message, 20)?;
        }
        Ok(())
    }

    pub(crate) fn hand(&mut self, tab: usize, client_id: Option<Box<str>>) {
        let (node, address, user) = (self.clients[tab].node, self.clients[tab].address, self.oracle.tabs[tab].user);
        self.handed.push(Handed { node, address, user, client_id });
    }
}
