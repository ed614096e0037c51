//! Keys and secrets as settings: read once, shown never.

use std::fmt;
use std::fs;

use sha2::Digest;
use subtle::ConstantTimeEq;

use crate::id::UserId;

use super::value::{Entry, Value, quoted, split_list, words, wrong_type};

/// What stands for a secret wherever settings are shown.
const MASK: &str = "***";

/// Reads `file:PATH` as the file's text without the line end; any other text is the secret itself.
fn secret_text(text: &str) -> Result<String, String> {
    text.strip_prefix("file:").map_or_else(|| Ok(text.to_owned()), read_secret)
}

fn read_secret(path: &str) -> Result<String, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// A secret that is needed in clear, because something is signed with it. Its text is in no output.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<[u8]>);

impl Secret {
    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Value for Secret {
    const FORM: &'static str = "secret, or file:PATH";

    fn from_text(text: &str) -> Result<Self, String> {
        let text = secret_text(text)?;
        if text.is_empty() { Err("the secret is empty".to_owned()) } else { Ok(Self::from(text.as_str())) }
    }

    fn to_toml(&self) -> String {
        quoted(MASK)
    }
}

/// An address whose user, password or query may be a secret: it is shown without them.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(Box<str>);

impl SecretUrl {
    fn shown(&self) -> String {
        let (address, query) =
            self.0.split_once('?').map_or((&*self.0, None), |(address, query)| (address, Some(query)));
        let (scheme, rest) =
            address.split_once("://").map_or(("", address), |(_, rest)| (&address[..address.len() - rest.len()], rest));
        let place = rest.rsplit_once('@').map_or_else(|| rest.to_owned(), |(_, host)| format!("{MASK}@{host}"));
        let query = query.map_or_else(String::new, |_| format!("?{MASK}"));
        format!("{scheme}{place}{query}")
    }
}

impl Entry for SecretUrl {
    const LIST_FORM: &'static str = "list of URLs";

    fn read(text: &str) -> Result<Vec<Self>, String> {
        Self::from_text(text).map(|url| vec![url])
    }

    fn show(&self) -> String {
        quoted(&self.shown())
    }
}

impl std::ops::Deref for SecretUrl {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl From<&str> for SecretUrl {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl Value for SecretUrl {
    const FORM: &'static str = "URL";

    fn from_text(text: &str) -> Result<Self, String> {
        String::from_text(text).map(|text| Self::from(text.as_str()))
    }

    fn to_toml(&self) -> String {
        quoted(&self.shown())
    }
}

/// What a key or a secret that somebody could try again and again must have: 16 random bytes are never found.
pub(crate) const KEY_BYTES_MIN: usize = 16;

/// A key as it is held: its SHA-256 digest only. Two of them are compared in constant time, wherever that is.
#[derive(Clone)]
pub struct KeyDigest {
    digest: [u8; 32],
    is_short: bool,
}

impl PartialEq for KeyDigest {
    fn eq(&self, other: &Self) -> bool {
        self.digest.ct_eq(&other.digest).into()
    }
}

impl Eq for KeyDigest {}

impl KeyDigest {
    /// The digest of a key in clear.
    #[must_use]
    pub fn of(key: &[u8]) -> Self {
        Self { digest: sha2::Sha256::digest(key).into(), is_short: key.len() < KEY_BYTES_MIN }
    }

    /// Whether the key was there in clear and has less than 16 bytes: it can be guessed. How long a key is that was given
    /// as its digest, nobody knows.
    #[must_use]
    pub const fn is_short(&self) -> bool {
        self.is_short
    }

    /// The digest's bytes, to be compared in constant time.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Reads a key in clear, or `sha256:` and 64 hexadecimal digits.
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a key is empty".to_owned());
        }
        if text.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err("a key has a space or a character outside printable ASCII".to_owned());
        }
        let Some(hex) = text.strip_prefix("sha256:") else {
            return Ok(Self::of(text.as_bytes()));
        };
        let wrong = || "after sha256: stand 64 hexadecimal digits".to_owned();
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut digest = [0; 32];
        for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&hex[at..at + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self { digest, is_short: false })
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

/// The lines of a file of keys: empty ones and those that start with `#` are passed over.
fn file_lines(path: &str) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    if lines.is_empty() { Err(format!("{path} holds no key")) } else { Ok(lines) }
}

fn read_lines<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    match text.strip_prefix("file:") {
        Some(path) => {
            let lines = file_lines(path)?;
            lines.iter().map(|line| parse(line).map_err(|reason| format!("{path}: {reason}"))).collect()
        }
        None => parse(text).map(|entry| vec![entry]),
    }
}

impl Entry for KeyDigest {
    const LIST_FORM: &'static str = "list of keys";
    const IS_SECRET: bool = true;

    fn read(text: &str) -> Result<Vec<Self>, String> {
        read_lines(text, Self::parse)
    }

    fn show(&self) -> String {
        quoted(MASK)
    }
}

/// A key that names a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserKey {
    /// Whom a request with this key speaks for.
    pub user: UserId,
    /// The key.
    pub digest: KeyDigest,
}

impl UserKey {
    /// `user:key`, split at the first colon.
    fn parse(text: &str) -> Result<Self, String> {
        let (user, key) = text.split_once(':').ok_or("expected user:key")?;
        let user = UserId::parse(user).map_err(|error| format!("the user before the colon: {error}"))?;
        Ok(Self { user, digest: KeyDigest::parse(key)? })
    }
}

impl Entry for UserKey {
    const LIST_FORM: &'static str = "list of user:key";
    const IS_SECRET: bool = true;

    fn read(text: &str) -> Result<Vec<Self>, String> {
        read_lines(text, Self::parse)
    }

    fn show(&self) -> String {
        quoted(&format!("{}:{MASK}", self.user))
    }
}

words! {
    /// How a token is signed. Fixed by the key, never chosen by the token.
    TokenAlgorithm {
        /// HMAC with SHA-256 and a shared secret.
        Hs256 = "HS256",
        /// RSA PKCS#1 v1.5 with SHA-256.
        Rs256 = "RS256",
        /// ECDSA over P-256 with SHA-256.
        Es256 = "ES256",
        /// Ed25519.
        EdDsa = "EdDSA",
    }
}

/// A key that verifies users' tokens.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenKey {
    /// The key's name, as the token's header has it.
    pub kid: String,
    /// The only algorithm that is accepted with this key.
    pub algorithm: TokenAlgorithm,
    /// HS256: the shared secret. The others: the public key as PEM.
    pub material: Secret,
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("kid", &self.kid).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

const TOKEN_KEY_FIELDS: [&str; 5] = ["kid", "alg", "secret", "secret_file", "public_key_file"];

impl TokenKey {
    fn from_fields(fields: Vec<(String, String)>) -> Result<Self, String> {
        let mut seen: [Option<String>; TOKEN_KEY_FIELDS.len()] = Default::default();
        for (name, value) in fields {
            let Some(at) = TOKEN_KEY_FIELDS.iter().position(|known| *known == name) else {
                return Err(format!(
                    "a token key has no field `{name}`; its fields are {}",
                    TOKEN_KEY_FIELDS.join(", ")
                ));
            };
            // A wrong separator: what is behind it may be a secret, and is not repeated.
            if name != "secret" && TOKEN_KEY_FIELDS.iter().any(|field| value.contains(&format!("{field}="))) {
                return Err("a token key's fields are separated by commas, and one has another in it".to_owned());
            }
            if seen[at].replace(value).is_some() {
                return Err(format!("a token key has `{name}` twice"));
            }
        }
        let [kid, alg, secret, secret_file, public_key_file] = seen;
        let kid = kid.filter(|kid| !kid.is_empty()).ok_or("a token key needs a `kid`")?;
        let algorithm = TokenAlgorithm::from_text(&alg.ok_or_else(|| format!("token key `{kid}` needs an `alg`"))?)?;
        let material = match (algorithm, secret, secret_file, public_key_file) {
            (TokenAlgorithm::Hs256, Some(secret), None, None) => secret_text(&secret)?,
            (TokenAlgorithm::Hs256, None, Some(path), None) => read_secret(&path)?,
            (TokenAlgorithm::Hs256, ..) => {
                return Err(format!("token key `{kid}`: HS256 takes either `secret` or `secret_file`, nothing else"));
            }
            (_, None, None, Some(path)) => read_secret(&path)?,
            _ => {
                let alg = algorithm.as_str();
                return Err(format!("token key `{kid}`: {alg} takes `public_key_file`, nothing else"));
            }
        };
        if material.is_empty() {
            return Err(format!("token key `{kid}`: the secret is empty"));
        }
        Ok(Self { kid, algorithm, material: Secret::from(material.as_str()) })
    }
}

/// In a flag or a variable: `kid=main,alg=HS256,secret=…`, several separated by `;`. A secret with a comma or a
/// semicolon goes into a file: `secret=file:PATH`, or `secret_file=PATH`.
impl Entry for TokenKey {
    const LIST_FORM: &'static str = "list of tables";
    const IS_SECRET: bool = true;
    const SEPARATOR: char = ';';

    fn read(text: &str) -> Result<Vec<Self>, String> {
        let mut fields = Vec::new();
        for field in split_list(text, ',')? {
            // What is not a field may be the rest of a secret with a comma in it: it is not repeated.
            let known = field.split_once('=').filter(|(name, _)| TOKEN_KEY_FIELDS.contains(&name.trim()));
            let (name, value) = known.ok_or("expected kid=…,alg=…,secret=… (or secret_file=…, public_key_file=…)")?;
            fields.push((name.trim().to_owned(), value.to_owned()));
        }
        Self::from_fields(fields).map(|key| vec![key])
    }

    fn read_toml(value: toml::Value) -> Result<Vec<Self>, String> {
        let table = match value {
            toml::Value::Table(table) => table,
            toml::Value::String(text) => return Self::read(&text),
            other => return Err(wrong_type("a table", &other)),
        };
        let mut fields = Vec::new();
        for (name, value) in table {
            match value {
                toml::Value::String(text) => fields.push((name, text)),
                other => return Err(format!("`{name}`: {}", wrong_type("a string", &other))),
            }
        }
        Self::from_fields(fields).map(|key| vec![key])
    }

    fn show(&self) -> String {
        let field = if self.algorithm == TokenAlgorithm::Hs256 { "secret" } else { "public_key" };
        format!("{{ kid = {}, alg = {}, {field} = \"{MASK}\" }}", quoted(&self.kid), self.algorithm.to_toml())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn a_key_is_given_in_clear_or_as_its_digest() {
        let clear = KeyDigest::read("k-123").unwrap();
        let hex: String = clear[0].as_bytes().iter().map(|b| format!("{b:02X}")).collect();
        let digest = KeyDigest::read(&format!("sha256:{hex}")).unwrap();
        assert_eq!(digest, clear);
        assert!(clear[0].is_short() && !digest[0].is_short());
        assert!(!KeyDigest::read(&"k".repeat(KEY_BYTES_MIN)).unwrap()[0].is_short());
        assert!(KeyDigest::read("sha256:12").is_err());
        assert!(KeyDigest::read(&format!("sha256:{}", "é".repeat(32))).is_err());
        assert!(KeyDigest::read("two words").is_err());
        assert!(KeyDigest::read("").is_err());
    }

    #[test]
    fn a_file_holds_one_key_a_line() {
        let keys = file("# workers\nfirst\n\n  second \n");
        let path = keys.path().display().to_string();
        assert_eq!(
            KeyDigest::read(&format!("file:{path}")).unwrap(),
            [KeyDigest::of(b"first"), KeyDigest::of(b"second")]
        );
        let empty = file("# none\n");
        assert!(KeyDigest::read(&format!("file:{}", empty.path().display())).unwrap_err().ends_with("holds no key"));
        assert!(KeyDigest::read("file:/nowhere").unwrap_err().starts_with("cannot read /nowhere"));
    }

    #[test]
    fn an_openai_key_names_its_user() {
        let key = UserKey::parse("alice:sk:1").unwrap();
        assert_eq!((key.user.as_str(), key.digest), ("alice", KeyDigest::of(b"sk:1")));
        assert!(UserKey::parse("no-colon").is_err());
        assert!(UserKey::parse(":key").is_err());
        assert!(UserKey::parse("alice:").is_err());
    }

    #[test]
    fn token_keys_have_a_compact_form() {
        let keys = Vec::<TokenKey>::from_text("kid=a,alg=HS256,secret=s=1; kid=b,alg=HS256,secret=2").unwrap();
        assert_eq!(keys.iter().map(|k| k.kid.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(keys[0].material.expose(), b"s=1");
        let secret = file("from a file\n");
        for field in ["secret_file=", "secret=file:"] {
            let from_file = format!("kid=a,alg=HS256,{field}{}", secret.path().display());
            assert_eq!(TokenKey::read(&from_file).unwrap()[0].material.expose(), b"from a file", "{field}");
            let (name, path) = field.split_once('=').unwrap();
            let table = format!("kid = 'a'\nalg = 'HS256'\n{name} = '{path}{}'", secret.path().display());
            let table = TokenKey::read_toml(toml::Value::Table(table.parse().unwrap()));
            assert_eq!(table.unwrap()[0].material.expose(), b"from a file", "{field}");
        }
    }

    #[test]
    fn a_wrong_token_key_is_refused_without_its_secret() {
        let check = |text: &str, expected: &str| {
            let reason = TokenKey::read(text).unwrap_err();
            assert!(reason.contains(expected), "{text}: {reason}");
            assert!(!reason.contains("hush"), "{reason}");
        };
        check("alg=HS256,secret=hush", "needs a `kid`");
        check("kid=a,secret=hush", "needs an `alg`");
        check("kid=a,alg=HS512,secret=hush", "expected one of HS256, RS256, ES256, EdDSA");
        check("kid=a,alg=none,secret=hush", "expected one of");
        check("kid=a,alg=HS256", "either `secret` or `secret_file`");
        check("kid=a,alg=HS256,secret=", "the secret is empty");
        check("kid=a,alg=RS256-secret=hush", "separated by commas");
        check("kid=a-secret=hush,alg=HS256", "separated by commas");
        check("kid=a,alg=HS256,secret_file=x secret=hush", "separated by commas");
        check("kid=a,alg=HS256,secret=hush,secret_file=x", "either `secret` or `secret_file`");
        check("kid=a,alg=RS256,secret=hush", "takes `public_key_file`");
        check("kid=a,alg=RS256,public_key_file=/nowhere", "cannot read /nowhere");
        check("kid=a,alg=HS256,secret=file:/nowhere", "cannot read /nowhere");
        check("kid=a,kid=b,alg=HS256,secret=hush", "`kid` twice");
        check("kid=a,alg=HS256,secert=hush", "expected kid=");
        check("kid=a,alg=HS256,secret=s,hush=1", "expected kid=");
        check("hush", "expected kid=");
    }

    #[test]
    fn nothing_shows_a_secret() {
        let key = TokenKey::read("kid=a,alg=HS256,secret=hush").unwrap().remove(0);
        let user_key = UserKey::parse("alice:hush").unwrap();
        let digest = KeyDigest::of(b"hush");
        let shown = format!(
            "{key:?} {user_key:?} {digest:?} {:?} {} {} {}",
            Secret::from("hush"),
            key.show(),
            user_key.show(),
            Secret::from("hush").to_toml()
        );
        let url = SecretUrl::from("https://example.org/hook?key=hush");
        assert_eq!(
            (format!("{url:?}").as_str(), url.to_toml().as_str()),
            ("https://example.org/hook?***", "\"https://example.org/hook?***\"")
        );
        assert_eq!(SecretUrl::from("http://localhost/hook").to_toml(), "\"http://localhost/hook\"");
        assert_eq!(SecretUrl::from("rediss://u:h@sh@host:1/2").show(), "\"rediss://***@host:1/2\"");
        assert!(!shown.contains("hush") && !shown.contains("104, 117"), "{shown}");
    }
}
