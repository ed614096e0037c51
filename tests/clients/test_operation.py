"""What whoever runs a gateway relies on: what it says at its start, its limits over HTTP, other origins, settings, its end."""

import http.server
import json
import pathlib
import signal
import socket
import subprocess
import threading
import unittest

from websockets.exceptions import InvalidStatus

from gateway import BINARY, PATIENCE, Gateway, GatewayTest, token, until
from test_endings import EventStream


class TheStart(unittest.TestCase):
    def started(self, **settings):
        gateway = Gateway(**settings)
        self.addCleanup(gateway.stop)
        return gateway, gateway.log_text()

    def test_says_where_it_listens_in_which_mode_and_what_it_may_cost(self):
        gateway, log = self.started(tabs_max=1000)
        self.assertIn(f"ready: {gateway.origin}/", log)
        self.assertNotIn(":0/", log, "port 0 is no address")
        self.assertIn('mode="development"', log)
        self.assertIn("tabs_max=1000", log)
        self.assertRegex(log, "WARN.*development mode: no key is set")
        self.assertRegex(log, r"memory at the worst: [0-9.]+ [MG]iB is the sum of")
        for term in ("bytes_budget", "worker_queue_bytes_max", "bodies_bytes_max", "tabs_max"):
            self.assertRegex(log, rf"[0-9.]+ [KMG]iB .*{term}")

    def test_with_keys_it_is_no_development_mode(self):
        _, log = self.started(api_keys="a-worker-s-key")
        self.assertIn('mode="keys"', log)
        self.assertNotIn("development", log)
        self.assertNotIn("a-worker-s-key", log)

    def test_is_over_within_a_tenth_of_a_second(self):
        # CPU time of all threads, as wall time is also that of whoever else runs here; the best of some, as the first
        # reads the binary from the disk.
        def spent():
            gateway, _ = self.started()
            tasks = pathlib.Path(f"/proc/{gateway.process.pid}/task").glob("*/schedstat")
            nanoseconds = sum(int(task.read_text().split()[0]) for task in tasks)
            gateway.stop()
            return nanoseconds / 1e9

        self.assertLess(min(spent() for _ in range(5)), 0.1)

    def run_quietly(self, **settings):
        own = {f"TABCAST_{name.upper()}": value for name, value in settings.items()}
        process = subprocess.Popen([BINARY], env={"TABCAST_LISTEN": "127.0.0.1:0", **own}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_a_silent_log_does_not_hide_that_every_route_is_open(self):
        for level in ("off", "error"):
            with self.subTest(level):
                process = self.run_quietly(log=level)
                self.assertIn("development mode: no key is set", process.stderr.readline())
        process = self.run_quietly(log="off", api_keys="a-worker-s-key")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.communicate(timeout=PATIENCE)[1], "")

    def test_check_config_shows_no_secret(self):
        settings = {"webhook_url": "https://example.org/hook?key=hush", "webhook_secret": "hush", "api_keys": "hush", "token_keys": "kid=a,alg=HS256,secret=hush"}
        env = {f"TABCAST_{name.upper()}": value for name, value in settings.items()}
        done = subprocess.run([BINARY, "check-config"], env=env, capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("https://example.org/hook?***", done.stdout)
        self.assertNotIn("hush", done.stdout + done.stderr)


class OtherOrigins(GatewayTest):
    settings = {"token_keys": "kid=main,alg=HS256,secret=a secret for tests only 32 bytes", "allowed_origins": "https://friend.example:443"}

    def ask(self, method, origin, **headers):
        return self.gateway.http(method, "/events", headers={**({"Origin": origin} if origin else {}), **headers})

    def test_a_listed_page_may_ask_for_events(self):
        wanted = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
        answer = self.ask("OPTIONS", "https://friend.example", **wanted)
        self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertEqual(answer.headers["Access-Control-Allow-Origin"], "https://friend.example")
        self.assertEqual(answer.headers["Access-Control-Allow-Methods"], "GET, POST")
        self.assertIn("authorization", answer.headers["Access-Control-Allow-Headers"])
        self.assertEqual(answer.headers["Vary"], "origin")
        self.assertIsNone(answer.headers["Access-Control-Allow-Credentials"])

    def test_no_other_page_may(self):
        for origin in ("https://evil.example", "http://friend.example", "https://friend.example.evil", "null", None):
            with self.subTest(origin):
                answer = self.ask("OPTIONS", origin)
                self.assert_error(answer, 403)
                self.assertIsNone(answer.headers["Access-Control-Allow-Origin"])

    def test_the_stream_itself_says_who_may_read_it(self):
        jwt = token(secret="a secret for tests only 32 bytes", sub=self.user)
        with socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE) as raw:
            raw.sendall(f"GET /events HTTP/1.1\r\nHost: {self.gateway.host}\r\nOrigin: https://friend.example\r\nAuthorization: Bearer {jwt}\r\n\r\n".encode())
            stream = raw.makefile("rb")
            self.addCleanup(stream.close)
            self.assertEqual(stream.readline(), b"HTTP/1.1 200 OK\r\n")
            head = b"".join(iter(stream.readline, b"\r\n")).lower()
            self.assertIn(b"access-control-allow-origin: https://friend.example\r\n", head)
            self.assertIn(b"vary: origin\r\n", head)
        self.assert_error(self.ask("GET", "https://evil.example", Authorization=f"Bearer {jwt}"), 403)


class Limits(GatewayTest):
    settings = {"tabs_per_user_max": 2, "tabs_max": 4}

    def full(self, user, status):
        with self.assertRaises(InvalidStatus) as caught:
            self.tab(user)
        response = caught.exception.response
        self.assertEqual((response.status_code, json.loads(response.body)["error"]["code"]), (status, "limit_reached"))
        self.assertEqual(response.headers["Retry-After"], "5")
        answer = self.gateway.http("GET", f"/events?user={user}&name=x")
        self.assertEqual(self.assert_error(answer, status)["code"], "limit_reached")
        self.assertEqual(answer.headers["Retry-After"], "5")

    def test_tabs_of_one_user_and_of_the_node(self):
        tabs = [self.tab("ann"), self.tab("ann")]
        self.full("ann", 429)
        tabs += [self.tab("bob"), self.tab("cid")]
        self.full("dan", 503)
        tabs.pop().close()
        until("there is room again", lambda: self.gateway.http("GET", "/api/users").json()["tab_count"] == 3)
        self.tab("dan")


class AListing(GatewayTest):
    settings = {"users_listed_max": 2}

    def test_names_so_many_and_counts_all(self):
        tabs = [self.tab(user) for user in ("ann", "bob", "cid")]
        listing = self.gateway.http("GET", "/api/users").json()
        self.assertEqual((len(listing["users"]), listing["user_count"], listing["tab_count"]), (2, len(tabs), len(tabs)))


class WithoutEcho(GatewayTest):
    settings = {"echo_to_tabs": "false", "worker": "none"}

    def test_what_a_user_writes_is_acked_and_shown_in_no_tab(self):
        tabs = self.tabs(2)
        self.assertEqual(tabs[0].ask(type="message", text="to myself")["type"], "ack")
        self.gateway.api("send", {"channel_id": self.user, "text": "after"})
        for tab in tabs:
            self.assertEqual(tab.frame()["text"], "after")

    def test_a_room_shows_it_all_the_same(self):
        tabs = [self.tab("eva"), self.tab("fay")]
        for tab in tabs:
            self.assertEqual(tab.ask(type="join", room="r")["type"], "ack")
        tabs[0].send({"type": "message", "text": "to all", "room": "r"})
        for tab in tabs:
            self.assertEqual(tab.find("message")["text"], "to all")


class ClientIds(GatewayTest):
    settings = {"worker": "none"}

    def test_one_stands_for_one_thing_only(self):
        tab = self.tab()
        button = {"type": "button", "message_id": "6c84fb90-12c4-41e1-840d-7b25c5ee7750", "custom_id": "x"}
        first = tab.ask(type="message", text="one", client_id="same")
        for other in ({"type": "message", "text": "two"}, {"type": "message", "text": "one", "room": "r"}, button):
            with self.subTest(other):
                answer = tab.ask(client_id="same", **other)
                self.assertEqual((answer["type"], answer["code"]), ("error", "bad_field"))
        self.assertEqual(tab.ask(type="message", text="one", client_id="same"), first)


class Hanging(http.server.ThreadingHTTPServer):
    """A worker that takes a message and does not answer until it may."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HangingHandler)
        self.has_one, self.may_answer = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class HangingHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.has_one.set()
        self.server.may_answer.wait(PATIENCE)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


class AWorkerThatHangs(unittest.TestCase):
    def setUp(self):
        self.worker = Hanging()
        self.addCleanup(self.worker.server_close)
        self.addCleanup(self.worker.shutdown)
        self.addCleanup(self.worker.may_answer.set)
        url = f"http://127.0.0.1:{self.worker.server_address[1]}/"
        self.gateway = Gateway(worker="webhook", webhook_url=url, worker_queue_max=1, drain_deadline="60s", webhook_timeout="60s")
        self.addCleanup(self.gateway.stop)
        self.tab = self.gateway.tab("wim")
        self.addCleanup(self.tab.close)

    def test_fills_its_queue_and_people_are_told(self):
        self.assertEqual(self.tab.ask(type="message", text="1")["type"], "ack")
        self.assertTrue(self.worker.has_one.wait(PATIENCE))
        refused = self.tab.ask(type="message", text="2", client_id="again")
        self.assertEqual((refused["type"], refused["code"]), ("error", "overloaded"))
        self.worker.may_answer.set()
        until("there is a place", lambda: self.tab.ask(type="message", text="2", client_id="again")["type"] == "ack")

    def test_holds_up_a_drain_until_a_second_signal(self):
        self.assertEqual(self.tab.ask(type="message", text="1")["type"], "ack")
        self.assertTrue(self.worker.has_one.wait(PATIENCE))
        self.gateway.terminate()
        until("it drains", lambda: "draining" in self.gateway.log_text())
        self.gateway.terminate()
        self.assertEqual(self.gateway.process.wait(PATIENCE), 0, self.gateway.log_text())
        self.assertIn("a second signal", self.gateway.log_text())


class ASecondSignal(unittest.TestCase):
    def test_ends_streams_that_nobody_reads_at_once(self):
        gateway = Gateway(drain_spread="50s", drain_deadline="60s")
        self.addCleanup(gateway.stop)
        streams = [EventStream(gateway, f"u{number}") for number in range(3)]
        for stream in streams:
            self.addCleanup(stream.close)
        gateway.terminate()
        until("it drains", lambda: "draining" in gateway.log_text())
        self.assertIsNone(gateway.process.poll())
        gateway.terminate()
        self.assertEqual(gateway.process.wait(PATIENCE), 0, gateway.log_text())


if __name__ == "__main__":
    unittest.main()
