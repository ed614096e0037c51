//! `tabcast top` in a terminal: keys in, pictures out. What is shown is decided in [`View`].

use std::io::{self, IsTerminal};
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver};

use super::connection::{Refusal, Stream, UPDATES_MAX, Update};
use super::draw::{Ink, draw};
use super::text::clean;
use super::view::{Key, Next, View};
use super::{Failure, Top, tail};
use crate::driver::clock;

/// A node that says nothing for so long is asked anew: it sends a frame a second.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a key may wait, and a frame to be shown.
const TURN: Duration = Duration::from_millis(100);

/// What the thread beside the terminal has to say.
enum Said {
    Update(Update),
    /// SIGTERM, SIGHUP: the terminal is to be left as it was.
    Leave,
}

/// Runs until it is ended. The terminal is put back whatever happens: by us, or by the hook for panics.
pub(super) fn run(top: &Top) -> Result<(), Failure> {
    let stream = Stream::new(&top.node, "status", SILENCE_MAX)?;
    if !io::stdout().is_terminal() {
        return Err(Failure::Argument("standard output is no terminal: --once prints plain text".to_owned()));
    }
    let (sender, said) = mpsc::channel(UPDATES_MAX);
    let runtime = tail::runtime()?;
    // Ends with the process: nothing waits for it.
    std::thread::Builder::new().name("node".to_owned()).spawn(move || runtime.block_on(listen(&stream, &sender)))?;
    let mut terminal = ratatui::try_init()?;
    let outcome = show(&mut terminal, top, said);
    ratatui::try_restore()?;
    match outcome? {
        None => Ok(()),
        Some(reason) => Err(Failure::Refused { url: clean(&top.node.url), reason }),
    }
}

async fn listen(stream: &Stream, said: &mpsc::Sender<Said>) {
    let (sender, mut updates) = mpsc::channel(UPDATES_MAX);
    let forward = async {
        while let Some(update) = updates.recv().await {
            if said.send(Said::Update(update)).await.is_err() {
                return;
            }
        }
    };
    let told = async {
        let (Ok(mut terminate), Ok(mut hangup)) = (signal(SignalKind::terminate()), signal(SignalKind::hangup()))
        else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(stream.follow(sender), forward) } => {}
        () = told => drop(said.send(Said::Leave).await),
    }
}

/// Shows it until somebody has enough, or the node refuses.
fn show(terminal: &mut DefaultTerminal, top: &Top, mut said: Receiver<Said>) -> io::Result<Option<Refusal>> {
    let (mut view, ink) = (View::new(&top.user), Ink::of_environment());
    loop {
        let now = clock::now();
        while let Ok(said) = said.try_recv() {
            match said {
                Said::Leave => return Ok(None),
                Said::Update(Update::Refused(refusal)) => return Ok(Some(refusal)),
                Said::Update(update) => view.handle_update(update, now),
            }
        }
        // Only the cells that differ are written.
        terminal.draw(|frame| draw(frame, &view, &top.node.url, now, ink))?;
        if !event::poll(TURN)? {
            continue;
        }
        if let Event::Key(key) = event::read()?
            && let Some(key) = key_of(key)
            && view.handle_key(key) == Next::Leave
        {
            return Ok(None);
        }
    }
}

fn key_of(key: KeyEvent) -> Option<Key> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
    Some(match key.code {
        KeyCode::Char('c') if is_control => Key::Interrupt,
        KeyCode::Char(_) if is_control => return None,
        KeyCode::Char(character) => Key::Char(character),
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Escape,
        KeyCode::Backspace => Key::Backspace,
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        _ => return None,
    })
}
