//! The extension's negotiation in the opening handshake (RFC 7692 §5, §7.1; the header's grammar is RFC 6455 §9.1).

use crate::proto::deflate::Window;

/// The extension's name.
const NAME: &str = "permessage-deflate";

/// What is answered, whether or not the client offered to go without context takeover (RFC 7692 §7.1.1.2).
const ACCEPTED: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

macro_rules! with_windows {
    ($($bits:literal)*) => {
        /// The same to an offer that asks for a window, from the smallest on (RFC 7692 §7.1.2.1).
        const ACCEPTED_WITH_WINDOW: [&str; [$($bits),*].len()] = [$(concat!(
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=", $bits
        )),*];
    };
}

with_windows!(9 10 11 12 13 14 15);

/// An offer that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// The value of the header to answer with.
    pub header: &'static str,
    /// How far back what we compress may refer.
    pub window: Window,
}

/// Answers a client's `Sec-WebSocket-Extensions`, each header a text, for the first offer that can be accepted with the
/// full window: what is made once for all is for those. If there is none, for the first that can be accepted at all.
/// None: the connection goes without.
///
/// An offer with a parameter that is unknown, malformed, doubled or not to be granted (a window of 256 bytes) is
/// declined, and the next is looked at. `client_max_window_bits` needs no answer: whatever window the client takes is
/// inflated.
///
/// ```
/// use tabcast::proto::deflate::{Window, accept};
/// let accepted = accept(["permessage-deflate; client_max_window_bits"]).ok_or("declined")?;
/// assert_eq!(accepted.header, "permessage-deflate; server_no_context_takeover; client_no_context_takeover");
/// assert_eq!(accepted.window, Window::FULL);
/// assert_eq!(accept(["permessage-deflate; server_max_window_bits=8"]), None);
/// # Ok::<(), &str>(())
/// ```
#[must_use]
pub fn accept<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Accepted> {
    let mut first = None;
    for accepted in headers.into_iter().flat_map(|header| split(header, ',')).filter_map(answer) {
        if accepted.window == Window::FULL {
            return Some(accepted);
        }
        first = first.or(Some(accepted));
    }
    first
}

/// The parameters that an offer may have (RFC 7692 §7.1).
#[derive(Default)]
struct Offer {
    server_no_context_takeover: bool,
    client_no_context_takeover: bool,
    server_max_window_bits: bool,
    client_max_window_bits: bool,
    window: Option<Window>,
}

/// The answer to one offer, if it is one for this extension that can be accepted.
fn answer(offer: &str) -> Option<Accepted> {
    let mut parts = split(offer, ';');
    if parts.next()? != NAME {
        return None;
    }
    let mut seen = Offer::default();
    for parameter in parts {
        let (name, value) = match parameter.split_once('=') {
            Some((name, value)) => (name.trim_end_matches(SPACES), Some(value.trim_start_matches(SPACES))),
            None => (parameter, None),
        };
        let (is_fine, place) = match name {
            "server_no_context_takeover" => (value.is_none(), &mut seen.server_no_context_takeover),
            "client_no_context_takeover" => (value.is_none(), &mut seen.client_no_context_takeover),
            "server_max_window_bits" => {
                seen.window = value.and_then(window_bits).and_then(Window::of_bits);
                (seen.window.is_some(), &mut seen.server_max_window_bits)
            }
            "client_max_window_bits" => {
                (value.is_none_or(|value| window_bits(value).is_some()), &mut seen.client_max_window_bits)
            }
            _ => return None,
        };
        if !is_fine || std::mem::replace(place, true) {
            return None;
        }
    }
    let Some(window) = seen.window else { return Some(Accepted { header: ACCEPTED, window: Window::FULL }) };
    let place = usize::from(window.bits() - Window::SMALLEST.bits());
    Some(Accepted { header: ACCEPTED_WITH_WINDOW.get(place)?, window })
}

const SPACES: [char; 2] = [' ', '\t'];

/// A number from 8 to 15, without a leading zero, as a token or a quoted string that is one.
fn window_bits(value: &str) -> Option<u8> {
    let token = match value.strip_prefix('"') {
        Some(quoted) => quoted.strip_suffix('"')?,
        None => value,
    };
    let is_number = !token.starts_with('0') && token.bytes().all(|byte| byte.is_ascii_digit());
    let bits = token.parse().ok().filter(|_| is_number)?;
    (8..=15).contains(&bits).then_some(bits)
}

/// Splits at a character that is not inside a quoted string; spaces around the parts are taken off.
fn split(text: &str, at: char) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let separates = move |character: char| {
        if is_escaped {
            is_escaped = false;
        } else if is_quoted {
            is_escaped = character == '\\';
            is_quoted = character != '"';
        } else {
            is_quoted = character == '"';
            return character == at;
        }
        false
    };
    text.split(separates).map(|part| part.trim_matches(SPACES))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH_WINDOW: &str = ACCEPTED_WITH_WINDOW[6];

    #[test]
    fn the_first_offer_that_can_be_accepted_is() {
        let check = |headers: &[&str], expected: Option<&'static str>| {
            let expected = expected.map(|header| Accepted { header, window: Window::FULL });
            assert_eq!(accept(headers.iter().copied()), expected, "{headers:?}");
        };
        // Chromium; Firefox and Safari; Safari before it had the extension.
        check(&["permessage-deflate; client_max_window_bits"], Some(ACCEPTED));
        check(&["permessage-deflate"], Some(ACCEPTED));
        check(&["x-webkit-deflate-frame"], None);
        check(&[], None);
        check(&[""], None);
        // Several offers: in one header, in several, behind what is not ours.
        check(&["permessage-deflate; server_max_window_bits=10, permessage-deflate"], Some(ACCEPTED));
        check(&["permessage-deflate; server_max_window_bits=10", "permessage-deflate"], Some(ACCEPTED));
        check(&["x-webkit-deflate-frame, permessage-deflate"], Some(ACCEPTED));
        check(&["foo; bar=\"a, permessage-deflate; b\", permessage-deflate;client_max_window_bits=8"], Some(ACCEPTED));
        check(&["foo; bar=\"a, permessage-deflate"], None);
        check(&["foo; bar=\"a\\\", b\",permessage-deflate"], Some(ACCEPTED));
        check(&[", ,permessage-deflate,"], Some(ACCEPTED));
        check(&["permessage-deflate; server_max_window_bits=15, permessage-deflate"], Some(WITH_WINDOW));
        // What is granted, and how spaces may stand.
        check(&["permessage-deflate;server_no_context_takeover;client_no_context_takeover"], Some(ACCEPTED));
        check(&["\t permessage-deflate \t;  server_no_context_takeover  "], Some(ACCEPTED));
        check(&["permessage-deflate; server_max_window_bits=15"], Some(WITH_WINDOW));
        check(&["permessage-deflate; server_max_window_bits = \"15\"; client_max_window_bits"], Some(WITH_WINDOW));
        for bits in 8..=15 {
            check(&[&format!("permessage-deflate; client_max_window_bits={bits}")], Some(ACCEPTED));
        }
    }

    #[test]
    fn a_smaller_window_is_granted_if_nothing_else_is_offered() {
        for bits in 9..=14 {
            let offer = format!("permessage-deflate; client_max_window_bits; server_max_window_bits={bits}");
            let header = format!("{ACCEPTED}; server_max_window_bits={bits}");
            let accepted = accept([offer.as_str()]).unwrap();
            assert_eq!((accepted.header, accepted.window.bits()), (header.as_str(), bits));
            let both = accept([offer.as_str(), "permessage-deflate; server_max_window_bits=9", "permessage-deflate"]);
            assert_eq!(both, Some(Accepted { header: ACCEPTED, window: Window::FULL }));
            let narrow = accept([offer.as_str(), "permessage-deflate; server_max_window_bits=9"]);
            assert_eq!(narrow, Some(accepted));
        }
    }

    #[test]
    fn an_offer_that_is_not_understood_is_declined_and_no_more() {
        for parameters in [
            "server_max_window_bits=8",
            "server_max_window_bits=014",
            "server_max_window_bits",
            "server_max_window_bits=",
            "server_max_window_bits=16",
            "server_max_window_bits=015",
            "server_max_window_bits=+15",
            "server_max_window_bits=\"15",
            "server_max_window_bits=15\"",
            "server_max_window_bits=99999999999999999999",
            "client_max_window_bits=7",
            "client_max_window_bits=16",
            "client_max_window_bits=x",
            "client_max_window_bits=",
            "server_no_context_takeover=1",
            "server_no_context_takeover=",
            "client_no_context_takeover=\"\"",
            "server_no_context_takeover; server_no_context_takeover",
            "client_max_window_bits; client_max_window_bits=15",
            "server_max_window_bits=15; server_max_window_bits=15",
            "unknown",
            "unknown=1",
            "",
            "server_no_context_takeover;;client_no_context_takeover",
            "=15",
            "server_no_context_takeover client_no_context_takeover",
            "SERVER_NO_CONTEXT_TAKEOVER",
        ] {
            let offer = format!("permessage-deflate; {parameters}");
            assert_eq!(accept([offer.as_str()]), None, "{offer}");
            // The next one is not its fault, unless a quoted string swallows it.
            let both = format!("{offer}, permessage-deflate");
            let expected = (parameters.matches('"').count() % 2 == 0).then_some(ACCEPTED);
            assert_eq!(accept([both.as_str()]).map(|accepted| accepted.header), expected, "{both}");
        }
        for name in [
            "permessage-deflate2",
            "permessage-bzip2",
            "Permessage-deflate",
            "permessage-deflate=1",
            "\"permessage-deflate\"",
        ] {
            assert_eq!(accept([name]), None, "{name}");
        }
    }
}
