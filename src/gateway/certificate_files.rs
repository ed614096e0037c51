//! The files of `tls_cert` and `tls_key`: read at the start, and again while the gateway runs.

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use tokio::signal::unix::Signal;
use tokio::time::MissedTickBehavior;

use crate::config::Settings;
use crate::driver::tls::Acceptor;
use crate::driver::tls::certificates::{CertificateError, Certificates};

/// How often the files are looked at without being asked to.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateFilesError {
    /// One of them cannot be read.
    #[error("{setting}: cannot read {}: {error}", .path.display())]
    Unreadable {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// What is in them cannot be used.
    #[error("{setting}: {}: {error}", .path.display())]
    Unusable {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: CertificateError,
    },
    /// TLS cannot be set up with them.
    #[error("tls_cert: {0}")]
    Tls(#[from] rustls::Error),
}

/// What a look at the files found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// What was found the last time.
    Same,
    /// Another pair, which handshakes get from now on.
    Replaced,
}

/// The two files, and the certificate that handshakes get.
pub struct CertificateFiles {
    certificate: PathBuf,
    key: PathBuf,
    certificates: Arc<Certificates>,
    /// Of both as they were seen last, usable or not: a bad pair is complained of once.
    seen: [u8; 32],
    /// One of them could not be read at the last look.
    is_missing: bool,
}

impl fmt::Debug for CertificateFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateFiles").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl CertificateFiles {
    /// Reads and checks what the settings name; nothing if they name nothing.
    ///
    /// # Errors
    /// Handshakes with it would fail: see [`CertificateFilesError`].
    pub fn open(settings: &Settings) -> Result<Option<Self>, CertificateFilesError> {
        let (Some(certificate), Some(key)) = (&settings.tls_cert, &settings.tls_key) else { return Ok(None) };
        let (certificate, key) = (PathBuf::from(certificate), PathBuf::from(key));
        let texts = Texts::read(&certificate, &key)?;
        let certificates = Certificates::from_pem(&texts.certificate, &texts.key, now());
        let certificates = certificates.map_err(|error| unusable(&certificate, &key, error))?;
        Ok(Some(Self {
            certificate,
            key,
            certificates: Arc::new(certificates),
            seen: texts.digest(),
            is_missing: false,
        }))
    }

    /// Accepts TLS with whatever certificate is the current one.
    pub(crate) fn acceptor(&self) -> Result<Acceptor, CertificateFilesError> {
        Ok(Acceptor::new(Arc::clone(&self.certificates) as _)?)
    }

    /// Takes what is in the files now, if that is not what was there before, or if it was `asked` to.
    fn look(&mut self, asked: bool) -> Result<Look, CertificateFilesError> {
        let texts = Texts::read(&self.certificate, &self.key)?;
        let digest = texts.digest();
        if std::mem::replace(&mut self.seen, digest) == digest && !asked {
            return Ok(Look::Same);
        }
        let replaced = self.certificates.replace(&texts.certificate, &texts.key, now());
        replaced.map_err(|error| unusable(&self.certificate, &self.key, error))?;
        Ok(Look::Replaced)
    }

    /// Looks, and says in the log what came of it.
    fn look_and_tell(&mut self, asked: bool) {
        let looked = self.look(asked);
        let is_missing = matches!(looked, Err(CertificateFilesError::Unreadable { .. }));
        let was_missing = std::mem::replace(&mut self.is_missing, is_missing);
        match looked {
            Ok(Look::Same) => {}
            Ok(Look::Replaced) => {
                let left = self.certificates.expires().and_then(|end| end.duration_since(now()).ok());
                let days = left.map_or(0, |left| left.as_secs() / 86_400);
                tracing::info!(valid_days = days, "new handshakes get the certificate that is in the files now");
            }
            // Said once, not at every look.
            Err(_) if is_missing && was_missing && !asked => {}
            Err(error) => tracing::error!(%error, "the certificate stays as it was"),
        }
    }
}

/// Looks at the files every 30 seconds, and on SIGHUP: for ever. Without files there is nothing to look at.
///
/// # Cancel safety
/// Dropped, a look that has begun ends by itself, and no other begins.
pub(crate) async fn keep(files: Option<CertificateFiles>, hangup: &mut Signal) -> Infallible {
    let Some(mut files) = files else { return std::future::pending().await };
    let mut interval = tokio::time::interval(LOOK_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            _ = interval.tick() => false,
        };
        // A file may be on a disk that does not answer: that is for a thread that nobody waits for.
        let looked = tokio::task::spawn_blocking(move || {
            files.look_and_tell(asked);
            files
        });
        files = match looked.await {
            Ok(files) => files,
            // A runtime that ends runs nothing new.
            Err(_) => return std::future::pending().await,
        };
    }
}

struct Texts {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Texts {
    fn read(certificate: &Path, key: &Path) -> Result<Self, CertificateFilesError> {
        let read = |setting, path: &Path| {
            let unreadable = |error| CertificateFilesError::Unreadable { setting, path: path.to_owned(), error };
            std::fs::read(path).map_err(unreadable)
        };
        Ok(Self { certificate: read("tls_cert", certificate)?, key: read("tls_key", key)? })
    }

    fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        digest.update((self.certificate.len() as u64).to_le_bytes());
        digest.update(&self.certificate);
        digest.update(&self.key);
        digest.finalize().into()
    }
}

fn unusable(certificate: &Path, key: &Path, error: CertificateError) -> CertificateFilesError {
    let (setting, path) = match error {
        CertificateError::Key(_) | CertificateError::Mismatch => ("tls_key", key),
        _ => ("tls_cert", certificate),
    };
    CertificateFilesError::Unusable { setting, path: path.to_owned(), error }
}

fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use rcgen::CertifiedKey;
    use tempfile::TempDir;
    use tokio::signal::unix::{SignalKind, signal};

    use super::*;

    fn write(folder: &TempDir) {
        let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(folder.path().join("cert"), cert.pem()).unwrap();
        std::fs::write(folder.path().join("key"), signing_key.serialize_pem()).unwrap();
    }

    fn open(folder: &TempDir) -> CertificateFiles {
        let path = |name| Some(folder.path().join(name).to_str().unwrap().to_owned());
        let settings = Settings { tls_cert: path("cert"), tls_key: path("key"), ..Settings::default() };
        CertificateFiles::open(&settings).unwrap().unwrap()
    }

    #[test]
    fn a_look_takes_what_has_changed_and_is_usable() {
        let folder = tempfile::tempdir().unwrap();
        write(&folder);
        let mut files = open(&folder);
        assert_eq!(files.look(false).unwrap(), Look::Same);
        assert_eq!(files.look(true).unwrap(), Look::Replaced);
        write(&folder);
        assert_eq!(files.look(false).unwrap(), Look::Replaced);
        assert_eq!(files.look(false).unwrap(), Look::Same);
        std::fs::write(folder.path().join("key"), "no key").unwrap();
        let refused = files.look(false).unwrap_err();
        assert!(
            refused.to_string().starts_with("tls_key: ") && refused.to_string().contains("/key: the key is not usable")
        );
        // Complained of once, but for those who ask.
        assert_eq!(files.look(false).unwrap(), Look::Same);
        assert!(files.look(true).is_err());
        assert!(files.certificates.expires().is_some_and(|end| end > now()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_pair_is_found_without_a_signal() {
        let folder = tempfile::tempdir().unwrap();
        write(&folder);
        let files = open(&folder);
        let certificates = Arc::clone(&files.certificates);
        let before = certificates.current();
        write(&folder);
        let mut hangup = signal(SignalKind::user_defined2()).unwrap();
        let kept = keep(Some(files), &mut hangup);
        let changed = async {
            while certificates.current() == before {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            never = kept => match never {},
            changed = tokio::time::timeout(2 * LOOK_INTERVAL, changed) => changed.unwrap(),
        }
    }
}
