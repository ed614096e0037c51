//! What runs and watches gateways: files that `tabcast print` gives out, each complete as it is.

#[cfg(test)]
mod tests;

/// A file for whoever deploys the gateway.
///
/// ```
/// use tabcast::gateway::deploy::DeployFile;
/// assert!(DeployFile::named("systemd").is_some_and(|unit| unit.text().contains("[Service]")));
/// assert_eq!(DeployFile::named("kubernetes"), None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeployFile {
    /// A dashboard of Grafana (JSON): import it there and choose the data source.
    Dashboard,
    /// Alert rules of Prometheus (YAML).
    Alerts,
    /// A unit of systemd.
    Systemd,
    /// A Dockerfile that builds the gateway from its source.
    Dockerfile,
}

impl DeployFile {
    /// Every one of them.
    pub const ALL: [Self; 4] = [Self::Dashboard, Self::Alerts, Self::Systemd, Self::Dockerfile];

    /// Its name as an argument.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dashboard => "dashboard",
            Self::Alerts => "alerts",
            Self::Systemd => "systemd",
            Self::Dockerfile => "dockerfile",
        }
    }

    /// The one of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|file| file.name() == name)
    }

    /// What is in it.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Dashboard => include_str!("deploy/dashboard.json"),
            Self::Alerts => include_str!("deploy/alerts.yaml"),
            Self::Systemd => include_str!("deploy/tabcast.service"),
            Self::Dockerfile => include_str!("deploy/Dockerfile"),
        }
    }
}
