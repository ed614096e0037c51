//! Who may what. Four classes of keys, none of which opens another's routes; without any key, development mode, which
//! takes this machine at its word and nobody else.
//!
//! Everything here is a function of the request's head, the settings and a time; nothing here reads a clock or a
//! socket. Answers to a refusal are in [`AuthError`]. No token and no key is ever in an error, a log line or a `Debug`.

use std::net::IpAddr;
use std::time::SystemTime;

use http::HeaderMap;
use http::Method;
use subtle::ConditionallySelectable;
use subtle::ConstantTimeEq;

use crate::config::KeyDigest;
use crate::config::Settings;
use crate::config::UserKey;
use crate::id::UserId;

mod error;
mod identity;
mod origin;
mod token;

pub use error::AuthError;
pub use error::NotLocal;
pub use error::TokenError;
pub use error::UserError;
pub use identity::AVATAR_BYTES_MAX;
pub use identity::Claims;
pub use identity::Credential;
pub use identity::NAME_BYTES_MAX;
pub use origin::OriginCheck;
pub use origin::Origins;
pub use token::KeyError;

pub(in crate::gateway) use identity::bearer;
pub(in crate::gateway) use identity::shows_long_key;
pub(in crate::gateway) use origin::allow_body;

use identity::Place;
use identity::Proof;
use token::Tokens;

/// Which keys open a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteClass {
    /// The page and its parts, `/healthz`, `/readyz`, `/files/…`, and paths at which there is nothing: nobody is asked
    /// for a key. A preflight of `/events` or `/v1` is of no class: it is answered before.
    Public,
    /// `/ws`, and `/events` of one's own: a user's token.
    User,
    /// `/api`: a worker's key.
    Api,
    /// `/v1`: a key that names a user.
    OpenAi,
    /// `/metrics`, `/events?watch=…`, and cutting users: an operator's key.
    Operator,
}

impl RouteClass {
    /// Every one of them.
    pub const ALL: [Self; 5] = [Self::Public, Self::User, Self::Api, Self::OpenAi, Self::Operator];
}

/// What of a request counts here.
#[derive(Debug, Clone, Copy)]
pub struct RequestHead<'a> {
    /// The method.
    pub method: &'a Method,
    /// What stands after `?`, still encoded.
    pub query: Option<&'a str>,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The other end of the connection.
    pub peer: IpAddr,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// Anybody: a public route.
    Anyone,
    /// A user, for a session.
    User(Box<Claims>),
    /// A worker.
    Worker,
    /// A user, by an OpenAI key. In development mode without a key: `developer`.
    OpenAi(UserId),
    /// An operator.
    Operator,
}

/// The user of an OpenAI request in development mode.
const DEVELOPER: &str = "developer";

/// Everything that decides who may what; built from the settings, replaced as a whole.
pub struct Keys {
    is_development: bool,
    tokens: Tokens,
    api: Box<[KeyDigest]>,
    openai: Box<[UserKey]>,
    operator: Box<[KeyDigest]>,
    origins: Origins,
    bot: UserId,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("is_development", &self.is_development).finish_non_exhaustive()
    }
}

impl Keys {
    /// Takes over the keys of `settings`.
    ///
    /// # Errors
    /// A token key is not a public key for its algorithm, or is a private one.
    pub fn new(settings: &Settings) -> Result<Self, KeyError> {
        Ok(Self {
            is_development: settings.is_development(),
            tokens: Tokens::new(settings)?,
            api: settings.api_keys.clone().into(),
            openai: settings.openai_keys.clone().into(),
            operator: settings.operator_keys.clone().into(),
            origins: Origins::new(
                &settings.allowed_origins,
                settings.public_url.as_deref(),
                settings.tls_cert.is_some(),
            ),
            bot: settings.bot_user_id.clone(),
        })
    }

    /// Whether there is no key of any class.
    #[must_use]
    pub const fn is_development(&self) -> bool {
        self.is_development
    }

    /// The origins that may connect, for CORS.
    #[must_use]
    pub const fn origins(&self) -> &Origins {
        &self.origins
    }

    /// Lets a request through to routes of `class`, or says why not.
    ///
    /// For [`RouteClass::User`] it verifies the token at once; where that must not take long, use
    /// [`Keys::session_credential`], [`Keys::is_costly`] and [`Keys::verify`].
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn authorize(
        &self,
        class: RouteClass,
        request: &RequestHead<'_>,
        now: SystemTime,
    ) -> Result<Principal, AuthError> {
        if class == RouteClass::User {
            let credential = self.session_credential(request)?;
            return self.verify(&credential, now).map(|claims| Principal::User(Box::new(claims)));
        }
        if self.is_development {
            return self.authorize_local(class, request);
        }
        if class == RouteClass::Public {
            return Ok(Principal::Anyone);
        }
        let key = identity::bearer(request.headers).ok_or(AuthError::Missing(class))?;
        let found = self.find(&KeyDigest::of(key.as_bytes()));
        match class {
            RouteClass::Api if found.is_worker => Ok(Principal::Worker),
            RouteClass::Operator if found.is_operator => Ok(Principal::Operator),
            RouteClass::OpenAi if found.user.is_some() => {
                found.user.map(Principal::OpenAi).ok_or(AuthError::UnknownKey)
            }
            _ if found.is_worker || found.is_operator || found.user.is_some() => Err(AuthError::WrongClass(class)),
            _ => Err(AuthError::UnknownKey),
        }
    }

    /// What a request for a session offers as proof; its origin is checked here, its signature not yet.
    ///
    /// # Errors
    /// There is none, or the request comes from a page that may not connect; in development mode also everything
    /// that speaks against this machine, and a user that is missing or wrong.
    pub fn session_credential(&self, request: &RequestHead<'_>) -> Result<Credential, AuthError> {
        let headers = request.headers;
        if self.is_development {
            self.origins.allow_local(request).map_err(AuthError::Development)?;
            let claims = identity::claims_from_query(request.query, &self.bot).map_err(AuthError::BadUser)?;
            return Ok(Credential::new(Proof::Word(Box::new(claims)), headers));
        }
        let Some((token, place)) = identity::token(headers) else {
            self.origins.allow_header_token(headers)?;
            return Err(AuthError::Missing(RouteClass::User));
        };
        match place {
            Place::Header => self.origins.allow_header_token(headers)?,
            Place::Cookie => self.origins.allow_cookie(headers)?,
        }
        Ok(Credential::new(Proof::Token(token.into()), headers))
    }

    /// Whether [`Keys::verify`] takes more than 100 µs (RS256, ES256, EdDSA) and belongs on another thread than a
    /// shard's. HS256 takes a few microseconds.
    #[must_use]
    pub fn is_costly(&self, credential: &Credential) -> bool {
        match &credential.proof {
            Proof::Token(token) => self.tokens.is_costly(token),
            Proof::Word(_) => false,
        }
    }

    /// Verifies what a request for a session offered.
    ///
    /// # Errors
    /// The token does not verify: see [`TokenError`].
    pub fn verify(&self, credential: &Credential, now: SystemTime) -> Result<Claims, AuthError> {
        match &credential.proof {
            Proof::Token(token) => Ok(self.tokens.verify(token, now)?),
            Proof::Word(claims) => Ok((**claims).clone()),
        }
    }

    fn authorize_local(&self, class: RouteClass, request: &RequestHead<'_>) -> Result<Principal, AuthError> {
        self.origins.allow_local(request).map_err(AuthError::Development)?;
        match class {
            RouteClass::Api => {
                let has_body = [Method::POST, Method::PUT, Method::PATCH].contains(request.method);
                if has_body {
                    allow_body(request.headers)?;
                }
                Ok(Principal::Worker)
            }
            RouteClass::OpenAi => UserId::parse(DEVELOPER)
                .map(Principal::OpenAi)
                .map_err(|error| AuthError::BadUser(UserError::Id(error))),
            RouteClass::Operator => Ok(Principal::Operator),
            RouteClass::Public | RouteClass::User => Ok(Principal::Anyone),
        }
    }

    /// Compares a key with all keys of all classes, each in constant time, whether it was found or not.
    fn find(&self, key: &KeyDigest) -> Found {
        let any = |keys: &[KeyDigest]| {
            let mut found = subtle::Choice::from(0);
            for other in keys {
                found |= key.as_bytes().ct_eq(other.as_bytes());
            }
            bool::from(found)
        };
        let mut place = 0u64;
        for (at, other) in (1u64..).zip(&self.openai) {
            place.conditional_assign(&at, key.as_bytes().ct_eq(other.digest.as_bytes()));
        }
        let at = usize::try_from(place).ok().and_then(|place| place.checked_sub(1));
        let user = at.and_then(|at| self.openai.get(at)).map(|key| key.user.clone());
        Found { is_worker: any(&self.api), is_operator: any(&self.operator), user }
    }
}

/// Whose a key is.
struct Found {
    is_worker: bool,
    is_operator: bool,
    user: Option<UserId>,
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use http::HeaderValue;

    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);
    const SECRET: &str = "a secret of more than thirty-two bytes";

    fn token(sub: &str) -> String {
        let claims = serde_json::json!({ "sub": sub, "exp": NOW.as_secs() + 60 });
        let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
        jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
    }

    fn keys(toml: &str) -> Keys {
        let settings = crate::config::Sources::new().with_toml(toml);
        Keys::new(&settings.load(crate::config::Machine { cores: 1, open_files_max: 1000 }).unwrap()).unwrap()
    }

    fn all_keys() -> Keys {
        keys(&format!(
            "token_keys = ['kid=a,alg=HS256,secret={SECRET}']\napi_keys = ['worker-1', 'worker-2']\n\
             openai_keys = ['alice:openai-a', 'bob:openai-b']\noperator_keys = ['operator-1']"
        ))
    }

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn ask(keys: &Keys, class: RouteClass, headers: &HeaderMap, query: Option<&str>) -> Result<Principal, AuthError> {
        let method = if class == RouteClass::Api { Method::POST } else { Method::GET };
        let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
        keys.authorize(class, &RequestHead { method: &method, query, headers, peer }, SystemTime::UNIX_EPOCH + NOW)
    }

    fn user(id: &str) -> UserId {
        UserId::parse(id).unwrap()
    }

    #[test]
    fn no_key_opens_the_routes_of_another_class() {
        let keys = all_keys();
        let token = token("alice");
        let credentials = [
            (None, RouteClass::Public),
            (Some(token.as_str()), RouteClass::User),
            (Some("worker-2"), RouteClass::Api),
            (Some("openai-b"), RouteClass::OpenAi),
            (Some("operator-1"), RouteClass::Operator),
        ];
        for class in RouteClass::ALL {
            for (credential, opens) in credentials {
                let mut list = vec![("host", "chat.example")];
                let bearer = credential.map(|credential| format!("Bearer {credential}"));
                list.extend(bearer.as_deref().map(|bearer| ("authorization", bearer)));
                let asked = ask(&keys, class, &headers(&list), Some("user=mallory"));
                let allowed = class == RouteClass::Public || class == opens;
                assert_eq!(asked.is_ok(), allowed, "{class:?} {opens:?}: {asked:?}");
                let Err(error) = asked else { continue };
                let status = match (opens, class) {
                    // A key on a token's route is just a token that does not verify, and the other way round.
                    (RouteClass::Public | RouteClass::User, _) | (_, RouteClass::User) => 401,
                    _ => 403,
                };
                assert_eq!(error.status().as_u16(), status, "{class:?} {opens:?}: {error}");
            }
        }
    }

    #[test]
    fn only_a_key_that_is_never_guessed_is_long() {
        let is_long = |value: &str| shows_long_key(&headers(&[("authorization", value)]));
        assert!(is_long("Bearer 0123456789abcdef") && is_long("bearer  0123456789abcdef "));
        for short in ["Bearer 0123456789abcde", "Bearer      0123456789", "Bearer ", "Basic 0123456789abcdef"] {
            assert!(!is_long(short), "{short}");
        }
        let two = [("authorization", "Bearer 0123456789abcdef"); 2];
        assert!(!shows_long_key(&headers(&two)) && !shows_long_key(&HeaderMap::new()));
    }

    #[test]
    fn a_key_says_whose_it_is() {
        let keys = all_keys();
        let with = |class, key: &str| ask(&keys, class, &headers(&[("authorization", &format!("Bearer {key}"))]), None);
        assert_eq!(with(RouteClass::OpenAi, "openai-a"), Ok(Principal::OpenAi(user("alice"))));
        assert_eq!(with(RouteClass::OpenAi, "openai-b"), Ok(Principal::OpenAi(user("bob"))));
        assert_eq!(with(RouteClass::Api, "worker-1"), Ok(Principal::Worker));
        assert_eq!(with(RouteClass::Operator, "operator-1"), Ok(Principal::Operator));
        assert_eq!(with(RouteClass::Api, "worker-3"), Err(AuthError::UnknownKey));
        assert_eq!(with(RouteClass::Api, ""), Err(AuthError::Missing(RouteClass::Api)));
        assert_eq!(with(RouteClass::Operator, "worker-1"), Err(AuthError::WrongClass(RouteClass::Operator)));
        let Ok(Principal::User(claims)) = with(RouteClass::User, &token("carol")) else { panic!() };
        assert_eq!(claims.user, user("carol"));
    }

    #[test]
    fn with_one_class_of_keys_the_others_are_shut() {
        let keys = keys("api_keys = ['worker-1']");
        assert!(!keys.is_development());
        for class in [RouteClass::User, RouteClass::OpenAi, RouteClass::Operator] {
            assert_eq!(
                ask(&keys, class, &headers(&[("host", "localhost")]), Some("user=a")),
                Err(AuthError::Missing(class))
            );
        }
        let with_token = headers(&[("authorization", &format!("Bearer {}", token("a")))]);
        assert_eq!(ask(&keys, RouteClass::User, &with_token, None), Err(TokenError::UnknownKid.into()));
    }

    #[test]
    fn a_cookie_counts_only_from_our_own_page() {
        let keys = all_keys();
        let cookie = format!("tabcast_token={}", token("alice"));
        let with = |origin: Option<&str>| {
            let mut list = vec![("host", "chat.example"), ("cookie", cookie.as_str())];
            list.extend(origin.map(|origin| ("origin", origin)));
            ask(&keys, RouteClass::User, &headers(&list), None).map(|_| ())
        };
        assert_eq!(with(Some("https://chat.example")), Ok(()));
        assert_eq!(with(Some("https://evil.example")), Err(AuthError::ForeignOrigin));
        assert_eq!(with(None), Err(AuthError::ForeignOrigin));
    }

    #[test]
    fn a_subprotocol_carries_the_token_and_is_answered() {
        let keys = all_keys();
        let offered = format!("tabcast, tabcast.bearer.{}", token("alice"));
        let headers = headers(&[("host", "a"), ("origin", "https://a"), ("sec-websocket-protocol", &offered)]);
        let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let request = RequestHead { method: &Method::GET, query: None, headers: &headers, peer };
        let credential = keys.session_credential(&request).unwrap();
        assert_eq!(credential.protocol(), Some("tabcast"));
        assert!(!keys.is_costly(&credential));
        assert_eq!(keys.verify(&credential, SystemTime::UNIX_EPOCH + NOW).unwrap().user, user("alice"));
        let late = SystemTime::UNIX_EPOCH + NOW + Duration::from_secs(90);
        assert_eq!(keys.verify(&credential, late), Err(TokenError::Expired.into()));
    }

    #[test]
    fn development_mode_opens_every_route_to_this_machine_only() {
        let keys = keys("");
        assert!(keys.is_development());
        let json = ("content-type", "application/json");
        let here = headers(&[("host", "localhost:8080"), json]);
        for class in RouteClass::ALL {
            assert!(ask(&keys, class, &here, Some("user=alice")).is_ok(), "{class:?}");
            let elsewhere = headers(&[("host", "chat.example"), json]);
            let refused = AuthError::Development(NotLocal::Host);
            assert_eq!(ask(&keys, class, &elsewhere, Some("user=alice")), Err(refused), "{class:?}");
            let proxied = headers(&[("host", "localhost"), ("x-forwarded-for", "10.0.0.1"), json]);
            let refused = AuthError::Development(NotLocal::Forwarded);
            assert_eq!(ask(&keys, class, &proxied, Some("user=alice")), Err(refused), "{class:?}");
        }
        let form = headers(&[("host", "localhost"), ("content-type", "text/plain")]);
        assert_eq!(ask(&keys, RouteClass::Api, &form, None), Err(AuthError::NotJson));
        assert_eq!(ask(&keys, RouteClass::User, &here, None), Err(AuthError::BadUser(UserError::Missing)));
        assert_eq!(ask(&keys, RouteClass::OpenAi, &here, None), Ok(Principal::OpenAi(user("developer"))));
    }

    #[test]
    fn nothing_shows_a_key() {
        let keys = all_keys();
        let shown = format!("{keys:?}");
        assert!(!shown.contains("worker") && !shown.contains(SECRET), "{shown}");
        for class in RouteClass::ALL {
            let asked = ask(&keys, class, &headers(&[("authorization", "Bearer hush")]), None);
            assert!(!format!("{asked:?}").contains("hush"));
            let told = asked.err().map(|error| error.body()).unwrap_or_default();
            assert!(!told.contains("hush"), "{told}");
        }
    }
}
