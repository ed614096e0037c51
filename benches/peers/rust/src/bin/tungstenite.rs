//! tokio-tungstenite with a bounded `tokio::sync::mpsc` for each tab, which flushes once for all that waits.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::accept_async_with_config;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

const QUEUE: usize = 256;

#[derive(Default)]
struct Hub {
    tabs: Mutex<HashMap<u64, mpsc::Sender<Utf8Bytes>>>,
    next: AtomicU64,
}

impl Hub {
    fn publish(&self, text: Utf8Bytes) -> usize {
        self.tabs.lock().expect("the tabs").values().filter(|tab| tab.try_send(text.clone()).is_ok()).count()
    }
}

/// As much HTTP as `POST /pub` on a kept connection needs.
async fn publisher(mut stream: TcpStream, hub: &Hub) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(8192);
    loop {
        let head = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        let length = text.split("content-length:").nth(1).and_then(|rest| rest.split("\r\n").next());
        let body: usize = length.and_then(|length| length.trim().parse().ok()).unwrap_or(0);
        while buffer.len() < head + body {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let message = String::from_utf8_lossy(&buffer[head..head + body]).into_owned();
        buffer.drain(..head + body);
        let answer = hub.publish(message.into()).to_string();
        let response = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{answer}", answer.len());
        stream.write_all(response.as_bytes()).await?;
    }
}

async fn connection(stream: TcpStream, hub: Arc<Hub>) {
    let _ = stream.set_nodelay(true);
    let mut start = [0; 4];
    loop {
        match stream.peek(&mut start).await {
            Ok(4) => break,
            Ok(0) | Err(_) => return,
            Ok(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    if &start == b"POST" {
        let _ = publisher(stream, &hub).await;
        return;
    }
    let config =
        WebSocketConfig::default().read_buffer_size(4096).write_buffer_size(4096).max_write_buffer_size(1 << 20);
    let Ok(mut socket) = accept_async_with_config(stream, Some(config)).await else { return };
    let (sender, mut messages) = mpsc::channel(QUEUE);
    let id = hub.next.fetch_add(1, Ordering::Relaxed);
    hub.tabs.lock().expect("the tabs").insert(id, sender);
    let mut batch = Vec::with_capacity(64);
    'open: loop {
        tokio::select! {
            count = messages.recv_many(&mut batch, 64) => {
                if count == 0 {
                    break;
                }
                for text in batch.drain(..) {
                    if socket.feed(Message::Text(text)).await.is_err() {
                        break 'open;
                    }
                }
                if socket.flush().await.is_err() {
                    break;
                }
            }
            received = socket.next() => match received {
                Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                Some(Ok(_)) => {}
            },
        }
    }
    hub.tabs.lock().expect("the tabs").remove(&id);
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let port = std::env::var("PORT").expect("PORT");
    let hub = Arc::new(Hub::default());
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("SO_REUSEADDR");
    socket.bind(format!("127.0.0.1:{port}").parse().expect("an address")).expect("a free port");
    let listener = socket.listen(4096).expect("a listener");
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(connection(stream, Arc::clone(&hub)));
        }
    }
}
