"""The gateway under test as a process, and the clients that talk to it: real sockets, nothing of ours in between."""

import base64
import hashlib
import hmac
import http.client
import json
import os
import pathlib
import queue
import re
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import unittest
import urllib.parse

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("TABCAST_BIN", str(ROOT / "target/release/tabcast"))
PATIENCE = 15.0  # seconds for what should take milliseconds


def until(what, check, timeout=PATIENCE):
    """Looks again until `check` gives something true; the only place that waits by the clock."""
    end = time.monotonic() + timeout
    while not (value := check()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.02)
    return value


class Answer:
    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self):
        return json.loads(self.body)


class Gateway:
    """One process. Settings are given as their names: `Gateway(header_timeout="1s")`. `trust`: what its TLS is checked by."""

    def __init__(self, trust=None, **settings):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TABCAST_")}
        own = {f"TABCAST_{name.upper()}": str(value) for name, value in settings.items()}
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [BINARY], env={**clean, "TABCAST_LISTEN": "127.0.0.1:0", **own}, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        self.trust = trust
        self.port = int(until("the gateway is ready", self.ready_port))
        self.host = f"127.0.0.1:{self.port}"
        self.origin = f"{self.scheme('http')}://{self.host}"

    def scheme(self, plain):
        return f"{plain}s" if self.trust else plain

    def ready_port(self):
        """The port that it says it listens on, once it does."""
        if self.process.poll() is not None:
            raise AssertionError(f"the gateway left with {self.process.returncode}:\n{self.log_text()}")
        ready = re.search(self.scheme("ready: http") + r"://127\.0\.0\.1:(\d+)/", self.log_text())
        return ready and ready[1]

    def log_text(self):
        # At a place, so that the process goes on writing where it is: they share one position.
        return os.pread(self.log.fileno(), 1 << 24, 0).decode(errors="replace")

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()

    def http(self, method, path, body=None, headers=None, timeout=PATIENCE):
        connection = self.connection(timeout)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def connection(self, timeout=PATIENCE):
        if self.trust:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=self.trust)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def post(self, route, value, **headers):
        body = json.dumps(value, ensure_ascii=False).encode()
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return self.http("POST", f"/api/{route}", body, {"Content-Type": "application/json", **named})

    def api(self, route, value, **headers):
        answer = self.post(route, value, **headers)
        if answer.status != 200:
            raise AssertionError(f"{route}: {answer.status} {answer.body[:500]!r}")
        return answer.json()

    def tab(self, user, **options):
        return Tab(self, user, **options)

    def raw_tab(self, user, receive_buffer=None, extensions=None):
        """A socket after a WebSocket handshake, for bytes that no client library would send."""
        raw = socket.socket()
        raw.settimeout(PATIENCE)
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.connect(("127.0.0.1", self.port))
        path = "/ws?" + urllib.parse.urlencode({"user": user, "name": user})
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {path} HTTP/1.1", f"Host: {self.host}", "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
        lines += [f"Sec-WebSocket-Extensions: {extensions}"] if extensions else []
        raw.sendall("\r\n".join([*lines, "", ""]).encode())
        stream = raw.makefile("rb")
        status = stream.readline()
        if b" 101 " not in status:
            raise AssertionError(f"no upgrade: {status!r}")
        while stream.readline() != b"\r\n":
            pass
        raw.sendall(masked(9, b"ready"))  # the pong comes from the session itself: from here on it gets frames
        if read_frame(stream) != (10, b"ready"):
            raise AssertionError("no pong")
        return raw, stream


class Tab:
    """One browser tab. Frames are read as they come, so that a test that is busy is not a slow consumer."""

    def __init__(self, gateway, user=None, hello=False, path="/ws", **options):
        query = {} if user is None else {"user": user, "name": options.pop("name", user)}
        query.update({"hello": "1"} if hello else {})
        options.setdefault("ssl", gateway.trust)
        uri = f"{gateway.scheme('ws')}://{gateway.host}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        options.setdefault("compression", None)
        self.socket = connect(uri, max_size=None, open_timeout=PATIENCE, ping_interval=None, close_timeout=2, **options)
        self.frames = queue.SimpleQueue()
        self.ending = None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if not self.socket.ping().wait(PATIENCE):  # answered by the session itself: from here on it gets frames
            raise AssertionError("no pong")

    def _read(self):
        try:
            while True:
                self.frames.put(self.socket.recv())
        except ConnectionClosed as error:
            self.ending = (error.rcvd.code, error.rcvd.reason) if error.rcvd else (1006, "")
        self.frames.put(None)

    def text(self, timeout=PATIENCE):
        """The next frame as it stands on the wire."""
        try:
            frame = self.frames.get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"no frame within {timeout} s") from None
        if frame is None:
            raise AssertionError(f"closed with {self.ending} instead of a frame")
        return frame

    def frame(self, timeout=PATIENCE):
        return json.loads(self.text(timeout))

    def until(self, accept, timeout=PATIENCE):
        """Frames up to and with the first that `accept` takes."""
        end = time.monotonic() + timeout
        seen = []
        while True:
            seen.append(self.frame(max(0.01, end - time.monotonic())))
            if accept(seen[-1]):
                return seen

    def find(self, kind, **values):
        return self.until(lambda frame: frame["type"] == kind and all(frame.get(name) == value for name, value in values.items()))[-1]

    def send(self, value):
        self.socket.send(value if isinstance(value, (str, bytes)) else json.dumps(value, ensure_ascii=False))

    def ask(self, **frame):
        """Sends a frame with a client id of its own and gives the ack or error that answers it."""
        client_id = frame.setdefault("client_id", base64.b16encode(os.urandom(8)).decode())
        self.send(frame)
        return self.until(lambda got: got["type"] in ("ack", "error") and got.get("client_id") == client_id)[-1]

    def closed(self, timeout=PATIENCE):
        """Waits for the end: (code, reason) and the frames that came before it."""
        rest = []
        end = time.monotonic() + timeout
        while True:
            try:
                frame = self.frames.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"still open after {timeout} s") from None
            if frame is None:
                return self.ending, rest
            rest.append(json.loads(frame))

    def close(self):
        self.socket.close()
        self.reader.join(PATIENCE)


def masked(opcode, payload, final=True):
    """A client's frame, byte by byte (RFC 6455 §5.2); the upper half of the opcode is for the reserved bits."""
    mask = os.urandom(4)
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", (final << 7) | opcode, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", (final << 7) | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", (final << 7) | opcode, 0x80 | 127, size)
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def read_frame(stream):
    """A server's frame: (opcode, payload), or None at the end of the connection."""
    head = stream.read(2)
    if len(head) < 2:
        return None
    assert head[0] & 0x70 == 0, "reserved bits"
    assert head[1] & 0x80 == 0, "a server does not mask"
    size = head[1] & 0x7F
    if size == 126:
        (size,) = struct.unpack("!H", stream.read(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", stream.read(8))
    payload = stream.read(size)
    return (head[0] & 0x0F, payload) if len(payload) == size else None


def close_code(stream):
    """Reads up to the close frame: its code, and the text frames before it."""
    texts = []
    while (frame := read_frame(stream)) is not None:
        if frame[0] == 8:
            return struct.unpack("!H", frame[1][:2])[0], texts
        if frame[0] == 1:
            texts.append(frame[1])
    return 1006, texts


KEYS = ROOT / "tests/keys"


def openssl(*arguments, data):
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return subprocess.run(["openssl", *arguments, file.name], check=True, capture_output=True).stdout


def signature(text, secret, algorithm):
    """What a private key of tests/keys signs, in the form of RFC 7518 §3 and RFC 8037 §3.1."""
    if algorithm == "HS256":
        return hmac.new(secret.encode(), text, hashlib.sha256).digest()
    key = str(KEYS / f"{algorithm.lower()}.pem")
    if algorithm == "RS256":
        return openssl("dgst", "-sha256", "-sign", key, data=text)
    if algorithm == "EdDSA":
        return openssl("pkeyutl", "-sign", "-rawin", "-inkey", key, "-in", data=text)
    if algorithm == "ES256":
        # DER: a sequence of two integers, each shorter than 128 bytes, with a zero in front if its first bit is set.
        der = openssl("dgst", "-sha256", "-sign", key, data=text)
        r = der[4 : 4 + der[3]]
        s = der[6 + der[3] :]
        return b"".join(int.from_bytes(number).to_bytes(32) for number in (r, s))
    return b""


def token(secret="a secret for tests only, 32 bytes", algorithm="HS256", kid="main", signed_as=None, **claims):
    """A JWT made by hand, so that it can be made wrong."""
    part = lambda value: base64.urlsafe_b64encode(value).rstrip(b"=")
    head = {"typ": "JWT", "alg": algorithm, **({"kid": kid} if kid else {})}
    text = part(json.dumps(head).encode()) + b"." + part(json.dumps({"sub": "alice", "name": "Alice", "exp": int(time.time()) + 600, **claims}).encode())
    return (text + b"." + part(signature(text, secret, signed_as or algorithm))).decode()


class GatewayTest(unittest.TestCase):
    """Tests that share one process with the settings of their class; each test has users of its own."""

    settings: dict = {}
    _count = 0

    @classmethod
    def setUpClass(cls):
        cls.gateway = Gateway(**cls.settings)

    @classmethod
    def tearDownClass(cls):
        left = cls.gateway.process.poll()
        log = cls.gateway.log_text()
        cls.gateway.stop()
        assert left is None, f"the gateway left with {left} during the tests:\n{log}"

    def setUp(self):
        GatewayTest._count += 1
        self.user = f"user-{GatewayTest._count}"

    def tabs(self, count, user=None):
        return [self.tab(user) for _ in range(count)]

    def tab(self, user=None, **options):
        tab = self.gateway.tab(user or self.user, **options)
        self.addCleanup(tab.close)
        return tab

    def raw_tab(self, user=None, **options):
        raw, stream = self.gateway.raw_tab(user or self.user, **options)
        self.addCleanup(raw.close)
        self.addCleanup(stream.close)
        return raw, stream

    def refusals(self, reason, **headers):
        """How often something was refused for that reason."""
        metrics = self.gateway.http("GET", "/metrics", headers=headers).body.decode()
        return int(re.search(rf'^tabcast_refusals_total{{reason="{reason}"}} (\d+)$', metrics, re.MULTILINE)[1])

    def assert_error(self, answer, *statuses):
        """The standard status, and a JSON error that says what."""
        self.assertIn(answer.status, statuses, answer.body[:300])
        self.assertIn("application/json", answer.headers["Content-Type"])
        error = answer.json()["error"]
        self.assertTrue(error["code"] and isinstance(error["code"], str))
        self.assertTrue(error["message"] and isinstance(error["message"], str))
        return error
