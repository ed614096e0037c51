"""The worker's client that the gateway serves: a bot written for the old adapter, over the webhook and /api, and over Redis."""

import ast
import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
import uuid

import msgpack

from gateway import PATIENCE, ROOT, Gateway, GatewayTest, until
from redis_server import RedisServer, free_port

SOURCE = ROOT / "src/gateway/pages/tabcast.py"
spec = importlib.util.spec_from_file_location("tabcast", SOURCE)
tabcast = importlib.util.module_from_spec(spec)
sys.modules["tabcast"] = tabcast
spec.loader.exec_module(tabcast)

SECRET = "a webhook's secret"
BUTTONS = [{"label": "Yes", "custom_id": "yes", "style": "success"}]


def envelope(text, channel_id="webchat:u", message_id=None, **extra):
    """A message as a gateway's webhook says it."""
    return json.dumps({
        "platform": "webchat", "channel_id": channel_id, "user_id": "u", "display_name": "U", "content": text, "is_addressed": True,
        "attachments": [], "room_name": None, "timestamp": 1.0, "message_id": message_id or str(uuid.uuid4()), "reply_to": None, "extra": extra,
        "reactions": [], "unified_user_id": None, "user_aliases": [],
    }).encode()


class Loop:
    """A loop on a thread of its own, as a bot would have."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work, timeout=PATIENCE):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)


class TheFile(unittest.TestCase):
    def test_it_is_one_file_of_fewer_than_300_lines_that_needs_the_standard_library_only(self):
        text = SOURCE.read_text()
        self.assertLess(len(text.splitlines()), 300)
        tree = ast.parse(text, feature_version=(3, 9))
        imported = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        self.assertLessEqual({name.split(".")[0] for name in imported}, sys.stdlib_module_names)
        # Nothing that is installed can be seen.
        code = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import tabcast; print(tabcast.WebChatAdapter().name)"
        run = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", code], capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual((run.returncode, run.stdout.strip()), (0, "webchat"), run.stderr)

    def test_its_types_hold(self):
        with tempfile.TemporaryDirectory() as folder:
            user = pathlib.Path(folder, "bot.py")
            user.write_text(
                "from tabcast import IncomingMessage, WebChatAdapter\n"
                "async def handle(message: IncomingMessage, adapter: WebChatAdapter) -> None:\n"
                "    id: str = await adapter.send(message.channel_id, message.text)\n"
                "    shown: bool = await adapter.edit_message(message.channel_id, id, 'x')\n"
                "    wrong: int = await adapter.send(message.channel_id, 1)\n"
                "WebChatAdapter(handle)\n"
            )
            command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder, str(user), str(SOURCE)]
            run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(SOURCE.parent)}, timeout=120)
        wrong = [line for line in run.stdout.splitlines() if ": error:" in line]
        self.assertEqual(len(wrong), 2, run.stdout + run.stderr)  # and both in the line that is wrong
        self.assertTrue(all("bot.py:5:" in line for line in wrong), run.stdout)


class TheTurns(unittest.TestCase):
    def test_who_is_cancelled_while_it_waits_lets_nobody_overtake(self):
        async def turns():
            lanes, order, release = {}, [], asyncio.Event()

            async def work(name, waits):
                order.append(f"{name} begins")
                if waits:
                    await release.wait()
                order.append(f"{name} ends")

            first = tabcast.in_turn(lanes, "c", lambda: work("first", True))
            second, third = (tabcast.in_turn(lanes, "c", lambda name=name: work(name, False)) for name in ("second", "third"))
            other = tabcast.in_turn(lanes, "d", lambda: work("other", False))
            await other
            second.cancel()
            await asyncio.wait([second])
            for _ in range(10):
                await asyncio.sleep(0)
            fourth = tabcast.in_turn(lanes, "c", lambda: work("fourth", False))
            release.set()
            await asyncio.gather(first, third, fourth)
            await asyncio.sleep(0)
            return order, lanes, second.cancelled()

        order, lanes, is_cancelled = asyncio.run(turns())
        expected = "first begins, other begins, other ends, first ends, third begins, third ends, fourth begins, fourth ends"
        self.assertEqual(", ".join(order), expected)
        self.assertEqual((lanes, is_cancelled), ({}, True))


class BotTest(GatewayTest):
    """A gateway whose worker is a bot on a webhook."""

    @classmethod
    def setUpClass(cls):
        cls.port = free_port()
        url = f"http://127.0.0.1:{cls.port}/"
        cls.settings = {"worker": "webhook", "webhook_url": url, "webhook_secret": SECRET, "webhook_backoff_min": "50ms", "webhook_backoff_max": "200ms"}
        super().setUpClass()
        cls.loop = Loop()

    def bot(self, handler, **options):
        bot = tabcast.WebChatAdapter(handler, url=self.gateway.origin, secret=SECRET, webhook=("127.0.0.1", self.port), **options)
        self.run_(bot.start())
        self.addCleanup(lambda: self.run_(bot.stop()))
        return bot

    def run_(self, work, timeout=PATIENCE):
        return self.loop.run(work, timeout)


class ABotOnAWebhook(BotTest):
    def test_it_is_served_as_it_is_here(self):
        answer = self.gateway.http("GET", "/tabcast.py")
        self.assertEqual((answer.status, answer.body), (200, SOURCE.read_bytes()))
        self.assertEqual(answer.headers["Content-Type"], "text/x-python; charset=utf-8")
        again = self.gateway.http("GET", "/tabcast.py", headers={"If-None-Match": answer.headers["ETag"]})
        self.assertEqual((again.status, again.body), (304, b""))
        self.assertEqual(self.gateway.http("GET", "/tabcast.d.ts").headers["Content-Type"], "application/typescript; charset=utf-8")

    def test_every_method_of_the_old_adapter(self):
        seen = []

        async def handle(message, adapter):
            seen.append(message)
            channel = message.channel_id
            await adapter.start_typing(channel)
            first = await adapter.send(channel, "…")
            assert await adapter.edit_message(channel, first, f"You said: {message.text}")
            await adapter.send_with_buttons(channel, "Well?", BUTTONS)
            row = types.SimpleNamespace(children=[types.SimpleNamespace(label="No", custom_id="no", style=types.SimpleNamespace(name="danger"), disabled=True)])
            await adapter.send_with_buttons(channel, "Or?", types.SimpleNamespace(children=[row]))
            seen.append(await adapter.send_file(channel, b"\0\xff", "a b.bin"))
            await adapter.stop_typing(channel)

        self.bot(handle)
        tab = self.tab(name="Ann")
        data = base64.b64encode(b"attached").decode()
        ack = tab.ask(type="message", text="hi 🌟", attachments=[{"filename": "n.txt", "mimetype": "text/plain", "data": data}])
        frames = tab.until(lambda frame: frame == {"type": "typing", "active": False})
        by_star = [frame for frame in frames if frame["type"] == "edit" or frame.get("sender") == "star"]
        self.assertEqual([frame["text"] for frame in by_star if frame["type"] == "message"], ["…", "Well?", "Or?"])
        self.assertIn("You said: hi 🌟", [frame["text"] for frame in by_star if frame["type"] == "edit"])
        self.assertEqual([frame["buttons"] for frame in by_star if "buttons" in frame], [BUTTONS, [{"label": "No", "custom_id": "no", "style": "danger", "disabled": True}]])
        [file] = [frame for frame in frames if frame["type"] == "file"]
        self.assertEqual((file["data"], file["mimetype"]), ("AP8=", "application/octet-stream"))
        message, url = seen
        self.assertEqual(url, f"webchat://file/{file['id']}/a%20b.bin")
        self.assertEqual((message.user_id, message.user_name, message.text, message.message_id), (self.user, "Ann", "hi 🌟", ack["id"]))
        self.assertEqual((message.platform, message.channel_id, message.is_addressed, message.channel_name), ("webchat", f"webchat:{self.user}", True, ""))
        self.assertEqual(message.attachments, [{"filename": "n.txt", "mimetype": "text/plain", "data": b"attached"}])
        self.assertAlmostEqual(message.timestamp.timestamp(), time.time(), delta=60)
        self.assertEqual((message.reply_to_id, message.extra, message.reactions, message.user_aliases, message.unified_user_id), (None, {}, [], [], None))

    def test_a_button_is_pressed(self):
        pressed = []

        async def handle(message, adapter):
            pressed.append((message.text, message.extra))

        self.bot(handle)
        tab = self.tab()
        shown = self.gateway.api("buttons", {"channel_id": self.user, "text": "Tea?", "buttons": BUTTONS})["id"]
        tab.ask(type="button", message_id=shown, custom_id="yes")
        until("the press", lambda: pressed)
        self.assertEqual(pressed, [("yes", {"button": {"message_id": shown, "custom_id": "yes"}})])

    def test_who_is_there(self):
        bot = self.bot(None, operator_token="")
        self.assertFalse(self.run_(bot.is_online(self.user)))
        tabs = self.tabs(2)
        self.assertTrue(self.run_(bot.is_online(self.user)))
        self.assertEqual([session["user_name"] for session in self.run_(bot.get_sessions(self.user))], [self.user] * 2)
        self.assertIn(self.user, self.run_(bot.active_users()))
        self.assertGreaterEqual(self.run_(bot.total_connections()), 2)
        self.assertEqual(self.run_(bot.disconnect(self.user)), 2)
        self.assertEqual([tab.closed()[0] for tab in tabs], [(4010, "kicked")] * 2)

    def test_one_channel_in_order_and_several_at_once(self):
        order, together, most = [], [], []

        async def handle(message, adapter):
            order.append((message.user_id, message.text))
            together.append(None)
            most.append(len(together))
            await asyncio.sleep(0.05)
            together.pop()
            await adapter.send(message.channel_id, f"after {message.text}")

        self.bot(handle)
        tabs = {user: self.tab(user) for user in (self.user, f"{self.user}-other")}
        for number in range(5):
            for tab in tabs.values():
                tab.send({"type": "message", "text": str(number)})
        for tab in tabs.values():
            tab.find("message", text="after 4")
        for user in tabs:
            self.assertEqual([text for asker, text in order if asker == user], list("01234"))
        self.assertEqual(max(most), 2)

    def test_a_handler_that_fails_gets_its_message_again_and_one_that_worked_does_not(self):
        tries = []

        async def handle(message, adapter):
            tries.append(message.message_id)
            if len(tries) < 3:
                raise RuntimeError("not yet")

        bot = self.bot(handle)
        with self.assertLogs("tabcast", "ERROR"):
            self.tab().ask(type="message", text="x")
            until("the third try", lambda: len(tries) == 3)
        self.assertEqual(len(set(tries)), 1)
        # The gateway was not told, and asks once more: the same message is not handled again.
        self.assertEqual(self.webhooked(envelope("x", message_id=tries[0])), 200)
        self.assertEqual(len(tries), 3)
        self.assertFalse(bot._under_way)

    def test_a_cancel_is_heard_when_the_bot_is_full(self):
        begun, ended = [], []

        async def handle(message, adapter):
            begun.append(message.text)
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(message.text)

        bot = self.bot(handle)
        bot.handlers_max = 2
        question = lambda number: envelope(str(number), f"sse:full-{number}", openai={})
        cancel = lambda number: envelope("", f"sse:full-{number}", cancel={"request_id": f"full-{number}"})
        self.assertEqual([self.webhooked(question(number)) for number in range(3)], [200, 200, 503])
        self.assertEqual(self.webhooked(cancel(1)), 200)
        until("the cancelled handler has ended", lambda: ended == ["1"])
        self.assertEqual(until("there is a place", lambda: self.webhooked(question(3)) == 200), True)
        self.assertEqual([self.webhooked(cancel(number)) for number in (0, 3)], [200, 200])
        until("all have ended", lambda: sorted(ended) == ["0", "1", "3"])
        self.assertEqual(begun, ["0", "1", "3"])

    def webhooked(self, body, secret=SECRET, at=None):
        at = str(int(at or time.time()))
        signature = "sha256=" + hmac.new(secret.encode(), at.encode() + b"." + body, hashlib.sha256).hexdigest()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("POST", "/", body, {"X-Tabcast-Timestamp": at, "X-Tabcast-Signature": signature})
            return connection.getresponse().status
        except http.client.HTTPException:
            return None
        finally:
            connection.close()

    def stranger(self, until_the_end):
        return until_the_end.enter_context(socket.create_connection(("127.0.0.1", self.port), PATIENCE))

    def signed_head(self, length, at=None):
        """The headers of what may be the gateway's, as far as a head can show."""
        return f"X-Tabcast-Timestamp: {int(at or time.time())}\r\nX-Tabcast-Signature: sha256={'0' * 64}\r\nContent-Length: {length}"

    def answer_to(self, raw):
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as stranger:
            stranger.sendall(raw)
            try:
                return stranger.recv(100)
            except ConnectionResetError:
                return b""

    def test_strangers_are_not_heard(self):
        heard = []

        async def handle(message, adapter):
            heard.append(message)

        self.bot(handle)
        for body, options, expected in [
            (b"{}", {"secret": "another"}, 401),
            (b"{}", {"at": time.time() - 400}, 401),
            (b"{}", {}, None),  # signed, and no message
            (b"[]", {}, None),
            (b"\xff", {}, None),
        ]:
            self.assertEqual(self.webhooked(body, **options), expected, (body, options))
        for raw in (b"GET\r\n\r\n", b"x" * 70_000):
            self.assertEqual(self.answer_to(raw), b"")
        # Nothing of a body is waited for that nobody signed, or that no gateway would send.
        for headers, status in [
            ("Content-Length: 1000000", b"401"),
            (f"Content-Length: {1 << 40}", b"401"),
            ("Content-Length: -5", b"401"),
            (f"X-Tabcast-Timestamp: {int(time.time())}\r\nContent-Length: 1000000", b"401"),
            (self.signed_head(1 << 20, time.time() - 400), b"401"),
            (self.signed_head(1 << 40), b"413"),
            (self.signed_head(-5), b"413"),
        ]:
            self.assertEqual(self.answer_to(f"POST / HTTP/1.1\r\n{headers}\r\n\r\n".encode())[:12], b"HTTP/1.1 " + status, headers)
        # And a little of it is read all the same, so that the answer arrives.
        self.assertEqual(self.answer_to(b"POST / HTTP/1.1\r\nContent-Length: 60000\r\n\r\n" + bytes(60_000))[:12], b"HTTP/1.1 401")
        self.assertEqual(heard, [])
        with self.assertRaises(tabcast.TabcastError) as refused:
            self.run_(tabcast.WebChatAdapter(handle, webhook=("0.0.0.0", 0)).start())
        self.assertEqual(refused.exception.code, "no_secret")

    def test_who_says_nothing_makes_room_for_who_speaks(self):
        heard = []

        async def handle(message, adapter):
            heard.append(message.text)

        def is_open(stranger):
            stranger.setblocking(False)
            try:
                return stranger.recv(1) != b""
            except BlockingIOError:
                return True

        self.bot(handle)
        with contextlib.ExitStack() as strangers:
            silent = [self.stranger(strangers) for _ in range(tabcast.CONNECTIONS_MAX + 5)]
            self.assertEqual(self.webhooked(envelope("one")), 200)
            until("the longest silent are gone", lambda: not any(map(is_open, silent[:5])))
            self.assertTrue(all(map(is_open, silent[20:])))  # the gateway's own may be among them
        with contextlib.ExitStack() as strangers:
            liars = []
            for _ in range(5):
                liars.append(self.stranger(strangers))
                liars[-1].sendall(f"POST / HTTP/1.1\r\n{self.signed_head(16 << 20)}\r\n\r\nx".encode())
            until("one is gone", lambda: sum(map(is_open, liars)) == 4)
            self.assertEqual(self.webhooked(envelope("two")), 200)
            until("another is gone", lambda: sum(map(is_open, liars)) == 3)
        self.assertEqual(heard, ["one", "two"])

    def test_who_is_refused_and_lingers_makes_room_too(self):
        async def handle(message, adapter):
            pass

        def is_over(stranger):
            stranger.setblocking(False)
            try:
                return stranger.recv(1) == b""
            except BlockingIOError:
                return False

        for head, status in [
            ("GET / HTTP/1.1", b"405"),
            ("POST / HTTP/1.1", b"401"),
            (f"POST / HTTP/1.1\r\n{self.signed_head(1 << 40)}", b"413"),
        ]:
            # Nobody leaves by itself while it is looked.
            with self.subTest(status), unittest.mock.patch.object(tabcast, "LINGER_TIME", 3600), contextlib.ExitStack() as strangers:
                bot = self.bot(handle)
                told = []
                for _ in range(tabcast.CONNECTIONS_MAX + 5):
                    told.append(self.stranger(strangers))
                    told[-1].sendall(f"{head}\r\nContent-Length: 60000\r\n\r\n".encode())
                    self.assertEqual(told[-1].recv(1000)[:12], b"HTTP/1.1 " + status)
                until("those told first are gone", lambda: all(map(is_over, told[:5])))
                self.assertFalse(any(map(is_over, told[5:])))
                self.assertLessEqual(len(bot._awaited), tabcast.CONNECTIONS_MAX)
                self.run_(bot.stop())

    def test_without_a_secret_no_page_in_a_browser_is_heard(self):
        heard = []

        async def handle(message, adapter):
            heard.append(message.text)

        port = free_port()
        bot = tabcast.WebChatAdapter(handle, webhook=("127.0.0.1", port))
        self.run_(bot.start())
        self.addCleanup(lambda: self.run_(bot.stop()))

        def asked(method, text, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            try:
                connection.request(method, "/", envelope(text), {name.replace("_", "-"): value for name, value in headers.items()})
                answer = connection.getresponse()
                answer.read()
                if answer.status == 405:
                    self.assertEqual(answer.headers["Allow"], "POST")
                return answer.status, connection.sock is None  # it is not kept
            finally:
                connection.close()

        json_type = "application/json"
        for method, headers, status in [
            ("POST", {"Content_Type": "text/plain", "Origin": "https://evil.example"}, 403),
            ("POST", {"Content_Type": "text/plain"}, 403),
            ("POST", {"Content_Type": "text/plain; application/json"}, 403),
            ("POST", {}, 403),
            ("POST", {"Content_Type": json_type, "Origin": "https://evil.example"}, 403),
            ("POST", {"Content_Type": json_type, "Origin": "null"}, 403),
            ("OPTIONS", {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}, 405),
            ("PUT", {"Content_Type": json_type}, 405),
            ("GET", {}, 405),
        ]:
            self.assertEqual(asked(method, "a page's", **headers), (status, True), (method, headers))
        # What the gateway sends, and the same with a parameter.
        self.assertEqual(asked("POST", "one", Content_Type=json_type), (200, False))
        self.assertEqual(asked("POST", "two", Content_Type="Application/JSON; charset=utf-8"), (200, False))
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as browser:
            browser.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            self.assertTrue(browser.recv(100).startswith(b"HTTP/1.1 405 "))
        self.assertEqual(heard, ["one", "two"])

    def test_an_answer_of_v1_ends_with_its_handler_and_a_client_that_leaves_cancels_it(self):
        cancelled = threading.Event()
        begun = threading.Event()

        async def handle(message, adapter):
            if message.text == "fail":
                raise RuntimeError("no")
            await adapter.send(message.channel_id, f"{message.extra['openai']['model']}: {message.text}")
            if message.text == "wait":
                begun.set()
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    cancelled.set()
                    raise

        self.bot(handle)
        question = lambda text, **more: json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more})
        ask = lambda text: self.gateway.http("POST", "/v1/chat/completions", question(text), {"Content-Type": "application/json"})
        answer = ask("hi").json()["choices"][0]
        self.assertEqual((answer["message"]["content"], answer["finish_reason"]), ("m: hi", "stop"))
        with self.assertLogs("tabcast", "ERROR"):
            self.assertGreaterEqual(ask("fail").status, 500)
        connection = self.gateway.connection()
        connection.request("POST", "/v1/chat/completions", question("wait", stream=True), {"Content-Type": "application/json"})
        stream = connection.getresponse()
        stream.readline()
        self.assertTrue(begun.wait(PATIENCE))
        stream.close()
        connection.close()
        self.assertTrue(cancelled.wait(PATIENCE), "the handler was cancelled")

    def test_a_stream_of_this_process(self):
        bot = self.bot(None)

        async def stream():
            queue = bot.create_sse_queue("r1", 3)
            with self.assertRaises(tabcast.TabcastError) as twice:
                bot.create_sse_queue("r1")
            id = await bot.send("sse:r1", "Hel")
            await bot.edit_message("sse:r1", id, "Hello")
            await bot.end("sse:r1")
            with self.assertRaises(tabcast.TabcastError) as full:
                await bot.send("sse:r1", "x")
            bot.remove_sse_queue("r1")
            bot.remove_sse_queue("r1")
            return twice.exception.code, full.exception.code, id, [queue.get_nowait() for _ in range(queue.qsize())]

        twice, full, id, frames = self.run_(stream())
        self.assertEqual((twice, full), ("stream_exists", "stream_full"))
        self.assertEqual([(frame["type"], frame.get("text"), frame.get("reason")) for frame in frames], [("edit", "Hello", None), ("end", None, "stop"), ("end", None, "cancelled")])
        self.assertEqual(frames[0]["id"], id)

    def test_what_is_small(self):
        bot = self.bot(None)
        self.assertEqual((bot.name, bot.is_running), ("webchat", True))
        self.assertEqual(bot.prompt_context(), [{"platform": "webchat", "user_id": "star", "display_name": "Star", "mention": "@Star"}])
        self.assertEqual(self.run_(bot.fetch_history(self.user, limit=5)), [])
        self.run_(bot.stop())
        self.assertEqual((bot.is_running, bot.prompt_context()), (False, []))
        tab = self.tab()
        self.run_(bot.send(self.user, "sends still work"))
        tab.find("message", text="sends still work")

    def test_a_bot_that_has_stopped_keeps_nothing_and_starts_again(self):
        async def handle(message, adapter):
            await adapter.send(message.channel_id, f"You said: {message.text}")

        threads, bot, tab = set(threading.enumerate()), self.bot(handle), self.tab()
        for text in ("once", "again"):
            tab.send({"type": "message", "text": text})
            tab.find("message", text=f"You said: {text}")
            [connection] = bot._connections.values()
            self.assertIsNotNone(connection.sock)
            self.run_(bot.stop())
            self.assertEqual((bot._connections, connection.sock), ({}, None))
            until("its threads have ended", lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("tabcast") and thread not in threads])
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.port), PATIENCE).close()
            self.run_(bot.start())

    def test_a_refusal_is_typed_and_not_tried_again(self):
        bot = self.bot(None)
        for channel, code, status in [("", "bad_field", 400), ("x" * 300, "bad_field", 400)]:
            with self.assertRaises(tabcast.TabcastError) as refused:
                self.run_(bot.send(channel, "x"))
            self.assertEqual((refused.exception.code, refused.exception.status), (code, status))
        self.run_(bot.start_typing("x" * 300))  # never fails


class ABotWhoseGatewayStumbles(unittest.TestCase):
    def setUp(self):
        test, self.seen = self, []

        class Stumbling(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                test.seen.append((time.monotonic(), self.headers["Idempotency-Key"], self.headers["Authorization"], json.loads(body), self.client_address))
                status, headers, answer = test.script.pop(0) if test.script else (200, {}, b'{"id":"1","delivered":true}')
                if status is None:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stumbling)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.bot = tabcast.WebChatAdapter(url=f"http://127.0.0.1:{self.server.server_port}", token="k")

    def test_it_asks_again_with_the_same_key_and_not_before_it_may(self):
        busy = b'{"error":{"code":"overloaded","message":"later"}}'
        self.script = [(503, {"Retry-After": "1"}, busy), (None, {}, b""), (502, {}, b"<html>")]
        self.assertEqual(asyncio.run(self.bot.send("webchat:u", "x")), "1")
        self.assertEqual(len(self.seen), 4)
        self.assertEqual(len({key for _, key, *_ in self.seen}), 1)
        uuid.UUID(self.seen[0][1])
        self.assertEqual({token for _, _, token, *_ in self.seen}, {"Bearer k"})
        self.assertGreaterEqual(self.seen[1][0] - self.seen[0][0], 1.0)
        # What does the same when it is done twice takes no key's place in the gateway.
        asyncio.run(self.bot.edit_message("webchat:u", "1", "y"))
        self.assertEqual((self.seen[-1][1], self.seen[-1][3]["text"]), (None, "y"))

    def test_it_gives_up_with_what_it_was_told_last(self):
        self.bot.attempts_max = 2
        self.script = [(500, {}, b'{"error":{"code":"internal","message":"no"}}')] * 9
        with self.assertRaises(tabcast.TabcastError) as lost:
            asyncio.run(self.bot.send("webchat:u", "x"))
        self.assertEqual((lost.exception.code, lost.exception.status, len(self.seen)), ("internal", 500, 2))
        nobody = tabcast.WebChatAdapter(url=f"http://127.0.0.1:{free_port()}")
        nobody.attempts_max = 2
        with self.assertRaises(tabcast.TabcastError) as lost:
            asyncio.run(nobody.edit_message("webchat:u", "1", "x"))
        self.assertEqual((lost.exception.code, lost.exception.status), ("unreachable", 0))

    def test_sends_to_one_channel_stay_in_order_over_connections_that_are_kept(self):
        self.script = []

        async def many():
            await asyncio.gather(*(self.bot.send("webchat:u", str(number)) for number in range(30)))

        asyncio.run(many())
        self.assertEqual([body["text"] for _, _, _, body, _ in self.seen], [str(number) for number in range(30)])
        self.assertLessEqual(len({address for *_, address in self.seen}), self.bot.requests_max)
        self.assertFalse(self.bot._sending)


class ABotOnRedis(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.redis = RedisServer()
        cls.addClassCleanup(cls.redis.stop)
        cls.gateway = Gateway(worker="redis", redis=cls.redis.url)
        cls.addClassCleanup(cls.gateway.stop)
        cls.loop = Loop()

    def bot(self, handler, **attributes):
        bot = tabcast.WebChatAdapter(handler, redis_url=self.redis.url)
        for name, value in attributes.items():
            setattr(bot, name, value)
        self.loop.run(bot.start())
        return bot

    def pending(self):
        return self.redis.control.xpending("sg:stream:inbound", "sg:workers")["pending"]

    def test_a_bot_that_has_stopped_keeps_nothing_and_starts_again(self):
        async def handle(message, adapter):
            await adapter.send(message.channel_id, f"You said: {message.text}")

        # The gateway's have names.
        connections = lambda: {client["id"] for client in self.redis.control.client_list() if not client["name"]}
        before, tab = connections(), self.gateway.tab("eve")
        self.addCleanup(tab.close)
        bot = self.bot(handle)
        for text in ("once", "again"):
            tab.send({"type": "message", "text": text})
            tab.find("message", text=f"You said: {text}")
            self.loop.run(bot.stop())
            self.assertEqual(self.pending(), 0)
            self.loop.run(bot.start())
        self.loop.run(bot.stop())
        until("none of its connections is left", lambda: connections() <= before)

    def test_it_answers_and_acknowledges(self):
        async def handle(message, adapter):
            await adapter.start_typing(message.channel_id)
            id = await adapter.send(message.channel_id, "…", message.message_id)
            await adapter.edit_message(message.channel_id, id, f"You said: {message.text}")
            await adapter.send_with_buttons(message.channel_id, "Well?", BUTTONS)
            assert await adapter.send_file(message.channel_id, b"\xff", "f.bin") == ""

        bot = self.bot(handle)
        tab = self.gateway.tab("ann")
        self.addCleanup(tab.close)
        ack = tab.ask(type="message", text="über Redis")
        frames = tab.until(lambda frame: frame["type"] == "file")
        [first] = [frame for frame in frames if frame.get("text") == "…"]
        self.assertEqual(first["reply_to"], ack["id"])
        self.assertEqual([(frame["id"], frame["text"]) for frame in frames if frame["type"] == "edit"], [(first["id"], "You said: über Redis")])
        self.assertEqual([frame["buttons"] for frame in frames if "buttons" in frame], [BUTTONS])
        until("the entry is acknowledged", lambda: self.pending() == 0)
        self.loop.run(bot.stop())

    def test_what_another_worker_left_is_claimed_and_a_handler_that_fails_is_tried_again(self):
        tries = []

        async def never(message, adapter):
            tries.append(("first", message.text))
            await asyncio.sleep(3600)

        async def second(message, adapter):
            tries.append(("second", message.text))
            if len(tries) < 4:
                raise RuntimeError("not yet")
            await adapter.send(message.channel_id, "at last")

        first = self.bot(never)
        tab = self.gateway.tab("bob")
        self.addCleanup(tab.close)
        tab.ask(type="message", text="left")
        until("it was taken", lambda: tries)

        def die():  # nothing is acknowledged, and nothing kept
            first._end()
            for answer in first._answers:
                answer.cancel()

        self.loop.loop.call_soon_threadsafe(die)
        with self.assertLogs("tabcast", "ERROR"):
            other = self.bot(second, claim_idle=0.2)
            tab.find("message", text="at last")
        self.assertEqual(tries, [("first", "left")] + [("second", "left")] * 3)
        until("the entry is acknowledged", lambda: self.pending() == 0)
        self.loop.run(other.stop())

    def test_what_a_bot_still_works_at_is_claimed_by_no_other(self):
        begun = []

        async def handle(message, adapter):
            begun.append((adapter, message.text))
            await asyncio.sleep(1.5)

        first = self.bot(handle, claim_idle=0.6, handlers_max=1)
        self.put(envelope("runs", "webchat:lane"), envelope("waits for its turn", "webchat:lane"), envelope("waits for a place", "webchat:other"))
        until("it has taken all", lambda: len(begun) == 1 and self.pending() == 3)
        second = self.bot(handle, claim_idle=0.6)
        self.loop.run(first.stop())  # which goes on until all is done
        self.assertEqual(self.pending(), 0)
        self.assertEqual(sorted(text for _, text in begun), ["runs", "waits for a place", "waits for its turn"])
        self.assertEqual({adapter for adapter, _ in begun}, {first})
        self.loop.run(second.stop())
        # A handler that has failed is not this bot's any more.
        failed = []

        async def fail(message, adapter):
            failed.append(adapter)
            if len(failed) < 2:
                raise RuntimeError("no")

        with self.assertLogs("tabcast", "ERROR"):
            bot = self.bot(fail, claim_idle=0.6)
            self.put(envelope("again"))
            until("it came again", lambda: len(failed) == 2 and self.pending() == 0)
        self.loop.run(bot.stop())

    def test_without_msgpack_a_messagepack_entry_is_a_handler_that_fails(self):
        heard, entry = [], msgpack.packb(json.loads(envelope("packed")))

        async def handle(message, adapter):
            heard.append(message.text)

        tabcast.log_once.cache_clear()
        with unittest.mock.patch.dict(sys.modules, {"msgpack": None}), self.assertLogs("tabcast") as logs:
            bot = self.bot(handle, claim_idle=0.2, attempts_max=3)
            self.put(entry, entry, envelope("after them"))
            until("the message after them", lambda: heard)
            until("they are kept, as another bot may have the package", lambda: self.pending() == 2)
            until("they are given up", lambda: self.pending() == 0)
        self.assertEqual((heard, len(logs.output)), (["after them"], 1))
        self.assertIn("install `msgpack`", logs.output[0])
        # With it the same entry is a message.
        self.put(entry)
        until("it is heard", lambda: heard == ["after them", "packed"])
        self.loop.run(bot.stop())

    def put(self, *envelopes):
        for body in envelopes:
            self.redis.control.xadd("sg:stream:inbound", {"e": body})

    def test_a_full_bot_hears_cancels_and_takes_a_reserve_and_no_more(self):
        begun, ended = [], []

        async def handle(message, adapter):
            begun.append(message.text)
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(message.text)

        question = lambda number: envelope(str(number), f"sse:full-{number}", openai={})
        cancel = lambda number: envelope("", f"sse:full-{number}", cancel={"request_id": f"full-{number}"})
        bot = self.bot(handle, handlers_max=2, reserve_max=2)
        self.put(*map(question, range(3)))
        until("two handlers run and one waits", lambda: begun == ["0", "1"] and self.pending() == 3)
        self.put(cancel(0))
        until("the one that waited has its place", lambda: ended == ["0"] and begun == ["0", "1", "2"])
        self.put(question(3), cancel(3), question(4))
        until("3 was cancelled while it waited", lambda: self.pending() == 3)
        self.put(cancel(1))
        until("4 has the place", lambda: begun == ["0", "1", "2", "4"])
        self.put(*map(question, range(5, 9)))
        until("the reserve is full", lambda: self.pending() == 4)
        with self.assertRaises(AssertionError):  # it takes no more
            until("a fifth is taken", lambda: self.pending() > 4, timeout=1.5)
        self.assertEqual(begun, ["0", "1", "2", "4"])
        self.put(*map(cancel, range(2, 9)))  # behind the reserve, until handlers end

        def is_done():
            for work in list(bot._handlers.values()):
                self.loop.loop.call_soon_threadsafe(work.cancel)
            return self.pending() == 0 and not bot._under_way

        until("all is done", is_done)
        self.loop.run(bot.stop())

    def test_an_entry_that_is_no_message_is_done_with(self):
        heard = []

        async def handle(message, adapter):
            heard.append(message.text)

        with self.assertLogs("tabcast", "ERROR"):
            bot = self.bot(handle)
            for fields in ({"e": "{}"}, {"e": "[1]"}, {"e": b"\xc1"}, {"other": "x"}):
                self.redis.control.xadd("sg:stream:inbound", fields)
            tab = self.gateway.tab("cid")
            self.addCleanup(tab.close)
            tab.ask(type="message", text="after them")
            until("the message after them", lambda: heard)
            until("all are acknowledged", lambda: self.pending() == 0)
        self.loop.run(bot.stop())


BOT = '''
import asyncio
from old_adapter import WebChatAdapter

class Row:
    def __init__(self, *children):
        self.children = children

class Button:
    label, custom_id, style = "Tea", "tea", "primary"

async def handle(message, adapter):
    await adapter.start_typing(message.channel_id)
    if "button" in message.extra:
        await adapter.edit_message(message.channel_id, message.extra["button"]["message_id"], f"{message.user_name} wants {message.text}")
    elif message.text == "menu":
        await adapter.send_with_buttons(message.channel_id, "Which?", Row(Row(Button())))
    else:
        await adapter.send(message.channel_id, message.text.upper())
    await adapter.stop_typing(message.channel_id)

async def main():
    adapter = WebChatAdapter()
    adapter.on_message = handle
    await adapter.start()
    await asyncio.Event().wait()

asyncio.run(main())
'''


class ABotThatMoves(unittest.TestCase):
    def test_its_import_is_all_that_changes(self):
        port = free_port()
        gateway = Gateway(worker="webhook", webhook_url=f"http://127.0.0.1:{port}/")
        self.addCleanup(gateway.stop)
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "tabcast.py").write_bytes(gateway.http("GET", "/tabcast.py").body)
            pathlib.Path(folder, "bot.py").write_text(BOT.replace("from old_adapter import", "from tabcast import"))
            settings = {"WEBCHAT_URL": gateway.origin, "WEBCHAT_LISTEN": f"127.0.0.1:{port}"}
            bot = subprocess.Popen([sys.executable, "-B", "bot.py"], cwd=folder, env={**os.environ, **settings})
            self.addCleanup(bot.wait)
            self.addCleanup(bot.kill)
            tab = gateway.tab("ann", name="Ann")
            self.addCleanup(tab.close)
            tab.ask(type="message", text="hello")
            frames = tab.until(lambda frame: frame == {"type": "typing", "active": False})
            self.assertEqual([frame["text"] for frame in frames if frame.get("sender") == "star"], ["HELLO"])
            self.assertIn({"type": "typing", "active": True}, frames)
            tab.ask(type="message", text="menu")
            menu = tab.find("message", text="Which?")
            self.assertEqual(menu["buttons"], [{"label": "Tea", "custom_id": "tea", "style": "primary"}])
            tab.ask(type="button", message_id=menu["id"], custom_id="tea")
            self.assertEqual(tab.find("edit", id=menu["id"])["text"], "Ann wants tea")


class ABotAsAProgram(unittest.TestCase):
    def test_it_runs_as_it_is_and_leaves_at_sigterm(self):
        port = free_port()
        gateway = Gateway(worker="webhook", webhook_url=f"http://127.0.0.1:{port}/", webhook_secret=SECRET)
        self.addCleanup(gateway.stop)
        program = f"""
from tabcast import WebChatAdapter

async def handle(message, adapter):
    await adapter.send(message.channel_id, f"You said: {{message.text}}")

WebChatAdapter(handle, webhook=("127.0.0.1", {port})).run()
"""
        settings = {"PYTHONPATH": str(SOURCE.parent), "WEBCHAT_URL": gateway.origin, "WEBCHAT_SECRET": SECRET}
        bot = subprocess.Popen([sys.executable, "-B", "-c", program], env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True)
        self.addCleanup(bot.stderr.close)
        self.addCleanup(bot.kill)
        tab = gateway.tab("ann")
        self.addCleanup(tab.close)
        tab.ask(type="message", text="hello")
        tab.find("message", text="You said: hello", sender="star")
        bot.send_signal(signal.SIGTERM)
        self.assertEqual((bot.wait(PATIENCE), bot.stderr.read()), (0, ""))

    def test_it_leaves_at_once_though_the_gateway_never_answers_what_a_handler_gave_up(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, tempfile.TemporaryFile() as log:
            port = free_port()
            program = f"""
import asyncio
from tabcast import WebChatAdapter

async def handle(message, adapter):
    try:
        await asyncio.wait_for(adapter.send(message.channel_id, "x"), 0.5)
    except asyncio.TimeoutError:
        pass

WebChatAdapter(handle, webhook=("127.0.0.1", {port})).run()
"""
            settings = {"PYTHONPATH": str(SOURCE.parent), "WEBCHAT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "WEBCHAT_SECRET": ""}
            bot = subprocess.Popen([sys.executable, "-B", "-W", "always::ResourceWarning", "-c", program], env={**os.environ, **settings}, stderr=log)
            self.addCleanup(bot.wait)
            self.addCleanup(bot.kill)

            def told():
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                try:
                    connection.request("POST", "/", envelope("hello"), {"Content-Type": "application/json"})
                    return connection.getresponse().status
                except ConnectionRefusedError:  # it does not listen yet
                    return None
                finally:
                    connection.close()

            self.assertEqual(until("its handler has given up", told), 200)
            bot.send_signal(signal.SIGTERM)
            self.assertEqual(bot.wait(5), 0)  # an attempt may take 30 s
            log.seek(0)
            self.assertEqual(log.read(), b"")  # nor is anything left open
