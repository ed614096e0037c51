"""Who may what: development mode's guard, user tokens, and the classes of keys against each other's routes."""

import hashlib
import http.client
import json
import tempfile
import time
import unittest

from websockets.exceptions import InvalidStatus

from gateway import KEYS, PATIENCE, Answer, Gateway, GatewayTest, token, until
from scripted import OpenAITest

UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}


class DevelopmentMode(GatewayTest):
    def requests(self):
        body = json.dumps({"channel_id": self.user, "text": "x"}).encode()
        yield "POST", "/api/send", body, {"Content-Type": "application/json"}
        yield "GET", f"/ws?user={self.user}&name=x", None, UPGRADE
        yield "GET", f"/events?user={self.user}&name=x", None, {}
        yield "GET", "/api/users", None, {}

    def test_refuses_what_may_come_from_another_site_or_machine(self):
        foreign = [
            {"Origin": "https://evil.example"},
            {"Origin": f"http://127.0.0.1:{self.gateway.port + 1}"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Host": "evil.example"},
            {"Host": f"localhost.evil.example:{self.gateway.port}"},
            {"X-Forwarded-For": "10.0.0.1"},
            {"Forwarded": "for=10.0.0.1"},
            {"X-Real-IP": "10.0.0.1"},
        ]
        for extra in foreign:
            for method, path, body, headers in self.requests():
                with self.subTest(extra=extra, path=path):
                    self.assert_error(self.gateway.http(method, path, body, {**headers, **extra}), 403)

    def test_lets_its_own_page_and_local_names_in(self):
        own = [{}, {"Origin": self.gateway.origin}, {"Sec-Fetch-Site": "same-origin"}, {"Host": f"localhost:{self.gateway.port}"}, {"Host": f"localhost:{self.gateway.port}", "Origin": f"http://localhost:{self.gateway.port}"}]
        body = json.dumps({"channel_id": self.user, "text": "x"}).encode()
        for extra in own:
            with self.subTest(extra):
                answer = self.gateway.http("POST", "/api/send", body, {"Content-Type": "application/json", **extra})
                self.assertEqual(answer.status, 200, answer.body)
        self.tab(origin=self.gateway.origin)

    def test_api_bodies_are_json_or_marked_raw(self):
        body = json.dumps({"channel_id": self.user, "text": "x"}).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            with self.subTest(kind):
                self.assert_error(self.gateway.http("POST", "/api/send", body, {"Content-Type": kind}), 400, 403, 415)
        unmarked = self.gateway.http("POST", f"/api/file?channel_id={self.user}&filename=f", b"x", {"Content-Type": "image/png"})
        self.assert_error(unmarked, 400, 403, 415)


class TokenTest(GatewayTest):
    """How a token gets in."""

    def enter(self, jwt=None, way="header", **options):
        if way == "header" and jwt:
            options["additional_headers"] = {"Authorization": f"Bearer {jwt}"}
        elif way == "subprotocol":
            options["subprotocols"] = ["tabcast", f"tabcast.bearer.{jwt}"]
        elif way == "cookie":
            options["additional_headers"] = {"Cookie": f"other=1; tabcast_token={jwt}"}
        tab = self.gateway.tab(None, **options)
        self.addCleanup(tab.close)
        return tab

    def refused(self, *statuses, **how):
        with self.assertRaises(InvalidStatus) as caught:
            self.enter(**how)
        self.assertIn(caught.exception.response.status_code, statuses)


class Tokens(TokenTest):
    secret = "a secret for tests only, 32 bytes"

    @classmethod
    def setUpClass(cls):
        file = tempfile.NamedTemporaryFile("w", suffix=".secret")
        cls.addClassCleanup(file.close)
        file.write(cls.secret)
        file.flush()
        keys = [f"kid=main,alg=HS256,secret_file={file.name}", f"kid=again,alg=HS256,secret=file:{file.name}"]
        cls.settings = {"token_keys": ";".join(keys), "token_leeway": "0s"}
        super().setUpClass()

    def test_a_secret_may_be_in_a_file_under_either_name(self):
        for kid in ("main", "again"):
            with self.subTest(kid):
                self.enter(token(sub=self.user, kid=kid))
        path = self.settings["token_keys"].rsplit("secret=", 1)[1]
        self.refused(401, jwt=token(sub=self.user, kid="again", secret=path))

    def test_a_good_token_names_the_user_in_every_way_of_carrying_it(self):
        jwt = token(sub=self.user, name="Somebody")
        for way, options in {"header": {}, "subprotocol": {"origin": self.gateway.origin}, "cookie": {"origin": self.gateway.origin}}.items():
            with self.subTest(way):
                tab = self.enter(jwt, way, **options)
                if way == "subprotocol":
                    self.assertEqual(tab.socket.subprotocol, "tabcast", "the token is never echoed")
                ack = tab.ask(type="message", text=way)
                self.assertEqual(tab.find("message", id=ack["id"])["sender"] if ack["type"] == "ack" else ack, self.user)

    def test_the_address_names_nobody(self):
        with self.assertRaises(InvalidStatus) as caught:
            self.gateway.tab("alice")
        self.assertEqual(caught.exception.response.status_code, 401)

    def test_bad_tokens_are_401(self):
        now = int(time.time())
        bad = {
            "none": None,
            "expired": token(exp=now - 5),
            "without an end": token(exp=None),
            "not yet": token(nbf=now + 600),
            "alg none": token(algorithm="none"),
            "alg None": token(algorithm="None"),
            "another secret": token(secret="another secret of 32 bytes or so"),
            "another key": token(kid="other"),
            "nobody": token(sub=""),
            "a control character": token(sub="a\u0000b"),
            "no token": "nonsense",
            "two parts": token().rsplit(".", 1)[0],
            "another algorithm": token(algorithm="HS512"),
        }
        for name, jwt in bad.items():
            with self.subTest(name):
                self.refused(401, jwt=jwt)
        self.refused(401, 403, jwt=token(sub="star"))  # the bot itself

    def test_a_refusal_without_the_upgrade_says_401_too(self):
        answer = self.gateway.http("GET", "/ws")
        self.assert_error(answer, 401)
        answer = self.gateway.http("GET", "/ws", headers={"Authorization": f"Bearer {token(exp=1)}"})
        self.assert_error(answer, 401)
        answer = self.gateway.http("GET", "/ws", headers={"Authorization": f"Bearer {token()}"})
        self.assert_error(answer, 400, 426)

    def test_a_cookie_from_another_origin_is_403(self):
        jwt = token(sub=self.user)
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{self.gateway.port + 1}"):
            with self.subTest(origin):
                self.refused(403, jwt=jwt, way="cookie", origin=origin)

    def test_the_session_ends_with_its_token(self):
        for seconds in (2, 5, 15, 45):  # a busy machine may take longer than two to get in
            end = int(time.time()) + seconds
            try:
                tab = self.enter(token(sub=self.user, exp=end))
                break
            except (InvalidStatus, AssertionError):
                self.assertGreaterEqual(time.time(), end, "refused before its end")
        self.assertEqual(tab.closed(60)[0], (4001, "token expired"))
        self.assertGreaterEqual(time.time(), end)

    def test_rooms_are_those_that_the_token_names(self):
        tab = self.enter(token(sub=self.user, rooms=["den", "team-*"]))
        for room, kind in {"den": "ack", "team-red": "ack", "attic": "error", "den2": "error"}.items():
            with self.subTest(room):
                answer = tab.ask(type="join", room=room)
                self.assertEqual(answer["type"], kind, answer)
                if kind == "error":
                    self.assertEqual(answer["code"], "forbidden")

    def test_the_page_knows_its_mode(self):
        page = self.gateway.http("GET", "/").body.decode()
        self.assertIn('<meta name="tabcast-mode" content="token">', page)

    def test_events_take_the_same_tokens(self):
        self.assert_error(self.gateway.http("GET", "/events"), 401)
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=PATIENCE)
        self.addCleanup(connection.close)
        connection.request("GET", "/events", headers={"Authorization": f"Bearer {token(sub=self.user)}"})
        self.assertEqual(connection.getresponse().status, 200)


class OtherAlgorithms(TokenTest):
    settings = {
        "token_keys": ";".join(f"kid={name},alg={name},public_key_file={KEYS}/{name.lower()}.pub.pem" for name in ("RS256", "ES256", "EdDSA")),
        "token_issuer": "https://issuer.example",
        "token_audience": "chat",
    }
    good = {"iss": "https://issuer.example", "aud": "chat"}

    def test_a_token_of_each_names_its_user(self):
        for name in ("RS256", "ES256", "EdDSA"):
            with self.subTest(name):
                tab = self.enter(token(sub=self.user, algorithm=name, kid=name, **self.good))
                self.assertEqual(tab.ask(type="message", text="x")["type"], "ack")

    def test_a_signature_is_of_its_key_and_its_text(self):
        for name in ("RS256", "ES256", "EdDSA"):
            with self.subTest(name):
                head, claims, signed = token(sub=self.user, algorithm=name, kid=name, **self.good).split(".")
                other = token(sub="mallory", algorithm=name, kid=name, **self.good).split(".")[1]
                self.refused(401, jwt=f"{head}.{other}.{signed}")
                self.refused(401, jwt=f"{head}.{claims}.")
        for kid, signed_as in {"ES256": "RS256", "RS256": "HS256"}.items():
            with self.subTest(kid=kid, signed_as=signed_as):
                public = (KEYS / "rs256.pub.pem").read_text()  # the oldest trick: HMAC with the public key
                self.refused(401, jwt=token(sub=self.user, secret=public, algorithm=signed_as, kid=kid, **self.good))

    def test_issuer_and_audience_are_those_that_are_set(self):
        made = lambda **claims: token(sub=self.user, algorithm="ES256", kid="ES256", **claims)
        self.enter(made(**{**self.good, "aud": ["other", "chat"]}))
        for claims in ({}, {"iss": self.good["iss"]}, {"aud": "chat"}, {**self.good, "iss": "https://evil.example"}, {**self.good, "aud": "other"}, {**self.good, "aud": []}):
            with self.subTest(claims):
                self.refused(401, jwt=made(**claims))


class KeyClasses(GatewayTest):
    settings = {
        "token_keys": "kid=main,alg=HS256,secret=a-secret-for-tests-only-of-32-bytes",
        "api_keys": "worker-key",
        "openai_keys": "olga:openai-key",
        "operator_keys": "operator-key",
        "bad_keys_per_address_per_second_max": "0",  # the matrix shows more wrong keys than one address may
    }

    def test_none_opens_another_s_routes(self):
        keys = {"user": token(secret="a-secret-for-tests-only-of-32-bytes"), "worker": "worker-key", "openai": "openai-key", "operator": "operator-key", "wrong": "wrong-key", "empty": "", "nobody": None}
        send = json.dumps({"channel_id": "u", "text": "x"}).encode()
        # What its owner is answered: a body that is not the route's own is refused only after the key was taken.
        routes = [("GET", "/ws", None, "user", 101), ("GET", "/events", None, "user", 200)]
        routes += [("GET", f"/events?watch={watched}", None, "operator", 200) for watched in ("status", "u", "room:r", "sse:1")]
        routes += [("GET", "/metrics", None, "operator", 200), ("DELETE", "/api/users/nobody", None, "operator", 200)]
        routes += [("POST", f"/api/{route}", send, "worker", status) for route, status in {"send": 200, "file": 400, "buttons": 400, "edit": 400, "typing": 400, "end": 200, "batch": 200}.items()]
        routes += [("POST", "/events", b'{"type":"ping"}', "user", 200)]
        routes += [("GET", "/v1/models", None, "openai", 200), ("GET", "/v1/models/tabcast", None, "openai", 200), ("POST", "/v1/chat/completions", b"{}", "openai", 400)]
        routes += [("GET", "/v1/chat/completions/x/events", None, "openai", 404), ("DELETE", "/v1/chat/completions/x", None, "openai", 404)]
        routes += [("GET", "/api/users", None, "worker", 200), ("GET", "/api/users/u", None, "worker", 200)]
        for method, path, body, owner, status in routes:
            for name, key in keys.items():
                with self.subTest(f"{name}: {method} {path}"):
                    headers = {"Content-Type": "application/json"} if body else {}
                    headers.update(UPGRADE if path == "/ws" else {})
                    headers.update({} if key is None else {"Authorization": f"Bearer {key}"})
                    connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=PATIENCE)
                    self.addCleanup(connection.close)
                    connection.request(method, path, body=body, headers=headers)
                    response = connection.getresponse()
                    if name == owner:
                        self.assertEqual(response.status, status)
                        continue
                    # A key of another class is known, and may not; to /ws and /events it is no token at all.
                    known = name in ("worker", "openai", "operator") and owner != "user"
                    self.assert_error(Answer(response), 403 if known else 401)

    def test_workers_may_look_who_is_there(self):
        answer = self.gateway.http("GET", "/api/users", headers={"Authorization": "Bearer worker-key"})
        self.assertEqual(answer.status, 200, answer.body)

    def test_probes_need_no_key(self):
        for path in ("/healthz", "/readyz"):
            self.assertEqual(self.gateway.http("GET", path).status, 200)

    def test_an_operator_cuts_a_user(self):
        jwt = token(secret="a-secret-for-tests-only-of-32-bytes", sub=self.user)
        tab = self.gateway.tab(None, additional_headers={"Authorization": f"Bearer {jwt}"})
        self.addCleanup(tab.close)
        self.gateway.http("DELETE", f"/api/users/{self.user}", headers={"Authorization": "Bearer operator-key"})
        self.assertEqual(tab.closed()[0], (4010, "kicked"))
        users = lambda: self.gateway.http("GET", "/api/users", headers={"Authorization": "Bearer worker-key"}).body.decode()
        until("the user is gone", lambda: self.user not in users())


class WhoSpeaks(OpenAITest):
    """Whatever a frame says, its sender is who the token names: in the echo, and to the worker."""

    secret = "a-secret-for-tests-only-of-32-bytes"
    settings = {"token_keys": f"kid=main,alg=HS256,secret={secret}"}
    pretended = {"sender": "mallory", "user_id": "mallory", "user_name": "Mallory", "username": "Mallory", "display_name": "Mallory", "name": "Mallory", "platform": "discord", "channel_id": "webchat:mallory", "channel_key": "webchat:mallory", "unified_user_id": "mallory", "user_aliases": ["mallory"], "id": "6c84fb90-12c4-41e1-840d-7b25c5ee7750", "timestamp": 1.5, "extra": {"cancel": {"request_id": "x"}}}

    def bearer(self):
        return {"Authorization": f"Bearer {token(self.secret, sub=self.user, name='Ann')}"}

    def check(self, said, **expected):
        message = self.worker.question().message
        known = {name: message[name] for name in ("user_id", "username", "display_name", "platform", "channel_id", "channel_key", "unified_user_id", "user_aliases")}
        of = f"webchat:{self.user}"
        self.assertEqual(known, {"user_id": self.user, "username": "Ann", "display_name": "Ann", "platform": "webchat", "channel_id": of, "channel_key": of, "unified_user_id": None, "user_aliases": []})
        self.assertEqual({name: message[name] for name in expected}, expected)
        self.assertGreater(message["timestamp"], 1e9)
        self.assertNotIn("mallory", json.dumps(message).lower())
        self.assertNotIn("cancel", message["extra"])
        self.assertEqual(said["id"], message["message_id"])
        self.assertNotEqual(said["id"], self.pretended["id"])

    def test_is_never_what_the_frame_says(self):
        tab = self.gateway.tab(None, additional_headers=self.bearer())
        self.addCleanup(tab.close)
        mallory = self.gateway.tab(None, additional_headers={"Authorization": f"Bearer {token(self.secret, sub='mallory')}"})
        self.addCleanup(mallory.close)

        def echo(ack, text):
            shown = tab.find("message", id=ack["id"])
            self.assertEqual((shown["text"], shown["sender"]), (text, self.user))
            self.assertGreater(shown["timestamp"], 1e9)

        ack = tab.ask(type="message", text="over a socket", **self.pretended)
        self.assertEqual(ack["type"], "ack", ack)
        echo(ack, "over a socket")
        self.check(ack, content="over a socket")
        frame = {"type": "message", "text": "by a request", "client_id": "1", **self.pretended}
        posted = self.gateway.http("POST", "/events", json.dumps(frame).encode(), {"Content-Type": "application/json", **self.bearer()})
        self.assertEqual(posted.status, 200, posted.body)
        echo(posted.json(), "by a request")
        self.check(posted.json(), content="by a request")
        shown = "1c84fb90-12c4-41e1-840d-7b25c5ee7750"
        ack = tab.ask(type="button", message_id=shown, custom_id="yes", **self.pretended)
        self.assertEqual(ack["type"], "ack", ack)
        message = self.worker.question().message
        self.assertEqual((message["user_id"], message["username"], message["content"], message["extra"]), (self.user, "Ann", "yes", {"button": {"message_id": shown, "custom_id": "yes"}}))
        # Nothing of all this reached whom the frames named.
        mallory.send({"type": "ping"})
        self.assertEqual(mallory.frame(), {"type": "pong"})


class Guesses(GatewayTest):
    """Keys tried one after the other. Each test's addresses are behind a proxy, as those of all limits may be."""

    # Of each class one of 16 bytes, and one that can be guessed, which only its length when it is shown tells.
    worker, olga, operator = "a-worker-s-key-2", "the-openai-s-key", "an-operator-key2"
    short = {worker: "a-worker-s-key1", olga: "an-openai-s-key", operator: "an-operator-key"}
    digest = lambda key: f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    settings = {
        "api_keys": f"{worker},{digest(short[worker])}",
        "openai_keys": f"olga:{olga},bob:{digest(short[olga])}",
        "operator_keys": f"{operator},{digest(short[operator])}",
        "trusted_proxies": "127.0.0.1",
        "bad_keys_per_address_per_second_max": 1,
    }

    def show(self, key, address, method="GET", path="/api/users", body=None):
        headers = {"Content-Type": "application/json", "X-Forwarded-For": address, **({"Authorization": f"Bearer {key}"} if key else {})}
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=PATIENCE)
        self.addCleanup(connection.close)
        connection.request(method, path, body=body, headers=headers)
        return connection.getresponse()

    routes = [("POST", "/api/end", b'{"channel_id":"sse:x"}', worker), ("GET", "/api/users", None, worker), ("GET", "/v1/models", None, olga), ("GET", "/metrics", None, operator), ("DELETE", "/api/users/u", None, operator), ("GET", "/events?watch=status", None, operator)]

    def refused(self, show, key):
        """What the brake says to `key`: the next second may begin between a wrong one and that."""

        def refused():
            show("no-key-of-anybody")
            answer = show(key)
            return answer.status == 429 and answer

        return until(f"{key!r} is refused", refused)

    def test_are_429_on_every_route_and_short_ones_before_they_are_looked_at(self):
        for number, (method, path, body, key) in enumerate(self.routes):
            with self.subTest(f"{method} {path}"):
                address, other = f"192.0.2.{number}", f"198.51.100.{number}"
                show = lambda key, address=address: self.show(key, address, method, path, body)
                self.assertEqual(show("no-key-of-anybody").status, 401)
                # Not even the right one is told, whether its length was known or not; nor is a longer one looked for in vain.
                for refused in (self.short[key], None, "no-key-of-anybody"):
                    answer = self.refused(show, refused)
                    self.assertEqual(answer.headers["Retry-After"], "1")
                    self.assertEqual(json.loads(answer.read())["error"]["code"], "rate_limited")
                self.assertEqual(show(self.short[key], other).status, 200, "another address behind the same proxy")
                until("a second later it is taken", lambda: show(self.short[key]).status == 200)
        metrics = self.show(self.operator, "203.0.113.1", path="/metrics").read().decode()
        count = next(line for line in metrics.splitlines() if 'reason="bad_keys_of_address"' in line)
        self.assertGreaterEqual(int(count.rsplit(" ", 1)[1]), 3 * len(self.routes))

    def test_shut_nobody_out_who_has_a_long_key(self):
        for number, (method, path, body, key) in enumerate(self.routes):
            with self.subTest(f"{method} {path}"):
                show = lambda key: self.show(key, f"192.0.2.{100 + number}", method, path, body)
                seen = set()
                # Each round shows that the brake holds, and that it does not let go of the longest.
                for _ in range(5):
                    self.refused(show, "no-key-of-anybody")
                    seen.add(show(key).status)
                self.assertEqual(seen, {200})
        show = lambda key: self.show(key, "192.0.2.99")
        self.refused(show, "no-key-of-anybody")
        self.assertEqual(show(self.operator).status, 403, "one of another class is no guess")

    def test_good_keys_and_none_are_no_guesses(self):
        for key, status in ((self.worker, 200), (None, 401), (self.operator, 403)):
            with self.subTest(status):
                self.assertEqual({self.show(key, "192.0.2.77").status for _ in range(10)}, {status})

    def test_public_paths_stay_open(self):
        until("it is refused", lambda: self.show("wrong", "192.0.2.78").status == 429)
        self.show("wrong", "192.0.2.78")
        for path in ("/healthz", "/", "/tabcast.js"):
            self.assertEqual(self.show("wrong", "192.0.2.78", path=path).status, 200)

    def test_short_keys_are_warned_about_at_the_start(self):
        self.assertNotIn("can be guessed", self.gateway.log_text())
        weak = Gateway(api_keys="a-short-key", webhook_secret="hush")
        self.addCleanup(weak.stop)
        log = weak.log_text()
        for warning in ("api_keys: 1 with less than 16 bytes", "webhook_secret has less than 16 bytes"):
            self.assertIn(warning, log)
        self.assertNotIn("a-short-key", log)


if __name__ == "__main__":
    unittest.main()
