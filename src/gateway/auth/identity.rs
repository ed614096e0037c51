//! Who is at the other end of a session, and where a request says so.

use http::HeaderMap;
use http::header;
use percent_encoding::percent_decode;

use crate::config::KEY_BYTES_MIN;
use crate::fanout::session::RoomGrant;
use crate::id::UserId;
use crate::proto::event::Timestamp;

use super::UserError;

/// The most bytes of a user's name, which has no control characters: a session keeps it as long as it lives.
pub const NAME_BYTES_MAX: usize = 256;
/// The most bytes of an avatar's URL, which has no control characters.
pub const AVATAR_BYTES_MAX: usize = 2048;
/// The cookie that may carry a token.
const COOKIE: &str = "tabcast_token";
/// What stands before a token among a WebSocket's subprotocols.
const PROTOCOL_PREFIX: &str = "tabcast.bearer.";
/// The subprotocol to offer beside the token, so that the answer need not repeat the token.
const PROTOCOL: &str = "tabcast";

/// Whose session it is, and what it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The user.
    pub user: UserId,
    /// For people; the user id if nothing else was given. At most [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// A URL, or empty. At most [`AVATAR_BYTES_MAX`] bytes.
    pub avatar: String,
    /// The rooms that it may join.
    pub rooms: RoomGrant,
    /// When the session ends, if it does by itself: the token's end with the leeway.
    pub expires_at: Option<Timestamp>,
}

/// What a request for a session offers as proof, not yet verified. Owned, so that it can be verified elsewhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    pub(super) proof: Proof,
    protocol: Option<Box<str>>,
}

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Proof {
    Token(Box<str>),
    /// Development mode: taken at its word.
    Word(Box<Claims>),
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self.proof, Proof::Token(_)) { "Credential(token)" } else { "Credential(word)" })
    }
}

impl Credential {
    pub(super) fn new(proof: Proof, headers: &HeaderMap) -> Self {
        Self { proof, protocol: answered_protocol(headers).map(Box::from) }
    }

    /// The subprotocol that a WebSocket's answer has to name: `tabcast` if the client offers it, else the one that
    /// carries the token, else none.
    #[must_use]
    pub fn protocol(&self) -> Option<&str> {
        self.protocol.as_deref()
    }
}

/// Where a token was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In a header that only the page's own script sets.
    Header,
    /// In a cookie, which comes along with whatever any page asks.
    Cookie,
}

/// The token after `Bearer` in the only `Authorization`; nothing if it is empty.
pub(in crate::gateway) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let text = value.to_str().ok()?;
    let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// Whether a key was shown that is too long to be found by guessing. Its own length counts, so that a known key which is
/// given here only as its digest is no longer than it is.
pub(in crate::gateway) fn shows_long_key(headers: &HeaderMap) -> bool {
    bearer(headers).is_some_and(|key| key.len() >= KEY_BYTES_MIN)
}

fn protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(',')).map(str::trim)
}

fn answered_protocol(headers: &HeaderMap) -> Option<&str> {
    let plain = protocols(headers).find(|protocol| *protocol == PROTOCOL);
    plain.or_else(|| protocols(headers).find(|protocol| protocol.starts_with(PROTOCOL_PREFIX)))
}

/// The value of our cookie; nothing if it is there twice, as when another host of the domain planted one.
fn cookie(headers: &HeaderMap) -> Option<&str> {
    let texts = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut values = texts.flat_map(|text| text.split(';')).filter_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        (name.trim() == COOKIE).then(|| value.trim().trim_matches('"'))
    });
    match (values.next(), values.next()) {
        (Some(value), None) if !value.is_empty() => Some(value),
        _ => None,
    }
}

/// The first token of a request: `Authorization: Bearer`, then the subprotocol, then the cookie.
pub(super) fn token(headers: &HeaderMap) -> Option<(&str, Place)> {
    let protocol = || protocols(headers).find_map(|protocol| protocol.strip_prefix(PROTOCOL_PREFIX));
    let in_header = bearer(headers).or_else(protocol).map(|token| (token, Place::Header));
    in_header.or_else(|| cookie(headers).map(|token| (token, Place::Cookie)))
}

/// Development mode: `?user=&name=&avatar=`, percent-encoded, `+` for a space; the first of each counts.
pub(super) fn claims_from_query(query: Option<&str>, bot: &UserId) -> Result<Claims, UserError> {
    let (mut user, mut name, mut avatar) = (None, None, None);
    for pair in query.unwrap_or_default().split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let place = match key {
            "user" => &mut user,
            "name" => &mut name,
            "avatar" => &mut avatar,
            _ => continue,
        };
        if place.is_none() {
            *place = Some(decoded(value)?);
        }
    }
    let user = UserId::parse(&user.ok_or(UserError::Missing)?)?;
    if user == *bot {
        return Err(UserError::Bot);
    }
    let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| user.as_str().to_owned());
    if !is_label(&name, NAME_BYTES_MAX) {
        return Err(UserError::Name);
    }
    let avatar = avatar.unwrap_or_default();
    if !is_label(&avatar, AVATAR_BYTES_MAX) {
        return Err(UserError::Avatar);
    }
    Ok(Claims { user, name, avatar, rooms: RoomGrant::Any, expires_at: None })
}

/// Whether a text may stand beside a user: short enough, and on one line wherever a worker writes it.
pub(super) fn is_label(text: &str, bytes_max: usize) -> bool {
    text.len() <= bytes_max && !text.chars().any(char::is_control)
}

fn decoded(value: &str) -> Result<String, UserError> {
    let spaced = value.replace('+', " ");
    percent_decode(spaced.as_bytes()).decode_utf8().map(Into::into).map_err(|_| UserError::Encoding)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use crate::id::IdError;

    use super::*;
    use crate::id::RoomName;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn a_token_is_in_a_header_a_subprotocol_or_a_cookie() {
        let check = |list: &[(&'static str, &str)], expected: Option<(&str, Place)>| {
            assert_eq!(token(&headers(list)), expected, "{list:?}");
        };
        check(&[("authorization", "Bearer t")], Some(("t", Place::Header)));
        check(&[("authorization", "bearer  t ")], Some(("t", Place::Header)));
        check(&[("authorization", "Bearer ")], None);
        check(&[("authorization", "Bearer")], None);
        check(&[("authorization", "Basic t")], None);
        check(&[("authorization", "Bearer t"), ("authorization", "Bearer u")], None);
        check(&[("sec-websocket-protocol", "tabcast.bearer.t")], Some(("t", Place::Header)));
        check(&[("sec-websocket-protocol", "tabcast, tabcast.bearer.a.b.c")], Some(("a.b.c", Place::Header)));
        check(
            &[("sec-websocket-protocol", "tabcast"), ("sec-websocket-protocol", "tabcast.bearer.t")],
            Some(("t", Place::Header)),
        );
        check(&[("sec-websocket-protocol", "graphql-ws")], None);
        check(&[("cookie", "a=b; tabcast_token=t; c=d")], Some(("t", Place::Cookie)));
        check(&[("cookie", "a=b"), ("cookie", "tabcast_token=\"t\"")], Some(("t", Place::Cookie)));
        check(&[("cookie", "tabcast_token=t; tabcast_token=u")], None);
        check(&[("cookie", "xtabcast_token=t")], None);
        check(&[("cookie", "tabcast_token=")], None);
        check(&[("authorization", "Bearer t"), ("cookie", "tabcast_token=u")], Some(("t", Place::Header)));
        check(&[("authorization", "Basic x"), ("cookie", "tabcast_token=u")], Some(("u", Place::Cookie)));
        check(&[], None);
    }

    #[test]
    fn the_answer_names_a_subprotocol_that_was_offered() {
        let check = |offered: &str, expected: Option<&str>| {
            let headers = headers(&[("sec-websocket-protocol", offered)]);
            assert_eq!(Credential::new(Proof::Token("t".into()), &headers).protocol(), expected, "{offered}");
        };
        check("tabcast, tabcast.bearer.t", Some("tabcast"));
        check("tabcast.bearer.t,tabcast", Some("tabcast"));
        check("tabcast.bearer.t", Some("tabcast.bearer.t"));
        check("graphql-ws", None);
        assert_eq!(Credential::new(Proof::Token("t".into()), &HeaderMap::new()).protocol(), None);
    }

    #[test]
    fn in_development_mode_the_query_names_the_user() {
        let star = UserId::parse("star").unwrap();
        let read = |query: &str| claims_from_query(Some(query), &star);
        let claims = read("user=al%20ice&name=A+%C3%A9&avatar=https%3A%2F%2Fa%2Fp&user=other&hello=1").unwrap();
        assert_eq!(
            (claims.user.as_str(), claims.name.as_str(), claims.avatar.as_str()),
            ("al ice", "A é", "https://a/p")
        );
        assert_eq!((claims.rooms, claims.expires_at), (RoomGrant::Any, None));
        assert_eq!(read("user=alice&name=").unwrap().name, "alice");
        assert_eq!(claims_from_query(None, &star), Err(UserError::Missing));
        assert_eq!(read("name=a"), Err(UserError::Missing));
        assert_eq!(read("user="), Err(UserError::Id(IdError::Empty)));
        assert_eq!(read("user=a%00"), Err(UserError::Id(IdError::Control)));
        assert_eq!(read("user=%ff"), Err(UserError::Encoding));
        assert_eq!(read("user=star"), Err(UserError::Bot));
        assert_eq!(read(&format!("user=a&name={}", "n".repeat(257))), Err(UserError::Name));
        assert_eq!(read(&format!("user=a&avatar={}", "n".repeat(2049))), Err(UserError::Avatar));
        for control in ["%0A", "%0d%0aX:1", "%00", "%C2%85", "%7F"] {
            assert_eq!(read(&format!("user=a&name=n{control}")), Err(UserError::Name), "{control}");
            assert_eq!(read(&format!("user=a&avatar=n{control}")), Err(UserError::Avatar), "{control}");
        }
    }

    #[test]
    fn a_star_at_the_end_of_a_room_is_a_prefix() {
        let grant = RoomGrant::from_patterns(&["lobby".to_owned(), "team-*".to_owned(), "a*b".to_owned()]);
        let allows = |room: &str| grant.allows(&RoomName::parse(room).unwrap());
        assert!(allows("lobby") && allows("team-") && allows("team-1") && allows("a*b"));
        assert!(!allows("Lobby") && !allows("lobby1") && !allows("tea") && !allows("axb"));
        let any = RoomGrant::from_patterns(&["*".to_owned()]);
        assert!(any.allows(&RoomName::parse("whatever").unwrap()));
    }

    #[test]
    fn a_credential_does_not_show_its_token() {
        let credential = Credential::new(Proof::Token("hush".into()), &HeaderMap::new());
        assert!(!format!("{credential:?}").contains("hush"));
    }
}
