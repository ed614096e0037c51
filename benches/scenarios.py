#!/usr/bin/env python3
"""Measures what `benches/compare.py` does not: one scenario after the other, a line or two each.

    benches/scenarios.py [--out FOLDER] [--tabs N] [--minutes M] [--share S] SCENARIO …

users      messages to random users with two tabs each through /api/batch, beside the floor, which writes to tabs in a
           random order as well, or in the one that they came in, which the kernel's caches like better
handshake  handshakes with a signed token (HS256), beside the floor's
silent     a --share (0.1) of 1,000 tabs never reads: p99 of the others, with and without them in turn
files      files of 12 MiB (16 MiB as frames) to one tab: p99 of small frames to others, with and without in turn
tls        an idle tab, a handshake and a delivery with TLS, without, and behind nginx that has it
deflate    a delivery of 1 KiB with permessage-deflate and without
churn      1,000 tabs a second leave and come back under steady traffic, for --minutes (10), and a fifth of that again
sessions   --tabs (300,000) WebSocket sessions in one process, held for --minutes (10) with heartbeats

The server has processor 0, the client processor 1; in `sessions` both have both. Ratios are medians of pairs that
were measured in turn. Runs on Debian, as root.
"""

import argparse
import base64
import hashlib
import hmac
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import compare

PAIRS = int(os.environ.get("PAIRS", 7))


class Gateway(compare.Server):
    """tabcast with settings of a scenario."""

    def __init__(self, *flags, shards=1, pin="0"):
        self.name, self.port, self.flags = "tabcast", compare.free_port(), flags
        binary = os.environ.get("TABCAST", compare.TABCAST)
        command = ["taskset", "-c", pin, binary, "serve", "--log", "warn", "--listen", f"127.0.0.1:{self.port}"]
        command += ["--shards", shards] if shards else []
        self.log = tempfile.NamedTemporaryFile(prefix="tabcast-", suffix=".log")
        self.process = subprocess.Popen(
            [str(part) for part in [*command, *flags]], stdout=self.log, stderr=self.log, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", self.port)) != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"scenarios: the gateway does not start:\n{pathlib.Path(self.log.name).read_text()}")
            time.sleep(0.05)
        time.sleep(0.3)

    def memory(self):
        """Pss in MiB."""
        text = pathlib.Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) / 1024


def spread(values, digits=2):
    values = sorted(values)
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}–{values[-1]:.{digits}f})"


def users(out, _):
    tabs = ["--tabs", 18_800]
    costs, sequential, shuffled = [], [], []
    for number in range(PAIRS):
        floors = []
        for more in ({}, {"SHUFFLED": "1"}):
            with compare.Server("floor", 18_800, **more) as floor:
                path = out / f"users-floor-{len(floors)}-{number}.json"
                floors.append(floor.bench(path, *tabs, "--messages", 20)["server_cpu_per_delivery_us"])
        with Gateway("--tabs-max", 19_000, "--file-tables", "shared") as gateway:
            flags = ["--to", "users", "--tabs-per-user", 2, "--batch", 100, "--in-flight", 8, "--messages", 200_000]
            costs.append(gateway.bench(out / f"users-{number}.json", *tabs, *flags)["server_cpu_per_delivery_us"])
        sequential.append(costs[-1] / floors[0])
        shuffled.append(costs[-1] / floors[1])
    print(
        f"users, batches of 100, 8 in flight: {spread(costs)} µs a delivery, ÷ floor that writes to all tabs in another "
        f"order each time {spread(shuffled)}, in their own order {spread(sequential)}"
    )


def token(secret, user):
    """A user's token that is good for a day."""

    def part(data):
        return base64.urlsafe_b64encode(json.dumps(data).encode()).rstrip(b"=")

    signed = part({"alg": "HS256", "typ": "JWT", "kid": "main"}) + b"."
    signed += part({"sub": user, "name": user, "rooms": ["*"], "exp": int(time.time()) + 86_400})
    signature = base64.urlsafe_b64encode(hmac.digest(secret, signed, hashlib.sha256)).rstrip(b"=")
    return (signed + b"." + signature).decode()


def handshake(out, _):
    secret, folder = os.urandom(32).hex(), pathlib.Path(tempfile.mkdtemp())
    (folder / "key").write_text(secret)
    (folder / "tokens").write_text("\n".join(token(secret.encode(), f"u{user}") for user in range(10_000)))
    ratios, costs = [], []
    flags = ["--tabs", 10_000, "--idle", "--duration", "1s", "--stall", "1s"]
    for number in range(PAIRS):
        with compare.Server("floor", 10_000) as floor:
            one = floor.bench(out / f"handshake-floor-{number}.json", *flags)
        key, api_key = f"kid=main,alg=HS256,secret_file={folder / 'key'}", "k" * 32
        # All clients have one address, and come as fast as they can.
        unlimited = ["--tabs-per-address-max", 0, "--connections-per-address-max", 0]
        unlimited += ["--handshakes-per-second-max", 0, "--handshakes-per-address-per-second-max", 0]
        with Gateway("--token-keys", key, "--api-keys", api_key, *unlimited) as gateway:
            # Nobody joins a room: the floor has none.
            ours = ["--to", "users", "--tabs-per-user", 1, "--tokens", folder / "tokens"]
            ours += ["--publish-header", f"Authorization: Bearer {api_key}"]
            found = gateway.bench(out / f"handshake-{number}.json", *flags, *ours)
        costs.append(found["server_cpu_per_handshake_us"])
        ratios.append(costs[-1] / one["server_cpu_per_handshake_us"])
    shutil.rmtree(folder)
    print(f"handshake with a token: {spread(costs, 1)} µs, ÷ floor {spread(ratios)}")


def silent(out, arguments):
    share, tabs = arguments.share, 1000
    # As many read in both runs.
    readers = tabs - int(tabs * share + 0.5)
    ratios, cut, silent_count = [], 0, 0
    flags = ["--rate", 100, "--duration", "8s", "--size", 1024]
    with Gateway() as gateway:
        for number in range(PAIRS):
            without = gateway.bench(out / f"silent-without-{number}.json", "--tabs", readers, *flags)
            found = gateway.bench(out / f"silent-{number}.json", "--tabs", tabs, *flags, "--silent", share)
            beside = found["tabs_count"] - found["silent_count"]
            if beside != without["tabs_count"]:
                sys.exit(f"scenarios: {beside} tabs read beside the silent ones, {readers} without")
            cut += found["silent_cut_count"]
            silent_count += found["silent_count"]
            ratios.append(found["latency"]["p99_ms"] / without["latency"]["p99_ms"])
    print(
        f"{share:.0%} silent: p99 of the others ÷ without {spread(ratios)}; "
        f"{cut} of {silent_count} silent tabs were cut"
    )


def read_all(port, user):
    """A tab that reads whatever comes, as fast as it comes."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(
        f"GET /ws?user={user} HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    count = [0]

    def read():
        buffer = bytearray(1 << 20)
        while received := connection.recv_into(buffer):
            count[0] += received

    threading.Thread(target=read, daemon=True).start()
    return count


def files(out, _):
    added, sent, stop = [], 0, threading.Event()
    file = os.urandom(12 << 20)
    flags = ["--tabs", 10, "--rate", 200, "--duration", "5s"]

    def post(port):
        nonlocal sent
        while not stop.is_set():
            connection = http.client.HTTPConnection("localhost", port, timeout=10)
            headers = {"X-Tabcast-Raw": "1", "Content-Type": "application/octet-stream"}
            connection.request("POST", "/api/file?channel_id=reader&filename=x", file, headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            connection.close()
            sent += 1
            stop.wait(0.3)

    os.sched_setaffinity(0, {1})
    with Gateway() as gateway:
        count = read_all(gateway.port, "reader")
        for number in range(PAIRS):
            without = gateway.bench(out / f"files-without-{number}.json", *flags)
            stop.clear()
            poster = threading.Thread(target=post, args=[gateway.port])
            poster.start()
            found = gateway.bench(out / f"files-{number}.json", *flags)
            stop.set()
            poster.join()
            added.append(found["latency"]["p99_ms"] - without["latency"]["p99_ms"])
        time.sleep(0.5)
        whole = sent * (16 << 20) <= count[0]
    print(f"files: {sent} of 12 MiB, {'all' if whole else 'NOT all'} came; p99 of small frames + {spread(added)} ms")


def tls(out, _):
    folder = pathlib.Path(tempfile.mkdtemp())
    run = compare.run
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subject += ["-addext", "basicConstraints=critical,CA:FALSE"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    cert, key = folder / "cert.pem", folder / "key.pem"
    run("openssl", "req", "-x509", "-nodes", "-days", "2", *curve, "-keyout", key, "-out", cert, *subject,
        stderr=subprocess.DEVNULL)  # fmt: skip
    trust = ["--tls", "--tls-ca", cert, "--tls-name", "localhost"]
    ours = ["--tls-cert", cert, "--tls-key", key]
    for way, flags, client in [("plain", [], []), ("TLS", ours, trust), ("nginx with TLS", [], trust)]:
        cells = []
        for shape in (["--tabs", 5000, "--idle", "--connecting", 128], ["--messages", 200], ["--messages", 1600, "--in-flight", 16]):
            shape = shape if "--idle" in shape else ["--tabs", 1000, *shape]
            with Gateway(*flags) as gateway:
                proxy = Proxy(gateway, cert, key, folder) if way.startswith("nginx") else None
                server = proxy or gateway
                name = f"tls-{way.replace(' ', '-')}-{len(cells)}.json"
                found = server.bench(out / name, *client, *shape)
                if proxy:
                    proxy.__exit__()
            cells.append(found)
        idle, one, many = cells
        print(
            f"{way}: idle tab {idle['server_pss_per_connection_bytes'] / 1024:.2f} KiB, "
            f"handshake {idle['server_cpu_per_handshake_us']:.0f} µs, delivery {one['server_cpu_per_delivery_us']:.2f} µs, "
            f"16 in flight {many['server_cpu_per_delivery_us']:.2f} µs"
        )
    shutil.rmtree(folder)


class Proxy(compare.Server):
    """nginx with TLS in front of a gateway; what both spend is counted."""

    def __init__(self, gateway, cert, key, folder):
        self.name, self.port, self.gateway = "tabcast", compare.free_port(), gateway
        text = f"""
            user root; daemon off; worker_processes 1; worker_rlimit_nofile 20000;
            pid {folder}/nginx.pid; error_log {folder}/error.log warn;
            events {{ worker_connections 19900; multi_accept on; }}
            http {{
              access_log off; tcp_nodelay on;
              map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
              upstream gateway {{ server 127.0.0.1:{gateway.port}; keepalive 64; }}
              server {{
                listen 127.0.0.1:{self.port} ssl backlog=4096;
                ssl_certificate {cert}; ssl_certificate_key {key}; ssl_protocols TLSv1.2 TLSv1.3;
                location / {{
                  proxy_pass http://gateway; proxy_http_version 1.1; proxy_read_timeout 1h;
                  proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
                  proxy_set_header Host localhost; proxy_buffer_size 4k;
                }}
              }}
            }}"""
        (folder / "nginx.conf").write_text(text)
        command = ["taskset", "-c", "0", "nginx", "-p", f"{folder}/", "-c", str(folder / "nginx.conf")]
        self.process = subprocess.Popen(command, start_new_session=True)
        while socket.socket().connect_ex(("127.0.0.1", self.port)) != 0:
            time.sleep(0.05)

    def bench(self, out, *flags):
        self.pids = [*compare.processes_of(self.process.pid), self.gateway.process.pid]
        return compare.bench("tabcast", self.port, self.pids, out, *flags)

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(10)


def deflate(out, _):
    for size in (256, 1024, 8192):
        cells = []
        for flags, client in (([], []), (["--deflate", "on"], ["--deflate"])):
            with Gateway(*flags) as gateway:
                shape = ["--tabs", 1000, "--messages", 300, "--size", size]
                cells.append(gateway.bench(out / f"deflate-{size}-{len(cells)}.json", *shape, *client))
        rates = [f["received_bytes_per_second"] / f["deliveries_per_second"] for f in cells]
        costs = [f["server_cpu_per_delivery_us"] for f in cells]
        print(
            f"deflate, {size} B: {costs[0]:.3f} → {costs[1]:.3f} µs a delivery, {rates[0]:.0f} → {rates[1]:.0f} B on the wire"
        )


def churn(out, arguments):
    with Gateway("--tabs-max", 19_000, "--file-tables", "shared") as gateway:
        memory = []
        # The second storm is to find what the first has left behind.
        for storm, minutes in enumerate([arguments.minutes, arguments.minutes / 5]):
            flags = ["--tabs", 10_000, "--churn", 1000, "--rate", 5, "--duration", f"{minutes * 60:.0f}s"]
            found = gateway.bench(out / f"churn-{storm}.json", *flags)
            time.sleep(3)
            memory.append(gateway.memory())
            print(
                f"churn, storm {storm + 1}: {found['churned_count']} tabs left and came back in {minutes:.1f} min, "
                f"{found['delivered_count']} of {found['expected_count']} delivered, {found['lost_count']} lost, "
                f"{found['doubled_count']} doubled; p99 {found['latency']['p99_ms']:.1f} ms; "
                f"then {memory[-1]:.1f} MiB without tabs"
            )
        print(f"churn: memory after the second ÷ after the first {memory[1] / memory[0]:.3f}")


def sessions(out, arguments):
    tabs = arguments.tabs
    with Gateway("--tabs-max", tabs + 1000, shards=0, pin="0,1") as gateway:
        before = gateway.memory()
        flags = ["--tabs", tabs, "--idle", "--duration", f"{int(arguments.minutes * 60)}s", "--stall", "60s"]
        found = compare.bench("tabcast", gateway.port, [gateway.process.pid], out / "sessions.json", *flags, pin=None)
        print(
            f"sessions: {found['open_count']} open in {found['opening_seconds']:.0f} s, {found['cut_count']} cut in "
            f"{arguments.minutes} min; broadcast to {found['delivered_count']} of {found['expected_count']} in "
            f"{found['broadcast_ms']:.0f} ms, {found['doubled_count']} doubled; one user in {found['direct_ms']:.1f} ms; "
            f"gateway {found['server_pss_per_connection_bytes'] / 1024:.2f} KiB a tab, "
            f"client {found['client_pss_per_connection_bytes'] / 1024:.2f}, "
            f"all with the kernel {found['system_per_connection_bytes'] / 1024:.1f}; "
            f"{found['pings_count']} pings; gateway {before:.0f} MiB before"
        )
        started = time.monotonic()
        os.killpg(gateway.process.pid, signal.SIGTERM)
        code = gateway.process.wait(120)
        print(f"sessions: the gateway left with {code} after {time.monotonic() - started:.1f} s")


SCENARIOS = {one.__name__: one for one in (users, handshake, silent, files, tls, deflate, churn, sessions)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=compare.ROOT / "target" / "scenarios")
    parser.add_argument("--tabs", type=int, default=300_000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("scenario", nargs="+", choices=SCENARIOS)
    arguments = parser.parse_args()
    compare.open_files()
    compare.prepare(["floor"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.scenario:
        SCENARIOS[name](arguments.out, arguments)


if __name__ == "__main__":
    main()
