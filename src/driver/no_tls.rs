//! What stands for TLS where the feature `tls` is off: nothing that could be made.

use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::driver::stream::Stream;
use crate::metrics::ShardMetrics;

/// There is none without the feature `tls`.
#[derive(Debug, Clone)]
pub enum Acceptor {}

impl Acceptor {
    pub(crate) fn for_thread(&self, _metrics: Arc<ShardMetrics>) -> ThreadAcceptor {
        match *self {}
    }
}

pub(crate) enum ThreadAcceptor {}

impl ThreadAcceptor {
    pub(crate) async fn accept(&self, _stream: TcpStream) -> io::Result<Stream> {
        match *self {}
    }
}
