//! Tabs in a hyper server, which does what a hyper server does: `/ws` makes tabs, `/events` event streams, `/` is its own.
//!
//! `cargo run --example in_hyper`, and as who the header `x-user` names: `ws://127.0.0.1:8082/ws`.

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tabcast::driver::embed::Tabs;
use tabcast::driver::start::DrainPlan;
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::{Identity, RoomGrant};
use tabcast::id::{ChannelId, UserId};
use tabcast::platform::adapter::{Outlet, PlatformAdapter};
use tabcast::platform::message::IncomingMessage;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

type Answered = Response<BoxBody<Bytes, Infallible>>;

/// What a person says to the bot, it says back.
async fn answer(message: IncomingMessage, bot: Arc<dyn PlatformAdapter>) {
    let Ok(channel) = ChannelId::parse(&message.channel_id) else { return };
    let _ = bot.send(&channel, &format!("{} said: {}", message.user_name, message.text)).await;
}

pub(crate) fn tabs() -> Result<Tabs, Box<dyn Error>> {
    Ok(Tabs::start(&Engine::new(EngineSettings::default()), answer)?)
}

/// The server's own authentication: a header that the proxy in front sets, and lets nobody else set.
fn asker(request: &Request<Incoming>, tabs: &Tabs) -> Option<Identity> {
    let user = UserId::parse(request.headers().get("x-user")?.to_str().ok()?).ok()?;
    Some(Identity { rooms: RoomGrant::Any, ..Identity::new(user, tabs.engine().now()) })
}

fn plain(status: StatusCode, text: &'static str) -> Answered {
    let mut response = Response::new(Full::from(text).boxed());
    *response.status_mut() = status;
    response
}

async fn respond(mut request: Request<Incoming>, tabs: Tabs) -> Result<Answered, Infallible> {
    let identity = asker(&request, &tabs);
    Ok(match (request.uri().path(), identity) {
        ("/", _) => plain(StatusCode::OK, "a server of one's own"),
        ("/ws", Some(identity)) => tabs.websocket(&mut request, identity).map(BodyExt::boxed),
        ("/events", Some(identity)) => tabs.events(&request, identity).await.map(BodyExt::boxed),
        ("/ws" | "/events", None) => plain(StatusCode::UNAUTHORIZED, "who asks?"),
        _ => plain(StatusCode::NOT_FOUND, "not found"),
    })
}

/// Serves one connection: of TCP, or of whatever is over it. TLS of one's own works too, and costs a task a tab.
pub(crate) async fn serve_one(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, tabs: Tabs) {
    let service = service_fn(|request| respond(request, tabs.clone()));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new());
    // Without this nothing leaves HTTP.
    let _ = builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
}

pub(crate) async fn serve(listener: TcpListener, tabs: Tabs) {
    let mut connections = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // No descriptors are left, perhaps: somebody leaves.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        connections.spawn(serve_one(stream, tabs.clone()));
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let tabs = tabs()?;
    let listener = TcpListener::bind("127.0.0.1:8082").await?;
    tokio::select! {
        () = serve(listener, tabs.clone()) => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    tabs.shutdown(DrainPlan::within(Duration::from_secs(20))).await;
    Ok(())
}
