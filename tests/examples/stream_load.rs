//! How many answers of `/v1` a gateway carries, and what they cost. Not a test: it takes minutes, and says numbers.
//!
//! ```sh
//! ulimit -n 20000
//! TABCAST_WORKER=none TABCAST_SHARDS=1 TABCAST_ANSWERS_MAX=20000 TABCAST_ANSWERS_PER_USER_MAX=20000 \
//!   taskset -c 0 target/release/tabcast &
//! taskset -c 1 cargo run --release --example stream_load -- --address 127.0.0.1:8080 --pid $!
//! ```
//!
//! `--mode hold` (the default) holds `--rate` chunks a second over `--streams` streams for `--seconds`; `--mode ramp`
//! raises the rate until the 99th percentile of latency passes 100 ms; `--mode idle` opens `--streams` streams that say
//! nothing, and reads what the process holds.

#[path = "../support/stream_load.rs"]
mod stream_load;

use std::error::Error;
use std::fs;
use std::io::{Write, stdout};
use std::net::SocketAddr;
use std::time::Duration;

use stream_load::{Carried, Load, run};
use tokio::task::LocalSet;

/// Past it a rate is more than the gateway carries.
const LATENCY_MAX: Duration = Duration::from_millis(100);
/// From one step of a ramp to the next.
const STEP: f64 = 1.25;

type Failed = Box<dyn Error>;

struct Arguments {
    address: SocketAddr,
    pid: u32,
    mode: String,
    streams: Option<usize>,
    rate: u64,
    seconds: u64,
}

impl Arguments {
    fn parse() -> Result<Self, Failed> {
        let address = SocketAddr::from(([127, 0, 0, 1], 8080));
        let mut parsed = Self { address, pid: 0, mode: "hold".to_owned(), streams: None, rate: 20_000, seconds: 60 };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--address" => parsed.address = value.parse()?,
                "--pid" => parsed.pid = value.parse()?,
                "--mode" => parsed.mode = value,
                "--streams" => parsed.streams = Some(value.parse()?),
                "--rate" => parsed.rate = value.parse()?,
                "--seconds" => parsed.seconds = value.parse()?,
                _ => {
                    return Err(
                        format!("{name} is none of --address, --pid, --mode, --streams, --rate, --seconds").into()
                    );
                }
            }
        }
        Ok(parsed)
    }

    /// CPU time of all threads of the gateway.
    fn cpu(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let nanos = tasks.filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanos.sum())
    }

    /// What the gateway holds of memory, in bytes (Pss).
    fn memory(&self) -> Result<u64, Failed> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("no Pss")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }

    fn carry(&self, load: Load) -> Result<(Carried, Duration), Failed> {
        let mut moments = Vec::new();
        let carried = run(self.address, load, || moments.push(self.cpu()))?;
        let cpu = moments.last().zip(moments.first()).map_or(Duration::ZERO, |(end, start)| end.saturating_sub(*start));
        Ok((carried, cpu))
    }
}

fn say(load: Load, carried: &Carried, cpu: Duration) -> Result<(), Failed> {
    let Carried { sent, received, broken, records, took, .. } = carried;
    let each = cpu.as_secs_f64() * 1e6 / (*received).max(1) as f64;
    let (streams, rate, busy) = (load.streams, load.rate, cpu.as_secs_f64() / took.as_secs_f64() * 100.0);
    let late = [0.5, 0.99, 1.0].map(|part| carried.latency(part).as_secs_f64() * 1e3);
    writeln!(
        stdout(),
        "{streams} streams, {rate} chunks/s for {:.1} s: sent {sent}, received {received} in {records} records, broken \
         streams {broken}; server CPU {busy:.0} %, {each:.1} µs a chunk; latency p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        took.as_secs_f64(),
        late[0],
        late[1],
        late[2],
    )?;
    Ok(())
}

fn hold(arguments: &Arguments) -> Result<(), Failed> {
    let (streams, duration) = (arguments.streams.unwrap_or(2000), Duration::from_secs(arguments.seconds));
    let load = Load { streams, rate: arguments.rate, duration };
    let (carried, cpu) = arguments.carry(load)?;
    say(load, &carried, cpu)?;
    if carried.broken > 0 || carried.sent != carried.received { Err("something was lost".into()) } else { Ok(()) }
}

fn ramp(arguments: &Arguments) -> Result<(), Failed> {
    let mut load = Load {
        streams: arguments.streams.unwrap_or(2000),
        rate: arguments.rate,
        duration: Duration::from_secs(arguments.seconds.min(10)),
    };
    loop {
        let (carried, cpu) = arguments.carry(load)?;
        say(load, &carried, cpu)?;
        if carried.latency(0.99) > LATENCY_MAX {
            writeln!(stdout(), "p99 passes {LATENCY_MAX:?} at {} chunks/s", load.rate)?;
            return Ok(());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of millions at most")]
        let next = (load.rate as f64 * STEP) as u64;
        load.rate = next;
    }
}

fn idle(arguments: &Arguments) -> Result<(), Failed> {
    let count = arguments.streams.unwrap_or(10_000);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let before = arguments.memory()?;
    let streams = LocalSet::new().block_on(&runtime, stream_load::open(arguments.address, count))?;
    std::thread::sleep(Duration::from_secs(3));
    let after = arguments.memory()?;
    let each = after.saturating_sub(before) as f64 / streams.len() as f64 / 1024.0;
    writeln!(stdout(), "{} idle streams: Pss {before} → {after} bytes, {each:.2} KiB each", streams.len())?;
    Ok(())
}

fn main() -> Result<(), Failed> {
    let arguments = Arguments::parse()?;
    match arguments.mode.as_str() {
        "hold" => hold(&arguments),
        "ramp" => ramp(&arguments),
        "idle" => idle(&arguments),
        other => Err(format!("--mode is hold, ramp or idle, not {other}").into()),
    }
}
