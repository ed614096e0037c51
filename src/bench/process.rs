//! What processes spend, from `/proc`: CPU by thread, memory by its proportional share, and what the system has left.

use std::collections::HashMap;
use std::fs;

/// CPU time of processes, which only grows: a thread that ends keeps what was last seen of it.
#[derive(Debug, Default)]
pub(super) struct Cpu {
    pids: Vec<u32>,
    /// Nanoseconds by process and thread.
    threads: HashMap<(u32, u32), u64>,
    /// What threads had that are gone, and whose numbers others have now.
    gone: u64,
}

impl Cpu {
    pub(super) fn new(pids: &[u32]) -> Self {
        Self { pids: pids.to_vec(), ..Self::default() }
    }

    /// Nanoseconds so far.
    pub(super) fn nanos(&mut self) -> u64 {
        for pid in &self.pids {
            let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
            for task in tasks.flatten() {
                let Some(thread) = task.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
                let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
                if let Some(nanos) = text.split(' ').next().and_then(|nanos| nanos.parse().ok()) {
                    see(&mut self.threads, &mut self.gone, (*pid, thread), nanos);
                }
            }
        }
        self.gone + self.threads.values().sum::<u64>()
    }
}

/// A thread's time that has become less is that of another thread with its number.
fn see(threads: &mut HashMap<(u32, u32), u64>, gone: &mut u64, thread: (u32, u32), nanos: u64) {
    let before = threads.insert(thread, nanos).unwrap_or(0);
    if before > nanos {
        *gone += before;
    }
}

/// Bytes of memory of processes: what several share is divided among them.
pub(super) fn pss_bytes(pids: &[u32]) -> u64 {
    let of = |pid: &u32| kibibytes(&format!("/proc/{pid}/smaps_rollup"), "Pss:");
    pids.iter().filter_map(of).sum::<u64>() << 10
}

/// Bytes that the system could still give to programs.
pub(super) fn available_bytes() -> u64 {
    kibibytes("/proc/meminfo", "MemAvailable:").unwrap_or(0) << 10
}

fn kibibytes(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_never_becomes_less() {
        let (mut threads, mut gone) = (HashMap::new(), 0);
        let mut last = 0;
        for (thread, nanos) in [(1, 50), (2, 10), (1, 60), (2, 3), (2, 4), (1, 5)] {
            see(&mut threads, &mut gone, (7, thread), nanos);
            let sum = gone + threads.values().sum::<u64>();
            assert!(sum >= last, "{thread} {nanos}");
            last = sum;
        }
        assert_eq!(last, 60 + 10 + 4 + 5);
    }

    #[test]
    fn this_process_spends_and_has_memory() {
        let here = [std::process::id()];
        let mut cpu = Cpu::new(&here);
        let before = cpu.nanos();
        // A thread of its own, whose time stays counted when it is over.
        let sum = std::thread::spawn(|| (0..20_000_000u64).fold(1u64, |a, b| a.wrapping_mul(b | 1))).join();
        assert!(sum.is_ok());
        assert!(cpu.nanos() >= before && before > 0);
        assert!(pss_bytes(&here) > 100_000 && available_bytes() > 100_000);
        assert_eq!((Cpu::new(&[u32::MAX]).nanos(), pss_bytes(&[u32::MAX])), (0, 0));
    }
}
