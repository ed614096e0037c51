"""Two nodes behind one Redis are restarted one after the other, under traffic: nobody misses what the window covers, or is told."""

import asyncio
import collections
import json
import random
import time
import unittest
import uuid

from gateway import Gateway
from reconnecting import Api, Tab, open_all, raise_open_files
from redis_nodes import until_ready
from redis_server import RedisServer, free_port

USERS = 110
TABS_OF_USER = 2
PUBLISHERS = 4
PUBLISH_PAUSE = 0.025  # seconds between two messages of one publisher
GAP = "gap"


class Log:
    """What one tab got, in its order: (publisher, number), or GAP where it was told that it missed something."""

    def __init__(self):
        self.entries = []

    def note(self, _, frame):
        if frame["type"] == "message":
            publisher, number = frame["text"].split(" ")
            self.entries.append((publisher, int(number)))
        elif frame["type"] == "gap":
            self.entries.append(GAP)

    @property
    def gaps(self):
        return self.entries.count(GAP)

    def missed(self, sent):
        """(what is missing and was not said, how much is missing and was said); `sent`: publisher → how many.

        Raises for what came twice or in another order.
        """
        following, has_gap = dict.fromkeys(sent, 0), dict.fromkeys(sent, False)
        unsaid, said = [], 0
        for entry in [*self.entries, *((publisher, count) for publisher, count in sent.items())]:
            if entry == GAP:
                has_gap = dict.fromkeys(sent, True)
                continue
            publisher, number = entry
            if number < following[publisher]:
                raise AssertionError(f"{publisher} {number} came after {following[publisher] - 1}: {self.entries}")
            if number > following[publisher] and not has_gap[publisher]:
                unsaid += [(publisher, missing) for missing in range(following[publisher], number)]
            elif number > following[publisher]:
                said += number - following[publisher]
            following[publisher], has_gap[publisher] = number + 1, False
        return unsaid, said


class Publisher:
    """Messages to all users, each tried on one node after the other until one takes it: with one idempotency key."""

    def __init__(self, name, ports, dice):
        self.name = name
        self.nodes = collections.deque(Api(port) for port in ports)
        self.dice = dice
        self.sent = collections.Counter()  # user → how many
        self.turned = collections.Counter()  # why another node was tried → how often
        self.slowest = 0.0  # seconds until one took it
        self.is_over = False

    async def send(self, user):
        key, begin = str(uuid.uuid4()), time.monotonic()
        value = {"channel_id": user, "text": f"{self.name} {self.sent[user]}"}
        while True:
            try:
                status, body = await self.nodes[0].post("send", value, key, timeout=10)
            except (OSError, EOFError) as error:
                status, body = type(error).__name__, b""
            if status == 200:
                break
            if status not in (503, "ConnectionRefusedError", "ConnectionResetError", "BrokenPipeError", "IncompleteReadError"):
                raise AssertionError(f"{status} {body!r}")
            self.turned[json.loads(body)["error"]["code"] if body else status] += 1
            self.nodes.rotate()
            await asyncio.sleep(0.02)
        self.sent[user] += 1
        self.slowest = max(self.slowest, time.monotonic() - begin)

    async def run(self, users):
        while not self.is_over:
            await self.send(self.dice.choice(users))
            await asyncio.sleep(PUBLISH_PAUSE)


class RollingRestart(unittest.TestCase):
    def setUp(self):
        raise_open_files()
        self.redis = RedisServer()
        self.addCleanup(self.redis.remove)
        self.ports = [free_port(), free_port()]

    def node(self, port, recovery):
        gateway = Gateway(listen=f"127.0.0.1:{port}", redis=self.redis.url, worker="none", recovery=recovery, drain_spread="500ms", close_timeout="2s", drain_deadline="10s")
        self.addCleanup(gateway.stop)
        until_ready(gateway)
        return gateway

    async def restart(self, at, recovery):
        """SIGTERM, and a new process at the same port as soon as the old one has left."""
        self.nodes[at].terminate()
        self.assertEqual(await asyncio.to_thread(self.nodes[at].process.wait, 15), 0)
        self.assertNotIn("deadline has passed", self.nodes[at].log_text())
        self.nodes[at] = await asyncio.to_thread(self.node, self.ports[at], recovery)

    async def all_online(self):
        async with asyncio.timeout(60):
            await asyncio.gather(*(tab.online.wait() for tab in self.tabs))

    async def roll(self, recovery, rounds):
        self.nodes = [self.node(port, recovery) for port in self.ports]
        dice = random.Random(3)
        users = [f"u{number}" for number in range(USERS)]
        self.logs = {}
        self.tabs = []
        for number in range(USERS * TABS_OF_USER):
            log = Log()
            tab = Tab(users[number // TABS_OF_USER], lambda: dice.choice(self.ports), log.note, is_events=number % 4 == 3, dice=dice)
            self.logs[tab] = log
            self.tabs.append(tab)
        await open_all(self.tabs)
        # The first one: where two nodes publish at once, a tab that has nothing yet could not say what it has.
        self.publishers = [Publisher(f"p{number}", [self.ports[number % 2], self.ports[1 - number % 2]], dice) for number in range(PUBLISHERS)]
        for publisher in self.publishers:
            for user in users:
                await publisher.send(user)
        running = [asyncio.ensure_future(publisher.run(users)) for publisher in self.publishers]
        for _ in range(rounds):
            for at in (0, 1):
                await self.restart(at, recovery)
                await self.all_online()
        for publisher in self.publishers:
            publisher.is_over = True
        await asyncio.gather(*running)
        await self.all_online()
        for publisher in self.publishers:
            for user in users:
                await publisher.send(user)
        last = [(tab, (publisher.name, publisher.sent[tab.user] - 1)) for tab in self.tabs for publisher in self.publishers]
        async with asyncio.timeout(20):
            while any(entry not in self.logs[tab].entries[-PUBLISHERS * 4 :] for tab, entry in last):
                await asyncio.sleep(0.05)
        for tab in self.tabs:
            tab.leave()

    def rolled(self, recovery, rounds):
        asyncio.run(self.roll(recovery, rounds))
        unsaid, said = {}, 0
        for tab, log in self.logs.items():
            missing, covered = log.missed({publisher.name: publisher.sent[tab.user] for publisher in self.publishers})
            said += covered
            if missing:
                unsaid[tab.user, tab.is_events] = missing
        gaps = sum(log.gaps for log in self.logs.values())
        report = {
            "recovery": recovery,
            "restarts": 2 * rounds,
            "tabs": len(self.tabs),
            "reconnects": sum(tab.opens - 1 for tab in self.tabs),
            "messages": sum(sum(publisher.sent.values()) for publisher in self.publishers),
            "received": sum(len(log.entries) - log.gaps for log in self.logs.values()),
            "gaps": gaps,
            "missed_and_said": said,
            "missed_and_unsaid": sum(map(len, unsaid.values())),
            "tried_elsewhere": dict(sum((publisher.turned for publisher in self.publishers), collections.Counter())),
            "slowest_send_s": round(max(publisher.slowest for publisher in self.publishers), 2),
        }
        print(json.dumps(report), flush=True)
        self.assertEqual(unsaid, {})
        self.assertGreater(report["reconnects"], len(self.tabs) * rounds * 0.8)
        return report

    def test_with_recovery_in_redis_nobody_misses_anything(self):
        report = self.rolled("redis", rounds=2)
        self.assertEqual((report["gaps"], report["missed_and_said"]), (0, 0))

    def test_with_recovery_in_memory_whoever_misses_something_is_told(self):
        report = self.rolled("memory", rounds=1)
        self.assertGreater(report["gaps"], 0, "a node that was restarted remembers nothing")
        self.assertGreater(report["missed_and_said"], 0)


if __name__ == "__main__":
    unittest.main()
