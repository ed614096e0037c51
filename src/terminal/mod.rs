//! `tabcast top` and `tabcast tail`: one node as an operator sees it, over its own event streams.
//!
//! Both are clients like any other: `GET /events?watch=…` with an operator's key. What comes from there is text of
//! strangers, user ids above all: nothing of it reaches a terminal but through `text::Clean`.

mod connection;
mod draw;
mod history;
mod lines;
mod once;
mod status;
mod tail;
mod text;
mod top;
mod view;

use std::path::PathBuf;

/// Ended by its user, or its reader.
const ENDED: u8 = 0;
/// There was nothing to show.
const FAILED: u8 = 1;
/// The arguments are not usable (also clap's code).
const BAD_ARGUMENTS: u8 = 2;
/// The key is none of an operator (401, 403).
const REFUSED: u8 = 3;

/// Where the node is, and what opens it.
#[derive(Debug, Clone, clap::Args)]
pub struct Node {
    /// The node
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// An operator's key, or file:PATH. What stands on a command line is seen by everybody on the machine (`ps`): better
    /// in the variable, or in a file [default: none, as in development mode]
    #[arg(long, value_name = "KEY", env = "TABCAST_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Certificates in PEM that are trusted for https [default: those of the web]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// Prints the frames of a channel as they go by, one a line, until it is ended.
///
/// A connection that is lost is opened again, which is said on standard error. Exit codes: 0 if it was ended (Ctrl-C, or
/// its reader has gone), 1 if it cannot go on, 2 for bad arguments, 3 if the key is refused (401, 403).
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "tabcast tail", version)]
pub struct Tail {
    /// A channel id: `ann`, `room:lobby`, `sse:…`
    #[arg(value_name = "CHANNEL")]
    channel: String,
    /// Frames as they came: one JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    node: Node,
}

/// Shows a node as it is, once a second: sessions, deliveries, delays, queues, who has most, and why sessions ended.
///
/// Keys: `/` filters users, arrows choose a disconnect, Enter tells all of it, `?` helps, `q` ends. Exit codes: as those of
/// `tabcast tail`, and 1 if `--once` heard nothing. Without colours if NO_COLOR is set.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "tabcast top", version)]
pub struct Top {
    /// Prints it once, as plain text, and ends
    #[arg(long)]
    once: bool,
    /// Only users whose id has this in it
    #[arg(long, value_name = "TEXT", default_value = "")]
    user: String,
    #[command(flatten)]
    node: Node,
}

impl Tail {
    /// Runs until it is ended. The exit code.
    #[must_use]
    pub fn run(&self) -> u8 {
        told("tail", tail::run(self))
    }
}

impl Top {
    /// Runs until it is ended. The exit code.
    #[must_use]
    pub fn run(&self) -> u8 {
        told("top", if self.once { once::run(self) } else { top::run(self) })
    }
}

/// Why one of them ends.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// An argument is not usable.
    #[error("{0}")]
    Argument(String),
    /// The node does not want us.
    #[error("{url} refuses: {reason}")]
    Refused {
        /// Where that is.
        url: String,
        /// Its answer.
        reason: connection::Refusal,
    },
    /// Nothing came.
    #[error("{url} says nothing: {reason}")]
    Silent {
        /// Where that is.
        url: String,
        /// What happened last.
        reason: String,
    },
    /// Standard output, the terminal, threads.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

fn told(name: &str, outcome: Result<(), Failure>) -> u8 {
    use std::io::Write;
    let Err(failure) = outcome else { return ENDED };
    if let Failure::Io(error) = &failure
        && error.kind() == std::io::ErrorKind::BrokenPipe
    {
        // Whoever read it has enough.
        return ENDED;
    }
    // Where standard error is gone, the exit code still tells.
    let _ = writeln!(std::io::stderr(), "tabcast {name}: {failure}");
    match failure {
        Failure::Argument(_) => BAD_ARGUMENTS,
        Failure::Refused { reason, .. } if reason.is_about_the_key() => REFUSED,
        _ => FAILED,
    }
}
