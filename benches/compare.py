#!/usr/bin/env python3
"""Measures tabcast beside other servers, each in turn, with the same client: `tabcast bench`.

    benches/compare.py [--tabs 1000,10000,19000] [--rounds 1] [--out FOLDER] [SERVER …]

The server has processor 0, the client processor 1. In every round each server is started anew for each number of
tabs, one after the other, so that a busy moment of the machine meets all of them. `floor` is the limit: a C program
that only calls send(). Figures are medians over the rounds; each ratio is the median of the ratios to the floor of
its own round. What the others need is installed on the way (apt, pip, npm, cargo). Runs on Debian, as root.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
HERE = ROOT / "benches" / "peers"
BUILT = ROOT / "target" / "peers"
TABCAST = ROOT / "target" / "release" / "tabcast"
SERVERS = ["floor", "tabcast", "socketify", "nchan", "tungstenite", "axum", "ws"]
NAMES = {
    "floor": "raw C, `send()` per tab (the floor)",
    "tabcast": "**tabcast**",
    "socketify": "uWebSockets (socketify 0.0.31)",
    "nchan": "nginx with nchan",
    "tungstenite": "tokio-tungstenite, mpsc, batched flush",
    "axum": "axum, tokio broadcast",
    "ws": "node `ws`",
}
# Deliveries of a measurement, by messages in flight: enough for a second or two of work.
DELIVERIES = {1: 300_000, 16: 2_400_000, 64: 4_800_000}
# Of servers that write each frame by itself.
UNBATCHED = {"floor", "nchan", "axum", "ws"}
FOREIGN = [
    "--path", "/ws", "--publish",
    r"POST /pub HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: {len}\r\n\r\n{text}",
]  # fmt: skip


def run(*command, **options):
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, **options)


def prepare(servers):
    """Installs and builds what the servers need."""
    BUILT.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("TABCAST"):
        run("cargo", "build", "--quiet", "--release", "--locked", cwd=ROOT)
    if "floor" in servers:
        run("cc", "-O3", "-march=native", "-D_GNU_SOURCE", "-o", BUILT / "floor", HERE / "floor" / "floor.c")
    if {"axum", "tungstenite"} & set(servers):
        manifest = HERE / "rust" / "Cargo.toml"
        run("cargo", "build", "--quiet", "--release", "--locked", "--manifest-path", manifest, "--target-dir", BUILT / "rust")
    packages = [("nchan", "libnginx-mod-nchan"), ("socketify", "libuv1"), ("socketify", "python3-venv"), ("ws", "npm")]
    missing = [package for server, package in packages if server in servers and not is_installed(package)]
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)
    if "socketify" in servers and not (BUILT / "venv" / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", BUILT / "venv")
        run(BUILT / "venv" / "bin" / "pip", "install", "-q", "-r", HERE / "socketify" / "requirements.txt")
    if "ws" in servers:
        shutil.copytree(HERE / "node", BUILT / "node", dirs_exist_ok=True)
        run("npm", "ci", "--silent", cwd=BUILT / "node")


def is_installed(package):
    if package == "npm" and shutil.which("npm"):
        return True
    found = subprocess.run(["dpkg", "-s", package], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return found.returncode == 0


def command_of(server, port, tabs):
    """The server's command, and what its environment has more."""
    environment = {"PORT": str(port)}
    match server:
        case "floor":
            return [BUILT / "floor"], environment
        case "tabcast":
            binary = os.environ.get("TABCAST", TABCAST)
            flags = ["--listen", f"127.0.0.1:{port}", "--shards", "1", "--tabs-max", str(tabs)]
            return [binary, "serve", "--log", "warn", "--file-tables", "shared", *flags], environment
        case "socketify":
            return [BUILT / "venv" / "bin" / "python", HERE / "socketify" / "app.py"], environment
        case "ws":
            return ["node", "--max-old-space-size=8192", BUILT / "node" / "server.mjs"], environment
        case "nchan":
            folder = BUILT / "nchan"
            folder.mkdir(exist_ok=True)
            limit = open_files()
            words = {"OPEN_FILES": limit, "CONNECTIONS": limit - 100, "FOLDER": folder, "PORT": port}
            text = (HERE / "nchan" / "nginx.conf").read_text()
            for word, value in words.items():
                text = text.replace(word, str(value))
            (folder / "nginx.conf").write_text(text)
            return ["nginx", "-p", f"{folder}/", "-c", folder / "nginx.conf"], environment
        case _:
            return [BUILT / "rust" / "release" / server], environment


def open_files():
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_of(pid):
    """The process and its children, theirs too."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += processes_of(int(child))
    return found


class Server:
    """A server that listens, pinned to processor 0."""

    def __init__(self, name, tabs, **more):
        self.name, self.port = name, free_port()
        command, environment = command_of(name, self.port, tabs)
        self.process = subprocess.Popen(
            ["taskset", "-c", "0", *map(str, command)],
            env={**os.environ, **environment, **more},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 10
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"compare: {name} does not start: {' '.join(map(str, command))}")
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        time.sleep(0.3)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # What was to be measured has been: nothing that a server does at its end is.
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def bench(self, out, *flags):
        return bench(self.name, self.port, processes_of(self.process.pid), out, *flags)


def bench(server, port, pids, out, *flags, pin=1):
    """One run of the client; its findings."""
    command = [os.environ.get("TABCAST", TABCAST), "bench", "--address", f"127.0.0.1:{port}"]
    command += ["--pid", ",".join(map(str, pids)), "--label", server, "--json", out]
    command += ["--pin", pin] if pin is not None else []
    command += [*(() if server == "tabcast" else FOREIGN), *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if not out.exists():
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    if done.returncode != 0:
        print(f"  {server} {' '.join(map(str, flags))}: not all was delivered\n{done.stdout}", file=sys.stderr)
    return json.loads(out.read_text())["runs"][0]


def measure(server, tabs, number, out):
    """One round of one server: idle, then one, 16 and 64 messages in flight."""
    found = {}
    with Server(server, tabs) as running:
        # No room is joined: the others have none.
        alone = ["--to", "users", "--tabs-per-user", 1] if server == "tabcast" else []
        path = out / f"{server}-{tabs}-idle-{number}.json"
        # Of many handshakes at once a server keeps the memory; that is not what an idle tab costs.
        once = ["--connecting", 128, "--duration", "1s"]
        idle = running.bench(path, "--tabs", tabs, "--idle", *once, *alone)
        found["idle_bytes"] = idle["server_pss_per_connection_bytes"]
        found["handshake_us"] = idle["server_cpu_per_handshake_us"]
    for in_flight, deliveries in DELIVERIES.items():
        with Server(server, tabs) as running:
            if server in UNBATCHED:
                deliveries = min(deliveries, 300_000)
            messages = max(deliveries // tabs, 2 * in_flight)
            path = out / f"{server}-{tabs}-{in_flight}-{number}.json"
            closed = running.bench(path, "--tabs", tabs, "--in-flight", in_flight, "--messages", messages)
            found[in_flight] = closed["server_cpu_per_delivery_us"]
            found[f"p99 {in_flight}"] = closed["latency"]["p99_ms"] if closed["latency"] else None
    return found


def median(values):
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def figure(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}"


def table(rounds, servers, tabs):
    """One number of tabs as a table in Markdown."""
    lines = [
        f"| {tabs:,} tabs | idle KiB | handshake µs | one at a time µs (÷ floor) | 16 in flight | 64 in flight |",
        "|---|---|---|---|---|---|",
    ]
    for server in servers:
        mine = [one[server] for one in rounds]
        cells = [NAMES[server]]
        idle = median(found["idle_bytes"] for found in mine)
        cells += [figure(idle / 1024 if idle is not None else None), figure(median(f["handshake_us"] for f in mine), 1)]
        for in_flight in DELIVERIES:
            cost = figure(median(found[in_flight] for found in mine), 2 if in_flight == 1 else 3)
            if "floor" not in servers:
                cells.append(cost)
                continue
            ratios = [one[server][in_flight] / one["floor"][1] for one in rounds if one[server][in_flight]]
            spread = f", {min(ratios):.2f}–{max(ratios):.2f}" if len(ratios) > 2 and server != "floor" else ""
            cells.append(f"{cost} ({figure(median(ratios), 2 if in_flight == 1 else 3)}{spread})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tabs", default="1000,10000,19000")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target" / "compare")
    parser.add_argument("server", nargs="*", default=SERVERS, help=", ".join(SERVERS))
    arguments = parser.parse_args()
    unknown = set(arguments.server) - set(SERVERS)
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("compare: it takes two processors")
    open_files()
    prepare(arguments.server)
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    for tabs in map(int, arguments.tabs.split(",")):
        rounds = []
        for number in range(arguments.rounds):
            rounds.append({server: measure(server, tabs, number, arguments.out) for server in arguments.server})
            print(f"{tabs} tabs, round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        print(table(rounds, arguments.server, tabs), flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
