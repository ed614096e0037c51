"""`tabcast top` and `tabcast tail` as whoever is called at 3 a.m. runs them: in a terminal, in a pipe, against a node that
goes away, and against one that speaks what no node should."""

import contextlib
import fcntl
import http.server
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import tempfile
import termios
import threading
import time
import unittest

from gateway import BINARY, PATIENCE, Gateway, token, until
from test_tls import KEY_KINDS, Authority

STATUS = {
    "type": "status", "node": "node-one", "version": "0.1.0", "mode": "development", "uptime_seconds": 12.5,
    "health": {"ready": True, "draining": False, "reason": None},
    "sessions": {"now": 5, "max": 10000, "users": 3, "rooms": 1, "streams": 0},
    "rates": {"deliveries": 5.0}, "latency_micros": {"p50": 40, "p99": 120, "count": 5},
    "shards": [{"sessions": 5, "busy_share": 0.5}],
    "top_users": [{"user_id": "ann", "tabs": 2}],
    "ended": [
        {"at": 1764115199.5, "user_id": "ann", "session": "1", "reason": "slow consumer", "code": 4008, "retryable": True,
         "queue_frames": 1024, "queue_bytes": 1048576, "detail": "its queue held 1,024 frames; the limit is 1,024 frames"},
        {"at": 1764115199.0, "user_id": "bob", "session": "2", "reason": "kicked", "code": 4003, "detail": "an operator ended it"},
    ],
}


def event(frame):
    return f"data: {frame if isinstance(frame, str) else json.dumps(frame)}\n\n".encode()


class Node:
    """A node that answers each connection by the next of its scripts: a status and a body, or what it is to stream. The last
    one is repeated."""

    def __init__(self, *scripts):
        self.scripts, self.asked, self.over = list(scripts), [], threading.Event()
        node = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                script = node.scripts.pop(0) if len(node.scripts) > 1 else node.scripts[0]
                node.asked.append((self.path, self.headers.get("Authorization")))
                if isinstance(script, tuple):
                    status, body = script
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.end_headers()
                    self.wfile.write(json.dumps(body).encode())
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.end_headers()
                with contextlib.suppress(OSError):
                    for piece in script(node) if callable(script) else script:
                        self.wfile.write(piece)
                        self.wfile.flush()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def every_tenth_of_a_second(frame):
    """A script that says the same until the node is stopped."""

    def script(node):
        while not node.over.wait(0.1):
            yield event(frame)

    return script


def environment(**variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TABCAST_") and name != "NO_COLOR"}
    return {**clean, "TERM": "xterm-256color", **variables}


class TerminalTest(unittest.TestCase):
    def node(self, *scripts):
        node = Node(*scripts)
        self.addCleanup(node.stop)
        return node

    def start(self, *arguments, **variables):
        process = subprocess.Popen([BINARY, *arguments], env=environment(**variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for stream in (process.stdout, process.stderr):
            self.addCleanup(stream.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def ended(self, *arguments, **variables):
        """(exit code, standard output, standard error)"""
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


class Tail(TerminalTest):
    def test_a_frame_is_a_line_for_people_or_as_it_came(self):
        frames = [{"type": "message", "id": "1", "text": "hello", "sender": "star", "timestamp": 1764115199.5}, {"type": "typing", "active": True}]
        node = self.node([*map(event, frames)], (401, {}))
        code, out, _ = self.ended("tail", "room:a b", "--url", node.url)
        self.assertEqual((code, out.splitlines()[0]), (3, "23:59:59 message  star: hello id=1"))
        self.assertEqual(node.asked[0], ("/events?watch=room%3Aa%20b", None))
        node = self.node([*map(event, frames)], (401, {}))
        _, out, _ = self.ended("tail", "ann", "--json", "--url", node.url)
        self.assertEqual([json.loads(line) for line in out.splitlines()], frames)

    def test_a_lost_connection_is_opened_again_and_that_is_said(self):
        node = self.node([event("{}")], (503, {"error": {"code": "draining", "message": "it drains"}}), [event('{"type":"x"}')], (403, {"error": {"message": "not an operator's"}}))
        code, out, err = self.ended("tail", "ann", "--json", "--url", node.url)
        self.assertEqual((code, out.split()), (3, ["{}", '{"type":"x"}']))
        self.assertIn("lost: the node has ended the stream; again in 0.5 s", err)
        self.assertIn("lost: 503 it drains", err)
        self.assertIn("refuses: 403 not an operator's", err)

    def test_the_exit_code_says_what_is_wrong(self):
        for scripted, expected in ((401, 3), (403, 3), (404, 1), (400, 1)):
            with self.subTest(scripted):
                node = self.node((scripted, {"error": {"message": "no"}}))
                self.assertEqual(self.ended("tail", "ann", "--url", node.url)[0], expected)
                self.assertEqual(self.ended("top", "--once", "--url", node.url)[0], expected)
        for arguments in (["tail"], ["tail", "ann", "--url", "ftp://x"], ["tail", "status"], ["tail", "ann", "--key", "file:/nowhere"], ["tail", "ann", "--ca", "/nowhere"]):
            with self.subTest(arguments):
                self.assertEqual(self.ended(*arguments)[0], 2)
        code, _, err = self.ended("top", "--url", self.node([]).url)
        self.assertEqual(code, 2)
        self.assertIn("--once", err)

    def test_a_key_comes_from_the_environment_or_a_file_and_is_never_shown(self):
        node = self.node((401, {"error": {"message": "no"}}))
        _, out, err = self.ended("tail", "ann", "--url", node.url, TABCAST_KEY="hush-1")
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("# an operator's\nhush-2\n")
            file.flush()
            self.ended("tail", "ann", "--url", node.url, TABCAST_KEY=f"file:{file.name}")
            self.ended("tail", "ann", "--url", node.url, "--key", f"file:{file.name}")
        self.assertEqual([key for _, key in node.asked], ["Bearer hush-1", "Bearer hush-2", "Bearer hush-2"])
        self.assertNotIn("hush", out + err)
        self.assertNotIn("hush", self.ended("tail", "--help", TABCAST_KEY="hush-1")[1])

    def test_it_ends_without_a_sound_by_a_signal_and_with_its_reader(self):
        node = self.node(every_tenth_of_a_second({"type": "x"}))
        process = self.start("tail", "ann", "--url", node.url)
        self.assertTrue(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertNotIn("panicked", process.stderr.read())
        process = self.start("tail", "ann", "--url", node.url)
        self.assertTrue(process.stdout.readline())
        process.stdout.close()
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertNotIn("panicked", process.stderr.read())


class Once(TerminalTest):
    def test_it_says_why_ann_was_cut(self):
        node = self.node([event({"type": "hello"}), event(STATUS)])
        code, out, err = self.ended("top", "--once", "--user", "ann", "--url", node.url)
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(node.asked[0][0], "/events?watch=status")
        self.assertIn("23:59:59 ann: slow consumer (4008), 1,024 frames and 1.0 MiB waited", out)
        self.assertIn("its queue held 1,024 frames; the limit is 1,024 frames", out)
        self.assertNotIn("bob", out)

    def test_nobody_there_is_an_error_at_once(self):
        node = self.node([])
        node.stop()
        code, _, err = self.ended("top", "--once", "--url", node.url)
        self.assertEqual(code, 1)
        self.assertIn("refused", err)

    def test_what_cannot_be_read_is_said(self):
        code, _, err = self.ended("top", "--once", "--url", self.node([event("nonsense")]).url)
        self.assertEqual(code, 1)
        self.assertIn("cannot be read", err)


class Screen:
    """`tabcast top` in a pseudo-terminal."""

    def __init__(self, test, url, *arguments, columns=100, lines=30, **variables):
        self.terminal, inner = pty.openpty()
        test.addCleanup(os.close, self.terminal)
        self.resize(columns, lines)
        self.before = termios.tcgetattr(inner)
        self.inner = inner
        test.addCleanup(os.close, inner)
        self.process = subprocess.Popen([BINARY, "top", "--url", url, *arguments], env=environment(**variables), stdin=inner, stdout=inner, stderr=subprocess.PIPE)
        test.addCleanup(self.process.stderr.close)
        test.addCleanup(self.process.wait)
        test.addCleanup(self.process.kill)
        self.test, self.seen = test, b""

    def resize(self, columns, lines):
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def text(self):
        """What was written, without what moves the cursor and paints."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", self.seen.decode(errors="replace"))

    def read(self):
        while select.select([self.terminal], [], [], 0)[0]:
            self.seen += os.read(self.terminal, 1 << 16)

    def until(self, part):
        def has_it():
            self.read()
            return part in self.text()

        until(f"{part!r} is on the screen", has_it)

    def press(self, keys):
        self.seen = b""
        os.write(self.terminal, keys.encode())

    def left(self):
        """It has ended, and the terminal is as it was."""
        code = self.process.wait(PATIENCE)
        self.read()
        self.test.assertIn(b"\x1b[?1049l", self.seen)
        self.test.assertIn(b"\x1b[?25h", self.seen)
        self.test.assertEqual(termios.tcgetattr(self.inner), self.before)
        return code


class Top(TerminalTest):
    def test_from_a_page_at_3_am_to_why_ann_was_cut(self):
        screen = Screen(self, self.node(every_tenth_of_a_second(STATUS)).url)
        for word in ("READY", "node-one", "sessions", "deliveries/s", "p99", "redis", "top", "ann", "4008", "bob"):
            screen.until(word)
        screen.press("\r")
        for word in ("why", "limit", "1,024"):
            screen.until(word)
        screen.press("\x1b")
        screen.until("kicked")
        screen.press("/bob\r")
        screen.until("only")
        screen.press("?")
        screen.until("help")
        screen.press("xq")
        self.assertEqual(screen.left(), 0)

    def test_the_terminal_is_put_back_whatever_ends_it(self):
        url = self.node(every_tenth_of_a_second(STATUS)).url
        for name, end in (("Ctrl-C", lambda screen: screen.press("\x03")), ("SIGTERM", lambda screen: screen.process.terminate()), ("SIGHUP", lambda screen: screen.process.send_signal(signal.SIGHUP))):
            with self.subTest(name):
                screen = Screen(self, url)
                screen.until("READY")
                end(screen)
                self.assertEqual(screen.left(), 0)
        screen = Screen(self, self.node((401, {"error": {"message": "who are you"}})).url)
        self.assertEqual(screen.left(), 3)
        self.assertIn(b"401 who are you", screen.process.stderr.read())

    def test_a_resize_draws_anew_and_any_size_is_survived(self):
        screen = Screen(self, self.node(every_tenth_of_a_second(STATUS)).url)
        screen.until("READY")
        for columns, lines in ((60, 15), (3, 2), (1, 1), (200, 60)):
            screen.seen = b""
            screen.resize(columns, lines)
            screen.process.send_signal(signal.SIGWINCH)
            until("it is drawn anew", lambda: screen.read() or screen.seen)
        screen.until("deliveries/s")
        screen.press("q")
        self.assertEqual(screen.left(), 0)

    def test_what_is_old_is_said_and_a_node_that_comes_back_is_found(self):
        node = self.node([event(STATUS)], (503, {"error": {"message": "it starts"}}), every_tenth_of_a_second({**STATUS, "node": "node-two"}))
        screen = Screen(self, node.url)
        screen.until("node-one")
        screen.until("STATUS:")
        screen.until("node-two")
        screen.press("q")
        self.assertEqual(screen.left(), 0)

    def test_no_escape_sequence_of_a_user_id_and_no_colour_if_none_is_wanted(self):
        hostile = "\x1b]0;owned\x07\x1b[41m\x9b31m"
        status = {**STATUS, "node": hostile, "top_users": [{"user_id": hostile, "tabs": 1}], "ended": [{**STATUS["ended"][0], "user_id": hostile, "detail": hostile}]}
        screen = Screen(self, self.node(every_tenth_of_a_second(status)).url, NO_COLOR="1")
        screen.until("owned")
        screen.press("\r")
        screen.until("why")
        screen.press("xq")
        self.assertEqual(screen.left(), 0)
        written = screen.seen.decode()
        self.assertNotIn("\x1b]0", written)
        self.assertNotIn("\x9b", written)
        self.assertIsNone(re.search(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|4[0-7]|9[0-7])m", written), "a colour")
        self.assertNotRegex(written, r"\x1b\[38;5")


class ARealNode(TerminalTest):
    def setUp(self):
        self.gateway = Gateway(worker="none", operator_keys="an-operator-s", api_keys="a-worker-s", token_keys="kid=k,alg=HS256,secret=" + "s" * 32)
        self.addCleanup(self.gateway.stop)

    def api(self, method, path, key, value=None):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        answer = self.gateway.http(method, path, None if value is None else json.dumps(value).encode(), headers)
        self.assertEqual(answer.status, 200, answer.body)
        return answer.json()

    def tab(self, user):
        bearer = token("s" * 32, kid="k", sub=user, name=user)
        return self.gateway.tab(None, additional_headers={"Authorization": f"Bearer {bearer}"})

    def once(self, *arguments):
        code, out, err = self.ended("top", "--once", "--url", self.gateway.origin, *arguments, TABCAST_KEY="an-operator-s")
        self.assertEqual((code, err), (0, ""))
        return out

    def test_why_ann_was_cut(self):
        ann, _bob = self.tab("ann"), self.tab("bob")
        out = self.once()
        self.assertIn("READY", out)
        self.assertRegex(out, r"sessions +2 of [0-9,]+, 2 users")
        self.assertRegex(out, r"ann: 1 tabs")
        screen = Screen(self, self.gateway.origin, TABCAST_KEY="an-operator-s")
        screen.until("READY")
        screen.seen = b""
        self.api("DELETE", "/api/users/ann", "an-operator-s")
        until("ann is gone", lambda: ann.ending)
        screen.until(str(ann.ending[0]))
        screen.press("\r")
        screen.until("why")
        screen.press("xq")
        self.assertEqual(screen.left(), 0)
        out = self.once("--user", "ann")
        self.assertRegex(out, rf"ann: {re.escape(ann.ending[1])} \({ann.ending[0]}\), websocket, after")
        self.assertNotIn("bob", out)

    def test_a_tab_that_does_not_read_is_told_with_its_numbers(self):
        gateway = Gateway(worker="none", session_queue_bytes_max="1MiB", close_timeout="60s", drain_deadline="120s", heartbeat_interval="300s")
        self.addCleanup(gateway.stop)
        raw, _ = gateway.raw_tab("sam", receive_buffer=4096)
        self.addCleanup(raw.close)
        for _ in range(400):  # 25 MiB: more than any socket's buffers and the queue
            gateway.api("send", {"channel_id": "sam", "text": "x" * (64 << 10)})
        out = until("sam is cut", lambda: "4008" in (out := self.ended("top", "--once", "--user", "sam", "--url", gateway.origin)[1]) and out)
        self.assertRegex(out, r"sam: slow consumer \(4008\), websocket, after .* s, [0-9]+ frames and [0-9.]+ [KM]iB waited")
        self.assertIn("the limit is 1,048,576 bytes", out)

    def test_frames_are_printed_as_they_go_by(self):
        ann = self.tab("ann")
        process = self.start("tail", "ann", "--json", "--url", self.gateway.origin, TABCAST_KEY="an-operator-s")
        self.assertIn("followed", process.stderr.readline())
        for number in range(3):
            self.api("POST", "/api/send", "a-worker-s", {"channel_id": "ann", "text": f"number {number}"})
        frames = [json.loads(process.stdout.readline()) for _ in range(3)]
        self.assertEqual([frame["text"] for frame in frames], ["number 0", "number 1", "number 2"])
        self.assertEqual(frames, [ann.frame() for _ in range(3)])
        self.gateway.terminate()
        self.assertIn("lost", process.stderr.readline())

    def test_over_tls_with_an_authority_of_its_own(self):
        authority = Authority()
        self.addCleanup(authority.folder.cleanup)
        authority.sign("between", KEY_KINDS["ec"], "root", "signs")
        gateway = Gateway(trust=authority.trust(), **authority.issue())
        self.addCleanup(gateway.stop)
        code, out, err = self.ended("top", "--once", "--url", gateway.origin, "--ca", str(authority.path("root.pem")))
        self.assertEqual((code, err), (0, ""))
        self.assertIn("READY", out)
        code, _, err = self.ended("top", "--once", "--url", gateway.origin)
        self.assertEqual(code, 1)
        self.assertIn("certificate", err)

    def test_another_key_opens_nothing(self):
        for key in ("", "a-worker-s", "wrong"):
            with self.subTest(key):
                code, out, err = self.ended("tail", "ann", "--url", self.gateway.origin, TABCAST_KEY=key)
                self.assertEqual((code, out), (3, ""))
                self.assertIn("refuses: 40", err)


if __name__ == "__main__":
    unittest.main()
