//! Who is cut for the byte budget: nobody while there is a fatter one, on whichever shard of the node.

use std::time::Duration;

use tabcast::proto::disconnect::Disconnect;

use super::Violation;
use super::world::World;

/// Bytes of an answer to a client, or of a ping.
const ANSWER_BYTES: usize = 128;
/// A shard that has not been through its inbox for so long need not be waited for.
const WAIT: Duration = Duration::from_secs(1);
/// For so long what it said is good, whoever has become fatter or has stalled there since.
const GOOD: Duration = Duration::from_secs(2);

/// What waited for each tab of a node before something was done there.
pub(crate) struct Scales {
    node: usize,
    /// The tab, its shard and its bytes.
    before: Vec<(usize, usize, usize)>,
}

/// A power of two of bytes.
fn class(bytes: usize) -> u32 {
    bytes.checked_ilog2().unwrap_or(0)
}

impl Scales {
    /// Nothing is weighed in a world without a budget.
    pub(crate) fn weigh(world: &mut World, node: usize) -> Self {
        let scales = Self::look(world, node);
        for (tab, _, bytes) in &scales.before {
            let classes = &mut world.clients[*tab].classes;
            if classes.last().is_none_or(|(_, last)| *last != class(*bytes)) {
                classes.push((world.elapsed, class(*bytes)));
            }
            let old = classes.iter().rposition(|(from, _)| world.elapsed >= *from + GOOD);
            classes.drain(..old.unwrap_or_default());
        }
        scales
    }

    fn look(world: &World, node: usize) -> Self {
        let tabs = if world.bytes_budget == usize::MAX { 0 } else { world.clients.len() };
        let there = world.nodes[node].as_ref();
        let weigh = |tab: usize| {
            let address = world.clients[tab].address;
            let (slot, shard) = (address.slot(), usize::from(address.shard()));
            Some((tab, shard, there?.shards[shard].queued_for(slot).1))
        };
        let is_there = |tab: &usize| world.clients[*tab].node == node && world.oracle.tabs[*tab].is_listed;
        Self { node, before: (0..tabs).filter(is_there).filter_map(weigh).collect() }
    }

    /// Whether those of `shard` that were cut since then for the budget were the fattest of those that could be.
    /// One of another shard counts if that one answers when it is asked.
    pub(crate) fn the_fattest_are_cut_first(self, world: &mut World, shard: usize) -> Result<(), Violation> {
        let is_cut = |tab: usize| {
            let book = &world.oracle.tabs[tab];
            !book.is_listed && !book.reasons.is_empty() && book.reasons.iter().all(|why| *why == Disconnect::OverBudget)
        };
        let cut = self.before.iter().filter(|(tab, of, _)| *of == shard && is_cut(*tab));
        let bytes_max = |(tab, _, bytes): &(usize, usize, usize)| {
            let answers = ANSWER_BYTES * (1 + world.oracle.tabs[*tab].asked.len());
            (bytes + world.oracle.may_have_grown(*tab) + answers, *tab)
        };
        let thinnest = cut.map(bytes_max).min();
        let after = Self::weigh(world, self.node);
        let Some((bytes, thin)) = thinnest else { return Ok(()) };
        let heard_at = world.nodes[self.node].as_ref().map(|there| &there.heard_at[..]).unwrap_or_default();
        let is_silent = |of: usize| of != shard && world.elapsed >= heard_at[of] + WAIT;
        // Of another shard's: what it was all the time since that may have told of it.
        let known = |tab: usize, of: usize, fat: usize| {
            let client = &world.clients[tab];
            let is_old = |from: Duration| world.elapsed >= from + GOOD;
            match client.classes.iter().rposition(|(from, _)| is_old(*from)) {
                _ if of == shard => class(fat),
                Some(old) if is_old(client.blocked_at) => {
                    client.classes[old..].iter().map(|(_, class)| *class).min().unwrap_or(0)
                }
                _ => 0,
            }
        };
        let is_rival = |(tab, of, _): &&(usize, usize, usize)| world.clients[*tab].is_blocked && !is_silent(*of);
        let rivals =
            after.before.iter().filter(is_rival).map(|(tab, of, fat)| (known(*tab, *of, *fat), *tab, *of, *fat));
        match rivals.max() {
            Some((known, tab, of, fat)) if known > class(bytes) => {
                let text =
                    format!("tab {thin} was cut with {bytes} bytes at most, and tab {tab} of shard {of} has {fat}");
                Err(Violation::new("the_fattest_are_cut_first", text))
            }
            _ => Ok(()),
        }
    }
}
