//! A link: one connection in one role, made again when it is lost.
//!
//! Roles never share a connection: what one of them waits for must not delay another, and a connection that is
//! subscribed runs no commands. What was under way when a connection was lost may or may not have been carried out:
//! whoever asked is told, and decides whether it may be said twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, ErrorKind, IntoConnectionInfo, Pipeline, ProtocolVersion,
    RedisError, RedisResult, ServerErrorKind, TlsCertificates, Value,
};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// The first pause after a connection was lost; it doubles with each failure, and is spread by half.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest pause: with Redis back, delivery resumes within twice of it.
const BACKOFF_MAX: Duration = Duration::from_millis(800);
/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Where Redis is, and how it is talked to.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisServer {
    /// `redis://[user[:password]@]host[:port][/db]`, `rediss://` for TLS, `redis+unix:///path`. Several are the seeds of a
    /// cluster.
    pub urls: Vec<String>,
    /// Whether they are nodes of a Redis Cluster.
    pub is_cluster: bool,
    /// Certificates in PEM that are trusted beside nothing else. None: those of the system.
    pub ca: Option<Vec<u8>>,
    /// How long an answer may take before the connection counts as lost. Default 2 s.
    pub timeout: Duration,
}

impl Default for RedisServer {
    fn default() -> Self {
        let urls = vec!["redis://127.0.0.1/".to_owned()];
        Self { urls, is_cluster: false, ca: None, timeout: Duration::from_secs(2) }
    }
}

/// Without what the URLs may hold of secrets.
impl std::fmt::Debug for RedisServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisServer")
            .field("urls", &self.urls.len())
            .field("is_cluster", &self.is_cluster)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// A server whose URLs were read, and the name that its connections have.
#[derive(Clone)]
pub(crate) struct Endpoint {
    seeds: Arc<[ConnectionInfo]>,
    ca: Option<Arc<[u8]>>,
    cluster: Option<Arc<ClusterClient>>,
    timeout: Duration,
    /// What `CLIENT LIST` shows, before the role.
    name: Arc<str>,
}

impl Endpoint {
    /// # Errors
    /// A URL that is none, or certificates that cannot be read.
    pub(crate) fn new(server: &RedisServer, name: &str) -> RedisResult<Self> {
        let nodelay = |info: ConnectionInfo| info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let seeds = server.urls.iter().map(|url| url.as_str().into_connection_info().map(nodelay));
        let seeds: Arc<[ConnectionInfo]> = seeds.collect::<RedisResult<Vec<_>>>()?.into();
        let ca: Option<Arc<[u8]>> = server.ca.as_deref().map(Arc::from);
        let mut cluster = None;
        if server.is_cluster {
            let mut builder = ClusterClientBuilder::new(seeds.iter().cloned())
                .connection_timeout(CONNECT_TIMEOUT)
                .response_timeout(server.timeout)
                .overall_response_timeout(Some(server.timeout))
                .tcp_settings(TcpSettings::default().set_nodelay(true))
                .retries(4)
                .min_retry_wait(20)
                .max_retry_wait(400);
            if let Some(ca) = &ca {
                builder = builder.certs(certificates(ca));
            }
            cluster = Some(Arc::new(builder.build()?));
        }
        let endpoint = Self { seeds, ca, cluster, timeout: server.timeout, name: name.into() };
        endpoint.seeds.iter().try_for_each(|seed| endpoint.client(seed.clone()).map(drop))?;
        Ok(endpoint)
    }

    pub(crate) fn is_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The nodes that it was given.
    pub(crate) fn seeds(&self) -> &[ConnectionInfo] {
        &self.seeds
    }

    fn client(&self, info: ConnectionInfo) -> RedisResult<Client> {
        match &self.ca {
            Some(ca) => Client::build_with_tls(info, certificates(ca)),
            None => Client::open(info),
        }
    }

    /// A connection of its own to one node. `config` has the timeouts, and where pushes go.
    pub(crate) async fn connect_to(
        &self,
        node: &ConnectionInfo,
        role: &str,
        config: AsyncConnectionConfig,
        protocol: ProtocolVersion,
    ) -> RedisResult<MultiplexedConnection> {
        let settings = node.redis_settings().clone().set_protocol(protocol);
        let client = self.client(node.clone().set_redis_settings(settings))?;
        let config = config.set_connection_timeout(Some(CONNECT_TIMEOUT));
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let name = format!("{}:{role}", self.name);
        redis::cmd("CLIENT").arg("SETNAME").arg(name).exec_async(&mut connection).await?;
        Ok(connection)
    }

    /// The same to the first node that answers.
    pub(crate) async fn connect_to_any(&self, role: &str, config: AsyncConnectionConfig) -> RedisResult<Connection> {
        let mut failed = None;
        for node in &*self.seeds {
            match self.connect_to(node, role, config.clone(), ProtocolVersion::RESP2).await {
                Ok(connection) => return Ok(Connection::One(connection)),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| RedisError::from((ErrorKind::InvalidClientConfig, "no URL of Redis is given"))))
    }

    /// A configuration whose answers have to come in time.
    pub(crate) fn config(&self) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new().set_response_timeout(Some(self.timeout)).set_pipeline_buffer_size(1024)
    }
}

fn certificates(ca: &[u8]) -> TlsCertificates {
    TlsCertificates { client_tls: None, root_cert: Some(ca.to_vec()) }
}

/// A connection: to the server, or to whichever node of the cluster a key belongs to.
#[derive(Clone)]
pub(crate) enum Connection {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Connection {
    /// Sends all commands at once; one answer each, in their order. What the server refused is a
    /// [`Value::ServerError`] in its place. A cluster carries them out in any order, those for one key too.
    ///
    /// # Errors
    /// The connection is of no use any more: any of the commands may have been carried out.
    pub(crate) async fn run(&mut self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        match self {
            Self::One(_) => self.run_in_slot(pipeline).await,
            Self::Cluster(connection) => {
                let each = pipeline.cmd_iter().map(|command| {
                    let mut connection = connection.clone();
                    async move { connection.req_packed_command(command).await }
                });
                join_all(each).await.into_iter().map(in_place).collect()
            }
        }
    }

    /// The same for commands whose keys are all in one slot, each command naming one: a cluster carries them out in
    /// their order too. One that has moved the slot counts as lost, so that the next connection knows where it is.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(crate) async fn run_in_slot(&mut self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        let answers = match self {
            Self::One(connection) => connection.req_packed_commands(pipeline, 0, pipeline.len()).await?,
            Self::Cluster(connection) => connection.req_packed_commands(pipeline, 0, pipeline.len()).await?,
        };
        match answers.iter().find_map(unavailable) {
            Some(error) => Err(error),
            None => Ok(answers),
        }
    }
}

/// The server's refusal as an answer; what went wrong on the way stays an error.
fn in_place(answer: RedisResult<Value>) -> RedisResult<Value> {
    match answer {
        Err(error) if matches!(error.kind(), ErrorKind::Extension) => Ok(refusal(error)),
        Err(error) if matches!(error.kind(), ErrorKind::Server(kind) if !is_unavailable(kind)) => Ok(refusal(error)),
        answer => answer,
    }
}

fn refusal(error: RedisError) -> Value {
    Value::SimpleString(format!("{REFUSED}{error}"))
}

/// How a refusal of a cluster's node is marked: no simple string of Redis begins so.
const REFUSED: &str = "\0refused ";

/// What the server said against a command, if it did.
pub(crate) fn refused(answer: &Value) -> Option<String> {
    match answer {
        Value::ServerError(error) => Some(format!("{} {}", error.code(), error.details().unwrap_or_default())),
        Value::SimpleString(text) => text.strip_prefix(REFUSED).map(str::to_owned),
        _ => None,
    }
}

/// What a server answers that is there and can do nothing now.
const fn is_unavailable(kind: ServerErrorKind) -> bool {
    use ServerErrorKind as Kind;
    matches!(
        kind,
        Kind::BusyLoading
            | Kind::ClusterDown
            | Kind::MasterDown
            | Kind::TryAgain
            | Kind::ReadOnly
            | Kind::Moved
            | Kind::Ask
    )
}

fn unavailable(answer: &Value) -> Option<RedisError> {
    match answer {
        Value::ServerError(error) if error.kind().is_some_and(is_unavailable) => Some(error.clone().into()),
        _ => None,
    }
}

/// One connection in one role, made when it is first needed and again after it was lost. Clones are the same link.
#[derive(Clone)]
pub(crate) struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: Endpoint,
    role: &'static str,
    /// Blocking reads wait for longer than answers may take.
    response_timeout: Option<Duration>,
    /// Publishes go through one node, so that they stay in order.
    is_pinned: bool,
    state: Mutex<State>,
    /// The last answer did not come.
    ///
    /// # Ordering
    /// Relaxed: it only spares the lock while all is well.
    is_failing: AtomicBool,
}

#[derive(Default)]
struct State {
    connection: Option<Connection>,
    /// How often it was made: an error of an older one says nothing of this one.
    made: u64,
    failures: u32,
    not_before: Option<Instant>,
}

impl Shared {
    fn new(endpoint: Endpoint, role: &'static str) -> Self {
        let (response_timeout, is_failing) = (Some(endpoint.timeout), AtomicBool::new(false));
        Self { endpoint, role, response_timeout, is_pinned: false, state: Mutex::default(), is_failing }
    }
}

impl Link {
    pub(crate) fn new(endpoint: Endpoint, role: &'static str) -> Self {
        Self { shared: Arc::new(Shared::new(endpoint, role)) }
    }

    /// A link to one node, also of a cluster.
    pub(crate) fn pinned(endpoint: Endpoint, role: &'static str) -> Self {
        Self { shared: Arc::new(Shared { is_pinned: true, ..Shared::new(endpoint, role) }) }
    }

    /// A link for reads that block: an answer may take `block` longer than others.
    #[cfg(feature = "gateway")]
    pub(crate) fn blocking(endpoint: Endpoint, role: &'static str, block: Duration) -> Self {
        let response_timeout = Some(endpoint.timeout + block);
        Self { shared: Arc::new(Shared { response_timeout, ..Shared::new(endpoint, role) }) }
    }

    /// Runs all commands at once: see [`Connection::run`].
    ///
    /// # Errors
    /// There is no connection, which is then not tried again before a pause is over; or it was lost, and any of the
    /// commands may have been carried out.
    ///
    /// # Cancel safety
    /// A dropped call may have been carried out.
    pub(crate) async fn run(&self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        let (mut connection, made) = self.connection().await?;
        let result = connection.run(pipeline).await;
        self.note(made, &result).await;
        result
    }

    /// Runs all commands in their order: see [`Connection::run_in_slot`].
    ///
    /// # Errors
    /// As [`Self::run`].
    ///
    /// # Cancel safety
    /// As [`Self::run`].
    pub(crate) async fn run_in_slot(&self, pipeline: &Pipeline) -> RedisResult<Vec<Value>> {
        let (mut connection, made) = self.connection().await?;
        let result = connection.run_in_slot(pipeline).await;
        self.note(made, &result).await;
        result
    }

    /// Runs one command.
    ///
    /// # Errors
    /// As [`Self::run`], and what the server refused.
    pub(crate) async fn query(&self, command: Cmd) -> RedisResult<Value> {
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.add_command(command);
        let mut answers = self.run(&pipeline).await?;
        match answers.pop() {
            Some(Value::ServerError(error)) => Err(error.into()),
            Some(answer) => match refused(&answer) {
                Some(message) => Err(RedisError::from((ErrorKind::Extension, "refused", message))),
                None => Ok(answer),
            },
            None => Err(RedisError::from((ErrorKind::Parse, "no answer"))),
        }
    }

    async fn connection(&self) -> RedisResult<(Connection, u64)> {
        let Shared { endpoint, role, response_timeout, is_pinned, state, .. } = &*self.shared;
        let mut state = state.lock().await;
        if let Some(connection) = &state.connection {
            return Ok((connection.clone(), state.made));
        }
        if state.not_before.is_some_and(|then| Instant::now() < then) {
            return Err(RedisError::from((ErrorKind::Io, "Redis is not connected")));
        }
        let config = endpoint.config().set_response_timeout(*response_timeout);
        let made = match &endpoint.cluster {
            Some(client) if !is_pinned => {
                let within = tokio::time::timeout(CONNECT_TIMEOUT + endpoint.timeout, async {
                    let config = redis::cluster::ClusterConfig::new()
                        .set_connection_timeout(CONNECT_TIMEOUT)
                        .set_response_timeout(response_timeout.unwrap_or(endpoint.timeout));
                    client.get_async_connection_with_config(config).await
                });
                let timed_out = |_| RedisError::from((ErrorKind::Io, "the cluster does not answer"));
                within.await.map_err(timed_out).flatten().map(Connection::Cluster)
            }
            _ => endpoint.connect_to_any(role, config).await,
        };
        match made {
            Ok(connection) => {
                state.connection = Some(connection.clone());
                state.made += 1;
                Ok((connection, state.made))
            }
            Err(error) => {
                self.fail(&mut state, &error);
                Err(error)
            }
        }
    }

    /// A connection is well once it has answered, and of no use once it has not.
    async fn note<T>(&self, made: u64, result: &RedisResult<T>) {
        let Shared { role, state, is_failing, .. } = &*self.shared;
        match result {
            Ok(_) if !is_failing.load(Ordering::Relaxed) => {}
            Ok(_) => {
                let mut state = state.lock().await;
                if state.made == made {
                    (state.failures, state.not_before) = (0, None);
                    is_failing.store(false, Ordering::Relaxed);
                    tracing::info!(role, "Redis answers again");
                }
            }
            Err(error) => {
                let mut state = state.lock().await;
                if state.made == made && state.connection.is_some() {
                    state.connection = None;
                    self.fail(&mut state, error);
                }
            }
        }
    }

    /// One line when it breaks, and one when it is back: what is between is counted, not told.
    fn fail(&self, state: &mut State, error: &RedisError) {
        let role = self.shared.role;
        if state.failures == 0 {
            tracing::warn!(role, %error, "Redis cannot be reached; trying again");
        }
        state.not_before = Some(Instant::now() + backoff(state.failures));
        state.failures = state.failures.saturating_add(1);
        self.shared.is_failing.store(true, Ordering::Relaxed);
    }

    /// Gives the connection up, so that the next call makes another.
    #[cfg(feature = "gateway")]
    pub(crate) async fn give_up(&self) {
        self.shared.state.lock().await.connection = None;
    }

    /// Waits until another attempt makes sense.
    ///
    /// # Cancel safety
    /// Dropping it changes nothing.
    pub(crate) async fn pause(&self) {
        let then = self.shared.state.lock().await.not_before;
        match then {
            Some(then) => tokio::time::sleep_until(then).await,
            None => tokio::time::sleep(BACKOFF_MIN).await,
        }
    }
}

/// The pause after so many failures.
pub(crate) fn backoff(failures: u32) -> Duration {
    let full = BACKOFF_MIN.saturating_mul(1 << failures.min(10)).min(BACKOFF_MAX);
    // A spread that differs from node to node; how it is made does not matter.
    let random = uuid::Uuid::new_v4().as_u128() % 1_000;
    let spread = u32::try_from(random).unwrap_or_default();
    full / 2 + full / 2 * spread / 1_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        for failures in [0, 1, 5, 40] {
            let pauses: Vec<_> = (0..50).map(|_| backoff(failures)).collect();
            let full = BACKOFF_MIN.saturating_mul(1 << failures.min(10)).min(BACKOFF_MAX);
            assert!(pauses.iter().all(|pause| (full / 2..=full).contains(pause)), "{failures}: {pauses:?}");
            assert!(pauses.iter().any(|pause| *pause != pauses[0]));
        }
    }

    #[test]
    fn what_is_no_url_is_refused_and_no_secret_is_shown() {
        let server = |url: &str| RedisServer { urls: vec![url.to_owned()], ..RedisServer::default() };
        assert!(Endpoint::new(&server("http://x"), "t").is_err());
        assert!(Endpoint::new(&server("redis://u:secret@127.0.0.1:1/2"), "t").is_ok());
        assert!(!format!("{:?}", server("redis://u:secret@h")).contains("secret"));
    }
}
