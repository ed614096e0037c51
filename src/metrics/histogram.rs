//! How values are spread over fixed bounds, and what can be read from that.

use crate::metrics::{Add, Counter};

/// How values are spread over `N` fixed bounds. One thread writes it, or any if `C` is a [`SharedCounter`].
///
/// [`SharedCounter`]: crate::metrics::SharedCounter
#[derive(Debug)]
pub struct Histogram<const N: usize, C = Counter> {
    bounds: &'static [u64; N],
    counts: [C; N],
    over: C,
    sum: C,
}

impl<const N: usize, C: Add> Histogram<N, C> {
    /// An empty one; `bounds` are inclusive upper ends, ascending.
    #[must_use]
    pub fn new(bounds: &'static [u64; N]) -> Self {
        Self { bounds, counts: std::array::from_fn(|_| C::default()), over: C::default(), sum: C::default() }
    }

    /// Counts `value` in its bucket.
    #[inline]
    pub fn record(&self, value: u64) {
        self.record_many(value, 1);
    }

    /// Counts the same `value` as often as `times` says.
    #[inline]
    pub fn record_many(&self, value: u64, times: u64) {
        let bucket = self.bounds.iter().position(|bound| value <= *bound);
        bucket.map_or(&self.over, |at| &self.counts[at]).add(times);
        self.sum.add(value.wrapping_mul(times));
    }

    /// The inclusive upper ends of the buckets.
    #[must_use]
    pub fn bounds(&self) -> &'static [u64; N] {
        self.bounds
    }

    /// What it holds now.
    #[must_use]
    pub fn sum(&self) -> HistogramSum<N> {
        let mut total = HistogramSum::new(self.bounds);
        self.add_to(&mut total);
        total
    }

    /// Adds what this histogram holds to `total`, which has the same bounds.
    pub fn add_to(&self, total: &mut HistogramSum<N>) {
        for (sum, count) in total.counts.iter_mut().zip(&self.counts) {
            *sum += count.reading();
        }
        total.over += self.over.reading();
        total.sum += self.sum.reading();
    }
}

/// Several histograms with the same bounds, added up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistogramSum<const N: usize> {
    /// The inclusive upper ends of the buckets.
    pub bounds: &'static [u64; N],
    /// How many values fell into each bucket (not cumulative).
    pub counts: [u64; N],
    /// How many were over the last bound.
    pub over: u64,
    /// The sum of all values.
    pub sum: u64,
}

impl<const N: usize> HistogramSum<N> {
    /// The sum of none.
    #[must_use]
    pub const fn new(bounds: &'static [u64; N]) -> Self {
        Self { bounds, counts: [0; N], over: 0, sum: 0 }
    }

    /// How many values there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.over
    }

    /// What came since `earlier`, a sum of the same histograms.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            bounds: self.bounds,
            counts: std::array::from_fn(|at| self.counts[at].saturating_sub(earlier.counts[at])),
            over: self.over.saturating_sub(earlier.over),
            sum: self.sum.saturating_sub(earlier.sum),
        }
    }

    /// The value that `share` of all values do not exceed, as near as the bounds tell: within a bucket values count as
    /// evenly spread, and what is over the last bound counts as that. None if there are no values. `share` is from 0 to 1.
    ///
    /// ```
    /// use tabcast::metrics::Histogram;
    /// let histogram: Histogram<3> = Histogram::new(&[10, 100, 1_000]);
    /// let before = histogram.sum();
    /// (0..99).for_each(|_| histogram.record(5));
    /// histogram.record(700);
    /// let interval = histogram.sum().since(&before);
    /// assert_eq!((interval.quantile(0.5), interval.quantile(0.99)), (Some(5), Some(10)));
    /// assert_eq!((interval.quantile(1.0), before.quantile(0.5)), (Some(1_000), None));
    /// ```
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "an estimate between two bounds")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two bounds, so it is one")]
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = share.clamp(0.0, 1.0) * count as f64;
        let (mut below, mut lower) = (0, 0);
        for (bound, in_bucket) in self.bounds.iter().zip(self.counts) {
            if in_bucket > 0 && (below + in_bucket) as f64 >= rank {
                let part = (rank - below as f64) / in_bucket as f64;
                return Some(lower + ((bound - lower) as f64 * part) as u64);
            }
            below += in_bucket;
            lower = *bound;
        }
        self.bounds.last().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_falls_into_the_first_bucket_that_holds_it() {
        let histogram: Histogram<3> = Histogram::new(&[1, 10, 100]);
        for value in [0, 1, 2, 10, 11, 100, 101] {
            histogram.record(value);
        }
        histogram.record_many(5, 3);
        let mut total = histogram.sum();
        histogram.add_to(&mut total);
        assert_eq!((total.counts, total.over, total.sum), ([4, 10, 4], 2, 480));
        assert_eq!(total.count(), 20);
    }

    #[test]
    fn a_quantile_lies_between_the_bounds_of_its_bucket() {
        let check = |counts: [u64; 3], over: u64, share: f64, expected: Option<u64>| {
            let sum = HistogramSum { bounds: &[10, 20, 40], counts, over, sum: 0 };
            assert_eq!(sum.quantile(share), expected, "{counts:?} {over} {share}");
        };
        check([0, 0, 0], 0, 0.5, None);
        check([10, 0, 0], 0, 0.5, Some(5));
        check([0, 10, 0], 0, 0.5, Some(15));
        check([0, 10, 0], 0, 0.0, Some(10));
        check([5, 0, 5], 0, 0.5, Some(10));
        check([5, 0, 5], 0, 0.75, Some(30));
        check([5, 0, 5], 0, 7.0, Some(40));
        check([0, 0, 0], 3, 0.5, Some(40));
        check([1, 0, 0], 99, 0.99, Some(40));
    }
}
