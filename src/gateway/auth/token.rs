//! Users' tokens: signed, short-lived, verified by a key that fixes the algorithm.

use std::time::{Duration, SystemTime};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;

use crate::config::Settings;
use crate::config::TokenAlgorithm;
use crate::config::TokenKey;
use crate::id::UserId;
use crate::proto::event::Timestamp;

use super::TokenError;
use super::identity::AVATAR_BYTES_MAX;
use super::identity::Claims;
use super::identity::NAME_BYTES_MAX;
use super::identity::is_label;
use crate::fanout::session::RoomGrant;

/// Why a key of the settings cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file holds a private key: it must not be on this machine.
    #[error("token key `{kid}`: this is a private key; give its public half")]
    Private {
        /// Its name.
        kid: String,
    },
    /// The file holds no public key for that algorithm.
    #[error("token key `{kid}`: not a public key for {} in PEM", .algorithm.as_str())]
    Invalid {
        /// Its name.
        kid: String,
        /// What it was to be for.
        algorithm: TokenAlgorithm,
    },
}

struct Verifier {
    kid: String,
    algorithm: Algorithm,
    key: DecodingKey,
    validation: Validation,
}

/// Verifies tokens with the keys of the settings.
pub(super) struct Tokens {
    verifiers: Box<[Verifier]>,
    leeway: Duration,
    bot: UserId,
}

/// What of a token's claims is looked at here. Types are looked at one by one, so that the error can name the claim.
#[derive(serde::Deserialize)]
struct TokenClaims {
    sub: Option<Value>,
    exp: Option<Value>,
    nbf: Option<Value>,
    name: Option<Value>,
    picture: Option<Value>,
    rooms: Option<Value>,
}

fn text_claim(claim: Option<Value>, name: &'static str, bytes_max: usize) -> Result<String, TokenError> {
    match claim {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) if is_label(&text, bytes_max) => Ok(text),
        Some(_) => Err(TokenError::BadClaim(name)),
    }
}

fn rooms_claim(claim: Option<Value>) -> Result<RoomGrant, TokenError> {
    let patterns: Option<Vec<String>> =
        serde_json::from_value(claim.unwrap_or_default()).map_err(|_| TokenError::BadClaim("rooms"))?;
    Ok(RoomGrant::from_patterns(&patterns.unwrap_or_default()))
}

/// A NumericDate (RFC 7519 §2), as the time since the epoch.
fn time_claim(claim: &Value, name: &'static str) -> Result<Duration, TokenError> {
    let seconds = claim.as_f64().filter(|seconds| *seconds >= 0.0).ok_or(TokenError::BadClaim(name))?;
    Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

impl Tokens {
    pub(super) fn new(settings: &Settings) -> Result<Self, KeyError> {
        let verifiers: Result<_, KeyError> = settings.token_keys.iter().map(|key| verifier(key, settings)).collect();
        Ok(Self { verifiers: verifiers?, leeway: settings.token_leeway, bot: settings.bot_user_id.clone() })
    }

    /// Whether verifying `token` takes more than 100 µs: any signature but HMAC. A token that is refused at sight does
    /// not.
    pub(super) fn is_costly(&self, token: &str) -> bool {
        self.select(token).is_ok_and(|verifier| verifier.algorithm != Algorithm::HS256)
    }

    fn select(&self, token: &str) -> Result<&Verifier, TokenError> {
        let header = jsonwebtoken::decode_header(token).map_err(|_| TokenError::Malformed)?;
        // RFC 7515 §4.1.11: what is critical and not understood makes the token invalid; nothing is understood here.
        if header.crit.is_some() {
            return Err(TokenError::Malformed);
        }
        let verifier = match (header.kid, &*self.verifiers) {
            (Some(kid), all) => all.iter().find(|verifier| verifier.kid == kid).ok_or(TokenError::UnknownKid)?,
            (None, [only]) => only,
            (None, []) => return Err(TokenError::UnknownKid),
            (None, _) => return Err(TokenError::MissingKid),
        };
        if header.alg == verifier.algorithm { Ok(verifier) } else { Err(TokenError::WrongAlgorithm) }
    }

    /// Verifies `token` and says whose it is.
    pub(super) fn verify(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        let verifier = self.select(token)?;
        let verified = jsonwebtoken::decode::<TokenClaims>(token, &verifier.key, &verifier.validation);
        let claims = verified.map_err(|error| refused(error.kind()))?.claims;
        let expires_at = self.check_times(&claims, now)?;
        let sub = claims.sub.ok_or(TokenError::MissingClaim("sub"))?;
        let user = sub.as_str().and_then(|sub| UserId::parse(sub).ok()).ok_or(TokenError::BadClaim("sub"))?;
        if user == self.bot {
            return Err(TokenError::BadClaim("sub"));
        }
        let mut name = text_claim(claims.name, "name", NAME_BYTES_MAX)?;
        if name.is_empty() {
            name = user.as_str().to_owned();
        }
        let avatar = text_claim(claims.picture, "picture", AVATAR_BYTES_MAX)?;
        let rooms = rooms_claim(claims.rooms)?;
        Ok(Claims { user, name, avatar, rooms, expires_at: Some(expires_at) })
    }

    /// When the token ends, the leeway included: a token that was just let in is not cut at once.
    fn check_times(&self, claims: &TokenClaims, now: SystemTime) -> Result<Timestamp, TokenError> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let exp = claims.exp.as_ref().ok_or(TokenError::MissingClaim("exp"))?;
        let end = time_claim(exp, "exp")?.saturating_add(self.leeway);
        if now >= end {
            return Err(TokenError::Expired);
        }
        let start = claims.nbf.as_ref().map_or(Ok(Duration::ZERO), |nbf| time_claim(nbf, "nbf"))?;
        if start > now.saturating_add(self.leeway) {
            return Err(TokenError::NotYet);
        }
        Ok(Timestamp::from_micros(u64::try_from(end.as_micros()).unwrap_or(u64::MAX)))
    }
}

fn verifier(key: &TokenKey, settings: &Settings) -> Result<Verifier, KeyError> {
    let material = key.material.expose();
    let invalid = || KeyError::Invalid { kid: key.kid.clone(), algorithm: key.algorithm };
    if key.algorithm != TokenAlgorithm::Hs256 && material.windows(11).any(|window| window == b"PRIVATE KEY") {
        return Err(KeyError::Private { kid: key.kid.clone() });
    }
    let (algorithm, decoding_key) = match key.algorithm {
        TokenAlgorithm::Hs256 => (Algorithm::HS256, Ok(DecodingKey::from_secret(material))),
        TokenAlgorithm::Rs256 => (Algorithm::RS256, DecodingKey::from_rsa_pem(material)),
        TokenAlgorithm::Es256 => (Algorithm::ES256, DecodingKey::from_ec_pem(material)),
        TokenAlgorithm::EdDsa => (Algorithm::EdDSA, DecodingKey::from_ed_pem(material)),
    };
    let decoding_key = decoding_key.map_err(|_| invalid())?;
    // The library slices an Ed25519 key without looking at its length.
    let is_whole = algorithm != Algorithm::EdDSA || decoding_key.try_get_as_bytes().is_ok_and(|key| key.len() == 32);
    if !is_whole {
        return Err(invalid());
    }
    // A key of the wrong curve shows itself only when it is used.
    jsonwebtoken::crypto::verify("", b"", &decoding_key, algorithm).map_err(|_| invalid())?;
    Ok(Verifier { kid: key.kid.clone(), algorithm, key: decoding_key, validation: validation(algorithm, settings) })
}

fn validation(algorithm: Algorithm, settings: &Settings) -> Validation {
    let mut validation = Validation::new(algorithm);
    // Time is an argument here: `exp` and `nbf` are compared by `check_times`, which insists on `exp`.
    validation.validate_exp = false;
    validation.leeway = 0;
    let mut required = Vec::new();
    if !settings.token_issuer.is_empty() {
        validation.set_issuer(&settings.token_issuer);
        required.push("iss");
    }
    if !settings.token_audience.is_empty() {
        validation.set_audience(&settings.token_audience);
        required.push("aud");
    }
    validation.set_required_spec_claims(&required);
    validation
}

fn refused(kind: &ErrorKind) -> TokenError {
    match kind {
        ErrorKind::InvalidSignature => TokenError::BadSignature,
        ErrorKind::InvalidIssuer => TokenError::WrongIssuer,
        ErrorKind::InvalidAudience => TokenError::WrongAudience,
        ErrorKind::InvalidAlgorithm => TokenError::WrongAlgorithm,
        ErrorKind::MissingRequiredClaim(claim) => match claim.as_str() {
            "iss" => TokenError::WrongIssuer,
            "aud" => TokenError::WrongAudience,
            _ => TokenError::Malformed,
        },
        _ => TokenError::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::EncodingKey;
    use serde_json::json;

    use crate::config::Secret;
    use crate::id::RoomName;

    use super::*;

    const NOW: u64 = 1_800_000_000;
    const SECRET: &str = "a secret of more than thirty-two bytes";

    fn key(kid: &str, algorithm: TokenAlgorithm, material: &str) -> TokenKey {
        TokenKey { kid: kid.to_owned(), algorithm, material: Secret::from(material) }
    }

    fn settings(keys: Vec<TokenKey>) -> Settings {
        Settings { token_keys: keys, ..Settings::default() }
    }

    fn hs(kid: &str) -> TokenKey {
        key(kid, TokenAlgorithm::Hs256, SECRET)
    }

    fn four_keys() -> Vec<TokenKey> {
        vec![
            hs("hs"),
            key("rs", TokenAlgorithm::Rs256, include_str!("../../../tests/keys/rs256.pub.pem")),
            key("es", TokenAlgorithm::Es256, include_str!("../../../tests/keys/es256.pub.pem")),
            key("ed", TokenAlgorithm::EdDsa, include_str!("../../../tests/keys/eddsa.pub.pem")),
        ]
    }

    fn signing_key(algorithm: Algorithm) -> EncodingKey {
        match algorithm {
            Algorithm::RS256 => EncodingKey::from_rsa_pem(include_bytes!("../../../tests/keys/rs256.pem")).unwrap(),
            Algorithm::ES256 => EncodingKey::from_ec_pem(include_bytes!("../../../tests/keys/es256.pem")).unwrap(),
            Algorithm::EdDSA => EncodingKey::from_ed_pem(include_bytes!("../../../tests/keys/eddsa.pem")).unwrap(),
            _ => EncodingKey::from_secret(SECRET.as_bytes()),
        }
    }

    fn token(kid: Option<&str>, algorithm: Algorithm, claims: &Value) -> String {
        let mut header = jsonwebtoken::Header::new(algorithm);
        header.kid = kid.map(str::to_owned);
        jsonwebtoken::encode(&header, claims, &signing_key(algorithm)).unwrap()
    }

    fn verify_with(settings: &Settings, token: &str) -> Result<Claims, TokenError> {
        Tokens::new(settings).unwrap().verify(token, SystemTime::UNIX_EPOCH + Duration::from_secs(NOW))
    }

    /// Claims that are fine, with some replaced; `null` takes one away.
    fn claims(changes: Value) -> Value {
        let mut claims = json!({ "sub": "alice", "exp": NOW + 60 });
        for (name, value) in changes.as_object().unwrap() {
            if value.is_null() {
                claims.as_object_mut().unwrap().remove(name);
            } else {
                claims[name] = value.clone();
            }
        }
        claims
    }

    fn verify_claims(changes: Value) -> Result<Claims, TokenError> {
        verify_with(&settings(vec![hs("a")]), &token(None, Algorithm::HS256, &claims(changes)))
    }

    fn unsigned(header: &str, claims: &Value) -> String {
        use base64::Engine;
        let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.", encode(header), encode(&claims.to_string()))
    }

    #[test]
    fn a_good_token_says_who_it_is() {
        let all = json!({ "name": "Alice", "picture": "https://a/p.png", "rooms": ["lobby", "team-*"] });
        let verified = verify_claims(all).unwrap();
        assert_eq!((verified.user.as_str(), verified.name.as_str()), ("alice", "Alice"));
        assert_eq!(verified.avatar, "https://a/p.png");
        assert_eq!(verified.expires_at, Some(Timestamp::from_micros((NOW + 60 + 30) * 1_000_000)));
        let allows = |room: &str| verified.rooms.allows(&RoomName::parse(room).unwrap());
        assert!(allows("lobby") && allows("team-7") && !allows("lobby2") && !allows("team"));
        let bare = verify_claims(json!({})).unwrap();
        assert_eq!((bare.name.as_str(), bare.avatar.as_str()), ("alice", ""));
        assert!(!bare.rooms.allows(&RoomName::parse("lobby").unwrap()));
    }

    #[test]
    fn every_algorithm_verifies_with_its_own_key_only() {
        let settings = settings(four_keys());
        let kinds =
            [("hs", Algorithm::HS256), ("rs", Algorithm::RS256), ("es", Algorithm::ES256), ("ed", Algorithm::EdDSA)];
        for (kid, _) in kinds {
            for (signer, algorithm) in kinds {
                let verified = verify_with(&settings, &token(Some(kid), algorithm, &claims(json!({}))));
                let expected = if kid == signer { Ok("alice") } else { Err(TokenError::WrongAlgorithm) };
                assert_eq!(verified.as_ref().map(|c| c.user.as_str()).map_err(|e| *e), expected, "{kid} {signer}");
            }
        }
    }

    #[test]
    fn only_hmac_is_cheap() {
        let tokens = Tokens::new(&settings(four_keys())).unwrap();
        let costly = |kid: &str, algorithm| tokens.is_costly(&token(Some(kid), algorithm, &claims(json!({}))));
        assert!(!costly("hs", Algorithm::HS256));
        assert!(costly("rs", Algorithm::RS256) && costly("es", Algorithm::ES256) && costly("ed", Algorithm::EdDSA));
        assert!(!costly("rs", Algorithm::HS256), "refused at sight");
        assert!(!tokens.is_costly("nonsense"));
    }

    #[test]
    fn a_public_key_is_no_secret() {
        // The classic confusion: an HS256 token signed with the text of the RS256 public key.
        let public = include_str!("../../../tests/keys/rs256.pub.pem");
        let forged = {
            let mut header = jsonwebtoken::Header::new(Algorithm::HS256);
            header.kid = Some("rs".to_owned());
            jsonwebtoken::encode(&header, &claims(json!({})), &EncodingKey::from_secret(public.as_bytes())).unwrap()
        };
        assert_eq!(verify_with(&settings(four_keys()), &forged), Err(TokenError::WrongAlgorithm));
    }

    #[test]
    fn unsigned_and_broken_tokens_are_refused() {
        let one = settings(vec![hs("a")]);
        let check = |token: &str, expected: TokenError| assert_eq!(verify_with(&one, token), Err(expected), "{token}");
        for alg in ["none", "None", "NONE", ""] {
            check(&unsigned(&format!(r#"{{"alg":"{alg}"}}"#), &claims(json!({}))), TokenError::Malformed);
        }
        check(&unsigned(r#"{"alg":"HS256"}"#, &claims(json!({}))), TokenError::BadSignature);
        check(&unsigned(r#"{"alg":"HS384"}"#, &claims(json!({}))), TokenError::WrongAlgorithm);
        check(&unsigned(r#"{"alg":"HS256","crit":["exp"]}"#, &claims(json!({}))), TokenError::Malformed);
        check("", TokenError::Malformed);
        check("a.b", TokenError::Malformed);
        check("a.b.c.d", TokenError::Malformed);
        check("é.é.é", TokenError::Malformed);
        let good = token(None, Algorithm::HS256, &claims(json!({})));
        let (body, signature) = good.rsplit_once('.').unwrap();
        let first = if signature.starts_with('A') { "B" } else { "A" };
        check(&format!("{body}.{first}{}", &signature[1..]), TokenError::BadSignature);
        check(&format!("{body}.{signature}="), TokenError::Malformed);
        let other = settings(vec![key("a", TokenAlgorithm::Hs256, "another secret")]);
        assert_eq!(verify_with(&other, &good), Err(TokenError::BadSignature));
    }

    #[test]
    fn the_kid_chooses_the_key() {
        let token = |kid| token(kid, Algorithm::HS256, &claims(json!({})));
        let verify = |kids: &[&str], kid| {
            verify_with(&settings(kids.iter().map(|kid| hs(kid)).collect()), &token(kid)).map(|_| ())
        };
        assert_eq!(verify(&["a"], None), Ok(()));
        assert_eq!(verify(&["a"], Some("a")), Ok(()));
        assert_eq!(verify(&["a"], Some("b")), Err(TokenError::UnknownKid));
        assert_eq!(verify(&["a", "b"], Some("b")), Ok(()));
        assert_eq!(verify(&["a", "b"], None), Err(TokenError::MissingKid));
        assert_eq!(verify(&[], None), Err(TokenError::UnknownKid));
    }

    #[test]
    fn times_are_checked_with_the_leeway() {
        let check = |changes: Value, expected: Result<(), TokenError>| {
            assert_eq!(verify_claims(changes.clone()).map(|_| ()), expected, "{changes}");
        };
        check(json!({ "exp": NOW - 29 }), Ok(()));
        check(json!({ "exp": NOW - 30 }), Err(TokenError::Expired));
        check(json!({ "exp": NOW as f64 + 0.5 }), Ok(()));
        check(json!({ "exp": 0 }), Err(TokenError::Expired));
        check(json!({ "exp": 1e300 }), Ok(()));
        check(json!({ "exp": null }), Err(TokenError::MissingClaim("exp")));
        check(json!({ "exp": "tomorrow" }), Err(TokenError::BadClaim("exp")));
        check(json!({ "exp": -1 }), Err(TokenError::BadClaim("exp")));
        check(json!({ "nbf": NOW + 30 }), Ok(()));
        check(json!({ "nbf": NOW + 31 }), Err(TokenError::NotYet));
        check(json!({ "nbf": "x" }), Err(TokenError::BadClaim("nbf")));
    }

    #[test]
    fn claims_are_bounded_and_typed() {
        let check = |changes: Value, claim: &'static str| {
            assert_eq!(verify_claims(changes.clone()).map(|_| ()), Err(TokenError::BadClaim(claim)), "{changes}");
        };
        check(json!({ "sub": "star" }), "sub");
        check(json!({ "sub": "" }), "sub");
        check(json!({ "sub": "a\r\nb" }), "sub");
        check(json!({ "sub": "a".repeat(257) }), "sub");
        check(json!({ "name": 5 }), "name");
        check(json!({ "name": "n".repeat(257) }), "name");
        check(json!({ "picture": "p".repeat(2049) }), "picture");
        for control in ["a\nb", "a\r\nX-Injected: 1", "a\0", "a\u{85}b", "a\u{7f}", "\u{1b}[2J"] {
            check(json!({ "sub": control }), "sub");
            check(json!({ "name": control }), "name");
            check(json!({ "picture": control }), "picture");
        }
        check(json!({ "rooms": "lobby" }), "rooms");
        check(json!({ "rooms": [1] }), "rooms");
        assert_eq!(verify_claims(json!({ "sub": null })).map(|_| ()), Err(TokenError::MissingClaim("sub")));
        check(json!({ "sub": 5 }), "sub");
    }

    #[test]
    fn issuer_and_audience_count_when_they_are_set() {
        let verify = |settings: &Settings, changes: Value| {
            verify_with(settings, &token(None, Algorithm::HS256, &claims(changes))).map(|_| ())
        };
        let plain = settings(vec![hs("a")]);
        assert_eq!(verify(&plain, json!({ "iss": "anyone" })), Ok(()));
        assert_eq!(verify(&plain, json!({ "aud": "somebody" })), Err(TokenError::WrongAudience));
        let issuer = Settings { token_issuer: vec!["me".to_owned()], ..plain.clone() };
        assert_eq!(verify(&issuer, json!({ "iss": "me" })), Ok(()));
        assert_eq!(verify(&issuer, json!({ "iss": "you" })), Err(TokenError::WrongIssuer));
        assert_eq!(verify(&issuer, json!({})), Err(TokenError::WrongIssuer));
        let audience = Settings { token_audience: vec!["chat".to_owned()], ..plain };
        assert_eq!(verify(&audience, json!({ "aud": "chat" })), Ok(()));
        assert_eq!(verify(&audience, json!({ "aud": ["mail", "chat"] })), Ok(()));
        assert_eq!(verify(&audience, json!({ "aud": ["mail"] })), Err(TokenError::WrongAudience));
        assert_eq!(verify(&audience, json!({})), Err(TokenError::WrongAudience));
    }

    #[test]
    fn a_key_that_cannot_verify_is_refused_at_the_start() {
        let refused = |algorithm, material: &str| Tokens::new(&settings(vec![key("a", algorithm, material)])).err();
        let private = KeyError::Private { kid: "a".to_owned() };
        assert_eq!(refused(TokenAlgorithm::Rs256, include_str!("../../../tests/keys/rs256.pem")), Some(private));
        let invalid = |algorithm| Some(KeyError::Invalid { kid: "a".to_owned(), algorithm });
        for algorithm in [TokenAlgorithm::Rs256, TokenAlgorithm::Es256, TokenAlgorithm::EdDsa] {
            assert_eq!(refused(algorithm, "nonsense"), invalid(algorithm));
        }
        let rsa = include_str!("../../../tests/keys/rs256.pub.pem");
        assert_eq!(refused(TokenAlgorithm::Es256, rsa), invalid(TokenAlgorithm::Es256));
        let p384 = include_str!("../../../tests/keys/es384.pub.pem");
        assert_eq!(refused(TokenAlgorithm::Es256, p384), invalid(TokenAlgorithm::Es256));
    }
}
