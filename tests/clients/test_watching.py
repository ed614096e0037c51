"""What an operator sees: `/events?watch=status` once a second, and `/events?watch=<channel>` as it goes by."""

import contextlib
import json
import unittest

import httpx
import httpx_sse

from gateway import PATIENCE, Gateway, GatewayTest, token, until
from redis_nodes import NodesTest

SECRET = "a-secret-for-tests-only-of-32-bytes"
OPERATOR = {"Authorization": "Bearer operator-key"}
# What a stalled connection takes before its queue grows: a few MiB of the kernel's.
LARGE = "x" * 15_000


class Watches:
    headers: dict = {}

    @contextlib.contextmanager
    def watch(self, watched, gateway=None):
        """The frames that whoever watches gets, one after the other."""
        origin = (gateway or self.gateway).origin
        with httpx.Client(base_url=origin, timeout=PATIENCE) as client:
            with httpx_sse.connect_sse(client, "GET", "/events", params={"watch": watched}, headers=self.headers) as source:
                self.assertEqual(source.response.status_code, 200)
                self.assertEqual(source.response.headers["content-type"], "text/event-stream; charset=utf-8")
                yield (json.loads(event.data) for event in source.iter_sse() if event.data)

    def status_when(self, statuses, what, accept):
        """The first frame that `accept` takes: they come once a second."""
        for _ in range(30):
            status = next(statuses)
            self.assertEqual(status["type"], "status")
            if accept(status):
                return status
        self.fail(f"not within 30 frames: {what}; the last: {status}")


class Watching(Watches, GatewayTest):
    def say(self, channel, text):
        return self.gateway.api("send", {"channel_id": channel, "text": text})

    def stall(self, user):
        """A tab that reads nothing until it is cut."""
        self.raw_tab(user, receive_buffer=4096)
        before = self.discarded()
        for _ in range(2_000):
            self.say(user, LARGE)
            if self.discarded() > before:
                return
        self.fail("it was not cut")

    def discarded(self):
        for line in self.gateway.http("GET", "/metrics").body.decode().splitlines():
            if line.startswith('tabcast_ended_sessions_total{reason="slow_consumer"}'):
                return int(line.split()[1])
        return 0


class Status(Watching):
    settings = {"shards": "2", "session_queue_bytes_max": "65536", "recovery_bytes_max": "32768", "tabs_per_user_max": "3"}

    def test_once_a_second_it_says_how_the_node_is(self):
        tabs = self.tabs(2)
        with self.watch("status") as statuses:
            first = next(statuses)
            keys = {"type", "node", "version", "mode", "timestamp", "uptime_seconds", "interval_seconds", "health", "sessions", "rates"}
            keys |= {"latency_micros", "queues", "process", "shards", "redis", "top_users", "ended", "ended_total", "refusals"}
            self.assertEqual(set(first), keys)
            self.assertEqual((first["mode"], first["redis"], first["health"]), ("development", None, {"ready": True, "draining": False, "reason": None}))
            self.assertTrue(first["node"].endswith(f":{self.gateway.port}"), first["node"])
            self.assertGreater(first["process"]["resident_bytes"], 1 << 20)
            self.assertGreater(first["process"]["open_files"], 5)
            self.assertEqual(len(first["shards"]), 2)
            here = self.status_when(statuses, "both tabs", lambda status: {"user_id": self.user, "tabs": 2, "queue_frames": 0, "queue_bytes": 0} in status["top_users"])
            self.assertGreater(here["timestamp"], first["timestamp"])
            self.assertGreaterEqual(here["sessions"]["now"], 2)
            self.say(self.user, "hello")
            busy = self.status_when(statuses, "a publish", lambda status: status["rates"]["publishes"] > 0)
            self.assertGreaterEqual(busy["rates"]["deliveries"], 2 * busy["rates"]["publishes"])
            self.assertTrue(0.3 < busy["interval_seconds"] < 10, busy["interval_seconds"])
        for tab in tabs:
            tab.find("message", text="hello")

    def test_who_watches_is_no_tab_and_no_user(self):
        users = lambda: self.gateway.http("GET", "/api/users").json()
        before = users()
        with self.watch("status") as statuses, self.watch(self.user) as frames:
            next(statuses)
            self.assertEqual(users(), before)
            self.assertEqual(self.gateway.http("GET", f"/api/users/{self.user}").json()["tabs"], 0)
            self.assertEqual(self.say(self.user, "to nobody")["tabs"], 0)
            self.assertEqual(next(frames)["text"], "to nobody")
            self.assertEqual(next(statuses)["sessions"]["watchers"], 2)

    def test_a_slow_tab_is_named_with_the_reason_and_the_numbers(self):
        with self.watch("status") as statuses:
            self.stall(self.user)
            mine = lambda status: [row for row in status["ended"] if row["user_id"] == self.user]
            row = mine(self.status_when(statuses, "the slow tab", mine))[0]
            self.assertEqual((row["reason"], row["code"], row["retryable"], row["wire"]), ("slow consumer", 4008, True, "websocket"))
            self.assertGreater(row["queue_frames"], 1)
            self.assertIn(f"its queue held {row['queue_frames']} frames", row["detail"])
            self.assertIn("the limit is 65,536 bytes", row["detail"])
            again = mine(next(statuses))[0]
            self.assertEqual(again, row, "what is told once stays as it was told")
        # It is still known to who comes later.
        with self.watch("status") as statuses:
            self.assertEqual([row["session"] for row in mine(next(statuses))], [row["session"]])

    def test_who_was_not_let_in_is_counted_by_the_reason(self):
        self.tabs(3)
        refused = self.gateway.http("GET", f"/events?user={self.user}&name=x")
        self.assertEqual(refused.status, 429)
        with self.watch("status") as statuses:
            self.assertGreaterEqual(next(statuses)["refusals"]["tabs_of_user"], 1)


class Channels(Watching):
    def test_frames_go_by_as_they_are_whether_or_not_somebody_is_there(self):
        watched = [self.user, f"room:{self.user}", f"sse:{self.user}"]
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(self.watch(name)) for name in watched]
            for name in watched:
                answer = self.say(name, f"to nobody in {name}")
                self.assertFalse(answer["delivered"], "who watches is not counted")
            tab = self.tab()
            self.assertEqual(tab.ask(type="join", room=self.user)["type"], "ack")
            for name in watched:
                self.say(name, f"to {name}")
            for name, frames in zip(watched, streams):
                with self.subTest(name):
                    self.assertEqual([next(frames)["text"] for _ in range(2)], [f"to nobody in {name}", f"to {name}"])
            got = tab.find("message", text=f"to room:{self.user}")
            self.say(f"room:{self.user}", "again")
            self.assertEqual(next(streams[1])["text"], "again")
            self.assertNotIn("watch", json.dumps(got))

    def test_what_people_say_goes_by_too(self):
        tab = self.tab()
        with self.watch(self.user) as frames:
            ack = tab.ask(type="message", text="hello")
            echo = next(frames)
            self.assertEqual((echo["text"], echo["id"], echo["sender"]), ("hello", ack["id"], self.user))

    def test_a_bad_name_is_400(self):
        for name in ("", "room:", "a%0Ab", "x" * 300):
            with self.subTest(name[:10]):
                self.assert_error(self.gateway.http("GET", f"/events?watch={name}"), 400)

    def test_a_foreign_page_sees_nothing(self):
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            with self.subTest(headers):
                self.assert_error(self.gateway.http("GET", "/events?watch=status", headers=headers), 403)


class Keys(Watching):
    settings = {"token_keys": f"kid=main,alg=HS256,secret={SECRET}", "api_keys": "worker-key", "openai_keys": "olga:openai-key", "operator_keys": "operator-key", "tabs_max": "4", "watchers_max": "5"}
    headers = OPERATOR

    def test_only_an_operator_watches(self):
        keys = {"user": (token(secret=SECRET), 401), "worker": ("worker-key", 403), "openai": ("openai-key", 403), "wrong": ("wrong", 401), "nobody": (None, 401)}
        for watched in ("status", "u", "room:r", "sse:1"):
            for name, (key, status) in keys.items():
                with self.subTest(f"{name}: {watched}"):
                    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                    answer = self.gateway.http("GET", f"/events?watch={watched}", headers=headers)
                    self.assert_error(answer, status)
        cookie = {"Cookie": f"tabcast_token={token(secret=SECRET)}", "Origin": self.gateway.origin}
        self.assert_error(self.gateway.http("GET", "/events?watch=status", headers=cookie), 401)

    def test_an_operator_gets_in_where_nobody_else_does(self):
        jwt = lambda: {"Authorization": f"Bearer {token(secret=SECRET, sub=self.user)}"}
        tabs = [self.gateway.tab(None, additional_headers=jwt()) for _ in range(4)]
        for tab in tabs:
            self.addCleanup(tab.close)
        self.assert_error(self.gateway.http("GET", "/events", headers=jwt()), 503)
        with self.watch("status") as statuses:
            status = next(statuses)
            self.assertEqual((status["mode"], status["sessions"]["max"]), ("token", 4))
            self.assertGreaterEqual(status["refusals"]["tabs"], 1)

    def test_so_many_watch_and_no_more(self):
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(self.watch("u"))
            answer = self.gateway.http("GET", "/events?watch=status", headers=OPERATOR)
            self.assertIn("5 watch", self.assert_error(answer, 429)["message"])
            self.assertIn("Retry-After", answer.headers)
        until("their places are free", lambda: self.may_watch())

    def may_watch(self):
        with httpx.stream("GET", f"{self.gateway.origin}/events?watch=u", headers=OPERATOR, timeout=PATIENCE) as response:
            return response.status_code == 200


class Unwatched(Watching):
    settings = {"shards": "1"}

    def written(self):
        text = self.gateway.http("GET", "/metrics").body.decode()
        return {line.split()[0]: int(line.split()[1]) for line in text.splitlines() if line.startswith(("tabcast_offered_frames_total", "tabcast_delivered_writes_total", "tabcast_sessions "))}

    def test_what_nobody_watches_is_sent_to_nobody(self):
        with self.watch("status") as statuses, self.watch("u") as frames:
            next(statuses)
            self.say("u", "seen")
            self.assertEqual(next(frames)["text"], "seen")
        until("they are gone", lambda: self.written()["tabcast_sessions"] == 0)
        before = self.written()
        uptime = lambda: self.first_status()["uptime_seconds"]
        for _ in range(20):
            self.say("u", "not seen")
        self.assertEqual(self.written(), before)
        # Seconds go by without a frame, and then there is one at once.
        end = uptime() + 2
        middle = until("two seconds have gone by", lambda: (now := uptime()) > end and now)
        self.assertGreater(middle, end)

    def first_status(self):
        with self.watch("status") as statuses:
            return next(statuses)


class OnManyNodes(Watches, NodesTest):
    settings = {"redis_canary_deadline": "1s"}

    def test_what_other_nodes_say_to_tabs_here_and_to_rooms_goes_by(self):
        here, there = self.gateways
        tab = self.tab(here)
        self.assertEqual(tab.ask(type="join", room=self.user)["type"], "ack")
        with self.watch(self.user, here) as frames, self.watch(f"room:{self.user}", here) as said:
            self.send(there, "from there")
            self.send(there, "from there, to all", f"room:{self.user}")
            self.assertEqual((next(frames)["text"], next(said)["text"]), ("from there", "from there, to all"))
            self.send(here, "from here")
            self.assertEqual(next(frames)["text"], "from here")

    def test_a_watch_changes_nothing_that_others_see(self):
        here, there = self.gateways
        with self.watch(self.user, here) as frames, self.watch(f"sse:{self.user}", here), self.watch("status", here) as statuses:
            for channel in (self.user, f"sse:{self.user}"):
                answer = self.send(there, "to nobody", channel)
                self.assertEqual((answer["delivered"], answer["tabs"], answer["nodes"]), (False, 0, 0), channel)
            self.assertFalse(there.http("GET", f"/api/users/{self.user}").json()["online"])
            self.send(here, "published here")
            self.assertEqual(next(frames)["text"], "published here")
            redis = self.status_when(statuses, "two nodes", lambda status: status["redis"]["nodes"] == 2)["redis"]
            self.assertEqual((redis["healthy"], redis["reason"]), (True, None))
            self.assertGreater(redis["canary_micros"], 0)

    def test_a_redis_that_does_not_answer_is_not_healthy(self):
        here, _ = self.gateways
        with self.watch("status", here) as statuses:
            self.redis.pause()
            try:
                bad = self.status_when(statuses, "it is missed", lambda status: not status["redis"]["healthy"])
            finally:
                self.redis.resume()
            self.assertIn("Redis", bad["redis"]["reason"])
            self.assertEqual(bad["health"], {"ready": False, "draining": False, "reason": bad["redis"]["reason"]})
            self.status_when(statuses, "it is back", lambda status: status["redis"]["healthy"] and status["health"]["ready"])


class Draining(Watching):
    def test_who_watches_hears_of_the_end(self):
        gateway = Gateway(drain_spread="100ms")
        self.addCleanup(gateway.stop)
        with self.watch("status", gateway) as statuses:
            next(statuses)
            gateway.terminate()
            kinds = [frame["type"] for frame in statuses]
            self.assertEqual(kinds[-1], "draining")
        self.assertEqual(gateway.process.wait(PATIENCE), 0)


if __name__ == "__main__":
    unittest.main()
