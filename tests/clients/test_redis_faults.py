"""Redis killed, frozen, paused, cut off, slow: what is local goes on, and what was waiting arrives when it is back."""

import base64
import itertools
import json
import os
import threading
import time
import unittest

from gateway import PATIENCE, Gateway, until
from redis_nodes import NodesTest, Watch, is_online, texts, until_ready
from redis_server import Link, RedisServer
from redis_worker import RedisWorker

RESUMED = 2.0  # seconds after Redis is back, at most
LOCAL = 1.0  # seconds that a send to a tab of the same node may take, whatever Redis does
TICKS = os.sysconf("SC_CLK_TCK")


class Flow:
    """Numbered texts through one node to a user on another, one after the other, and what became of each."""

    pace = 0.02

    def __init__(self, gateway, user, tab):
        self.gateway = gateway
        self.user = user
        self.sent = []  # when, by number
        self.answers = []  # (status, body), by number
        self.watch = Watch(tab)
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.is_over.wait(self.pace):
            self.sent.append(time.monotonic())
            answer = self.gateway.post("send", {"channel_id": self.user, "text": f"{len(self.answers)}"})
            self.answers.append((answer.status, answer.json()))

    def stop(self):
        self.is_over.set()
        self.thread.join(PATIENCE)

    def taken(self):
        return [number for number, (status, _) in enumerate(self.answers) if status == 200]

    def arrived(self):
        return [int(text) for text in self.watch.texts() if text.isdigit()]

    def first_after(self, moment):
        """When the first text that was sent after a moment arrived, if one did."""
        for came, frame in list(self.watch.seen):
            text = frame.get("text", "")
            if text.isdigit() and self.sent[int(text)] >= moment:
                return came
        return None


class FaultsTest(NodesTest):
    """`far` has a tab on the second node and gets a flow through the first; `near` has tabs on the first one only."""

    settings = {"redis_canary_deadline": "1s"}

    def setUp(self):
        super().setUp()
        for gateway in self.gateways:
            until_ready(gateway)
        self.far, self.near, self.both = (f"{self.user}-{name}" for name in ("far", "near", "both"))
        a, b = self.gateways
        self.near_tab = self.tab(a, self.near)
        self.both_tabs = [self.tab(a, self.both), self.tab(b, self.both)]
        self.flow = Flow(a, self.far, self.tab(b, self.far))
        self.addCleanup(self.flow.stop)
        until("it flows", lambda: len(self.flow.arrived()) > 5)
        self.locals = 0

    def assert_local(self):
        """Tabs of the node that a send goes through get it in time, be its user elsewhere too or not."""
        self.locals += 1
        a = self.gateways[0]
        for user, tab in ((self.near, self.near_tab), (self.both, self.both_tabs[0])):
            begin = time.monotonic()
            answering = self.apart(self.send, a, f"local {self.locals}", user)
            frame = tab.until(lambda frame: frame.get("text") == f"local {self.locals}", 2 * PATIENCE)[-1]
            self.assertLess(time.monotonic() - begin, LOCAL, f"{user} got {frame} late")
            self.assertIs(answering.result(PATIENCE)["delivered"], True)
        self.assertEqual(self.flow.gateway.http("GET", "/healthz").status, 200)

    def during(self, seconds):
        """Looks at local delivery again and again, until so much time has passed."""
        end = time.monotonic() + seconds
        while True:
            self.assert_local()
            if (left := end - time.monotonic()) <= 0:
                return
            self.flow.is_over.wait(min(left, 0.3))

    def resumed(self, back, what="resumed"):
        """From the moment that Redis was back to the first text that was sent since and arrived."""
        first = until("delivery resumes", lambda: self.flow.first_after(back))
        print(f"{what} after {first - back:.2f} s", flush=True)
        self.assertLess(first - back, RESUMED)

    def assert_all_arrived(self, may_miss=False):
        """Everything that was taken arrives, once and in order; what was refused was refused with a code."""
        self.flow.stop()
        taken = self.flow.taken()
        self.assertTrue(taken)
        until("the last text arrives", lambda: self.flow.arrived()[-1:] == taken[-1:])
        arrived = self.flow.arrived()
        self.assertEqual(arrived, sorted(set(arrived)), "once and in order")
        missing = sorted(set(taken) - set(arrived))
        if not may_miss:
            self.assertEqual([(number, self.flow.answers[number]) for number in missing], [])
        for status, body in self.flow.answers:
            if status != 200:
                self.assertEqual(status, 503)
                self.assertTrue(body["error"]["code"])
        return missing

    def assert_whole_again(self):
        """Both ways, and the tabs that are on both nodes."""
        a, b = self.gateways
        for gateway in (a, b):
            until("both nodes are reached", lambda: self.send(gateway, f"whole {gateway.port}", self.both)["nodes"] == 1, RESUMED + 1)
            for tab in self.both_tabs:
                tab.until(lambda frame: frame.get("text") == f"whole {gateway.port}")
        until("who is where is known", lambda: is_online(a, self.far) and is_online(b, self.near), 5)
        for gateway in self.gateways:
            until_ready(gateway, 5)

    def until_unready(self, since):
        for gateway in self.gateways:
            until("the canary is missed", lambda: gateway.http("GET", "/readyz").status == 503, 1 + 2)
        error = self.gateways[0].http("GET", "/readyz").json()["error"]
        self.assertTrue(error["code"])
        print(f"not ready after {time.monotonic() - since:.2f} s", flush=True)


def metrics(gateway):
    """What is without labels."""
    lines = gateway.http("GET", "/metrics").body.decode().splitlines()
    return {name: float(value) for name, value in (line.split(" ") for line in lines if line[0] != "#" and "{" not in line)}


def recovered(seen):
    return seen["tabcast_broker_canary_age_seconds"] < 1 and seen["tabcast_broker_spool_bytes"] == 0


def cpu_seconds(gateway):
    with open(f"/proc/{gateway.process.pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class OneRedis(FaultsTest):
    def test_killed_and_started_again_empty(self):
        a, b = self.gateways
        before = metrics(a)
        self.redis.stop()
        begin = time.monotonic()
        self.during(0.5)
        self.until_unready(begin)
        for gateway in (a, b):
            until("the last canary that came is old", lambda: metrics(gateway)["tabcast_broker_canary_age_seconds"] > 1, 5)
        now = metrics(a)
        self.assertGreater(now["tabcast_broker_failures_total"], before["tabcast_broker_failures_total"])
        self.assertTrue(0 < now["tabcast_broker_spool_bytes"] <= now["tabcast_broker_spool_bytes_max"], "what waits is told")
        # Somebody comes while it is away: at home here at once, and known elsewhere afterwards.
        late = f"{self.user}-late"
        came = time.monotonic()
        tab = b.tab(late)
        self.addCleanup(tab.close)
        self.send(b, "welcome", late)
        self.assertEqual(tab.frame()["text"], "welcome")
        self.assertLess(time.monotonic() - came, 2 * LOCAL)
        self.during(1)
        self.redis.restart()
        back = time.monotonic()
        self.resumed(back)
        for gateway in self.gateways:
            until_ready(gateway, 5)
        print(f"ready after {time.monotonic() - back:.2f} s", flush=True)
        self.assert_all_arrived()
        self.assert_whole_again()
        until("canaries come again, and nothing waits", lambda: recovered(metrics(a)))
        until("who came meanwhile is reached", lambda: self.send(a, "late", late)["nodes"] == 1, 5)
        self.assertEqual(set(texts(tab.until(lambda frame: frame["text"] == "late"))), {"late"})

    def test_frozen_for_five_seconds(self):
        self.redis.pause()
        begin = time.monotonic()
        try:
            self.until_unready(begin)
            self.during(begin + 5 - time.monotonic())
        finally:
            self.redis.resume()
        self.resumed(time.monotonic())
        self.assert_all_arrived()
        self.assert_whole_again()

    def test_paused_for_three_seconds(self):
        self.redis.client_pause(3)
        begin = time.monotonic()
        self.during(2.8)
        self.resumed(begin + 3)
        self.assert_all_arrived()
        self.assert_whole_again()

    def test_an_outage_costs_little_and_is_told_in_few_lines(self):
        self.flow.stop()
        for fault, mend in ((self.redis.stop, self.redis.restart), (self.redis.pause, self.redis.resume)):
            with self.subTest(fault.__name__):
                lines = [gateway.log_text().count("\n") for gateway in self.gateways]
                fault()
                try:
                    begin = time.monotonic()
                    self.until_unready(begin)
                    before, measured = [cpu_seconds(gateway) for gateway in self.gateways], time.monotonic()
                    until("three seconds are over", lambda: time.monotonic() > measured + 3)
                    shares = [(cpu_seconds(gateway) - used) / (time.monotonic() - measured) for gateway, used in zip(self.gateways, before)]
                    told = [gateway.log_text().count("\n") - count for gateway, count in zip(self.gateways, lines)]
                finally:
                    mend()
                print(f"{max(shares):.1%} of a core, {max(told)} lines in {time.monotonic() - begin:.1f} s", flush=True)
                self.assertLess(max(shares), 0.2)
                self.assertLess(max(told), 20, self.gateways[0].log_text()[-3000:])
                self.assertGreater(min(told), 0, "it is told")
                self.assert_whole_again()

    def test_the_connections_of_each_role_are_cut(self):
        roles = self.redis.roles()
        self.assertGreaterEqual(set(roles), {"publish", "subscribe"})
        for role in roles:
            with self.subTest(role):
                missed = len(self.flow.answers)
                self.assertGreater(self.redis.kill_clients(role), 0)
                killed = time.monotonic()
                self.assert_local()
                self.resumed(killed, f"{role} cut: resumed")
                self.assertGreater(len(self.flow.answers), missed)
        self.assert_all_arrived()
        self.assert_whole_again()

    def test_who_is_in_a_room_is_told_what_was_missed_while_a_node_subscribed_anew(self):
        a, room = self.gateways[0], f"den-{self.user}"
        member = self.tab(self.gateways[1], f"{self.user}-member")
        self.assertEqual(member.ask(type="join", room=room)["type"], "ack")
        watch, numbers, missed = Watch(member), itertools.count(1), 0
        last = lambda: int((watch.texts() or ["0"])[-1])

        def say():
            number = next(numbers)
            a.api("send", {"channel_id": f"room:{room}", "text": f"{number}"})
            return number

        say()
        until("a node's number is known", lambda: last() == 1)  # what was before the first is not
        end = time.monotonic() + 4 * PATIENCE
        while not missed:
            self.assertLess(time.monotonic(), end, "nothing was ever missed")
            self.redis.kill_clients("subscribe")
            newest = [say() for _ in range(20)][-1]
            until("something newer arrives", lambda: last() > newest or (say() and False))
            following, is_told = 1, False
            for _, frame in list(watch.seen):
                if frame["type"] == "gap":
                    self.assertIn(frame["reason"], ("room_not_kept", "lost_between_nodes"))
                    is_told |= frame["reason"] == "room_not_kept"
                elif frame["type"] == "message":
                    number = int(frame["text"])
                    self.assertTrue(number == following or is_told, f"{following} to {number - 1} were missed, and nobody said so")
                    missed += number - following
                    following, is_told = number + 1, False
        print(f"{missed} of {next(numbers) - 1} were missed, and it was said", flush=True)

    def test_a_subscriber_that_is_too_slow_for_redis_comes_back(self):
        a, b = self.gateways
        subscribers = lambda: {connection["id"] for connection in self.redis.connections("subscribe")}
        before = subscribers()
        self.redis.pubsub_buffer(128 << 10)
        try:
            content = base64.b64encode(bytes(300_000)).decode()
            answering = self.apart(a.post, "file", {"channel_id": self.far, "filename": "large", "data": content})
            until("Redis cuts the subscriber", lambda: before - subscribers(), 5)
            cut = time.monotonic()
            self.assert_local()
            self.resumed(cut, "subscriber overrun: resumed")
            self.assertIn(answering.result(PATIENCE).status, (200, 503))
            # What is larger than the limit cannot get there; it must not come again and again either.
            until("both nodes have subscribed again", lambda: len(subscribers()) >= len(before))
            settled = subscribers()
            self.during(2)
            self.assertEqual(subscribers(), settled)
        finally:
            self.redis.pubsub_buffer(32 << 20)
        missing = self.assert_all_arrived(may_miss=True)
        print(f"{len(missing)} texts were in the buffer that Redis threw away", flush=True)
        self.assertLess(len(missing), RESUMED / Flow.pace)
        self.assert_whole_again()


class BeforeRedis(unittest.TestCase):
    def test_a_gateway_that_starts_first_serves_its_own_tabs_and_joins_later(self):
        server = RedisServer()
        self.addCleanup(server.remove)
        server.stop()
        gateways = []
        for _ in range(2):
            gateways.append(Gateway(redis=server.url, worker="redis", recovery="redis", redis_canary_deadline="1s"))
            self.addCleanup(gateways[-1].stop)
        tabs = [gateway.tab("early") for gateway in gateways]
        for gateway, tab in zip(gateways, tabs):
            self.addCleanup(tab.close)
            begin = time.monotonic()
            self.assertIs(gateway.api("send", {"channel_id": "early", "text": "local"})["delivered"], True)
            self.assertEqual(tab.frame()["text"], "local")
            self.assertLess(time.monotonic() - begin, LOCAL)
            self.assertEqual(gateway.http("GET", "/readyz").status, 503)
        server.restart()
        for gateway in gateways:
            until_ready(gateway, 5)
        until("one reaches the other", lambda: gateways[0].api("send", {"channel_id": "early", "text": "joined"})["nodes"] == 1, 5)
        for tab in tabs:
            tab.find("message", text="joined")


class ASmallSpool(FaultsTest):
    settings = {**FaultsTest.settings, "redis_spool_bytes_max": "64KiB"}

    def test_what_does_not_fit_is_refused_with_a_code_and_what_was_taken_arrives(self):
        a = self.gateways[0]
        self.redis.stop()
        text = "x" * 1_000
        taken, refusal = [], None
        for number in range(400):
            answer = a.post("send", {"channel_id": self.far, "text": f"spooled {number} {text}"})
            if answer.status != 200:
                refusal = answer
                break
            taken.append(f"spooled {number} {text}")
        self.assertIsNotNone(refusal, "64 KiB have an end")
        self.assertEqual((refusal.status, refusal.json()["error"]["code"]), (503, "spool_full"))
        self.assertTrue(20 < len(taken) < 80, f"{len(taken)} were taken")
        seen = metrics(a)
        self.assertEqual(seen["tabcast_broker_spool_bytes_max"], 64 << 10)
        self.assertTrue(32 << 10 < seen["tabcast_broker_spool_bytes"] <= 64 << 10, seen["tabcast_broker_spool_bytes"])
        self.assert_local()
        self.redis.restart()
        self.resumed(time.monotonic())
        self.flow.stop()
        spooled = lambda: [text for text in self.flow.watch.texts() if text.startswith("spooled")]
        until("all that was taken arrives", lambda: len(spooled()) >= len(taken))
        self.assertEqual(spooled(), taken)
        self.assert_whole_again()


class ASlowLink(FaultsTest):
    """Each gateway has a wire of its own to Redis."""

    settings = {**FaultsTest.settings, "redis_canary_deadline": "2s"}

    @classmethod
    def node(cls, **settings):
        link = Link(cls.redis.port)
        cls.addClassCleanup(link.remove)
        cls.links = [*getattr(cls, "links", []), link]
        return super().node(redis=link.url, **settings)

    def tearDown(self):
        for link in self.links:
            link.delay = 0.0
            link.mend()

    def test_a_hundred_milliseconds_delay_frames_and_do_not_hold_them_up(self):
        a = self.gateways[0]
        for link in self.links:
            link.delay = 0.1
        self.during(1)
        self.resumed(time.monotonic(), "over a link of 100 ms: arrived")
        lines = [json.dumps({"op": "send", "channel_id": self.far, "text": f"{1_000_000 + number}"}) for number in range(500)]
        begin = time.monotonic()
        self.flow.stop()
        self.assertEqual(a.http("POST", "/api/batch", "\n".join(lines).encode(), {"Content-Type": "application/x-ndjson"}, timeout=60).status, 200)
        until("the batch arrives", lambda: self.flow.arrived()[-1] == 1_000_499)
        print(f"500 frames over a link of 100 ms in {time.monotonic() - begin:.2f} s", flush=True)
        self.assertLess(time.monotonic() - begin, 10, "not a round trip for each")
        arrived = self.flow.arrived()
        self.assertEqual(arrived[-500:], list(range(1_000_000, 1_000_500)))
        self.assertEqual(arrived[:-500], self.flow.taken())
        self.assertTrue(all(gateway.http("GET", "/readyz").status == 200 for gateway in self.gateways), "slow is not gone")
        self.assert_whole_again()

    def test_one_node_is_cut_off(self):
        a, b = self.gateways
        self.links[0].cut()
        begin = time.monotonic()
        self.during(0.5)
        until("it is not ready", lambda: a.http("GET", "/readyz").status == 503, 2 + 2)
        self.assertEqual(b.http("GET", "/readyz").status, 200, "the other one is")
        self.assert_local()
        self.links[0].mend()
        self.resumed(time.monotonic())
        self.assert_all_arrived()
        self.assert_whole_again()
        print(f"cut off for {time.monotonic() - begin:.2f} s in all", flush=True)


class TheChatSurvives(NodesTest):
    settings = {"worker": "redis"}

    def setUp(self):
        super().setUp()
        worker = RedisWorker(self.redis.client(decode_responses=False)).start()
        self.addCleanup(worker.stop)
        a, b = self.gateways
        self.asking, self.listening = self.tab(a), self.tab(b)
        self.asked = 0
        self.until_answered()

    def until_answered(self):
        """Asks until an answer is seen on both nodes."""
        until("an answer is seen on both nodes", self.is_answered)

    def is_answered(self):
        self.asked += 1
        self.asking.send({"type": "message", "text": f"{self.asked}"})
        try:
            for tab in (self.asking, self.listening):
                tab.until(lambda frame: frame.get("text") == f"You said: {self.asked}", 0.5)
        except AssertionError:
            return False
        return True

    def assert_survives(self, fault, limit):
        fault()
        back = time.monotonic()
        self.until_answered()
        print(f"chat resumed after {time.monotonic() - back:.2f} s", flush=True)
        self.assertLess(time.monotonic() - back, limit)

    def test_that_redis_is_started_empty(self):
        def fault():
            self.redis.stop()
            self.redis.restart()

        self.assert_survives(fault, 8)

    def test_that_redis_is_emptied(self):
        self.assert_survives(lambda: self.redis.control.flushall(), 8)

    def test_that_the_connections_of_each_role_are_cut(self):
        roles = self.redis.roles()
        self.assertGreaterEqual(set(roles), {"inbound", "outbound", "lease"})
        for role in roles:
            with self.subTest(role):
                self.assertGreater(self.redis.kill_clients(role), 0)
                begin = time.monotonic()
                self.until_answered()
                print(f"{role} cut: chat resumed after {time.monotonic() - begin:.2f} s", flush=True)
                self.assertLess(time.monotonic() - begin, 2 * RESUMED)

    def test_that_redis_is_frozen(self):
        def fault():
            self.redis.pause()
            timer = threading.Timer(3, self.redis.resume)
            timer.start()
            timer.join()

        self.assert_survives(fault, 8)


if __name__ == "__main__":
    unittest.main()
