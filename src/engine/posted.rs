//! A publish that was posted here, and that other nodes may have yet to answer for.

use tokio::time::Instant;

use crate::broker::Receipt;
use crate::metrics::{Label, PublishOutcome};
use crate::proto::delivery::{Delivery, Nobody};
use crate::traces::PublishSpan;

/// A publish that was posted here and offered to the other nodes, of which some may have yet to answer.
#[derive(Debug)]
#[must_use]
pub struct Posted {
    delivery: Delivery,
    waits: Option<Waits>,
    /// It ends with the value.
    span: PublishSpan,
}

/// For the other nodes, until when.
#[derive(Debug)]
struct Waits {
    receipt: Receipt,
    deadline: Instant,
}

impl Posted {
    /// There is nothing to wait for.
    pub(super) const fn here(delivery: Delivery) -> Self {
        Self { delivery, waits: None, span: PublishSpan::none() }
    }

    /// Other nodes answer by the receipt; a report waits for it until `deadline`.
    pub(super) const fn elsewhere(delivery: Delivery, receipt: Receipt, deadline: Instant) -> Self {
        Self { delivery, waits: Some(Waits { receipt, deadline }), span: PublishSpan::none() }
    }

    /// The same in the publish's span, which ends once as much as anybody waits for is known.
    pub(super) fn of(self, span: PublishSpan) -> Self {
        Self { span, ..self }
    }

    /// What is known now.
    #[must_use]
    pub const fn delivery(&self) -> Delivery {
        self.delivery
    }

    /// Whether other nodes have yet to answer.
    #[must_use]
    pub const fn is_waiting(&self) -> bool {
        self.waits.is_some()
    }

    /// Waits for the other nodes, until the publish's deadline has passed.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing: the frame is on its way.
    pub async fn settled(self) -> Delivery {
        let Self { mut delivery, waits, mut span } = self;
        let Some(Waits { mut receipt, deadline }) = waits else { return delivery };
        match tokio::time::timeout_at(deadline, &mut receipt).await {
            Ok(nodes) => delivery.nodes = nodes,
            Err(_) => {
                // One of them may have died: the others count.
                delivery.nodes = receipt.so_far();
                delivery.nobody = delivery.nobody.map(|_| Nobody::Waiting);
            }
        }
        delivery.nobody = delivery.nobody.filter(|_| delivery.nodes == 0);
        span.settled(outcome(delivery), delivery);
        delivery
    }

    /// Waits until every other node has taken it, or is gone: however long that takes.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing: the frame is on its way.
    pub async fn forwarded(self) {
        let Self { delivery, waits, mut span } = self;
        if let Some(Waits { receipt, .. }) = waits {
            let delivery = Delivery { nodes: receipt.await, nobody: None, ..delivery };
            span.settled(outcome(delivery), delivery);
        }
    }
}

/// What a span says of it once the other nodes have answered, or are not waited for any more.
fn outcome(delivery: Delivery) -> &'static str {
    let outcome = match delivery.nobody {
        _ if delivery.is_delivered() => PublishOutcome::Delivered,
        Some(Nobody::Waiting) => PublishOutcome::Forwarded,
        _ => PublishOutcome::Nobody,
    };
    outcome.name()
}
