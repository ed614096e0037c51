//! Tabs over a transport of one's own, without HTTP: lines over TCP, of which the first names who connects. A frame's JSON
//! is a line, and so is what a client says.
//!
//! Needs no default feature: `cargo run --example own_transport --no-default-features`, then `nc 127.0.0.1 8083`, `ann`.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tabcast::engine::mailboxes::{Mailboxes, TabMailbox};
use tabcast::engine::{Engine, EngineSettings};
use tabcast::fanout::hub::Drain;
use tabcast::fanout::session::{Identity, RoomGrant};
use tabcast::id::{ChannelId, UserId};
use tabcast::platform::adapter::{Outlet, PlatformAdapter};
use tabcast::platform::message::IncomingMessage;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// The longest line that is read; a longer one is the client's last.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// What a person says to the bot, it says back.
async fn answer(message: IncomingMessage, bot: Arc<dyn PlatformAdapter>) {
    let Ok(channel) = ChannelId::parse(&message.channel_id) else { return };
    let _ = bot.send(&channel, &format!("{} said: {}", message.user_name, message.text)).await;
}

pub(crate) fn start(engine: &Engine) -> Result<Mailboxes, Box<dyn Error>> {
    Ok(Mailboxes::start(engine, answer)?)
}

/// The next line without its end; empty at the end.
async fn line(from: &mut BufReader<OwnedReadHalf>) -> io::Result<String> {
    let mut line = String::new();
    from.take(LINE_BYTES_MAX).read_line(&mut line).await?;
    line.truncate(line.trim_end().len());
    Ok(line)
}

/// Frames to the client, as fast as it reads: if that is too slow, the tab is cut, and the stream ends.
async fn write(tab: &mut TabMailbox, to: &mut OwnedWriteHalf) -> io::Result<()> {
    while let Some(frame) = tab.next().await {
        to.write_all(&[frame.json(), b"\n"].concat()).await?;
    }
    Ok(())
}

async fn connected(
    stream: TcpStream,
    mailboxes: Mailboxes,
    engine: Engine,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let (from, mut to) = stream.into_split();
    let mut from = BufReader::new(from);
    let user = UserId::parse(&line(&mut from).await?)?;
    let identity = Identity { rooms: RoomGrant::Any, ..Identity::new(user, engine.now()) };
    let mut tab = mailboxes.connect(identity).await?;
    // Kept for those that speak, while the tab itself is read.
    let voice = tab.voice();
    let hear = async {
        loop {
            let line = line(&mut from).await?;
            if line.is_empty() {
                return Ok(());
            }
            voice.say(line).await?;
        }
    };
    tokio::select! {
        written = write(&mut tab, &mut to) => Ok(written?),
        heard = hear => heard,
    }
}

pub(crate) async fn serve(listener: TcpListener, mailboxes: Mailboxes, engine: Engine) -> io::Result<()> {
    let mut clients = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        while clients.try_join_next().is_some() {}
        clients.spawn(connected(stream, mailboxes.clone(), engine.clone()));
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let engine = Engine::new(EngineSettings::default());
    let mailboxes = start(&engine)?;
    let listener = TcpListener::bind("127.0.0.1:8083").await?;
    tokio::select! {
        served = serve(listener, mailboxes.clone(), engine) => served?,
        _ = tokio::signal::ctrl_c() => {}
    }
    let second = Duration::from_secs(1);
    // The handler has five seconds, then the tabs have; whoever does not read is given up a close timeout later.
    let drain = Drain { spread: second, closes_per_second_max: 2_000, latest: 5 * second };
    let _ = tokio::time::timeout(20 * second, mailboxes.shutdown(drain)).await;
    Ok(())
}
