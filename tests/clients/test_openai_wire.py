"""/v1 byte by byte: the framing of a stream, requests that no SDK would send, bad bodies, and CORS."""

import json
import re
import socket
import unittest

from gateway import PATIENCE, until
from scripted import OpenAITest

SMALL = b'{"messages":[{"role":"user","content":"hi \xc3\xbc"}],"stream":true}'


class Wire(OpenAITest):
    def connect(self):
        raw = socket.create_connection(("127.0.0.1", self.gateway.port), PATIENCE)
        self.addCleanup(raw.close)
        return raw

    def request(self, body=SMALL, path="/v1/chat/completions", method="POST", length=None, **headers):
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.gateway.host}", f"Content-Length: {len(body) if length is None else length}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def rest(self, raw):
        """Everything up to the server's FIN; a reset is no end."""
        data = b""
        while part := raw.recv(65536):
            data += part
        return data

    def until_has(self, raw, end):
        data = b""
        while not data.endswith(end):
            part = raw.recv(65536)
            self.assertTrue(part, f"it ended early: {data!r}")
            data += part
        return data

    def answer_of(self, raw):
        """The status and body of a plain answer."""
        head, body = b"", b""
        while b"\r\n\r\n" not in head:
            part = raw.recv(65536)
            if not part:
                return None, head
            head += part
        head, body = head.split(b"\r\n\r\n", 1)
        length = int(re.search(rb"(?i)\r\ncontent-length: (\d+)", head)[1])
        while len(body) < length:
            body += raw.recv(65536)
        return int(head.split(b" ")[1]), body

    def assert_refused(self, status, body, expected=range(400, 500)):
        self.assertIn(status, expected, body)
        error = json.loads(body)["error"]
        self.assertEqual(list(error), ["message", "type", "param", "code"])
        self.assertTrue(error["message"] and error["type"])
        return error

    def assert_it_lives(self):
        raw = self.connect()
        raw.sendall(self.request(SMALL.replace(b"hi", b"alive?")))
        while (turn := self.worker.question()).message["content"] != "alive? ü":
            pass
        turn.say("alive")
        self.assertIn(b'"content":"alive"', self.rest(raw))
        return turn.id


class Framing(Wire):
    def test_every_byte_of_a_stream(self):
        raw = self.connect()
        raw.sendall(self.request())
        turn = self.worker.question()
        first = self.until_has(raw, b"\n\n\r\n")
        created = re.search(rb'"created":(\d+)', first)[1].decode()

        def chunk(text):
            return b"%x\r\n%s\r\n" % (len(text), text)

        def record(delta, finish="null"):
            choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}'
            front = f'"id":"{turn.id}","object":"chat.completion.chunk","created":{created},"model":"tabcast"'
            return f'data: {{{front},"choices":[{choice}]}}\n\n'.encode()

        head = (
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
            f"transfer-encoding: chunked\r\nvary: origin\r\nconnection: close\r\nx-request-id: {turn.id}\r\n\r\n"
        )
        self.assertEqual(first, head.encode() + chunk(record('{"role":"assistant","content":""}')))
        message = turn.send('a "ü"')
        self.assertEqual(self.until_has(raw, b"\r\n"), chunk(record('{"content":"a \\"ü\\""}')))
        turn.typing()
        self.assertEqual(self.until_has(raw, b"\r\n"), b"e\r\n: keep-alive\n\n\r\n")
        turn.typing(False)
        turn.edit(message, 'a "ü" \u2028')
        self.assertEqual(self.until_has(raw, b"\r\n"), chunk(record('{"content":" \\u2028"}')))
        turn.end()
        last = self.rest(raw)
        self.assertEqual(last, chunk(record("{}", '"stop"') + b"data: [DONE]\n\n") + b"0\r\n\r\n", "the last chunk at once, and then the end")

    def test_the_end_follows_done_within_one_write(self):
        """No pause between `[DONE]` and the terminating chunk: a reader that waits for it is let go at once."""
        raw = self.connect()
        raw.sendall(self.request())
        turn = self.worker.question()
        self.until_has(raw, b"\n\n\r\n")
        turn.say("x")
        raw.settimeout(1.0)  # far less than any timeout of ours
        self.assertTrue(self.rest(raw).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"))

    def test_an_error_is_the_last_record_and_there_is_no_done(self):
        raw = self.connect()
        raw.sendall(self.request())
        self.worker.question().end("error")
        wire = self.rest(raw)
        error = b'data: {"error":{"message":"the worker failed; the answer is not complete","type":"server_error","param":null,"code":"worker_error"}}\n\n\r\n0\r\n\r\n'
        self.assertTrue(wire.endswith(error), wire[-400:])
        self.assertNotIn(b"[DONE]", wire)

    def test_no_record_is_empty_or_more_than_data(self):
        raw = self.connect()
        raw.sendall(self.request())
        turn = self.worker.question()
        message = turn.send("")
        for step in range(1, 30):
            turn.typing(step % 3 > 0)
            turn.edit(message, "line\n\ndata: x\r\n" * step)
        turn.end()
        text, chunked = b"", self.rest(raw).split(b"\r\n\r\n", 1)[1]
        while chunked:
            size, chunked = chunked.split(b"\r\n", 1)
            length = int(size, 16)
            self.assertEqual(size, b"%x" % length)
            text, end, chunked = text + chunked[:length], chunked[length : length + 2], chunked[length + 2 :]
            self.assertEqual(end, b"\r\n")
            self.assertTrue(length or not chunked, "nothing behind the last chunk")
        for one in text.removesuffix(b"\n\n").split(b"\n\n"):
            self.assertTrue(one == b": keep-alive" or re.fullmatch(rb"data: (\{.*\}|\[DONE\])", one), one)
            if one.startswith(b"data: {"):
                self.assertTrue({"message", "detail", "error"}.isdisjoint(json.loads(one[6:])))


class Heartbeat(Wire):
    settings = {"heartbeat_interval": "1s", "heartbeat_timeout": "1s"}

    def test_comments_come_at_its_interval(self):
        raw = self.connect()
        raw.sendall(self.request())
        turn = self.worker.question()
        self.until_has(raw, b"\n\n\r\n")
        for _ in range(2):
            self.assertEqual(self.until_has(raw, b"\r\n"), b"e\r\n: keep-alive\n\n\r\n")
        turn.say("x")
        self.assertTrue(self.rest(raw).endswith(b"[DONE]\n\n\r\n0\r\n\r\n"))


class OddRequests(Wire):
    settings = {"body_timeout": "1s", "header_timeout": "1s"}

    def test_a_request_that_ends_at_any_byte(self):
        whole = self.request()
        for end in range(len(whole)):
            raw = self.connect()
            raw.sendall(whole[:end])
            raw.shutdown(socket.SHUT_WR)
            answer = self.rest_or_reset(raw)
            if answer:
                self.assertIn(int(answer.split(b" ", 2)[1]), (400, 408), whole[:end])
        self.assertEqual(self.worker.asked, 0)
        self.assert_it_lives()

    def rest_or_reset(self, raw):
        try:
            return self.rest(raw)
        except ConnectionResetError:
            return b""

    def test_a_body_that_says_less_than_its_length_is_cut_off_anywhere(self):
        for end in range(len(SMALL)):
            raw = self.connect()
            raw.sendall(self.request(SMALL[:end]))  # a length that fits what there is
            status, body = self.answer_of(raw)
            self.assert_refused(status, body, [400])
        self.assertEqual(self.worker.asked, 0)
        self.assert_it_lives()

    def test_a_body_that_stops_coming_is_408(self):
        sockets = [self.connect() for _ in range(len(SMALL))]
        for end, raw in enumerate(sockets):
            raw.sendall(self.request(SMALL[:end], length=len(SMALL)))
        for raw in sockets:
            status, body = self.answer_of(raw)
            error = self.assert_refused(status, body, [408])
            self.assertEqual((error["type"], error["code"]), ("timeout", "timeout"))
        self.assert_it_lives()

    def test_a_body_in_pieces_of_one_byte_is_whole(self):
        raw = self.connect()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in self.request():
            raw.sendall(bytes([byte]))
        turn = self.worker.question()
        self.assertEqual(turn.message["content"], "hi ü")
        turn.say("x")
        self.assertIn(b"[DONE]", self.rest(raw))

    def test_a_chunked_body(self):
        raw = self.connect()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.gateway.host}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        raw.sendall(head + b"".join(b"1\r\n%c\r\n" % byte for byte in SMALL) + b"0\r\n\r\n")
        turn = self.worker.question()
        self.assertEqual(turn.message["content"], "hi ü")
        turn.say("x")
        self.assertIn(b"[DONE]", self.rest(raw))

    def test_what_real_clients_do_is_taken(self):
        for path in ("/v1/chat/completions", "//v1//chat///completions", "/v1/chat/completions?api-version=1"):
            for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer"}, {"Authorization": "Bearer sk-any"}, {"Accept": "application/json"}, {"Accept_Encoding": "gzip, deflate, br"}, {"Content_Type": "text/plain"}):
                with self.subTest(path, **headers):
                    raw = self.connect()
                    raw.sendall(self.request(path=path, **headers))
                    self.worker.question().say("x")
                    wire = self.rest(raw)
                    self.assertTrue(wire.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream"), wire[:200])
                    self.assertNotIn(b"content-encoding", wire)
                    self.assertTrue(wire.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"))
        for path in ("/v1/models", "//v1///models", "/v1//models/tabcast"):
            self.assertEqual(self.gateway.http("GET", path, headers={"Authorization": "Bearer "}).status, 200, path)

    def test_an_old_client_s_stream_is_505_and_whole_answers_are_not(self):
        raw = self.connect()
        raw.sendall(self.request().replace(b"HTTP/1.1", b"HTTP/1.0"))
        self.assert_refused(*self.answer_of(raw), [505])
        raw = self.connect()
        raw.sendall(self.request(SMALL.replace(b"true", b"null")).replace(b"HTTP/1.1", b"HTTP/1.0"))
        self.worker.question().say("old but whole")
        self.assertIn(b"old but whole", self.rest(raw))


class Leaving(Wire):
    """With a worker of its own: what is asked may come to it when the test is over."""

    def test_a_client_that_goes_away_at_once_leaves_nothing(self):
        for _ in range(20):
            raw = self.connect()
            raw.sendall(self.request())
            raw.close()
        alive = self.assert_it_lives()
        # What the worker was not given yet when its client left, it never gets.
        until("each that was asked is told of once", lambda: sorted(self.worker.cancelled) == sorted(set(self.worker.ids) - {alive}))


class BadBodies(Wire):
    def test_are_4xx_in_openai_s_shape(self):
        ask = lambda **keys: json.dumps({"messages": [{"role": "user", "content": "x"}], **keys})
        messages = lambda *list: json.dumps({"messages": list})
        content = lambda value: messages({"role": "user", "content": value})
        deep = lambda levels: '{"messages":[{"role":"user","content":"x"}],"x":' + "[" * levels + "]" * levels + "}"
        bad = {
            "nothing": "",
            "space": "  ",
            "no JSON": "hello",
            "half": '{"messages":[{"role":"user","content":"x"',
            "two": ask() + ask(),
            "a list": "[]",
            "a text": '"messages"',
            "null": "null",
            "a number": "1e999999",
            "a BOM": "\ufeff" + ask(),
            "NaN": '{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
            "bad UTF-8": b'{"messages":[{"role":"user","content":"\xff"}]}',
            "half a character": b'{"messages":[{"role":"user","content":"\xf0\x9f\x98"}]}',
            "a surrogate in UTF-8": b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
            "half a surrogate pair": '{"messages":[{"role":"user","content":"\\ud83d"}]}',
            "a raw line break": '{"messages":[{"role":"user","content":"a\nb"}]}',
            "deep": deep(200),
            "deeper": deep(100_000),
            "deep objects": '{"a":' * 50_000,
            "deep content": content(None).replace("null", "[" * 5000),
            "no messages": "{}",
            "null messages": '{"messages":null}',
            "empty messages": messages(),
            "messages of a text": '{"messages":"hi"}',
            "messages of an object": '{"messages":{"role":"user","content":"x"}}',
            "a message of null": messages(None),
            "a message of a text": messages("hi"),
            "a message of a list": messages([]),
            "a late bad message": messages({"role": "user", "content": "x"}, 7),
            "no role": messages({"content": "x"}),
            "unknown role": messages({"role": "nobody", "content": "x"}),
            "a role in capitals": messages({"role": "USER", "content": "x"}),
            "a role of a number": messages({"role": 1, "content": "x"}),
            "an empty role": messages({"role": "", "content": "x"}),
            "no content": messages({"role": "user"}),
            "content of null": content(None),
            "content of a number": content(1),
            "content of an object": content({"type": "text", "text": "x"}),
            "a part of null": content([None]),
            "a part of a text": content(["x"]),
            "a part without a type": content([{"text": "x"}]),
            "a part with a type of null": content([{"type": None}]),
            "a text part without text": content([{"type": "text"}]),
            "a text part of a number": content([{"type": "text", "text": 1}]),
            "a model of a number": ask(model=1),
            "a model of a list": ask(model=["a"]),
            "a long model": ask(model="m" * 257),
            "stream of a text": ask(stream="true"),
            "stream of a number": ask(stream=1),
            "stream_options of a text": ask(stream=True, stream_options="usage"),
            "include_usage of a text": ask(stream=True, stream_options={"include_usage": "yes"}),
            "two answers": ask(n=2),
            "no answers": ask(n=0),
            "n of a text": ask(n="1"),
            "too many values": ask(x=[0] * 200_000),
            "too large": ask(x="x" * (10 << 20)),
            "too large a text": content("x" * (10 << 20)),
        }
        for name, body in bad.items():
            with self.subTest(name):
                raw = self.connect()
                try:
                    raw.sendall(self.request(body if isinstance(body, bytes) else body.encode(), Content_Type="application/json"))
                except ConnectionError:
                    self.assertTrue(name.startswith("too large"), "only that is not read to its end")
                status, answer = self.answer_of(raw)
                error = self.assert_refused(status, answer, [413] if name.startswith("too large") else [400])
                self.assertEqual(error["type"], "invalid_request_error")
                self.assertLess(len(answer), 1000, "an error does not repeat the body")
        self.assertEqual(self.worker.asked, 0)

    def test_an_answer_of_413_reaches_who_is_still_sending(self):
        raw = self.connect()
        raw.sendall(self.request(b"", length=10 << 20))
        status, body = self.answer_of(raw)
        self.assertEqual(self.assert_refused(status, body, [413])["code"], "too_large")

    def test_what_is_odd_but_good_is_taken(self):
        good = {
            "empty text": ([{"role": "user", "content": ""}], ""),
            "no parts": ([{"role": "user", "content": []}], ""),
            "an empty part": ([{"role": "user", "content": [{"type": "text", "text": ""}]}], ""),
            "parts of another kind": ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "odd"}]}], ""),
            "a system message alone": ([{"role": "system", "content": "s"}], "s"),
            "an assistant's last": ([{"role": "user", "content": "u"}, {"role": "assistant", "content": None}], "u"),
            "a tool's": ([{"role": "user", "content": "u"}, {"role": "tool", "content": "t", "tool_call_id": "1"}], "u"),
            "doubled keys": ([{"role": "user", "content": "\U0001f600\u0000"}], "\U0001f600\u0000"),
        }
        for name, (messages, text) in good.items():
            with self.subTest(name):
                asking = self.apart(self.gateway.http, "POST", "/v1/chat/completions", json.dumps({"model": None, "stream": None, "n": 1, "messages": messages, "logit_bias": {}, "é": [1]}))
                turn = self.worker.question()
                self.assertEqual((turn.message["content"], turn.message["extra"]["openai"]["messages"]), (text, messages))
                turn.say("x")
                self.assertEqual(asking.result(PATIENCE).status, 200)


class Cors(Wire):
    LISTED, FOREIGN = "https://chat.example", "https://evil.example"
    key = "worker-key"
    settings = {"allowed_origins": LISTED, "api_keys": "worker-key", "openai_keys": "olga:key-of-olga"}

    def preflight(self, path, origin, method="POST", names="authorization, content-type, x-stainless-os, x-tabcast-detach"):
        asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": names}
        return self.gateway.http("OPTIONS", path, headers=asked)

    def test_a_listed_origin_may_ask(self):
        for path in ("/v1/chat/completions", "/v1/models", "/v1/models/tabcast", "/v1/chat/completions/chatcmpl-1/events", "/v1/chat/completions/chatcmpl-1", "//v1//models"):
            with self.subTest(path):
                answer = self.preflight(path, self.LISTED)
                self.assertEqual((answer.status, answer.body), (204, b""))
                self.assertEqual(answer.headers["access-control-allow-origin"], self.LISTED)
                self.assertTrue({"GET", "POST", "DELETE"} <= set(answer.headers["access-control-allow-methods"].split(", ")))
                self.assertEqual(answer.headers["access-control-allow-headers"], "authorization, content-type, x-stainless-os, x-tabcast-detach")
                self.assertEqual(answer.headers["vary"].lower(), "origin")

    def test_a_foreign_origin_may_not(self):
        for origin in (self.FOREIGN, "null", "https://chat.example.evil.example", "http://chat.example"):
            with self.subTest(origin):
                answer = self.preflight("/v1/chat/completions", origin)
                self.assertEqual(answer.status, 403)
                self.assertNotIn("access-control-allow-origin", answer.headers)

    def test_every_answer_can_be_read_by_a_listed_page_only(self):
        good = {"Authorization": "Bearer key-of-olga"}
        for origin in (self.LISTED, self.FOREIGN):
            readable = self.LISTED if origin == self.LISTED else None
            for method, path, headers, body in [
                ("GET", "/v1/models", good, None),
                ("GET", "/v1/models/none", good, None),
                ("GET", "/v1/models", {}, None),
                ("POST", "/v1/chat/completions", good, b"{}"),
                ("PUT", "/v1/chat/completions", good, b"{}"),
                ("GET", "/v1/nothing", good, None),
            ]:
                with self.subTest(f"{origin} {method} {path}"):
                    answer = self.gateway.http(method, path, body, {"Origin": origin, **headers})
                    self.assertEqual(answer.headers["access-control-allow-origin"], readable)
                    self.assertIn("origin", answer.headers["vary"].lower())
            with self.subTest(f"{origin} stream"):
                raw = self.connect()
                raw.sendall(self.request(Origin=origin, Authorization="Bearer key-of-olga"))
                if readable:
                    self.worker.question().say("x")
                    head = self.rest(raw).split(b"\r\n\r\n")[0].decode()
                    self.assertIn(f"access-control-allow-origin: {origin}", head)
                    self.assertIn("x-request-id", re.search("access-control-expose-headers: (.*)", head)[1])
                    self.assertIn("vary: origin", head)
                else:
                    head = self.first_head(raw)
                    self.assertNotIn("access-control-allow-origin", head)

    def first_head(self, raw):
        head = b""
        while b"\r\n\r\n" not in head:
            head += raw.recv(65536)
        return head.split(b"\r\n\r\n")[0].decode()


if __name__ == "__main__":
    unittest.main()
