//! What the process has of the machine, from `/proc`. What cannot be read is null.

use std::fs;
use std::net::SocketAddr;

use rustix::param::page_size;
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

/// Threads whose file tables are looked at.
const THREADS_MAX: usize = 2_048;

/// What the process has now.
pub(super) fn state(cpu_share: f64) -> Value {
    json!({
        "resident_bytes": resident_bytes(),
        "cpu_share": cpu_share,
        "open_files": open_files(),
        "open_files_max": getrlimit(Resource::Nofile).current,
    })
}

/// What people call this node: its machine, and the port that it listens at.
pub(super) fn node_name(address: SocketAddr) -> String {
    let system = rustix::system::uname();
    format!("{}:{}", system.nodename().to_string_lossy(), address.port())
}

fn resident_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * page_size() as u64)
}

/// Open files of the fullest table: the limit is of each, and shards may have their own. A folder of descriptors tells
/// its number as its size (Linux 6.2); before that it is null, as counting them takes too long where there are many.
fn open_files() -> Option<u64> {
    let threads = fs::read_dir("/proc/self/task").ok()?;
    let of_thread = |thread: fs::DirEntry| fs::metadata(thread.path().join("fd")).ok().map(|folder| folder.len());
    threads.flatten().take(THREADS_MAX).filter_map(of_thread).max().filter(|count| *count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_has_memory_and_files_of_a_known_number() {
        let before = state(0.5);
        assert!(before["resident_bytes"].as_u64().unwrap() > 1 << 20, "{before}");
        assert_eq!(before["cpu_share"], 0.5);
        let files = |state: &Value| state["open_files"].as_u64();
        // Other tests open and close some meanwhile: so many more than those are seen.
        if let Some(count) = files(&before) {
            let opened: Vec<_> = (0..500).map(|_| fs::File::open("/dev/null").unwrap()).collect();
            assert!(files(&state(0.5)).unwrap() >= 500, "beside {count}");
            drop(opened);
        }
        assert!(node_name("127.0.0.1:80".parse().unwrap()).ends_with(":80"));
    }
}
