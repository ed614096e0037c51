//! Why a request was refused, and how that is told.

use crate::id::IdError;

use super::RouteClass;

/// Why a request was refused. No message repeats a token, a key or anything else from the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// Nothing that says who it is.
    #[error("{}", needs(*.0))]
    Missing(RouteClass),
    /// A key that nobody was given, or several.
    #[error("the key is not known here")]
    UnknownKey,
    /// The address has just shown too many of these: what it shows now is not known here either, or can be guessed and
    /// was not looked at.
    #[error(
        "this address shows too many keys that are not known here; try again later (behind a proxy of yours: see trusted_proxies)"
    )]
    TooManyKeys,
    /// A good key of another class.
    #[error("the key is not for this route: {}", needs(*.0))]
    WrongClass(RouteClass),
    /// The token does not verify.
    #[error("the token is refused: {0}")]
    Token(#[from] TokenError),
    /// A page of another origin, or, with a cookie, a request that does not say from where.
    #[error("pages of this origin may not connect; the setting allowed_origins names those that may")]
    ForeignOrigin,
    /// Development mode, and the request may come from somewhere else.
    #[error("without any key this gateway serves its own machine only: {0}")]
    Development(NotLocal),
    /// Development mode, and a body that a foreign page could have sent.
    #[error("the body must be application/json, or be marked by X-Tabcast-Raw: 1")]
    NotJson,
    /// Development mode, and `?user=`, `?name=` or `?avatar=` is missing or wrong.
    #[error("{0}")]
    BadUser(UserError),
}

const fn needs(class: RouteClass) -> &'static str {
    match class {
        RouteClass::Public => "no key is needed",
        RouteClass::User => {
            "this route takes a user's token: Authorization: Bearer, tabcast.bearer.<token>, or the cookie"
        }
        RouteClass::Api => "this route takes one of api_keys: Authorization: Bearer",
        RouteClass::OpenAi => "this route takes one of openai_keys: Authorization: Bearer",
        RouteClass::Operator => "this route takes one of operator_keys: Authorization: Bearer",
    }
}

/// What is wrong with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Not three parts of base64url with JSON, or an algorithm that nobody takes.
    #[error("it is not a signed token of a known kind")]
    Malformed,
    /// The header names a key that is not here.
    #[error("its kid is not known here")]
    UnknownKid,
    /// The header names no key, and there are several.
    #[error("it has no kid, and several keys are set")]
    MissingKid,
    /// Signed in another way than the key says.
    #[error("its alg is not that of the key")]
    WrongAlgorithm,
    /// The signature is wrong.
    #[error("its signature does not verify")]
    BadSignature,
    /// Past `exp`.
    #[error("it has expired")]
    Expired,
    /// Before `nbf`.
    #[error("it is not valid yet")]
    NotYet,
    /// `iss` is missing or another.
    #[error("its issuer is not one of token_issuer")]
    WrongIssuer,
    /// `aud` is missing, or names only others, or is there and `token_audience` is not set.
    #[error("its audience is not one of token_audience")]
    WrongAudience,
    /// A claim that is needed is not there.
    #[error("the claim {0} is missing")]
    MissingClaim(&'static str),
    /// A claim has a wrong type or a value that is not allowed.
    #[error("the claim {0} has a value that is not allowed")]
    BadClaim(&'static str),
}

/// What speaks against a request coming from this machine, past no proxy and from no foreign page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotLocal {
    /// The connection comes from another address.
    #[error("the connection is not from a loopback address")]
    Peer,
    /// `Host` is missing, doubled or not a loopback name.
    #[error("the Host is not localhost or a loopback address")]
    Host,
    /// A proxy has passed the request on.
    #[error("a proxy passed the request on")]
    Forwarded,
    /// `Origin` is another than our own.
    #[error("the Origin is another than its own")]
    Origin,
    /// `Sec-Fetch-Site` says that another site's page asked.
    #[error("the request comes from a page of another site")]
    FetchSite,
}

/// What is wrong with a user in the query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UserError {
    /// There is no `user`.
    #[error("?user= is missing")]
    Missing,
    /// The user id is not one.
    #[error("?user=: {0}")]
    Id(#[from] IdError),
    /// The bot's own id.
    #[error("?user=: this is the bot's own id")]
    Bot,
    /// Not UTF-8 when decoded.
    #[error("?user=, ?name= and ?avatar= are percent-encoded UTF-8")]
    Encoding,
    /// The name is too long, or has a control character.
    #[error("?name= may have at most 256 bytes and no control characters")]
    Name,
    /// The avatar is too long, or has a control character.
    #[error("?avatar= may have at most 2048 bytes and no control characters")]
    Avatar,
}

impl AuthError {
    /// The status of the answer.
    #[must_use]
    pub const fn status(self) -> http::StatusCode {
        match self {
            Self::Missing(_) | Self::UnknownKey | Self::Token(_) => http::StatusCode::UNAUTHORIZED,
            Self::WrongClass(_) | Self::ForeignOrigin | Self::Development(_) => http::StatusCode::FORBIDDEN,
            Self::TooManyKeys => http::StatusCode::TOO_MANY_REQUESTS,
            Self::NotJson => http::StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::BadUser(_) => http::StatusCode::BAD_REQUEST,
        }
    }

    /// The code in the answer's JSON.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Missing(_) => "unauthorized",
            Self::UnknownKey => "invalid_key",
            Self::TooManyKeys => "rate_limited",
            Self::WrongClass(_) => "forbidden",
            Self::Token(TokenError::Expired) => "token_expired",
            Self::Token(_) => "invalid_token",
            Self::ForeignOrigin => "foreign_origin",
            Self::Development(_) => "development_only",
            Self::NotJson => "unsupported_media_type",
            Self::BadUser(_) => "bad_user",
        }
    }

    /// The header `WWW-Authenticate` of a 401 (RFC 6750 §3); other answers have none.
    #[must_use]
    pub const fn www_authenticate(self) -> Option<&'static str> {
        match self {
            Self::Missing(_) => Some("Bearer realm=\"tabcast\""),
            Self::UnknownKey | Self::Token(_) => Some("Bearer realm=\"tabcast\", error=\"invalid_token\""),
            _ => None,
        }
    }

    /// The header `Retry-After` of a 429, in seconds; other answers have none.
    #[must_use]
    pub const fn retry_after(self) -> Option<&'static str> {
        match self {
            Self::TooManyKeys => Some("1"),
            _ => None,
        }
    }

    /// The answer's body.
    #[must_use]
    pub fn body(self) -> String {
        serde_json::json!({ "error": { "code": self.code(), "message": self.to_string() } }).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_a_status_a_code_and_a_body() {
        let check = |error: AuthError, status: u16, code: &str, challenge: bool| {
            assert_eq!((error.status().as_u16(), error.code()), (status, code), "{error}");
            assert_eq!(error.www_authenticate().is_some(), challenge, "{error}");
            assert_eq!(error.retry_after().is_some(), status == 429, "{error}");
            let body: serde_json::Value = serde_json::from_str(&error.body()).unwrap();
            assert_eq!(body["error"]["code"], code);
            assert_eq!(body["error"]["message"], error.to_string());
        };
        check(AuthError::Missing(RouteClass::Api), 401, "unauthorized", true);
        check(AuthError::UnknownKey, 401, "invalid_key", true);
        check(AuthError::TooManyKeys, 429, "rate_limited", false);
        check(AuthError::WrongClass(RouteClass::Operator), 403, "forbidden", false);
        check(TokenError::Expired.into(), 401, "token_expired", true);
        check(TokenError::BadSignature.into(), 401, "invalid_token", true);
        check(AuthError::ForeignOrigin, 403, "foreign_origin", false);
        check(AuthError::Development(NotLocal::Host), 403, "development_only", false);
        check(AuthError::NotJson, 415, "unsupported_media_type", false);
        check(AuthError::BadUser(UserError::Missing), 400, "bad_user", false);
    }
}
