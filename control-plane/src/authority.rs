//! The CA certificates that sessions are to trust for the token port, from a file.
//!
//! In: a PEM file, such as `ca.crt` of a mounted Secret. Out: what is in it when a session is
//! started, so that one which is started after a change of the authority trusts the new one. What
//! cannot be used keeps the last good content.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use ambient_shared::client::parse_certificates;
use metrics::counter;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use crate::metrics::CERTIFICATE_RELOADS;

/// Longest file, in bytes: the system passes a program no longer variable (`MAX_ARG_STRLEN`,
/// 128 KiB), and some thirty certificates fit.
const MAX_CERTIFICATES: u64 = 64 * 1024;

/// The file, and what was last good of it.
#[derive(Debug)]
pub struct Authority {
    path: PathBuf,
    last: Mutex<Last>,
}

#[derive(Debug)]
struct Last {
    pem: Arc<str>,
    is_failing: bool,
}

impl Authority {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// When it cannot be read, or holds no certificate: what is wrong, for people.
    pub fn open(path: &Path) -> Result<Self, String> {
        let last = Last {
            pem: read(path)?.into(),
            is_failing: false,
        };
        Ok(Self {
            path: path.to_owned(),
            last: Mutex::new(last),
        })
    }

    /// The certificates as they were last good, PEM.
    pub fn pem(&self) -> Arc<str> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&last.pem)
    }

    /// The certificates as they are now, PEM; if they cannot be used, as they were last good.
    ///
    /// Cancel-safe.
    pub async fn now(&self) -> Arc<str> {
        // So that the first failure is an increase.
        counter!(CERTIFICATE_RELOADS, "result" => "failed").increment(0);
        let path = self.path.clone();
        // Off the threads that serve others. An error means that the program ends.
        if let Ok(read) = spawn_blocking(move || read(&path)).await {
            self.take(read);
        }
        self.pem()
    }

    fn take(&self, read: Result<String, String>) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(pem) => {
                last.is_failing = false;
                if *last.pem != *pem {
                    last.pem = pem.into();
                    counter!(CERTIFICATE_RELOADS, "result" => "ok").increment(1);
                    info!("sessions are given other CA certificates for the token port");
                }
            }
            Err(reason) if !last.is_failing => {
                last.is_failing = true;
                counter!(CERTIFICATE_RELOADS, "result" => "failed").increment(1);
                warn!(%reason, "the CA certificates that sessions are given stay the last good ones");
            }
            Err(_) => {}
        }
    }
}

fn read(path: &Path) -> Result<String, String> {
    let place = path.display();
    let text = || {
        if fs::metadata(path)?.len() > MAX_CERTIFICATES {
            let message = format!("it is larger than {MAX_CERTIFICATES} bytes");
            return Err(io::Error::other(message));
        }
        fs::read_to_string(path)
    };
    let text = text().map_err(|error| format!("cannot read {place}: {error}"))?;
    parse_certificates(&text).map_err(|error| format!("{place}: {error}"))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use ambient_shared::{swap::write_atomic, telemetry::MetricsPage};

    use super::*;

    fn certificate() -> String {
        let pair = rcgen::generate_simple_self_signed(["cp.example".to_owned()]);
        pair.unwrap().cert.pem()
    }

    #[tokio::test]
    async fn what_is_changed_is_given_and_what_cannot_be_used_is_not() {
        let page = MetricsPage::default();
        let _recorder = metrics::set_default_local_recorder(&page);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.crt");
        let write = |text: &str| write_atomic(&path, text.as_bytes(), 0o644).unwrap();
        let (first, second) = (certificate(), certificate());
        write(&first);
        let authority = Authority::open(&path).unwrap();
        assert_eq!(*authority.now().await, *first);

        write(&second);
        assert_eq!(*authority.now().await, *second);
        let both = format!("{first}{second}");
        write(&both);
        assert_eq!(*authority.now().await, *both);

        let too_long = both.repeat(100);
        for useless in ["", "no certificate", &first[..200], &too_long] {
            write(useless);
            assert_eq!(*authority.now().await, *both, "{useless}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(*authority.now().await, *both);
        write(&first);
        assert_eq!(*authority.now().await, *first);
        assert_eq!(authority.pem(), authority.now().await);
        // Files in a row that cannot be used are one failure, as nothing has changed in between.
        for (result, times) in [("ok", 3), ("failed", 1)] {
            let line = format!("{CERTIFICATE_RELOADS}{{result=\"{result}\"}} {times}\n");
            assert!(page.render().contains(&line), "{}", page.render());
        }
    }
}
