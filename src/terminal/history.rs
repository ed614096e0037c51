//! The last five minutes of the numbers that are drawn.

use std::collections::VecDeque;

use super::status::Status;

/// Samples that are kept: one a second.
pub(super) const SAMPLES_MAX: usize = 300;

/// What is drawn as a curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Curve {
    Sessions,
    Deliveries,
    P99,
    QueuedBytes,
}

/// The newest samples of each curve.
#[derive(Debug, Default)]
pub(super) struct History {
    samples: VecDeque<[f64; 4]>,
}

impl History {
    pub(super) fn add(&mut self, status: &Status) {
        if self.samples.len() >= SAMPLES_MAX {
            self.samples.pop_front();
        }
        let p99 = status.latency_micros.p99.unwrap_or(0.0);
        self.samples.push_back([status.sessions.now, status.rates.deliveries, p99, status.queues.bytes]);
    }

    /// The `width` columns of a curve, each the most of its part of the time, the newest last: all five minutes, however
    /// narrow it is. Where there is nothing yet it is 0.
    pub(super) fn columns(&self, curve: Curve, width: usize) -> Vec<f64> {
        let samples: Vec<f64> = self.samples.iter().map(|sample| sample[curve as usize]).collect();
        if width == 0 {
            return Vec::new();
        }
        // Parts of the same length whatever has come yet, so that the curve moves and does not shrink.
        let part = SAMPLES_MAX.div_ceil(width);
        let parts = samples.rchunks(part).rev().map(|part| part.iter().copied().fold(0.0, f64::max));
        let empty = width - samples.len().div_ceil(part);
        std::iter::repeat_n(0.0, empty).chain(parts).collect()
    }

    /// The most there was.
    pub(super) fn most(&self, curve: Curve) -> f64 {
        self.samples.iter().map(|sample| sample[curve as usize]).fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_five_minutes_in_any_width_and_keeps_its_peaks() {
        let mut history = History::default();
        let mut status = Status::default();
        for second in 0..1_000 {
            status.sessions.now = f64::from(if second == 800 { 5_000 } else { second });
            history.add(&status);
        }
        assert_eq!(history.columns(Curve::Sessions, 300).len(), SAMPLES_MAX);
        let columns = history.columns(Curve::Sessions, 60);
        assert_eq!((columns.len(), columns[59]), (60, 999.0));
        assert!(columns.contains(&5_000.0));
        assert_eq!(history.most(Curve::Sessions), 5_000.0);
        assert_eq!(history.columns(Curve::P99, 7).len(), 7);
        assert!(history.columns(Curve::Sessions, 0).is_empty());
        assert_eq!(History::default().columns(Curve::Sessions, 3), [0.0; 3]);
        let mut short = History::default();
        short.add(&status);
        assert_eq!(short.columns(Curve::Sessions, 3), [0.0, 0.0, 999.0]);
    }
}
