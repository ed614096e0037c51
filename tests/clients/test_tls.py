"""The gateway over TLS: OpenSSL's clients, every route, and what a user sees of it."""

import base64
import json
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import unittest

import websockets.exceptions

from gateway import PATIENCE, Gateway, GatewayTest, until

KEY_KINDS = {"ec": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"), "rsa": ("-newkey", "rsa:2048"), "ed25519": ("-newkey", "ed25519")}


class Authority:
    """An authority of its own, an intermediate one, and the chain of `localhost`."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path("names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self.path("signs").write_text("basicConstraints=critical,CA:true\n")
        self.openssl("req", "-x509", *KEY_KINDS["ec"], "-nodes", "-keyout", "root.key", "-out", "root.pem", "-subj", "/CN=root", "-days", "2")
        self.sign("between", KEY_KINDS["ec"], "root", "signs")

    def path(self, name):
        return pathlib.Path(self.folder.name, name)

    def openssl(self, *arguments):
        subprocess.run(["openssl", *arguments], cwd=self.folder.name, check=True, capture_output=True)

    def sign(self, name, kind, by, extensions):
        self.openssl("req", *kind, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        self.openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", extensions
        )

    def issue(self, kind="ec"):
        """A new chain where the settings say it is; both files change at once, or almost."""
        self.sign("server", KEY_KINDS[kind], "between", "names")
        self.path("chain.new").write_text(self.path("server.pem").read_text() + self.path("between.pem").read_text())
        os.replace(self.path("chain.new"), self.path("chain.pem"))
        os.replace(self.path("server.key"), self.path("chain.key"))
        return {"tls_cert": str(self.path("chain.pem")), "tls_key": str(self.path("chain.key"))}

    def trust(self, **options):
        context = ssl.create_default_context(cafile=str(self.path("root.pem")))
        for name, value in options.items():
            setattr(context, name, value)
        return context


class OverTls(GatewayTest):
    @classmethod
    def setUpClass(cls):
        cls.authority = Authority()
        cls.gateway = Gateway(trust=cls.authority.trust(), shards=2, **cls.authority.issue())

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        cls.authority.folder.cleanup()

    def test_one_message_in_two_tabs_and_an_event_stream(self):
        tabs = self.tabs(2)
        connection = self.gateway.connection()
        self.addCleanup(connection.close)
        connection.request("GET", f"/events?user={self.user}")
        events = connection.getresponse()
        self.assertEqual((events.status, events.headers.get_content_type()), (200, "text/event-stream"))
        answer = self.gateway.api("send", {"channel_id": self.user, "text": "for all of them"})
        self.assertEqual((answer["delivered"], answer["tabs"]), (True, 3))
        for tab in tabs:
            self.assertEqual(tab.find("message")["text"], "for all of them")
        while not (line := events.readline()).startswith(b"data: "):
            self.assertTrue(line, "the stream ended")
        self.assertEqual(json.loads(line[6:])["text"], "for all of them")
        self.assertTrue(tabs[0].ask(type="message", text="hello")["id"])

    def test_a_file_comes_as_it_was_sent(self):
        tab = self.tab()
        data = os.urandom(3 << 20)
        answer = self.gateway.http("POST", f"/api/file?channel_id={self.user}&filename=a.bin", data, {"X-Tabcast-Raw": "1"}).json()
        self.assertEqual(base64.b64decode(tab.find("file")["data"]), data)
        part = self.gateway.http("GET", answer["url"].replace("webchat://file/", "/files/"), headers={"Range": "bytes=1000000-1999999"})
        self.assertEqual((part.status, part.body), (206, data[1_000_000:2_000_000]))

    def test_an_answer_of_openai_is_whole_and_its_end_is_one(self):
        body = json.dumps({"messages": [{"role": "user", "content": "/file"}], "stream": True}).encode()
        # Python's ssl tells an end without a goodbye from one with it.
        answer = self.gateway.http("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        self.assertEqual(answer.status, 200)
        self.assertTrue(answer.body.endswith(b"data: [DONE]\n\n"), answer.body[-200:])
        self.assertIn(self.gateway.origin.encode() + b"/files/", answer.body)

    def test_versions_keys_and_clients_that_come_back(self):
        for kind, versions in [("rsa", (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)), ("ed25519", (ssl.TLSVersion.TLSv1_3,)), ("ec", (ssl.TLSVersion.TLSv1_2,))]:
            before = self.gateway.log_text().count("the certificate that is in the files now")
            self.authority.issue(kind)
            self.gateway.process.send_signal(signal.SIGHUP)
            until("the certificate is read again", lambda: self.gateway.log_text().count("the certificate that is in the files now") > before)
            for version in versions:
                trust = self.authority.trust(minimum_version=version, maximum_version=version)
                session = None
                for is_back in (False, True):
                    raw = socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE)
                    with trust.wrap_socket(raw, server_hostname="localhost", session=session) as client:
                        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                        self.assertIn(b"200 OK", client.recv(4096))
                        self.assertEqual((client.session_reused, client.version()), (is_back, version.name.replace("_", ".")))
                        session = client.session

    def test_a_page_that_came_without_tls_is_a_foreign_one(self):
        for origin, status in [(self.gateway.origin, 200), (f"http://{self.gateway.host}", 403)]:
            self.assertEqual(self.gateway.http("GET", "/api/users", headers={"Origin": origin}).status, status, origin)

    def test_old_versions_are_refused(self):
        trust = self.authority.trust(minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
        trust.set_ciphers("ALL:@SECLEVEL=0")
        with self.assertRaises(ssl.SSLError), socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE) as raw:
            trust.wrap_socket(raw, server_hostname="localhost")


def tab_of(gateway, user):
    """A tab. The library reads and writes one connection from two threads, which Python's `ssl` is probably not made for: about
    one opening in 150 hangs until the server gives up, and is tried again. Of 2,000 by raw sockets none did."""
    for _ in range(2):
        try:
            return gateway.tab(user)
        except websockets.exceptions.InvalidMessage:
            pass
    return gateway.tab(user)


class Leaving(unittest.TestCase):
    def test_a_drain_tells_tabs_and_streams_at_its_pace(self):
        authority = Authority()
        self.addCleanup(authority.folder.cleanup)
        gateway = Gateway(trust=authority.trust(), drain_spread="1s", worker="none", **authority.issue())
        self.addCleanup(gateway.stop)
        tabs = [tab_of(gateway, f"user-{number}") for number in range(20)]
        connection = gateway.connection()
        self.addCleanup(connection.close)
        connection.request("GET", "/events?user=reader")
        events = connection.getresponse()
        rest = []
        reader = threading.Thread(target=lambda: rest.append(events.read()))
        reader.start()
        gateway.terminate()
        for tab in tabs:
            ending, frames = tab.closed()
            self.assertEqual((ending[0], frames[-1]["type"]), (1012, "draining"))
        reader.join(PATIENCE)
        # Chunked to the last chunk, or `read` would have raised.
        self.assertIn(b"draining", rest[0])
        self.assertEqual(gateway.process.wait(PATIENCE), 0)

    def test_many_tabs_come_and_go_without_a_goodbye(self):
        authority = Authority()
        self.addCleanup(authority.folder.cleanup)
        gateway = Gateway(trust=authority.trust(), worker="none", shards=1, **authority.issue())
        self.addCleanup(gateway.stop)
        for _ in range(100):
            raw = socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE)
            tls = authority.trust().wrap_socket(raw, server_hostname="localhost")
            tls.sendall(b"GET /ws?user=u HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
            self.assertIn(b" 101 ", tls.recv(4096))
            socket.socket.close(tls)
        until("nobody is there any more", lambda: gateway.http("GET", "/api/users").json()["tab_count"] == 0)


if __name__ == "__main__":
    unittest.main()
