"""What users say without a WebSocket: POST /events, and the rooms that an event stream is opened with."""

import base64
import contextlib
import json
import unittest
import uuid

import httpx
import httpx_sse

from gateway import PATIENCE, GatewayTest, token, until


class Saying(GatewayTest):
    def token(self, **claims):
        return token(SECRET, **claims)

    def post(self, frame, user=None, **headers):
        body = frame if isinstance(frame, bytes) else json.dumps(frame).encode()
        return self.gateway.http("POST", f"/events?user={user or self.user}&name=x", body, {"Content-Type": "application/json", **headers})

    @contextlib.contextmanager
    def reader(self, query, **headers):
        with httpx.Client(base_url=self.gateway.origin, timeout=PATIENCE) as client:
            with httpx_sse.connect_sse(client, "GET", f"/events?{query}", headers=headers) as source:
                self.assertEqual(source.response.status_code, 200)
                yield source.iter_sse()

    def frames(self, events, count):
        return [json.loads(next(events).data) for _ in range(count)]


SECRET = "a-secret-for-tests-only-of-32-bytes"
SETTINGS = {"token_keys": f"kid=main,alg=HS256,secret={SECRET}", "api_keys": "worker", "operator_keys": "operator", "openai_keys": "olga:openai"}


class InDevelopment(Saying):
    def test_a_message_is_acked_in_the_answer_and_goes_where_one_of_a_tab_goes(self):
        tab = self.tab()
        answer = self.post({"type": "message", "text": "by a request", "client_id": "1", "user_id": "mallory"})
        self.assertEqual((answer.status, answer.headers["Content-Type"]), (200, "application/json"))
        ack = answer.json()
        self.assertEqual(list(ack), ["type", "client_id", "id"])
        echo = tab.find("message", id=ack["id"])
        self.assertEqual((echo["text"], echo["sender"]), ("by a request", self.user))
        tab.find("edit")  # the demo worker has it

    def test_a_repeat_has_the_same_id_also_over_a_socket(self):
        tab = self.tab()
        frame = {"type": "message", "text": "once", "client_id": "again"}
        first, second = self.post(frame).json(), self.post(frame).json()
        self.assertEqual(first, second)
        self.assertEqual(tab.ask(**frame), first)
        other = self.post({**frame, "text": "other"})
        self.assertEqual((other.status, other.json()["code"]), (400, "bad_field"))

    def test_each_answer_has_its_status(self):
        shown = str(uuid.uuid4())
        for frame, status, expected in [
            ({"type": "ping", "client_id": "p"}, 200, {"type": "pong", "client_id": "p"}),
            ({"type": "typing", "active": True, "client_id": "t"}, 200, {"type": "ack", "client_id": "t"}),
            ({"type": "typing", "active": True}, 204, None),
            ({"type": "message", "text": "no answer wanted"}, 204, None),
            ({"type": "button", "message_id": shown, "custom_id": "x"}, 204, None),
            ({"type": "message", "client_id": "m"}, 400, {"code": "bad_field", "client_id": "m"}),
            ({"type": "message", "text": "x" * 16_385, "client_id": "l"}, 413, {"code": "too_large", "client_id": "l"}),
            ({"type": "join", "room": "r", "client_id": "j"}, 400, {"code": "bad_field", "client_id": "j"}),
            ({"type": "leave", "room": "r"}, 400, {"code": "bad_field"}),
            ({"type": "nothing"}, 400, {"code": "bad_frame"}),
            (b"no json", 400, {"code": "bad_frame"}),
            (b'{"type":"message","text":"\xff"}', 400, {"code": "bad_frame"}),
            (b'{"type":"message","text":"a","text":"b"}', 400, {"code": "bad_field"}),
            (b"", 400, {"code": "bad_frame"}),
        ]:
            with self.subTest(frame):
                answer = self.post(frame)
                self.assertEqual(answer.status, status, answer.body)
                if expected is None:
                    self.assertEqual(answer.body, b"")
                else:
                    self.assertLessEqual(expected.items(), answer.json().items())
        # Announced: the answer comes before it is sent.
        self.assert_error(self.post(b"x", **{"Content-Length": str(3 << 20)}), 413)

    def test_no_other_page_can_say_anything(self):
        frame = {"type": "message", "text": "x"}
        for headers, status in [
            ({"Origin": "https://evil.example"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ]:
            with self.subTest(headers):
                self.assert_error(self.post(frame, **headers), status)
        self.assert_error(self.gateway.http("POST", "/events", b"{}", {"Content-Type": "application/json"}), 400)  # nobody
        self.assertEqual(self.gateway.http("PUT", "/events?user=u", b"{}").headers["Allow"], "GET, POST, OPTIONS")

    def test_a_stream_joins_the_rooms_that_it_names(self):
        with self.reader(f"user={self.user}&room=hall&room=a+room%20%26%20more&room={'x' * 300}") as events:
            acks = self.frames(events, 3)
            self.assertEqual(acks[:2], [{"type": "ack", "client_id": "room-0"}, {"type": "ack", "client_id": "room-1"}])
            self.assertEqual((acks[2]["code"], acks[2]["client_id"]), ("too_large", "room-2"))
            self.gateway.api("send", {"channel_id": "room:hall", "text": "to the hall"})
            self.gateway.api("send", {"channel_id": "room:a room & more", "text": "to the other"})
            self.post({"type": "message", "text": "from one of them", "room": "hall"})
            self.assertEqual([frame["text"] for frame in self.frames(events, 3)], ["to the hall", "to the other", "from one of them"])

    def test_a_stream_that_is_cut_says_so(self):
        with self.reader(f"user={self.user}&hello=1") as events:
            self.frames(events, 1)
            self.assertEqual(self.gateway.http("DELETE", f"/api/users/{self.user}").json()["closed"], 1)
            [last] = events
            self.assertEqual((last.event, json.loads(last.data)), ("close", {"code": 4010, "reason": "kicked"}))


class WithKeys(Saying):
    settings = {
        **SETTINGS,
        "allowed_origins": "https://page.example",
        "inbound_messages_per_second_max": 2,
        "handshakes_per_address_per_second_max": 60,
        "rooms_max": 2,
    }

    def say(self, frame, jwt=None, **headers):
        return self.post(frame, Authorization=f"Bearer {jwt or self.token(sub=self.user, rooms=['team-*'])}", **headers)

    def test_the_token_says_who_speaks(self):
        self.assert_error(self.post({"type": "ping"}), 401)
        self.assert_error(self.say({"type": "ping"}, "not.a.token"), 401)
        for key in ("worker", "operator", "openai"):
            self.assert_error(self.say({"type": "ping"}, key), 401, 403)
        tab = self.gateway.tab(None, additional_headers={"Authorization": f"Bearer {self.token(sub=self.user)}"})
        self.addCleanup(tab.close)
        ack = self.say({"type": "message", "text": "me", "client_id": "1"}).json()
        self.assertEqual(tab.find("message", id=ack["id"])["sender"], self.user)

    def test_the_token_says_which_rooms(self):
        answer = self.say({"type": "message", "text": "x", "room": "lobby", "client_id": "1"})
        self.assertEqual((answer.status, answer.json()["code"], answer.json()["client_id"]), (403, "forbidden", "1"))
        self.assertEqual(self.say({"type": "message", "text": "x", "room": "team-a", "client_id": "2"}).status, 200)
        jwt = self.token(sub=self.user, rooms=["team-*"])
        with self.reader("room=team-a&room=lobby&room=team-b&room=team-c", Authorization=f"Bearer {jwt}") as events:
            self.assertEqual([frame.get("code", frame["type"]) for frame in self.frames(events, 4)], ["ack", "forbidden", "ack", "limit_reached"])

    def test_no_page_uses_the_cookie_of_somebody_who_is_signed_in(self):
        cookie = {"Cookie": f"tabcast_token={self.token(sub=self.user)}"}
        for origin, status in [(self.gateway.origin, 200), ("https://evil.example", 403), ("null", 403), (None, 403)]:
            with self.subTest(origin):
                answer = self.post({"type": "ping"}, **cookie, **({"Origin": origin} if origin else {}))
                self.assertEqual(answer.status, status, answer.body)

    def test_one_user_says_no_more_than_one_tab_may(self):
        answers = [self.say({"type": "ping", "client_id": str(n)}) for n in range(25)]
        self.assertEqual([answer.status for answer in answers[:20]], [200] * 20)
        refused = [answer for answer in answers if answer.status != 200]
        self.assertGreaterEqual(len(refused), 3)
        self.assertEqual({answer.status for answer in refused}, {429})
        last = refused[-1].json()
        self.assertEqual((last["type"], last["code"], last["client_id"], refused[-1].headers["Retry-After"]), ("error", "rate_limited", "24", "1"))
        self.assertEqual(self.say({"type": "ping"}, self.token(sub=f"{self.user}-other")).status, 200)

    def test_a_large_frame_past_the_rate_is_not_even_read(self):
        user = self.token(sub=self.user)
        # Legal, and over the 64 KiB that a shard's thread reads itself; any one may come after a silence.
        file = {"filename": "f", "mimetype": "image/png", "data": base64.b64encode(bytes(1 << 20)).decode()}
        large = {"type": "message", "text": "x", "client_id": "large", "attachments": [file]}
        accepted = self.say(large, user)
        self.assertEqual((accepted.status, accepted.json()["client_id"]), (200, "large"), accepted.body)
        refused = until("it is too much", lambda: (answer := self.say(large, user)).status == 429 and answer)
        self.assertEqual((refused.json()["code"], refused.headers["Retry-After"]), ("rate_limited", "1"))
        self.assertNotIn("client_id", refused.json())
        small = until("nothing fits", lambda: (answer := self.say({"type": "ping", "client_id": "small"}, user)).status == 429 and answer)
        self.assertEqual(small.json()["client_id"], "small")

    def test_pages_of_listed_origins_may_ask_and_read(self):
        asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
        preflight = self.gateway.http("OPTIONS", "/events", headers=asked)
        self.assertEqual((preflight.status, preflight.headers["Access-Control-Allow-Methods"]), (204, "GET, POST"))
        answer = self.say({"type": "ping"}, Origin="https://page.example")
        self.assertEqual((answer.status, answer.headers["Access-Control-Allow-Origin"]), (200, "https://page.example"))
        refused = self.say({"type": "ping"}, Origin="https://evil.example")
        self.assertEqual((refused.status, refused.headers["Access-Control-Allow-Origin"]), (403, None))


class AFlood(Saying):
    settings = {**SETTINGS, "handshakes_per_address_per_second_max": 5}

    def test_it_is_refused_before_a_token_is_looked_at(self):
        answers = [self.post({"type": "ping"}, Authorization="Bearer not.a.token").status for _ in range(12)]
        self.assertEqual(answers[:5], [401] * 5)
        self.assertIn(429, answers)


if __name__ == "__main__":
    unittest.main()
