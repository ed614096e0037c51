"""What must be refused: with the standard status or close code, and an error that says what and how much is allowed."""

import http.client
import json
import select
import socket
import threading
import unittest

from gateway import PATIENCE, Answer, GatewayTest, close_code, masked, read_frame, until

ID = "6c84fb90-12c4-41e1-840d-7b25c5ee7750"


class BadFrames(GatewayTest):
    settings = {"message_bytes_max": "32KiB", "attachment_bytes_max": "4KiB", "text_chars_max": 1000, "worker": "demo"}

    def test_are_answered_and_the_connection_stays(self):
        wrong = {
            "bad_frame": ["not json", "[]", '"text"', "{}", '{"type":"nope"}', '{"type":7}', '{"type":"message","text":"a"', ""],
            "bad_field": [
                '{"type":"message"}',
                '{"type":"message","text":7}',
                '{"type":"message","text":"x","reply_to":"not-a-uuid"}',
                f'{{"type":"button","message_id":"{ID}"}}',
                '{"type":"button","message_id":"x","custom_id":"y"}',
                '{"type":"typing","active":"yes"}',
                '{"type":"join"}',
                '{"type":"join","room":""}',
                '{"type":"message","text":"x","attachments":[{"filename":"a","mimetype":"b","data":"%%%"}]}',
            ],
        }
        for code, frames in wrong.items():
            for text in frames:
                with self.subTest(text):
                    tab = self.tab()
                    tab.send(text)
                    error = tab.frame()
                    self.assertEqual(error["type"], "error")
                    self.assertEqual(error["code"], code)
                    self.assertTrue(error["message"])
                    tab.send({"type": "ping"})
                    self.assertEqual(tab.frame()["type"], "pong")

    def test_a_refusal_carries_the_client_id(self):
        tab = self.tab()
        self.assertEqual(tab.ask(type="message", client_id="mine")["code"], "bad_field")

    def test_a_text_over_the_limit_is_refused_with_the_limit(self):
        tab = self.tab()
        error = tab.ask(type="message", text="x" * 1001)
        self.assertEqual(error["code"], "too_large")
        self.assertRegex(error["message"], "1,?000")
        self.assertEqual(tab.ask(type="message", text="ü" * 1000)["type"], "ack", "characters count, not bytes")

    def test_an_attachment_over_the_limit_is_refused(self):
        tab = self.tab()
        data = "A" * (4 * ((4 << 10) // 3 + 4))
        error = tab.ask(type="message", text="x", attachments=[{"filename": "f", "mimetype": "a/b", "data": data}])
        self.assertEqual(error["code"], "too_large")

    def test_a_flood_of_them_ends_with_1008(self):
        raw, stream = self.raw_tab()
        raw.sendall(b"".join(masked(1, b"no json") for _ in range(100)))
        code, errors = close_code(stream)
        self.assertEqual(code, 1008)
        self.assertGreaterEqual(len(errors), 5)

    def test_a_binary_message_ends_with_1003(self):
        tab = self.tab()
        tab.send(b"bytes")
        self.assertEqual(tab.closed()[0][0], 1003)

    def test_a_message_over_the_limit_ends_with_1009(self):
        raw, stream = self.raw_tab()
        raw.sendall(masked(1, b" " * (1 << 20))[: 64 << 10])  # its length alone is enough
        self.assertEqual(close_code(stream)[0], 1009)

    def test_fragments_over_the_limit_together_end_with_1009(self):
        raw, stream = self.raw_tab()
        raw.sendall(masked(1, b" " * 8000, final=False))
        try:
            for _ in range(40):
                raw.sendall(masked(0, b" " * 8000, final=False))
        except OSError:
            pass  # already cut
        self.assertEqual(close_code(stream)[0], 1009)

    def test_a_message_in_fragments_with_a_ping_between_is_read(self):
        raw, stream = self.raw_tab()
        whole = json.dumps({"type": "ping", "client_id": "ü"}, ensure_ascii=False).encode()
        cut = whole.index("ü".encode()) + 1  # inside the character
        raw.sendall(masked(1, whole[:cut], final=False) + masked(9, b"between") + masked(0, whole[cut:]))
        self.assertEqual(read_frame(stream), (10, b"between"))
        self.assertEqual(json.loads(read_frame(stream)[1]), {"type": "pong", "client_id": "ü"})

    def test_what_breaks_rfc_6455_ends_with_1002(self):
        cases = {
            "not masked": b"\x81\x02hi",
            "a reserved bit": bytes([masked(1, b"{}")[0] | 0x40]) + masked(1, b"{}")[1:],
            "a reserved opcode": masked(3, b""),
            "a continuation of nothing": masked(0, b"x"),
            "a fragmented ping": masked(9, b"", final=False),
            "a ping of 126 bytes": masked(9, b"x" * 126),
            "a message inside a message": masked(1, b"{", final=False) + masked(1, b"{}"),
            "a length that is not minimal": b"\x81\xfe\x00\x02\x00\x00\x00\x00{}",
            "a close of one byte": masked(8, b"\x03"),
            "a close code that is never sent": masked(8, b"\x03\xed"),
        }
        for name, data in cases.items():
            with self.subTest(name):
                raw, stream = self.raw_tab()
                raw.sendall(data)
                self.assertEqual(close_code(stream)[0], 1002)

    def test_text_that_is_not_utf_8_ends_with_1007(self):
        for name, data in {"one frame": masked(1, b'{"type":"\xff"}'), "before its end": masked(1, b"\xc3\x28", final=False)}.items():
            with self.subTest(name):
                raw, stream = self.raw_tab()
                raw.sendall(data)
                self.assertEqual(close_code(stream)[0], 1007)

    def test_a_close_is_answered_in_kind(self):
        raw, stream = self.raw_tab()
        raw.sendall(masked(8, b"\x03\xe8bye"))
        self.assertEqual(close_code(stream)[0], 1000)


class BadRequests(GatewayTest):
    settings = {"header_timeout": "1s", "body_bytes_max": "64KiB", "body_timeout": "2s", "file_bytes_max": "32KiB"}

    def test_wrong_methods_are_405_and_name_the_right_one(self):
        for method, path, allowed in [("GET", "/api/send", "POST"), ("DELETE", "/api/edit", "POST"), ("POST", "/healthz", "GET"), ("PUT", "/events", "GET"), ("POST", "/api/users", "GET"), ("POST", "/", "GET")]:
            with self.subTest(f"{method} {path}"):
                answer = self.gateway.http(method, path, b"" if method in ("POST", "PUT") else None, {"Content-Type": "application/json"})
                self.assert_error(answer, 405)
                self.assertIn(allowed, answer.headers["Allow"])

    def test_unknown_paths_are_404(self):
        for path in ("/nothing", "/api/nothing", "/api", "/index.php", "/%00", "/../Cargo.toml"):
            with self.subTest(path):
                self.assert_error(self.gateway.http("GET", path), 404)

    def test_malformed_and_missing_bodies_are_400(self):
        for route in ("send", "file", "buttons", "edit", "typing", "end"):
            for body in (b"", b"{", b"nonsense", b"[]", b"null", b"{}", b'{"channel_id":7}', b'{"channel_id":"u","text":"\xff"}'):
                with self.subTest(route=route, body=body):
                    self.assert_error(self.gateway.http("POST", f"/api/{route}", body, {"Content-Type": "application/json"}), 400, 411, 422)

    def test_wrong_values_are_400(self):
        cases = [
            ("send", {"channel_id": "", "text": "x"}),
            ("send", {"channel_id": "webchat:", "text": "x"}),
            ("send", {"channel_id": "a\u0000b", "text": "x"}),
            ("send", {"channel_id": "a\r\nPUBLISH", "text": "x"}),
            ("send", {"channel_id": "a" * 257, "text": "x"}),
            ("send", {"channel_id": "u", "text": 7}),
            ("send", {"channel_id": "u", "text": "x", "reply_to": "no uuid"}),
            ("edit", {"channel_id": "u", "message_id": "no uuid", "text": "x"}),
            ("typing", {"channel_id": "u", "active": "yes"}),
            ("end", {"channel_id": "sse:r", "reason": "because"}),
            ("file", {"channel_id": "u", "filename": "f", "data": "not base64!"}),
            ("buttons", {"channel_id": "u", "text": "x", "buttons": [{"label": "x" * 81, "custom_id": "a"}]}),
            ("buttons", {"channel_id": "u", "text": "x", "buttons": [{"label": "x", "custom_id": "a" * 101}]}),
            ("buttons", {"channel_id": "u", "text": "x", "buttons": [{"label": "x", "custom_id": "a"}] * 26}),
            ("buttons", {"channel_id": "u", "text": "x", "buttons": [{"label": "x", "custom_id": "a", "style": "loud"}]}),
            ("buttons", {"channel_id": "u", "text": "x"}),
        ]
        for route, value in cases:
            with self.subTest(route=route, value=str(value)[:80]):
                self.assert_error(self.gateway.post(route, value), 400, 422)

    def test_a_body_over_the_limit_is_413_and_says_the_limit(self):
        error = self.assert_error(self.gateway.post("send", {"channel_id": "u", "text": "x" * (100 << 10)}), 413)
        self.assertRegex(error["message"], r"65,?536|64 ?KiB")

    def test_a_chunked_body_over_the_limit_is_413(self):
        head = f"POST /api/send HTTP/1.1\r\nHost: {self.gateway.host}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        whole = head.encode() + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 40 + b"0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE) as raw:

            def send():
                try:
                    raw.sendall(whole)
                except OSError:
                    pass  # the gateway need not take what it has refused

            sender = threading.Thread(target=send, daemon=True)
            sender.start()
            response = http.client.HTTPResponse(raw)
            response.begin()
            self.assert_error(Answer(response), 413)
            sender.join(PATIENCE)

    def test_a_file_over_the_limit_is_413(self):
        path = f"/api/file?channel_id={self.user}&filename=f"
        self.assert_error(self.gateway.http("POST", path, b"x" * (40 << 10), {"Content-Type": "image/png", "X-Tabcast-Raw": "1"}), 413)

    def slow(self, head):
        """Sends `head` and nothing more: what comes back before the connection ends, and that it does end."""
        with socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE) as raw:
            raw.sendall(head)
            answer = b""
            try:
                while part := raw.recv(4096):
                    answer += part
            except ConnectionResetError:
                pass
            return answer

    def test_slow_headers_end_the_connection(self):
        for head in (b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
            with self.subTest(head):
                answer = self.slow(head)
                self.assertTrue(answer == b"" or b" 408 " in answer.split(b"\r\n")[0], answer[:200])

    def test_a_slow_body_is_408(self):
        head = f"POST /api/send HTTP/1.1\r\nHost: {self.gateway.host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode()
        self.assertIn(b" 408 ", self.slow(head).split(b"\r\n")[0])

    def test_headers_over_the_limit_are_431(self):
        with socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE) as raw:
            raw.sendall(f"GET / HTTP/1.1\r\nHost: {self.gateway.host}\r\nX-Long: {'x' * (64 << 10)}\r\n\r\n".encode())
            self.assertIn(b" 431 ", raw.recv(200).split(b"\r\n")[0])

    def test_more_than_a_hundred_headers_are_431(self):
        for count, status in ((100, b" 200 "), (101, b" 431 ")):
            with self.subTest(count), socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE) as raw:
                others = "".join(f"X-{number}: x\r\n" for number in range(count - 1))
                raw.sendall(f"GET /healthz HTTP/1.1\r\nHost: {self.gateway.host}\r\n{others}\r\n".encode())
                self.assertIn(status, raw.recv(200).split(b"\r\n")[0])

    def test_a_websocket_handshake_that_is_none_is_refused(self):
        answer = self.gateway.http("GET", f"/ws?user={self.user}")
        self.assert_error(answer, 400, 426)
        wrong = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x" * 22 + "==", "Sec-WebSocket-Version": "12"}
        answer = self.gateway.http("GET", f"/ws?user={self.user}", headers=wrong)
        self.assert_error(answer, 400, 426)

    def test_a_websocket_without_a_user_or_with_a_bad_one_is_400(self):
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
        for query in ("", "?user=", "?user=a%00b", f"?user={'a' * 257}"):
            with self.subTest(query[:20]):
                self.assert_error(self.gateway.http("GET", f"/ws{query}", headers=upgrade), 400, 401)


class ManyBodies(GatewayTest):
    """What all bodies that are held at one time may take, wherever they go."""

    settings = {"file_bytes_max": "4KiB", "body_bytes_max": "64KiB", "bodies_bytes_max": "64KiB", "users_listed_max": "40", "worker": "none"}

    def held(self, body):
        """A request all of whose body is read but the last byte."""
        raw = socket.create_connection(("127.0.0.1", self.gateway.port), timeout=PATIENCE)
        self.addCleanup(raw.close)
        raw.sendall(f"POST /api/send HTTP/1.1\r\nHost: {self.gateway.host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
        return raw

    def test_past_it_a_request_is_503_and_counted(self):
        said = {"type": "message", "text": "x", "attachments": [{"filename": "f", "mimetype": "image/png", "data": "A" * 20_000}]}
        chat = {"messages": [{"role": "user", "content": "x" * 20_000}], "stream": True}
        sends = {"channel_id": self.user, "text": "x" * 20_000}
        routes = {"/api/send": sends, f"/events?user={self.user}&name=x": said, "/v1/chat/completions": chat}
        ask = lambda path: self.gateway.http("POST", path, json.dumps(routes[path]).encode(), {"Content-Type": "application/json"})
        body = json.dumps({"channel_id": self.user, "text": "x" * 50_000}).encode()
        held = self.held(body)

        def is_held():
            nonlocal held
            # Bodies come in pieces: what is asked here may have had room before the last of them.
            is_refused = ask("/api/send").status == 503
            if not select.select([held], [], [], 0.5 if is_refused else 0)[0]:
                return is_refused and ask("/api/send").status == 503 and not select.select([held], [], [], 0.5)[0]
            held.close()
            held = self.held(body)
            return False

        until("it is held", is_held)
        before = self.refusals("bodies")
        for path in routes:
            with self.subTest(path):
                answer = ask(path)
                self.assertEqual(self.assert_error(answer, 503)["code"], "overloaded")
                self.assertEqual(answer.headers["Retry-After"], "1")
        tabs = self.tabs(2, "ann") + [self.tab(f"{self.user}-{number}") for number in range(30)]
        answer = self.gateway.http("GET", "/api/users")
        self.assertEqual(self.assert_error(answer, 503)["code"], "overloaded")
        self.assertEqual(answer.headers["Retry-After"], "1")
        self.assertEqual(self.refusals("bodies") - before, len(routes) + 1)
        held.sendall(b"}")
        response = http.client.HTTPResponse(held)
        response.begin()
        self.assertEqual(response.status, 200, "what is held is not touched")
        listing = until("there is room for a listing", lambda: (answer := self.gateway.http("GET", "/api/users")).status == 200 and answer)
        self.assertEqual((len(listing.json()["users"]), listing.json()["tab_count"]), (31, len(tabs)))
        for path in ("/api/send", f"/events?user={self.user}&name=x"):
            self.assertLess(until("there is room again", lambda: (answer := ask(path)).status != 503 and answer).status, 300)


if __name__ == "__main__":
    unittest.main()
