"""README's configurations of nginx, HAProxy and Caddy as they stand there, before a gateway: what a user has of it through the real proxies."""

import base64
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import unittest

from gateway import KEYS, PATIENCE, ROOT, Answer, Gateway, masked, read_frame, token, until
from redis_server import free_port
from scripted import Worker

SECRET = "a secret for tests only: 32 bytes"
LIMITS = {"tabs_per_address_max": 3}
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
FILE_BYTES = 5 << 20
PINGS = 4  # two seconds apart, so that they outlast a proxy that waits for five
ESTABLISHED = "01"


def snippet(language):
    """The one block of that language in README's section about proxies."""
    section = (ROOT / "README.md").read_text().split("\n### nginx, Caddy, HAProxy\n")[1].split("\n### ")[0]
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return text


def replaced(text, **places):
    """`text` with all that is named in `places` replaced: what is not there has to be looked for again."""
    for old, new in places.items():
        if old not in text:
            raise AssertionError(f"README has no {old!r} in:\n{text}")
        text = text.replace(old, str(new))
    return text


def established(port):
    """How many connections there are to that port of this machine."""
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == ESTABLISHED for row in rows)


class Proxy:
    """One process in the foreground, with a folder of its own.

    `settings`: what README has the gateway set for it. `waits`: for how long it lets a connection be silent.
    """

    settings: dict = {"trusted_proxies": "127.0.0.1"}
    waits = "2m"

    def __init__(self, port, upstream, waits):
        self.folder = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.folder.name)
        self.port = port
        text = snippet(self.language)
        if waits:
            text = replaced(text, **{self.waits: waits})
        self.write(text, f"127.0.0.1:{upstream}")
        # Debian has servers where the path of a user does not lead.
        program = shutil.which(self.program[0], path=f"{os.environ['PATH']}:/usr/sbin")
        if not program:
            raise AssertionError(f"{self.program[0]} is not installed")
        environment = {"PATH": os.environ["PATH"], "HOME": self.folder.name, "XDG_DATA_HOME": self.folder.name, "XDG_CONFIG_HOME": self.folder.name}
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [program, *self.program[1:]], cwd=self.path, env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            until(f"{self.program[0]} listens", self.is_listening)
        except BaseException:
            self.stop()
            raise

    def is_listening(self):
        if self.process.poll() is not None:
            raise AssertionError(f"{self.program[0]} left with {self.process.returncode}:\n{self.log_text()}")
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def log_text(self):
        return os.pread(self.log.fileno(), 1 << 20, 0).decode(errors="replace")

    def stop(self):
        """With all that it has started, which is of its session."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        self.folder.cleanup()

    def file(self, name, *parts):
        self.path.joinpath(name).write_text("".join(parts))


class Nginx(Proxy):
    language = "nginx"
    program = ("nginx", "-p", ".", "-e", "stderr", "-c", "nginx.conf", "-g", "daemon off;")

    def write(self, text, upstream):
        # The numbers of ports last: they may look like anything.
        text = replaced(text, **{"443": f"127.0.0.1:{self.port}", "chat.example": "localhost", "127.0.0.1:8080": upstream})
        text = replaced(text, **{"/etc/ssl/chat.pem": "chat.pem", "/etc/ssl/chat.key": "chat.key"})
        self.file("chat.pem", (KEYS / "localhost.cert.pem").read_text())
        self.file("chat.key", (KEYS / "localhost.pem").read_text())
        own = [f"{kind}_temp_path {kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
        # Whoever may change its user does so, to one that may not look into this folder.
        user = "user root;\n" if os.geteuid() == 0 else ""
        self.file("nginx.conf", user, "pid nginx.pid;\nevents {}\nhttp {\naccess_log off;\n", *own, text, "}\n")


class Haproxy(Proxy):
    language = "haproxy"
    program = ("haproxy", "-db", "-f", "haproxy.cfg")
    settings = {"trusted_proxies": "127.0.0.1", "proxy_protocol": "v2"}

    def write(self, text, upstream):
        text = replaced(text, **{":443": f"127.0.0.1:{self.port}", "/etc/haproxy/chat.pem": "chat.pem", "127.0.0.1:8080": upstream})
        self.file("chat.pem", (KEYS / "localhost.cert.pem").read_text(), (KEYS / "localhost.pem").read_text())
        self.file("haproxy.cfg", text)


class Caddy(Proxy):
    language = "caddy"
    program = ("caddy", "run", "--config", "Caddyfile", "--adapter", "caddyfile")
    waits = None

    def write(self, text, upstream):
        site = f"localhost:{self.port} {{\n    bind 127.0.0.1\n    tls chat.pem chat.key"
        text = replaced(text, **{"127.0.0.1:8080": upstream, "chat.example {": site})
        self.file("chat.pem", (KEYS / "localhost.cert.pem").read_text())
        self.file("chat.key", (KEYS / "localhost.pem").read_text())
        # Certificates of its own making, and the port 80 that sends browsers to the other, are not for a test.
        self.file("Caddyfile", "{\n    admin off\n    auto_https off\n}\n", text)


class Site:
    """A gateway with keys, a worker of the test's, and a proxy before it. Clients choose the address that they come from."""

    def __init__(self, proxy, waits=None, **settings):
        self.port = free_port()
        self.host = f"localhost:{self.port}"
        self.origin = f"https://{self.host}"
        self.trust = ssl.create_default_context(cafile=str(KEYS / "localhost.cert.pem"))
        self.worker = Worker()
        self.worker.gateway, self.worker.key = self, "worker-key"
        keys = {"token_keys": f"kid=main,alg=HS256,secret={SECRET}", "api_keys": "worker-key", "openai_keys": "olga:openai-key"}
        self.gateway = self.proxy = None
        try:
            self.gateway = Gateway(worker="webhook", webhook_url=self.worker.url, public_url=self.origin, **keys, **proxy.settings, **settings)
            self.proxy = proxy(self.port, self.gateway.port, waits)
        except BaseException:
            self.stop()
            raise

    def stop(self):
        for part in (self.proxy, self.gateway, self.worker):
            if part:
                part.stop()

    def dial(self, address, before=b""):
        """A connection over TLS; `before`: what is sent in front of it."""
        raw = socket.create_connection(("127.0.0.1", self.port), PATIENCE, (address, 0))
        try:
            raw.sendall(before)
            return self.trust.wrap_socket(raw, server_hostname="localhost")
        except OSError:
            raw.close()
            raise

    def request(self, method, path, body=None, headers=None, address="127.0.0.1"):
        """(connection, response whose body is still to be read)."""
        connection = http.client.HTTPConnection("localhost", self.port)
        connection.sock = self.dial(address)
        connection.request(method, path, body, {"Host": self.host, **(headers or {})})
        return connection, connection.getresponse()

    def http(self, *arguments, **options):
        connection, response = self.request(*arguments, **options)
        try:
            return Answer(response)
        finally:
            connection.close()

    def api(self, route, value, **headers):
        answer = self.http("POST", f"/api/{route}", json.dumps(value), {"Content-Type": "application/json", "Authorization": "Bearer worker-key", **headers})
        if answer.status != 200:
            raise AssertionError(f"{route}: {answer.status} {answer.body[:500]!r}")
        return answer.json()

    def send(self, user, text):
        return self.api("send", {"channel_id": user, "text": text})


class Tab:
    """A WebSocket as a browser opens it, read when the test says so. `status` is 101, or says why there is none."""

    def __init__(self, site, user, address, before=b"", inside=b"", **headers):
        self.socket = site.dial(address, before)
        self.stream = self.socket.makefile("rb")
        fields = {"Host": site.host, **UPGRADE, "Origin": site.origin, "Cookie": f"tabcast_token={token(SECRET, sub=user, name=user)}", **headers}
        lines = ["GET /ws?hello=1 HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        self.socket.sendall(inside + "\r\n".join(lines).encode())
        self.status = int((self.stream.readline().split(b" ") + [b"0"] * 2)[1])
        self.headers = http.client.parse_headers(self.stream)
        self.body = b"" if self.status == 101 else self.stream.read(int(self.headers["Content-Length"] or 0))
        if self.status == 101:
            self.find("hello")

    def send(self, **frame):
        self.socket.sendall(masked(1, json.dumps(frame).encode()))

    def next(self):
        """The next frame; its opcode alone, if it is none of text. Pings are answered."""
        opcode, payload = read_frame(self.stream) or (None, b"")
        if opcode == 9:
            self.socket.sendall(masked(10, payload))
        elif opcode == 8:
            return struct.unpack("!H", payload[:2])[0]
        return json.loads(payload) if opcode == 1 else opcode

    def find(self, kind):
        while not isinstance(frame := self.next(), dict) or frame["type"] != kind:
            if frame is None or frame not in (9, 10) and not isinstance(frame, dict):
                raise AssertionError(f"ended with {frame} instead of {kind}")
        return frame

    def close(self):
        self.stream.close()
        self.socket.close()


class Walk:
    """What every proxy has to let through. Each test has a user and addresses of its own."""

    proxy: type[Proxy]
    _count = 0

    @classmethod
    def setUpClass(cls):
        cls.site = Site(cls.proxy, **LIMITS)
        cls.addClassCleanup(cls.site.stop)

    def setUp(self):
        Walk._count += 1
        self.user = f"user-{Walk._count}"
        self.addresses = (f"127.{Walk._count}.0.{number}" for number in range(1, 255))

    def of_its_own(self, waits=None, **settings):
        site = Site(self.proxy, waits, **settings)
        self.addCleanup(site.stop)
        return site

    def tab(self, site=None, user=None, address="127.0.0.1", **options):
        tab = Tab(site or self.site, user or self.user, address, **options)
        self.addCleanup(tab.close)
        return tab

    def events(self, site):
        """Lines of an event stream as they come, one that is not empty after the other."""
        connection, stream = site.request("GET", "/events?hello=1", headers={"Authorization": f"Bearer {token(SECRET, sub=self.user)}"}, address=next(self.addresses))
        self.addCleanup(connection.close)
        self.assertEqual((stream.status, stream.headers.get_content_type()), (200, "text/event-stream"))
        return (line.decode().rstrip("\n") for line in iter(stream.readline, b"") if line != b"\n")

    def heard(self, lines, kind):
        """The next frame of that kind in the data of such lines."""
        for line in lines:
            if line.startswith("data: {") and (frame := json.loads(line[6:]))["type"] == kind:
                return frame
        raise AssertionError(f"the stream ended before {kind}")

    def test_the_page_and_its_script_come_over_tls(self):
        for path, kind in [("/", "text/html"), ("/tabcast.js", "text/javascript"), ("/readyz", "application/json")]:
            answer = self.site.http("GET", path)
            self.assertEqual((answer.status, answer.headers.get_content_type()), (200, kind), path)
        self.assertIn("frame-ancestors 'none'", self.site.http("GET", "/").headers["Content-Security-Policy"])

    def test_a_tab_of_this_page_writes_and_is_written_to_and_one_of_another_is_refused(self):
        tab = self.tab()
        for number in range(20):
            tab.send(type="message", text=f"question {number}", client_id=f"c{number}")
            self.assertEqual(tab.find("ack")["client_id"], f"c{number}")
            self.assertEqual(self.site.worker.question().message["content"], f"question {number}")
            self.assertTrue(self.site.send(self.user, f"answer {number}")["delivered"])
            while (text := tab.find("message")["text"]) != f"answer {number}":
                self.assertEqual(text, f"question {number}")
        self.assertEqual(self.tab(Origin="https://evil.example").status, 403)

    def test_pings_keep_what_is_silent_for_longer_than_the_proxy_waits(self):
        site = self.of_its_own(waits=self.proxy.waits and "5s", heartbeat_interval="2s", heartbeat_timeout="2s")
        tab, lines = self.tab(site), self.events(site)
        self.heard(lines, "hello")
        pings = comments = 0
        while pings < PINGS:
            self.assertEqual(tab.next(), 9)
            pings += 1
        for line in lines:
            self.assertTrue(line.startswith(":"), line)
            if (comments := comments + 1) == PINGS:
                break
        self.assertEqual(site.send(self.user, "still there?")["tabs"], 2)
        self.assertEqual(tab.find("message")["text"], "still there?")
        self.assertEqual(self.heard(lines, "message")["text"], "still there?")
        tab.send(type="message", text="yes", client_id="c")
        self.assertTrue(tab.find("ack")["id"])

    def test_an_event_stream_and_an_answer_come_word_by_word(self):
        lines = self.events(self.site)
        self.heard(lines, "hello")
        for text in ("one", "two", "three"):
            self.site.send(self.user, text)
            self.assertEqual(self.heard(lines, "message")["text"], text, "it comes before the next one is sent")
        body = json.dumps({"model": "tabcast", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
        headers = {"Content-Type": "application/json", "Authorization": "Bearer openai-key"}
        connection, stream = self.site.request("POST", "/v1/chat/completions", body, headers, next(self.addresses))
        self.addCleanup(connection.close)
        self.assertEqual(stream.status, 200)
        turn = self.site.worker.question()
        deltas = (json.loads(line[6:])["choices"][0]["delta"].get("content") for line in iter(stream.readline, b"") if line.startswith(b"data: {"))
        message, text = turn.send("a"), "a"
        for word in (" b", " c"):
            self.assertEqual(next(delta for delta in deltas if delta), text[-2:], "it comes before the next one is sent")
            text += word
            turn.edit(message, text)
        self.assertEqual(next(deltas), " c")
        turn.file("a.txt", "text/plain", b"x")
        self.assertIn(f"{self.site.origin}/files/", next(delta for delta in deltas if delta))
        turn.end()
        self.assertEqual([delta for delta in deltas if delta], [])

    def test_a_file_goes_up_and_down(self):
        tab, data = self.tab(), os.urandom(FILE_BYTES)
        path = f"/api/file?channel_id={self.user}&filename=a.bin"
        headers = {"X-Tabcast-Raw": "1", "Content-Type": "application/octet-stream", "Authorization": "Bearer worker-key"}
        answer = self.site.http("POST", path, data, headers)
        self.assertEqual(answer.status, 200, answer.body[:300])
        self.assertTrue(base64.b64decode(tab.find("file")["data"]) == data, "the tab has got other bytes")
        link = answer.json()["url"].replace("webchat://file/", "/files/")
        self.assertTrue(self.site.http("GET", link).body == data, "the link leads to other bytes")
        part = self.site.http("GET", link, headers={"Range": "bytes=1000000-1999999"})
        self.assertEqual((part.status, part.body == data[1_000_000:2_000_000]), (206, True))
        # In base64 it is a third more: still within what the gateway takes, and the proxy has to take.
        value = {"channel_id": self.user, "filename": "b.bin", "data": base64.b64encode(data * 3).decode()}
        self.assertTrue(self.site.api("file", value)["delivered"])
        self.assertTrue(base64.b64decode(tab.find("file")["data"]) == data * 3, "the tab has got other bytes")

    def test_a_body_that_is_announced_as_too_long_is_refused_before_it_has_come(self):
        client = self.site.dial(next(self.addresses))
        self.addCleanup(client.close)
        head = f"POST /api/file?channel_id=a&filename=b HTTP/1.1\r\nHost: {self.site.host}\r\nAuthorization: Bearer worker-key\r\nX-Tabcast-Raw: 1\r\nContent-Length: {(24 << 20) + 1}\r\n\r\n"
        client.sendall(head.encode())
        answer = b""
        for _ in range(100):
            # Caddy passes the answer on as something of the body comes.
            client.settimeout(PATIENCE)
            client.sendall(bytes(64 << 10))
            client.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                answer = client.recv(4096)
                break
        self.assertEqual(answer.split(b" ")[:2], [b"HTTP/1.1", b"413"])

    def test_limits_count_the_address_of_the_client_whatever_it_says_of_itself(self):
        mine, other, third = (next(self.addresses) for _ in range(3))
        # A connection to the gateway that the proxy keeps, and that was made for somebody else.
        self.assertEqual(self.site.http("GET", "/healthz", address=other).status, 200)
        for _ in range(LIMITS["tabs_per_address_max"]):
            self.assertEqual(self.tab(address=mine).status, 101)
        refused = self.tab(address=mine)
        self.assertEqual((refused.status, json.loads(refused.body)["error"]["code"]), (429, "limit_reached"))
        self.assertGreater(int(refused.headers["Retry-After"]), 0)
        self.assertEqual(self.tab(address=other).status, 101)
        forged = [("X-Forwarded-For", third), ("X-Forwarded-For", f"{third}, 127.0.0.1"), ("Forwarded", f"for={third}"), ("X-Real-IP", third), ("Client-IP", third)]
        for name, value in forged:
            with self.subTest(name, value=value):
                self.assertEqual(self.tab(address=mine, **{name: value}).status, 429)
        # Nor is it counted for whoever it names.
        self.assertEqual(self.tab(address=third, **{"X-Forwarded-For": mine, "Forwarded": f"for={mine}"}).status, 101)

    def test_an_introduction_of_the_clients_own_opens_nothing(self):
        mine, other = next(self.addresses), next(self.addresses)
        first = f"PROXY TCP4 {other} 127.0.0.1 4321 443\r\n".encode()
        second = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack("!H", 12) + socket.inet_aton(other) + socket.inet_aton("127.0.0.1") + struct.pack("!HH", 4321, 443)
        for version, introduction in (("v1", first), ("v2", second)):
            for place in ("before", "inside"):
                with self.subTest(version, place=place):
                    try:
                        status = self.tab(address=mine, **{place: introduction}).status
                    except OSError:  # it is no TLS
                        status = None
                    self.assertIn(status, (None, 0, 400))
        self.assertEqual(self.tab(address=mine).status, 101)

    def test_a_drain_is_told_to_who_is_there_and_to_who_comes(self):
        site = self.of_its_own(drain_spread="4s")
        tabs = [self.tab(site, f"{self.user}-{number}") for number in range(4)]
        lines = self.events(site)
        self.heard(lines, "hello")
        site.gateway.terminate()
        until("readiness flips", lambda: site.http("GET", "/readyz").status == 503)
        late = self.tab(site, "late")
        self.assertEqual((late.status, json.loads(late.body)["error"]["code"]), (503, "draining"))
        self.assertGreater(int(late.headers["Retry-After"]), 0)
        for tab in tabs:
            self.assertGreater(tab.find("draining")["retry_after_ms"], 0)
            self.assertEqual(tab.next(), 1012)
        self.assertGreater(self.heard(lines, "draining")["retry_after_ms"], 0)
        self.assertGreater(int(next(lines).removeprefix("retry: ")), 0)
        self.assertEqual(list(lines), [])
        self.assertEqual(site.gateway.process.wait(PATIENCE), 0)

    def test_connections_that_wait_are_let_go_before_the_gateway_does(self):
        """Whoever sends on one that is just being closed is told 502: a POST is not repeated."""
        site = self.of_its_own(header_timeout="30s")
        self.assertEqual(site.http("GET", "/healthz").status, 200)
        until("none is kept for ten seconds, after which the gateway ends it by default", lambda: established(site.gateway.port) == 0, 9)


class Cut:
    def test_a_tab_is_cut_by_a_proxy_that_waits_for_less_than_a_heartbeat(self):
        site = self.of_its_own(waits="1s")
        self.assertIsNone(self.tab(site).next(), "README: it must leave connections open for longer than heartbeat_interval")


class BehindNginx(Walk, Cut, unittest.TestCase):
    proxy = Nginx


class BehindHaproxy(Walk, Cut, unittest.TestCase):
    proxy = Haproxy


class BehindCaddy(Walk, unittest.TestCase):
    proxy = Caddy

    def test_an_event_stream_over_http_2_comes_word_by_word(self):
        """README has a browser's HTTP/2 end at a proxy; this one speaks it without being told to."""
        bearer = f"Authorization: Bearer {token(SECRET, sub=self.user)}"
        command = ["curl", "-sSNi", "--http2", "--cacert", KEYS / "localhost.cert.pem", "-H", bearer, f"{self.site.origin}/events?hello=1"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as curl:
            self.addCleanup(curl.stdout.close)
            self.addCleanup(curl.kill)
            lines = (line.decode().rstrip("\r\n") for line in curl.stdout)
            self.assertEqual(next(lines), "HTTP/2 200 ")
            self.heard(lines, "hello")
            for text in ("one", "two"):
                self.site.send(self.user, text)
                self.assertEqual(self.heard(lines, "message")["text"], text, "it comes before the next one is sent")
            curl.kill()


if __name__ == "__main__":
    unittest.main()
