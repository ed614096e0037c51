//! A Redis of a test's own: on a socket in a directory of its own, without persistence, gone with its value.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::broker::redis::link;
use crate::broker::redis::link::{Endpoint, Link};

/// A running server.
pub(crate) struct RedisServer {
    /// `redis+unix://…`. It stays the same over restarts.
    pub(crate) url: String,
    directory: TempDir,
    child: Child,
}

impl RedisServer {
    /// Starts one and waits until it answers.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("redis+unix://{}", directory.path().join("s").display());
        let child = spawn(&directory);
        Self { url, directory, child }
    }

    /// Ends it at once, and starts an empty one in its place.
    pub(crate) fn restart(&mut self) {
        self.stop();
        self.child = spawn(&self.directory);
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
        let server = link::RedisServer { urls: vec![self.url.clone()], timeout, ..link::RedisServer::default() };
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

fn spawn(directory: &TempDir) -> Child {
    let socket = directory.path().join("s");
    drop(std::fs::remove_file(&socket));
    let mut command = Command::new("redis-server");
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--dir"]).arg(directory.path());
    command.arg("--unixsocket").arg(&socket).stdout(Stdio::null()).stderr(Stdio::null());
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
