//! The extension's negotiation in the opening handshake (RFC 7692 §5, §7.1; the header's grammar is RFC 6455 §9.1).

/// The extension's name.
const NAME: &str = "permessage-deflate";

/// What is answered, whether or not the client offered to go without context takeover (RFC 7692 §7.1.1.2).
const ACCEPTED: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

/// The same to an offer that asks for a window which is no smaller than ours (RFC 7692 §7.1.2.1).
const ACCEPTED_WITH_WINDOW: &str =
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=15";

/// The window that we compress with. An offer with a smaller one is declined: it would need a form of its own.
const WINDOW_BITS: u8 = 15;

/// Answers a client's `Sec-WebSocket-Extensions`, each header a text: the value of the header to answer with, for the
/// first offer that can be accepted. None: the connection goes without.
///
/// An offer with a parameter that is unknown, malformed, doubled or not to be granted is declined, and the next is
/// looked at. `client_max_window_bits` needs no answer: whatever window the client takes is inflated.
///
/// ```
/// use tabcast::proto::deflate::accept;
/// let accepted = accept(["permessage-deflate; client_max_window_bits"]);
/// assert_eq!(accepted, Some("permessage-deflate; server_no_context_takeover; client_no_context_takeover"));
/// assert_eq!(accept(["permessage-deflate; server_max_window_bits=10"]), None);
/// ```
#[must_use]
pub fn accept<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<&'static str> {
    headers.into_iter().flat_map(|header| split(header, ',')).find_map(answer)
}

/// The parameters that an offer may have (RFC 7692 §7.1).
#[derive(Default)]
struct Offer {
    server_no_context_takeover: bool,
    client_no_context_takeover: bool,
    server_max_window_bits: bool,
    client_max_window_bits: bool,
}

/// The answer to one offer, if it is one for this extension that can be accepted.
fn answer(offer: &str) -> Option<&'static str> {
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
                (value.and_then(window_bits) == Some(WINDOW_BITS), &mut seen.server_max_window_bits)
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
    Some(if seen.server_max_window_bits { ACCEPTED_WITH_WINDOW } else { ACCEPTED })
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

    const WITH_WINDOW: &str = ACCEPTED_WITH_WINDOW;

    #[test]
    fn the_first_offer_that_can_be_accepted_is() {
        let check = |headers: &[&str], expected: Option<&str>| {
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
    fn an_offer_that_is_not_understood_is_declined_and_no_more() {
        for parameters in [
            "server_max_window_bits=8",
            "server_max_window_bits=14",
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
            assert_eq!(accept([both.as_str()]), expected, "{both}");
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
