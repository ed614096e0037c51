//! Labels: closed enums, and one counter for each of their values.

use std::marker::PhantomData;

use crate::metrics::Reading;
use crate::proto::disconnect::Disconnect;
use crate::proto::frame::{Class, Kind};

/// A label's values: a closed list.
pub trait Label: Copy + 'static {
    /// Every value, in the order of [`Label::index`].
    const VALUES: &'static [Self];
    /// Its place in [`Label::VALUES`].
    fn index(self) -> usize;
    /// Its name; spaces become underscores in the exposition.
    fn name(self) -> &'static str;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$value_doc])* $value,)+
        }

        impl $name {
            /// How many values there are.
            pub const COUNT: usize = [$(Self::$value),+].len();
        }

        impl Label for $name {
            const VALUES: &'static [Self] = &[$(Self::$value),+];

            fn index(self) -> usize {
                self as usize
            }

            fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $text,)+
                }
            }
        }
    };
}

pub(crate) use label;

impl Label for Disconnect {
    const VALUES: &'static [Self] = &Self::ALL;

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        self.reason()
    }
}

impl Label for Kind {
    const VALUES: &'static [Self] = &Self::ALL;

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        self.as_str()
    }
}

impl Label for Class {
    const VALUES: &'static [Self] = &[Self::Control, Self::Ordered, Self::Latest];

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Ordered => "ordered",
            Self::Latest => "latest",
        }
    }
}

/// One counter for each value of a label.
#[derive(Debug)]
pub struct PerLabel<L, C, const N: usize> {
    counters: [C; N],
    label: PhantomData<fn(L)>,
}

impl<L: Label, C: Default, const N: usize> Default for PerLabel<L, C, N> {
    fn default() -> Self {
        const { assert!(L::VALUES.len() == N, "one counter for each value of the label") };
        Self { counters: std::array::from_fn(|_| C::default()), label: PhantomData }
    }
}

impl<L: Label, C, const N: usize> PerLabel<L, C, N> {
    /// The counter of `label`.
    #[inline]
    pub fn of(&self, label: L) -> &C {
        &self.counters[label.index()]
    }
}

impl<L: Label, C: Reading, const N: usize> PerLabel<L, C, N> {
    /// The sum over all labels.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counters.iter().map(Reading::reading).sum()
    }
}
