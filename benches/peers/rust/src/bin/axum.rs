//! axum's WebSockets over `tokio::sync::broadcast`: the textbook design, a task for each tab.

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use tokio::sync::broadcast::{self, Sender, error::RecvError};

async fn upgrade(upgrade: WebSocketUpgrade, State(all): State<Sender<Utf8Bytes>>) -> Response {
    upgrade.read_buffer_size(4096).max_message_size(1 << 20).on_upgrade(move |socket| tab(socket, all))
}

async fn tab(mut socket: WebSocket, all: Sender<Utf8Bytes>) {
    let mut messages = all.subscribe();
    loop {
        tokio::select! {
            message = messages.recv() => match message {
                Ok(text) => if socket.send(Message::Text(text)).await.is_err() { return },
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            received = socket.recv() => match received {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                Some(Ok(_)) => {}
            },
        }
    }
}

async fn publish(State(all): State<Sender<Utf8Bytes>>, body: String) -> String {
    all.send(body.into()).unwrap_or(0).to_string()
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let port = std::env::var("PORT").expect("PORT");
    let (all, _) = broadcast::channel::<Utf8Bytes>(1024);
    let routes = Router::new().route("/ws", get(upgrade)).route("/pub", post(publish)).with_state(all);
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("SO_REUSEADDR");
    socket.bind(format!("127.0.0.1:{port}").parse().expect("an address")).expect("a free port");
    let listener = socket.listen(4096).expect("a listener");
    let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
    axum::serve(listener, routes).await.expect("serving");
}
