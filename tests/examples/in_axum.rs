//! Tabs in an axum router: its own sessions say who asks, `/ws` makes tabs, `/events` event streams, and a POST publishes.
//!
//! `cargo run --example in_axum`, and with the cookie `session=s-ann`: `ws://127.0.0.1:8081/ws`.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::COOKIE;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use tabcast::driver::embed::Tabs;
use tabcast::driver::start::DrainPlan;
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::session::{Identity, RoomGrant};
use tabcast::id::{ChannelId, UserId};
use tabcast::platform::adapter::{BotIdentity, Outlet, PlatformAdapter};
use tabcast::platform::message::IncomingMessage;
use tabcast::platform::webchat::{SendOptions, WebChat};
use tokio::net::TcpListener;

/// What the handlers share. Clones are the same.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) tabs: Tabs,
    bot: Arc<WebChat<Engine>>,
    /// Whose a session is. Of one's own: a table, a store, another service.
    sessions: Arc<HashMap<&'static str, &'static str>>,
}

/// What a person says to the bot, it says back.
async fn answer(message: IncomingMessage, bot: Arc<dyn PlatformAdapter>) {
    let Ok(channel) = ChannelId::parse(&message.channel_id) else { return };
    let _ = bot.send(&channel, &format!("{} said: {}", message.user_name, message.text)).await;
}

/// The app's own authentication: an extractor, by the cookie of its session.
struct Asker(UserId);

impl FromRequestParts<App> for Asker {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, StatusCode> {
        let cookies = parts.headers.get(COOKIE).and_then(|cookies| cookies.to_str().ok()).unwrap_or_default();
        let session = cookies.split(';').find_map(|cookie| cookie.trim().strip_prefix("session="));
        let user = session.and_then(|session| app.sessions.get(session)).ok_or(StatusCode::UNAUTHORIZED)?;
        UserId::parse(user).map(Self).map_err(|_| StatusCode::UNAUTHORIZED)
    }
}

impl App {
    pub(crate) fn start() -> Result<Self, Box<dyn Error>> {
        Ok(Self::new(Tabs::start(&Engine::new(EngineSettings::default()), answer)?))
    }

    pub(crate) fn new(tabs: Tabs) -> Self {
        let bot = Arc::new(WebChat::new(Arc::new(tabs.engine().clone()), BotIdentity::default()));
        Self { tabs, bot, sessions: Arc::new(HashMap::from([("s-ann", "ann"), ("s-ben", "ben")])) }
    }

    fn identity(&self, Asker(user): Asker) -> Identity {
        Identity { rooms: RoomGrant::Any, ..Identity::new(user, self.tabs.engine().now()) }
    }

    pub(crate) fn router(self) -> axum::Router {
        axum::Router::new()
            .route("/", get("an app of one's own"))
            .route("/ws", any(websocket))
            .route("/events", get(events))
            .route("/notify/{user}", post(notify))
            .with_state(self)
    }
}

async fn websocket(State(app): State<App>, asker: Asker, mut request: Request) -> Response {
    app.tabs.websocket(&mut request, app.identity(asker)).into_response()
}

async fn events(State(app): State<App>, asker: Asker, request: Request) -> Response {
    app.tabs.events(&request, app.identity(asker)).await.into_response()
}

/// Says something to all tabs of a user. How many there were is the answer.
async fn notify(
    State(app): State<App>,
    Path(user): Path<String>,
    _: Asker,
    text: String,
) -> Result<String, StatusCode> {
    let channel = ChannelId::parse(&user).map_err(|_| StatusCode::BAD_REQUEST)?;
    let sent = app
        .bot
        .send_report(&channel, &text, SendOptions::default())
        .await
        .map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    Ok(format!("{} tabs", sent.delivery.tabs))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let app = App::start()?;
    let tabs = app.tabs.clone();
    let listener = TcpListener::bind("127.0.0.1:8081").await?;
    let stopped = async move {
        let _ = tokio::signal::ctrl_c().await;
        // Tabs first: the server itself has nothing of theirs any more.
        tabs.shutdown(DrainPlan::within(Duration::from_secs(20))).await;
    };
    axum::serve(listener, app.router()).with_graceful_shutdown(stopped).await?;
    Ok(())
}
