//! The certificate that handshakes get: checked before it is used, replaced while handshakes go on.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use x509_cert::Certificate;
use x509_cert::der::Decode;

/// Why a chain and a key cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// The text of the chain is not PEM with certificates in it.
    #[error("the certificate is not usable: {0}")]
    Chain(String),
    /// The text of the key is not PEM with a private key in it, or no key that can sign here.
    #[error("the key is not usable: {0}")]
    Key(String),
    /// The first certificate of the chain is not that of the key.
    #[error("the key is not that of the certificate, which must be the first of its chain")]
    Mismatch,
    /// Nobody would accept it any more.
    #[error("the certificate has expired, {} ago", rough(*.0))]
    Expired(Duration),
    /// Nobody accepts it yet.
    #[error("the certificate is not valid before {} from now", rough(*.0))]
    NotYetValid(Duration),
}

/// A duration to the day, or to the second within one.
fn rough(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..86_400 => format!("{seconds} s"),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// What a new handshake gets. Sessions keep what they have.
pub struct Certificates(ArcSwap<CertifiedKey>);

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Certificates").finish_non_exhaustive()
    }
}

impl Certificates {
    /// A chain and its key, both in PEM: the server's own certificate first, then those that vouch for it. `now` is what
    /// its validity is compared with.
    ///
    /// # Errors
    /// [`CertificateError`]: it would not be accepted, or cannot be used.
    pub fn from_pem(chain: &[u8], key: &[u8], now: SystemTime) -> Result<Self, CertificateError> {
        certified(chain, key, now).map(|certified| Self(ArcSwap::from_pointee(certified)))
    }

    /// Takes another pair from now on.
    ///
    /// # Errors
    /// As [`Self::from_pem`]: the one before stays.
    pub fn replace(&self, chain: &[u8], key: &[u8], now: SystemTime) -> Result<(), CertificateError> {
        self.0.store(Arc::new(certified(chain, key, now)?));
        Ok(())
    }

    /// The certificate that handshakes get, in DER.
    #[must_use]
    pub fn current(&self) -> Vec<u8> {
        self.0.load().cert.first().map(|certificate| certificate.to_vec()).unwrap_or_default()
    }

    /// When the certificate that handshakes get expires.
    #[must_use]
    pub fn expires(&self) -> Option<SystemTime> {
        let end = validity(self.0.load().cert.first()?).ok()?.1;
        SystemTime::UNIX_EPOCH.checked_add(end)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

fn certified(chain: &[u8], key: &[u8], now: SystemTime) -> Result<CertifiedKey, CertificateError> {
    let unusable = |error: &dyn fmt::Display| CertificateError::Chain(error.to_string());
    let certificates = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| unusable(&error))?;
    let own = certificates.first().ok_or_else(|| unusable(&"there is none in the file"))?;
    let (from, until) = validity(own)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| CertificateError::Key(error.to_string()))?;
    let key = ring::sign::any_supported_type(&key).map_err(|error| CertificateError::Key(error.to_string()))?;
    let certified = CertifiedKey::new(certificates, key);
    match certified.keys_match() {
        Ok(()) => {}
        Err(rustls::Error::InconsistentKeys(_)) => return Err(CertificateError::Mismatch),
        Err(error) => return Err(unusable(&error)),
    }
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if now < from {
        return Err(CertificateError::NotYetValid(from - now));
    }
    if now > until {
        return Err(CertificateError::Expired(now - until));
    }
    Ok(certified)
}

/// From when until when a certificate is valid, since 1970.
fn validity(certificate: &CertificateDer<'_>) -> Result<(Duration, Duration), CertificateError> {
    let certificate = Certificate::from_der(certificate).map_err(|error| CertificateError::Chain(error.to_string()))?;
    let validity = certificate.tbs_certificate.validity;
    Ok((validity.not_before.to_unix_duration(), validity.not_after.to_unix_duration()))
}
