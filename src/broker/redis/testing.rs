//! A Redis of a test's own: on a socket in a directory of its own, without persistence, gone with its value.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::broker::redis::link;
use crate::broker::redis::link::{Endpoint, Link};

/// A running server.
pub(crate) struct RedisServer {
    /// `redis+unix://…`, of a cluster `redis://…`. It stays the same over restarts.
    pub(crate) url: String,
    directory: TempDir,
    /// Its port, and the one that nodes of a cluster talk on.
    cluster: Option<[u16; 2]>,
    child: Child,
}

impl RedisServer {
    /// Starts one and waits until it answers.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("redis+unix://{}", directory.path().join("s").display());
        let child = spawn(&directory, None);
        Self { url, directory, cluster: None, child }
    }

    /// Starts a cluster of one node, which has all slots: what is asked of two slots at once it refuses as any other.
    pub(crate) fn start_cluster() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = listeners.map(|listener| listener.local_addr().unwrap().port());
        let url = format!("redis://127.0.0.1:{}", ports[0]);
        let child = spawn(&directory, Some(ports));
        let server = Self { url, directory, cluster: Some(ports), child };
        server.ask("CLUSTER ADDSLOTSRANGE 0 16383");
        let mut attempts = 0;
        while !server.ask("CLUSTER INFO").contains("cluster_state:ok") {
            attempts += 1;
            assert!(attempts < 1000, "the cluster does not begin");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// The beginning of what it answers to one line.
    fn ask(&self, line: &str) -> String {
        let mut stream = UnixStream::connect(self.directory.path().join("s")).unwrap();
        stream.write_all(format!("{line}\r\n").as_bytes()).unwrap();
        let mut answer = [0; 512];
        let count = stream.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..count]).into_owned()
    }

    /// Ends it at once, and starts an empty one in its place.
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.child = spawn(&self.directory, self.cluster);
    }

    /// Ends it at once: connections are refused until [`Self::restart`].
    pub(crate) fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Makes it answer nothing; connections stay open, and new ones are accepted by the kernel.
    pub(crate) fn pause(&self) {
        self.signal("-STOP");
    }

    /// Makes it go on.
    pub(crate) fn resume(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// What links to it are made with.
    pub(crate) fn endpoint(&self, name: &str) -> Endpoint {
        let timeout = Duration::from_secs(1);
        let is_cluster = self.cluster.is_some();
        let server =
            link::RedisServer { urls: vec![self.url.clone()], is_cluster, timeout, ..link::RedisServer::default() };
        Endpoint::new(&server, name).unwrap()
    }

    /// A link for what the test itself asks.
    pub(crate) fn link(&self) -> Link {
        Link::new(self.endpoint("test"), "test")
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // It may be gone already; a paused one is ended too.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn spawn(directory: &TempDir, cluster: Option<[u16; 2]>) -> Child {
    let socket = directory.path().join("s");
    drop(std::fs::remove_file(&socket));
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"]).arg(directory.path());
    command.arg("--unixsocket").arg(&socket).stdout(Stdio::null()).stderr(Stdio::null());
    match cluster {
        None => command.args(["--port", "0"]),
        Some([port, between]) => command
            .args(["--port", &port.to_string(), "--cluster-port", &between.to_string()])
            .args(["--cluster-enabled", "yes"]),
    };
    let child = command.spawn().expect("redis-server is installed");
    let answers = || {
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"PING\r\n")?;
        stream.read_exact(&mut [0; 7])
    };
    let mut attempts = 0;
    while answers().is_err() {
        attempts += 1;
        assert!(attempts < 1000, "redis-server does not answer");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}
