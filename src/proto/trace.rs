//! Which trace something belongs to: the headers `traceparent` and `tracestate` of the W3C's Trace Context, and the same
//! in bytes between nodes.

use std::fmt;
use std::num::{NonZeroU64, NonZeroU128};

/// The most bytes of a `tracestate` that are handed on (W3C Trace Context, 3.3.1.5: at least 512).
pub const STATE_BYTES_MAX: usize = 512;

/// Bytes of a `traceparent` of version 00.
const PARENT_BYTES: usize = 55;

/// A span, wherever it is: what comes after it is its child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    trace: NonZeroU128,
    span: NonZeroU64,
    is_sampled: bool,
    state: Box<str>,
}

impl TraceContext {
    /// A span of a trace. A state that cannot be a header, or is longer than [`STATE_BYTES_MAX`], is left out: the
    /// parent counts without it.
    #[must_use]
    pub fn new(trace: NonZeroU128, span: NonZeroU64, is_sampled: bool, state: &str) -> Self {
        let state = if is_state(state) { state } else { "" };
        Self { trace, span, is_sampled, state: state.into() }
    }

    /// Reads the two headers (W3C Trace Context, 3.2 and 3.3); None: there is no parent, and no state counts. Of a version
    /// that is not known here, what is known is read. An empty `state` is none.
    ///
    /// ```
    /// use tabcast::proto::trace::TraceContext;
    ///
    /// let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    /// let context = TraceContext::parse(parent, "vendor=1").ok_or("no parent")?;
    /// assert!(context.is_sampled());
    /// assert_eq!((context.to_string().as_str(), context.state()), (parent, "vendor=1"));
    /// assert_eq!(TraceContext::parse("00-0-0-01", ""), None);
    /// # Ok::<(), &str>(())
    /// ```
    #[must_use]
    pub fn parse(parent: &str, state: &str) -> Option<Self> {
        let (known, more) = parent.split_at_checked(PARENT_BYTES)?;
        let mut fields = known.split('-');
        let mut next = |digits: usize| hexadecimal(fields.next()?, digits);
        let (version, trace, span, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
        let is_whole = match version {
            0 => more.is_empty(),
            0xff => false,
            _ => more.is_empty() || more.starts_with('-'),
        };
        if !is_whole || fields.next().is_some() {
            return None;
        }
        let span = u64::try_from(span).ok().and_then(NonZeroU64::new)?;
        Some(Self::new(NonZeroU128::new(trace)?, span, flags & 1 == 1, state))
    }

    /// The trace.
    #[must_use]
    pub const fn trace(&self) -> NonZeroU128 {
        self.trace
    }

    /// The span in it.
    #[must_use]
    pub const fn span(&self) -> NonZeroU64 {
        self.span
    }

    /// Whether its spans are recorded.
    #[must_use]
    pub const fn is_sampled(&self) -> bool {
        self.is_sampled
    }

    /// `tracestate`, or nothing.
    #[must_use]
    pub const fn state(&self) -> &str {
        &self.state
    }

    /// Bytes that it holds.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        size_of::<Self>() + self.state.len()
    }
}

/// `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, u8::from(self.is_sampled))
    }
}

/// Whether it may be a `tracestate` that is handed on; an empty one may.
#[must_use]
pub fn is_state(state: &str) -> bool {
    state.len() <= STATE_BYTES_MAX && state.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// So many lower-case digits.
fn hexadecimal(text: &str, digits: usize) -> Option<u128> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == digits && text.bytes().all(is_digit)).then(|| u128::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_no_parent_is_none() {
        let check = |parent: &str, expected: Option<&str>| {
            let read = TraceContext::parse(parent, "").map(|context| context.to_string());
            assert_eq!(read.as_deref(), expected, "{parent:?}");
        };
        check(PARENT, Some(PARENT));
        check(&PARENT.replace("-01", "-00"), Some(&PARENT.replace("-01", "-00")));
        // Flags that are not known here are not handed on.
        check(&PARENT.replace("-01", "-ff"), Some(PARENT));
        check(&PARENT.replace("-01", "-fe"), Some(&PARENT.replace("-01", "-00")));
        // A later version may have more behind it.
        check(&PARENT.replace("00-4", "01-4"), Some(PARENT));
        check(&format!("{}-more", PARENT.replace("00-4", "cc-4")), Some(PARENT));
        for bad in [
            "".to_owned(),
            PARENT[..54].to_owned(),
            format!("{PARENT}-more"),
            format!("{PARENT} "),
            format!(" {PARENT}"),
            format!("{}more", PARENT.replace("00-4", "01-4")),
            PARENT.replace("00-4", "ff-4"),
            PARENT.replace("4bf9", "4BF9"),
            PARENT.replace("4bf9", "+bf9"),
            PARENT.replace("-01", "-0g"),
            PARENT.replace("-01", "_01"),
            PARENT.replace("b7-01", "-b701"),
            PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            PARENT.replace("00f067aa0ba902b7", &"0".repeat(16)),
            PARENT.replace('4', "ü"),
            "ü".repeat(40),
        ] {
            check(&bad, None);
        }
    }

    #[test]
    fn a_state_that_cannot_be_one_is_left_out_and_the_parent_counts() {
        let state = |state: &str| TraceContext::parse(PARENT, state).unwrap().state().to_owned();
        for good in ["", "a=1", "a=1, b@c=\"2\\", &"x".repeat(STATE_BYTES_MAX)] {
            assert_eq!(state(good), good);
        }
        for bad in ["a=\n", "a=ü", "a\u{7f}", &"x".repeat(STATE_BYTES_MAX + 1)] {
            assert_eq!(state(bad), "");
        }
    }
}
