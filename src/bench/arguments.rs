//! The flags of `tabcast bench`, and what they make of a plan.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use super::lanes::NUMBER_MAX;
use super::plan::{CONNECTIONS_PER_SOURCE, Joining, Mix, PUBLISHERS_MAX, Plan, Publishing, Shape, Target};
use super::template::{Template, unescape};
use super::tls::Trust;

/// Descriptors of a thread that are no clients, beside its publishers.
const SPARE_DESCRIPTORS: usize = 64;
/// Clients, so that their lanes fit into memory.
const TABS_MAX: usize = 4_000_000;
/// Threads with clients.
const THREADS_MAX: usize = 512;

/// Measures a fan-out server: opens clients, publishes, and checks that everything came, once and in order.
///
/// Without options it drives `tabcast serve` in development mode: every client joins one room, and what is published
/// goes to that room. Other servers are driven with `--path`, `--subscribe` and `--publish`. Exit codes: 0 if all was
/// delivered, 1 if something was lost, doubled, out of order or stalled, 2 for bad arguments.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "tabcast bench", version, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// What is done instead of a measurement.
    #[command(subcommand)]
    pub task: Option<Task>,

    /// The server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub address: String,
    /// How many clients; several numbers with commas are measured one after the other
    #[arg(long, value_name = "N,…", default_value = "100", value_delimiter = ',')]
    pub tabs: Vec<usize>,
    /// What WebSocket clients ask for; {i} is the client's number, {u} its user's [default: /ws?user=u{u}]
    #[arg(long, value_name = "PATH")]
    pub path: Option<String>,
    /// What event streams ask for [default: /events?user=u{u}, or --path]
    #[arg(long, value_name = "PATH")]
    pub sse_path: Option<String>,
    /// This share of the clients are event streams, from 0 to 1
    #[arg(long, value_name = "SHARE", num_args = 0..=1, default_value_t = 0.0, default_missing_value = "1")]
    pub sse: f64,
    /// What each WebSocket client sends first; with \r \n \t \"; nothing if empty [default: joins the room `all`]
    #[arg(long, value_name = "TEXT")]
    pub subscribe: Option<String>,
    /// That is a binary message
    #[arg(long)]
    pub subscribe_binary: bool,
    /// What is in the frame that says that a client hears everything [default: an ack, if the default is sent]
    #[arg(long, value_name = "TEXT")]
    pub subscribed: Option<String>,
    /// WebSocket clients offer permessage-deflate, without context takeover
    #[arg(long)]
    pub deflate: bool,
    /// A header of every client's handshake: `Name: value`, with {i} and {u}
    #[arg(long, value_name = "HEADER")]
    pub header: Vec<String>,
    /// A file with a token in each line: the clients send them in turn, as `Authorization: Bearer`
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// `Host` of all requests [default: localhost and the port]
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// Handshakes that are under way at once
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub connecting: usize,
    /// Loopback addresses that clients come from, 127.0.1.1 and following [default: one for 8,000 clients]
    #[arg(long, value_name = "N")]
    pub sources: Option<usize>,
    /// Threads with clients [default: as many as open files need file tables of their own]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Whom messages are for: the room, a random user each, or both in turn
    #[arg(long, value_name = "WHOM", default_value = "room", value_parser = ["room", "users", "mixed"])]
    pub to: String,
    /// Tabs of each user [default: 1; with --to users or mixed 2]
    #[arg(long, value_name = "N")]
    pub tabs_per_user: Option<usize>,
    /// Bytes of a message's text
    #[arg(long, value_name = "BYTES", default_value_t = 128)]
    pub size: usize,
    /// Messages in one request, as lines of /api/batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
    /// Connections that publish, with one request under way each [default: as many as --in-flight, 8 in an open loop]
    #[arg(long, value_name = "N")]
    pub publishers: Option<usize>,
    /// A header of every request that publishes: `Name: value`
    #[arg(long, value_name = "HEADER")]
    pub publish_header: Vec<String>,
    /// A whole request, for other servers; {text} is the message, {len} the length of what stands behind the empty line,
    /// or of the message in what is no HTTP; with \r \n \t \"
    #[arg(long, value_name = "REQUEST")]
    pub publish: Option<String>,
    /// What a connection that publishes begins with, for protocols that are not HTTP
    #[arg(long, value_name = "TEXT", requires = "publish")]
    pub publish_first: Option<String>,
    /// Where messages are published [default: --address]
    #[arg(long, value_name = "HOST:PORT")]
    pub publish_address: Option<String>,

    /// Closed loop: so many requests whose messages have not all come yet [default: 1]
    #[arg(long, value_name = "N", conflicts_with_all = ["rate", "idle"])]
    pub in_flight: Option<usize>,
    /// Closed loop: messages in all
    #[arg(long, value_name = "N", default_value_t = 1000, conflicts_with_all = ["rate", "idle"])]
    pub messages: usize,
    /// Open loop: messages a second, whether or not the server keeps up
    #[arg(long, value_name = "N", conflicts_with = "idle")]
    pub rate: Option<f64>,
    /// Nothing is published for --duration; then one message to all, and one to a single user
    #[arg(long)]
    pub idle: bool,
    /// How long an open loop goes on, or nothing happens
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    pub duration: Duration,
    /// So many clients a second leave and come back, beside all that
    #[arg(long, value_name = "N", default_value_t = 0.0)]
    pub churn: f64,
    /// This share of the clients never reads, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, allow_negative_numbers = true)]
    pub silent: f64,
    /// Messages before those that count, one at a time
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub warm_up: usize,
    /// What random choices begin with
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// When nothing has come for so long, it never will
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    pub stall: Duration,

    /// Processes of the server whose CPU and memory are measured, with commas; children are not included
    #[arg(long, value_name = "PID,…", value_delimiter = ',')]
    pub pid: Vec<u32>,
    /// The processor that the client's threads stay on
    #[arg(long, value_name = "CPU")]
    pub pin: Option<usize>,

    /// The connections are encrypted (TLS 1.3)
    #[arg(long, requires = "tls_ca")]
    pub tls: bool,
    /// A PEM file of certificates that are trusted
    #[arg(long, value_name = "FILE", requires = "tls")]
    pub tls_ca: Option<PathBuf>,
    /// The name in the server's certificate [default: the host of --address]
    #[arg(long, value_name = "NAME", requires = "tls")]
    pub tls_name: Option<String>,

    /// What this is, in tables and charts
    #[arg(long, value_name = "TEXT", default_value = "tabcast")]
    pub label: String,
    /// Writes everything that was found
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Writes latencies by the second: an interval log for HdrHistogram's tools
    #[arg(long, value_name = "FILE")]
    pub histogram: Option<PathBuf>,
    /// Draws latencies by percentile, or with several numbers of --tabs the cost of a delivery against them
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Starts a gateway, takes a short tour of everything, and ends it
    #[arg(long, conflicts_with_all = ["address", "pid", "publish"])]
    pub self_test: bool,
}

/// What is done instead of a measurement.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Task {
    /// Draws the cost of a delivery against the number of clients, a line for each label
    Chart {
        /// What --json wrote
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// The picture
        #[arg(long, value_name = "FILE")]
        svg: PathBuf,
    },
}

/// A flag that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}: {reason}")]
pub struct BadArgument {
    /// Which.
    pub flag: &'static str,
    /// Why.
    pub reason: String,
}

fn bad<T>(flag: &'static str, reason: impl Into<String>) -> Result<T, BadArgument> {
    Err(BadArgument { flag, reason: reason.into() })
}

impl Arguments {
    /// A plan for each number of clients. `open_files_max` is what one file table holds.
    ///
    /// # Errors
    /// The first flag that cannot be.
    pub fn plans(&self, open_files_max: usize) -> Result<Vec<Plan>, BadArgument> {
        self.tabs.iter().map(|tabs| self.plan(*tabs, open_files_max)).collect()
    }

    fn plan(&self, tabs: usize, open_files_max: usize) -> Result<Plan, BadArgument> {
        if !(1..=TABS_MAX).contains(&tabs) {
            return bad("tabs", format!("{tabs} is not between 1 and {TABS_MAX}"));
        }
        if self.connecting == 0 {
            return bad("connecting", "at least 1");
        }
        let address = resolve("address", &self.address)?;
        let shape = self.shape()?;
        let target = self.target()?;
        let mix = self.mix(tabs, target)?;
        let publishing = self.publishing(address, shape)?;
        let publishers = publishing.publishers;
        let (threads, own_file_tables) = self.threads(tabs, publishers, open_files_max)?;
        let sources = self.sources(tabs, address)?;
        let tls = self.tls_ca.as_ref().map(|file| Trust::new(file, &self.tls_name(address))).transpose();
        // Of another server's way to publish nothing is known.
        let publishing = (!self.is_foreign() || self.publish.is_some()).then_some(publishing);
        if publishing.is_none() && !self.idle {
            return bad("publish", "needed beside --subscribe, unless it is --idle");
        }
        Ok(Plan {
            label: self.label.clone(),
            address,
            joining: self.joining(address, target)?,
            tls: tls.or_else(|reason| bad("tls-ca", reason))?,
            mix,
            connecting: self.connecting,
            sources,
            threads,
            own_file_tables,
            publishing,
            target,
            size: self.size,
            warm_up: self.warm_up,
            shape,
            churn_rate: self.churn,
            seed: self.seed,
            stall: self.stall,
            pids: self.pid.clone(),
        })
    }

    /// True if what is asked for is not tabcast's own.
    fn is_foreign(&self) -> bool {
        self.publish.is_some() || self.subscribe.is_some()
    }

    fn shape(&self) -> Result<Shape, BadArgument> {
        if self.duration.is_zero() {
            return bad("duration", "longer than nothing");
        }
        if self.idle {
            return Ok(Shape::Idle { duration: self.duration });
        }
        let shape = match self.rate {
            Some(rate) if !(rate > 0.0 && rate <= 1e8) => return bad("rate", "between 0 and 100 million"),
            Some(rate) => Shape::Open { rate, duration: self.duration },
            None => Shape::Closed { in_flight: self.in_flight.unwrap_or(1), messages: self.messages },
        };
        let most = f64::from(NUMBER_MAX) / self.publisher_count(shape) as f64;
        let (flag, messages) = match shape {
            Shape::Closed { in_flight: 0, .. } => return bad("in-flight", "at least 1"),
            Shape::Closed { messages, .. } => ("messages", messages as f64),
            Shape::Open { rate, duration } => ("duration", rate * duration.as_secs_f64()),
            Shape::Idle { .. } => ("messages", 1.0),
        };
        if messages < 1.0 || messages + (self.warm_up * self.batch) as f64 >= most {
            return bad(flag, format!("between 1 and {most:.0} messages with so many publishers"));
        }
        Ok(shape)
    }

    fn target(&self) -> Result<Target, BadArgument> {
        let target = match self.to.as_str() {
            "users" => Target::Users,
            "mixed" => Target::Mixed,
            // An idle server is probed both ways.
            _ if self.idle && !self.is_foreign() => Target::Mixed,
            _ => Target::Room,
        };
        if self.is_foreign() && target != Target::Room {
            return bad("to", "another server's users are not known: leave out --subscribe and --publish");
        }
        if !(0.0..=1.0).contains(&self.sse) {
            return bad("sse", "a share between 0 and 1");
        }
        if self.sse > 0.0 && !self.is_foreign() && target == Target::Room {
            return bad("sse", "tabcast's event streams are in no room: add --to users or --to mixed");
        }
        Ok(target)
    }

    fn mix(&self, tabs: usize, target: Target) -> Result<Mix, BadArgument> {
        if !(0.0..=1.0).contains(&self.silent) {
            return bad("silent", "a share between 0 and 1");
        }
        if !(0.0..=1e6).contains(&self.churn) {
            return bad("churn", "between 0 and a million a second");
        }
        let default = if target == Target::Room || self.idle { 1 } else { 2 };
        let tabs_per_user = self.tabs_per_user.unwrap_or(default);
        if tabs_per_user == 0 {
            return bad("tabs-per-user", "at least 1");
        }
        #[expect(clippy::cast_possible_truncation, reason = "between 0 and the tabs")]
        let silent = (tabs as f64 * self.silent).round() as usize;
        // Each of them is away for a moment only; half of all at most, so that others stay.
        #[expect(clippy::cast_possible_truncation, reason = "between 0 and two million")]
        let churners = ((self.churn * 2.0).ceil() as usize).min((tabs - silent) / 2);
        if self.churn > 0.0 && churners == 0 {
            return bad("churn", "too few clients: half of them stay");
        }
        if silent + churners >= tabs {
            return bad("silent", "somebody has to read");
        }
        Ok(Mix { tabs, tabs_per_user, stream_share: self.sse, churners, silent })
    }

    fn publisher_count(&self, shape: Shape) -> usize {
        let default = match shape {
            Shape::Idle { .. } => 1,
            Shape::Closed { in_flight, .. } => in_flight.min(PUBLISHERS_MAX),
            Shape::Open { .. } => 8,
        };
        self.publishers.unwrap_or(default).max(1)
    }

    fn publishing(&self, address: SocketAddr, shape: Shape) -> Result<Publishing, BadArgument> {
        let publishers = self.publisher_count(shape);
        if publishers > PUBLISHERS_MAX || self.publishers == Some(0) {
            return bad("publishers", format!("between 1 and {PUBLISHERS_MAX}"));
        }
        if !(1..=100_000).contains(&self.batch) {
            return bad("batch", "between 1 and 100,000");
        }
        if !(super::record::RECORD_BYTES..=1 << 24).contains(&self.size) {
            return bad("size", "between 30 bytes and 16 MiB");
        }
        let request = match &self.publish {
            Some(request) => unescape(request),
            None => self.own_request(address)?,
        };
        // What is no HTTP has no head, and is not answered.
        let is_http = request.contains(" HTTP/1.1\r\n");
        let (head, body) = match request.find("\r\n\r\n").filter(|_| is_http) {
            Some(at) => request.split_at(at + 4),
            None if is_http => return bad("publish", "an empty line (\\r\\n\\r\\n) has to follow the headers"),
            None => ("", request.as_str()),
        };
        let line = Template::new(body);
        if !line.has_text() {
            return bad("publish", "{text} is missing");
        }
        let publish_address = self.publish_address.as_ref().map(|to| resolve("publish-address", to)).transpose()?;
        Ok(Publishing {
            address: publish_address.unwrap_or(address),
            request: Template::new(head),
            line,
            is_http,
            first: self.publish_first.as_deref().map(unescape),
            publishers,
            batch: self.batch,
            is_tabcast: !self.is_foreign(),
        })
    }

    /// How tabcast is told to send.
    fn own_request(&self, address: SocketAddr) -> Result<String, BadArgument> {
        let (path, kind, line) = if self.batch > 1 {
            let line = "{\"op\":\"send\",\"channel_id\":\"{channel}\",\"text\":\"{text}\"}\n";
            ("batch", "application/x-ndjson", line)
        } else {
            ("send", "application/json", r#"{"channel_id":"{channel}","text":"{text}"}"#)
        };
        let headers = lines("publish-header", &self.publish_header)?;
        let host = self.host(address);
        Ok(format!(
            "POST /api/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n{headers}\
             Content-Length: {{len}}\r\n\r\n{line}"
        ))
    }

    fn host(&self, address: SocketAddr) -> String {
        self.host.clone().unwrap_or_else(|| format!("localhost:{}", address.port()))
    }

    fn joining(&self, address: SocketAddr, target: Target) -> Result<Joining, BadArgument> {
        let path = self.path.as_deref().unwrap_or("/ws?user=u{u}");
        let default_stream = if self.path.is_some() { path } else { "/events?user=u{u}" };
        let joins = !self.is_foreign() && target != Target::Users;
        let join = joins.then(|| r#"{"type":"join","room":"all","client_id":"join"}"#.to_owned());
        let ack = joins.then(|| r#""type":"ack""#.to_owned());
        Ok(Joining {
            path: Template::new(path),
            stream_path: Template::new(self.sse_path.as_deref().unwrap_or(default_stream)),
            host: self.host(address),
            headers: Template::new(&lines("header", &self.header)?),
            tokens: self.tokens()?,
            subscribe: self
                .subscribe
                .as_deref()
                .map(unescape)
                .or(join)
                .filter(|text| !text.is_empty())
                .as_deref()
                .map(Template::new),
            deflates: self.deflate,
            subscribe_binary: self.subscribe_binary,
            subscribed: self.subscribed.clone().or(ack),
        })
    }

    fn tokens(&self) -> Result<Vec<String>, BadArgument> {
        let Some(file) = &self.tokens else { return Ok(Vec::new()) };
        let text =
            std::fs::read_to_string(file).or_else(|error| bad("tokens", format!("{}: {error}", file.display())))?;
        let tokens: Vec<String> = text.split_ascii_whitespace().map(str::to_owned).collect();
        if tokens.is_empty() { bad("tokens", format!("{}: there is none", file.display())) } else { Ok(tokens) }
    }

    /// How many threads, and whether each has a file table of its own.
    fn threads(&self, tabs: usize, publishers: usize, open_files_max: usize) -> Result<(usize, bool), BadArgument> {
        let per_table = (open_files_max / 100 * 95).saturating_sub(SPARE_DESCRIPTORS + publishers);
        if per_table == 0 {
            return bad("publishers", format!("the limit of open files is {open_files_max}"));
        }
        let needed = tabs.div_ceil(per_table);
        let threads = self.threads.unwrap_or(needed);
        if !(needed..=THREADS_MAX).contains(&threads) {
            let reason = format!("between {needed} and {THREADS_MAX}, as {open_files_max} files may be open in each");
            return bad("threads", reason);
        }
        Ok((threads, needed > 1))
    }

    fn sources(&self, tabs: usize, address: SocketAddr) -> Result<usize, BadArgument> {
        // Ports of connections that were left stay taken for a while.
        #[expect(clippy::cast_possible_truncation, reason = "at most a million a second")]
        let needed = tabs.saturating_add((self.churn * 5.0) as usize).div_ceil(CONNECTIONS_PER_SOURCE);
        let sources = self.sources.unwrap_or(if address.ip().is_loopback() { needed } else { 1 });
        if !(1..=60_000).contains(&sources) {
            return bad("sources", "between 1 and 60,000");
        }
        if sources > 1 && !(address.ip().is_loopback() && address.is_ipv4()) {
            return bad("sources", "only a server on 127.0.0.0/8 can be reached from many addresses");
        }
        Ok(sources)
    }

    fn tls_name(&self, address: SocketAddr) -> String {
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(host, _)| host);
        self.tls_name
            .clone()
            .unwrap_or_else(|| if host.is_empty() { address.ip().to_string() } else { host.to_owned() })
    }
}

fn resolve(flag: &'static str, text: &str) -> Result<SocketAddr, BadArgument> {
    match text.to_socket_addrs().map(|mut addresses| addresses.next()) {
        Ok(Some(address)) => Ok(address),
        Ok(None) => bad(flag, format!("{text} is no address")),
        Err(error) => bad(flag, format!("{text}: {error}")),
    }
}

/// Header lines, each with its CR LF.
fn lines(flag: &'static str, headers: &[String]) -> Result<String, BadArgument> {
    for header in headers {
        if !header.contains(':') || header.contains(['\r', '\n']) {
            return bad(flag, format!("{header:?} is no `Name: value`"));
        }
    }
    Ok(headers.iter().map(|header| format!("{header}\r\n")).collect())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    fn parsed(flags: &[&str]) -> Arguments {
        Arguments::try_parse_from(["bench"].iter().chain(flags)).unwrap()
    }

    fn plan(flags: &[&str]) -> Plan {
        let mut plans = parsed(flags).plans(20_000).unwrap();
        assert_eq!(plans.len(), 1);
        plans.remove(0)
    }

    fn text(template: &Template, values: &super::super::template::Values<'_>) -> String {
        let mut out = Vec::new();
        template.write(&mut out, values);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_flags_are_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn without_options_it_drives_tabcast() {
        let plan = plan(&["--address", "127.0.0.1:9999"]);
        let values = super::super::template::Values { index: 3, user: 3, length: 7, ..Default::default() };
        assert_eq!(text(&plan.joining.path, &values), "/ws?user=u3");
        assert_eq!(plan.joining.host, "localhost:9999");
        assert_eq!(plan.joining.subscribed.as_deref(), Some(r#""type":"ack""#));
        assert!(text(plan.joining.subscribe.as_ref().unwrap(), &values).contains(r#""room":"all""#));
        let publishing = plan.publishing.unwrap();
        assert!(publishing.is_http && publishing.is_tabcast);
        assert!(text(&publishing.request, &values).starts_with("POST /api/send HTTP/1.1\r\nHost: localhost:9999\r\n"));
        assert!(text(&publishing.request, &values).ends_with("Content-Length: 7\r\n\r\n"));
        assert_eq!((plan.target, plan.shape), (Target::Room, Shape::Closed { in_flight: 1, messages: 1000 }));
        assert_eq!((plan.threads, plan.own_file_tables, plan.sources), (1, false, 1));
    }

    #[test]
    fn other_servers_are_driven_by_templates() {
        let flags = ["--path", "/sub/{i}", "--publish", r"PUB x {len}\r\n{text}\r\n", "--publish-first", r"HI\r\n"];
        let plan = plan(&flags);
        assert_eq!((plan.joining.subscribe, plan.joining.subscribed), (None, None));
        let publishing = plan.publishing.unwrap();
        assert!(!publishing.is_http && !publishing.is_tabcast);
        let values = super::super::template::Values { text: b"abc", length: 3, ..Default::default() };
        assert_eq!(text(&publishing.line, &values), "PUB x 3\r\nabc\r\n");
        assert_eq!(publishing.first.as_deref(), Some("HI\r\n"));
    }

    #[test]
    fn many_clients_get_threads_tables_and_addresses() {
        for (tabs, threads, tables, sources) in
            [("1000", 1, false, 1), ("18000", 1, false, 3), ("19000", 2, true, 3), ("300000", 16, true, 38)]
        {
            let plan = plan(&["--tabs", tabs]);
            assert_eq!((plan.threads, plan.own_file_tables, plan.sources), (threads, tables, sources), "{tabs}");
        }
        let two = plan(&["--tabs", "1000", "--threads", "2"]);
        assert_eq!((two.threads, two.own_file_tables), (2, false));
        assert_eq!(parsed(&["--tabs", "10,20,30"]).plans(1024).unwrap().len(), 3);
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_flag() {
        for (flags, flag) in [
            (["--tabs", "0"].as_slice(), "tabs"),
            (&["--address", "nowhere"], "address"),
            (&["--in-flight", "0"], "in-flight"),
            (&["--messages", "0"], "messages"),
            (&["--messages", "5000000000"], "messages"),
            (&["--messages", "100000000", "--publishers", "256"], "messages"),
            (&["--rate", "0"], "rate"),
            (&["--rate", "NaN"], "rate"),
            (&["--duration", "0s", "--rate", "1"], "duration"),
            (&["--size", "29"], "size"),
            (&["--batch", "0"], "batch"),
            (&["--publishers", "0"], "publishers"),
            (&["--publishers", "257"], "publishers"),
            (&["--publish", "POST / HTTP/1.1\\r\\n\\r\\nx"], "publish"),
            (&["--publish", "POST / HTTP/1.1\\r\\n{text}"], "publish"),
            (&["--publish", "{text}", "--to", "users"], "to"),
            (&["--publish-header", "none"], "publish-header"),
            (&["--header", "none"], "header"),
            (&["--sse"], "sse"),
            (&["--sse", "2", "--to", "users"], "sse"),
            (&["--silent", "1"], "silent"),
            (&["--silent", "-0.1"], "silent"),
            (&["--churn", "1", "--tabs", "1"], "churn"),
            (&["--tabs-per-user", "0"], "tabs-per-user"),
            (&["--threads", "1", "--tabs", "50000"], "threads"),
            (&["--sources", "2", "--address", "192.0.2.1:80"], "sources"),
            (&["--connecting", "0"], "connecting"),
            (&["--tls", "--tls-ca", "/nowhere.pem"], "tls-ca"),
        ] {
            let parsed = Arguments::try_parse_from(["bench"].iter().chain(flags));
            let refused = parsed.unwrap_or_else(|error| panic!("{flags:?}: {error}")).plans(20_000).err();
            assert_eq!(refused.as_ref().map(|refused| refused.flag), Some(flag), "{flags:?}: {refused:?}");
        }
        for flags in [
            ["--rate", "1", "--in-flight", "2"].as_slice(),
            &["--idle", "--rate", "1"],
            &["--tls"],
            &["--self-test", "--pid", "1"],
            &["--to", "nobody"],
            &["chart", "--svg", "x"],
        ] {
            assert!(Arguments::try_parse_from(["bench"].iter().chain(flags)).is_err(), "{flags:?}");
        }
    }
}
