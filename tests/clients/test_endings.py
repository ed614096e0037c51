"""Event streams on the wire, slow consumers, and how everything ends."""

import http.client
import json
import socket
import threading
import unittest
import urllib.parse

from websockets.exceptions import WebSocketException

from gateway import PATIENCE, Answer, Gateway, GatewayTest, close_code, until


class EventStream:
    """`GET /events`, read byte by byte: status line, headers, chunks."""

    def __init__(self, gateway, user):
        self.raw = socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE)
        query = urllib.parse.urlencode({"user": user, "name": user})
        self.raw.sendall(f"GET /events?{query} HTTP/1.1\r\nHost: {gateway.host}\r\nAccept: text/event-stream\r\n\r\n".encode())
        self.stream = self.raw.makefile("rb")
        self.status = self.stream.readline()
        self.headers = {}
        while (line := self.stream.readline()) != b"\r\n":
            name, value = line.decode().split(":", 1)
            self.headers[name.lower()] = value.strip()
        self.text = b""

    def chunk(self):
        """The next chunk, or None after the last one (RFC 9112 §7.1)."""
        line = self.stream.readline()
        assert line.endswith(b"\r\n") and line.strip(), line
        size = int(line.split(b";")[0], 16)
        data = self.stream.read(size)
        assert self.stream.read(2) == b"\r\n", "a chunk ends with CRLF"
        return data if size else None

    def event(self):
        """The lines of the next event that is no comment, or None at the end."""
        while True:
            while b"\n\n" not in self.text:
                if (more := self.chunk()) is None:
                    assert self.text == b"", "the stream ends between events"
                    return None
                self.text += more
            event, self.text = self.text.split(b"\n\n", 1)
            lines = [line for line in event.decode().split("\n") if not line.startswith(":")]
            if lines:
                return lines

    def close(self):
        self.stream.close()
        self.raw.close()


def ids_until_the_end(events):
    while (lines := events.event()) is not None:
        yield from (line[4:] for line in lines if line.startswith("id: "))


class Events(GatewayTest):
    def stream(self):
        stream = EventStream(self.gateway, self.user)
        self.addCleanup(stream.close)
        until("the stream is counted", lambda: f'"{self.user}"' in self.gateway.http("GET", "/api/users").body.decode())
        return stream

    def test_the_head(self):
        stream = self.stream()
        self.assertEqual(stream.status, b"HTTP/1.1 200 OK\r\n")
        self.assertEqual(stream.headers["content-type"], "text/event-stream; charset=utf-8")
        self.assertEqual(stream.headers["cache-control"], "no-cache")
        self.assertEqual(stream.headers["x-accel-buffering"], "no")
        self.assertEqual(stream.headers["transfer-encoding"], "chunked")
        self.assertNotIn("content-length", stream.headers)
        self.assertNotIn("content-encoding", stream.headers)

    def test_frames_are_those_of_a_tab_with_an_id_on_ordered_ones_only(self):
        stream, tab = self.stream(), self.tab()
        message = self.gateway.api("send", {"channel_id": self.user, "text": "ü <b> \\ 🌟"})["id"]
        self.gateway.api("edit", {"channel_id": self.user, "message_id": message, "text": "newer"})
        self.gateway.api("typing", {"channel_id": self.user, "active": True})
        file = self.gateway.api("file", {"channel_id": self.user, "filename": "f", "data": "AAAA"})["id"]
        buttons = self.gateway.api("buttons", {"channel_id": self.user, "text": "?", "buttons": []})["id"]
        for expected in (message, None, None, file, buttons):
            lines = stream.event()
            self.assertEqual([line[4:] for line in lines if line.startswith("id: ")], [expected] if expected else [])
            self.assertEqual([line[6:] for line in lines if line.startswith("data: ")], [tab.text()])
            self.assertEqual({line.split(":")[0] for line in lines}, {"id", "data"} if expected else {"data"})

    def test_line_ends_of_unicode_are_escaped(self):
        stream = self.stream()
        words = "a\u0085b\u2028c\u2029d\r\ne"
        self.gateway.api("send", {"channel_id": self.user, "text": words})
        [data] = [line for line in stream.event() if line.startswith("data: ")]
        for end in "\u0085\u2028\u2029\r":
            self.assertNotIn(end, data)
        self.assertIn("\\u2028", data)
        self.assertEqual(json.loads(data[6:])["text"], words)

    def test_a_large_frame_comes_whole(self):
        stream = self.stream()
        words = "0123456789abcdef" * (1 << 16)
        threading.Thread(target=self.gateway.api, args=("send", {"channel_id": self.user, "text": words}), daemon=True).start()
        [data] = [line for line in stream.event() if line.startswith("data: ")]
        self.assertEqual(json.loads(data[6:])["text"], words)

    def test_a_stream_counts_as_a_tab(self):
        self.stream()
        answer = self.gateway.api("send", {"channel_id": self.user, "text": "x"})
        self.assertEqual((answer["delivered"], answer["tabs"]), (True, 1))


class SlowConsumers(unittest.TestCase):
    def test_are_cut_with_4008_while_others_get_everything(self):
        gateway = Gateway(session_queue_bytes_max="1MiB", close_timeout="60s", drain_deadline="120s", heartbeat_interval="300s")
        self.addCleanup(gateway.stop)
        raw, stream = gateway.raw_tab("sam", receive_buffer=4096)
        self.addCleanup(raw.close)
        quick = gateway.tab("sam")
        self.addCleanup(quick.close)
        until("both tabs are there", lambda: gateway.api("typing", {"channel_id": "sam", "active": True})["tabs"] == 2)
        filler = "x" * (64 << 10)
        sent = 400  # 25 MiB: more than any socket's buffers and the queue
        for number in range(sent):
            gateway.api("send", {"channel_id": "sam", "text": f"{number} {filler}"})
            got = quick.until(lambda frame: frame["type"] == "message")[-1]
            self.assertEqual(got["text"].split()[0], str(number))
        raw.settimeout(PATIENCE)
        code, texts = close_code(stream)
        self.assertEqual(code, 4008)
        numbers = [int(frame["text"].split()[0]) for frame in map(json.loads, texts) if frame["type"] == "message"]
        self.assertEqual(numbers, list(range(len(numbers))), "what was written before the cut is whole and in order")
        self.assertLess(len(numbers), sent)
        gateway.api("send", {"channel_id": "sam", "text": "after"})
        self.assertEqual(quick.until(lambda frame: frame["type"] == "message")[-1]["text"], "after")


class Draining(unittest.TestCase):
    def publish(self, gateway, stop, acknowledged, lock):
        """Sends until it is refused, over a connection that the gateway has from before it drains."""
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
        number = 0
        while not stop.is_set():
            number += 1
            body = json.dumps({"channel_id": "dora", "text": f"load {number}"})
            try:
                connection.request("POST", "/api/send", body, {"Content-Type": "application/json"})
                answer = Answer(connection.getresponse())
            except (OSError, http.client.HTTPException):
                break
            if answer.status != 200:
                break
            with lock:
                acknowledged.append(answer.json())
        connection.close()

    def test_sigterm_under_load_loses_nothing_that_was_acknowledged(self):
        gateway = Gateway(drain_spread="2s", drain_deadline="15s")
        self.addCleanup(gateway.stop)
        tabs = [gateway.tab("dora") for _ in range(10)]
        for tab in tabs:
            self.addCleanup(tab.close)
        events = EventStream(gateway, "dora")
        self.addCleanup(events.close)
        until("all tabs are there", lambda: gateway.api("typing", {"channel_id": "dora", "active": True})["tabs"] == 11)
        # Read as it comes: whoever reads late is a slow consumer.
        streamed = []
        reading = threading.Thread(target=lambda: streamed.extend(ids_until_the_end(events)))
        reading.start()
        probe = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
        self.addCleanup(probe.close)
        probe.request("GET", "/readyz")
        self.assertEqual(probe.getresponse().read() and 200, 200)

        stop, lock, acknowledged = threading.Event(), threading.Lock(), []
        publishers = [threading.Thread(target=self.publish, args=(gateway, stop, acknowledged, lock)) for _ in range(4)]
        for publisher in publishers:
            publisher.start()
        until("there is load", lambda: len(acknowledged) > 200)
        with lock:
            before = [answer["id"] for answer in acknowledged]
        gateway.terminate()

        statuses, entered, refused = [], [], []
        late = threading.Thread(target=self.knock, args=(gateway, entered, refused))

        def not_ready():
            try:
                probe.request("GET", "/readyz")
                answer = probe.getresponse()
                answer.read()
                statuses.append(answer.status)
            except (OSError, http.client.HTTPException):
                probe.close()  # opens again at the next request, or the process is gone
            return 503 in statuses or gateway.process.poll() is not None

        until("readiness has flipped", not_ready)
        self.assertIn(503, statuses)
        late.start()
        readers = []
        for tab in tabs:
            (code, reason), frames = tab.closed()
            self.assertEqual((code, reason), (1012, "service restart"))
            got = [frame["id"] for frame in frames if frame["type"] == "message"]
            self.assertEqual(len(set(got)), len(got), "nothing twice")
            self.assertEqual(set(before) - set(got), set(), "nothing lost")
            readers.append(set(got))
            self.assertEqual(frames[-1]["type"], "draining")
            self.assertGreaterEqual(frames[-1]["retry_after_ms"], 0)
        stop.set()
        reading.join(PATIENCE)
        self.assertFalse(reading.is_alive(), "the event stream did not end")
        self.assertEqual(set(before) - set(streamed), set(), "the event stream has them too, and ends properly")
        readers.append(set(streamed))
        self.assertEqual(gateway.process.wait(20), 0, gateway.log_text())
        for thread in (*publishers, late):
            thread.join(PATIENCE)
        during = [answer for answer in acknowledged if answer["delivered"] and answer["id"] not in before]
        self.assertTrue(during, "nothing was acknowledged while it drained")
        for answer in during:
            have_it = sum(answer["id"] in reader for reader in readers)
            self.assertEqual(have_it, answer["tabs"], f"{answer}: not all whom it was accepted for have it")
        self.assertEqual(entered, [], "nobody came in after readiness had flipped")
        self.assertGreaterEqual(len(refused), 1, "nobody was refused")

    @staticmethod
    def knock(gateway, entered, refused):
        while gateway.process.poll() is None:
            try:
                gateway.tab("late").close()
                entered.append("in")
            except (OSError, WebSocketException, EOFError) as refusal:
                refused.append(refusal)

    def test_an_idle_gateway_leaves_at_once(self):
        gateway = Gateway()
        self.addCleanup(gateway.stop)
        gateway.terminate()
        self.assertEqual(gateway.process.wait(10), 0, gateway.log_text())


if __name__ == "__main__":
    unittest.main()
