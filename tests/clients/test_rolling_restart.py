"""Two nodes behind one Redis are restarted one after the other, under traffic: nobody misses what the window covers, or is told."""

import asyncio
import base64
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
ROOMS = 12
ROOM_EACH = 3  # one of so many tabs is in a room
PUBLISHERS = 4
PUBLISH_PAUSE = 0.025  # seconds between two calls of one publisher
FILE_BYTES = 300
# What a tab is told, or does, behind which something may be missing: of its user, and of its room.
GAP, ROOM_GAP, REJOIN = "unknown_position", "room_not_kept", "rejoin"


def is_room(channel):
    return channel.startswith("room:")


class Log:
    """What one tab got, in its order: (channel, publisher, number), and what was said of what it missed."""

    def __init__(self):
        self.entries = []
        self.places = {}  # message → where it is in `entries`
        self.revisions = {}  # message → its newest revision
        self.opens_joined = 0  # how many of its connections were in the room

    def note(self, tab, frame):
        kind = frame["type"]
        if kind == "gap":
            self.entries.append(frame["reason"])
        elif kind == "message":
            publisher, channel, number, revision = frame["text"].split("|")
            self.places[frame["id"]] = len(self.entries)
            self.entries.append((channel, publisher, int(number)))
            self.revise(frame["id"], int(revision))
        elif kind == "file":
            publisher, channel, number = frame["filename"].split("|")
            if base64.b64decode(frame["data"]) != content(channel, publisher, int(number)):
                raise AssertionError(f"{frame['filename']} has other bytes")
            self.entries.append((channel, publisher, int(number)))
        elif kind == "edit":
            self.revise(frame["id"], int(frame["text"].split("|")[3]))
        elif kind == "ack":
            self.entries.append(REJOIN)
            self.opens_joined = tab.opens
        elif kind == "error":
            raise AssertionError(f"{tab.user} was told {frame}")

    def revise(self, message, revision):
        if revision < self.revisions.get(message, 0):
            raise AssertionError(f"revision {revision} of {message} came after {self.revisions[message]}")
        self.revisions[message] = revision

    def count(self, what):
        return self.entries.count(what)

    def missed(self, sent):
        """(what is missing without a word, what was said → how much is missing behind it).

        `sent`: (channel, publisher) → how many, of all channels of this tab. Raises for what came twice or in another order.
        """
        following, said_since = dict.fromkeys(sent, 0), {key: set() for key in sent}
        unsaid, said = [], collections.Counter()
        for entry in [*self.entries, *((*key, count) for key, count in sent.items())]:
            if isinstance(entry, str):
                for key in sent:
                    if is_room(key[0]) == (entry != GAP):
                        said_since[key].add(entry)
                continue
            *key, number = entry
            key = tuple(key)
            if number < following[key]:
                raise AssertionError(f"{key} {number} came after {following[key] - 1}: {self.entries}")
            missing = range(following[key], number)
            if missing and said_since[key]:
                # Of several that stand before it, the one that says most.
                said[next(what for what in (GAP, ROOM_GAP, REJOIN) if what in said_since[key])] += len(missing)
            else:
                unsaid += [(*key, one) for one in missing]
            following[key] = number + 1
            said_since[key].clear()
        return unsaid, said

    def unedited(self, revisions):
        """Messages that it has, whose last revision it has not, and no gap after them says so."""
        gaps = [at for at, entry in enumerate(self.entries) if entry == GAP]
        newest_gap = max(gaps, default=-1)
        return [message for message, at in self.places.items() if at > newest_gap and self.revisions[message] != revisions.get(message, 0)]


def content(channel, publisher, number):
    """The bytes of a file, told by its name."""
    return random.Random(f"{channel} {publisher} {number}").randbytes(FILE_BYTES)


class Publisher:
    """Messages, files and edits, each tried on one node after the other until one takes it: with one idempotency key."""

    def __init__(self, name, ports, dice):
        self.name = name
        self.nodes = collections.deque(Api(port) for port in ports)
        self.dice = dice
        self.sent = collections.Counter()  # channel → how many
        self.last = {}  # channel → its last message
        self.revisions = collections.Counter()  # message → how often it was edited
        self.numbers = {}  # message → its number
        self.turned = collections.Counter()  # why another node was tried → how often
        self.slowest = 0.0  # seconds until one took it
        self.is_over = False

    async def post(self, route, value):
        key, begin = str(uuid.uuid4()), time.monotonic()
        while True:
            try:
                status, body = await self.nodes[0].post(route, value, key, timeout=10)
            except (OSError, EOFError) as error:
                status, body = type(error).__name__, b""
            if status == 200:
                break
            if status not in (503, "ConnectionRefusedError", "ConnectionResetError", "BrokenPipeError", "IncompleteReadError"):
                raise AssertionError(f"{status} {body!r}")
            self.turned[json.loads(body)["error"]["code"] if body else status] += 1
            self.nodes.rotate()
            await asyncio.sleep(0.02)
        self.slowest = max(self.slowest, time.monotonic() - begin)
        return json.loads(body)

    async def send(self, channel):
        number = self.sent[channel]
        answer = await self.post("send", {"channel_id": channel, "text": f"{self.name}|{channel}|{number}|0"})
        self.last[channel], self.numbers[answer["id"]] = answer["id"], number
        self.sent[channel] += 1

    async def file(self, channel):
        number = self.sent[channel]
        data = base64.b64encode(content(channel, self.name, number)).decode()
        await self.post("file", {"channel_id": channel, "filename": f"{self.name}|{channel}|{number}", "data": data})
        self.sent[channel] += 1

    async def edit(self, channel):
        message = self.last[channel]
        revision = self.revisions[message] + 1
        text = f"{self.name}|{channel}|{self.numbers[message]}|{revision}"
        await self.post("edit", {"channel_id": channel, "message_id": message, "text": text})
        self.revisions[message] = revision

    async def run(self, users, rooms):
        while not self.is_over:
            what = self.dice.random()
            if what < 0.55:
                await self.send(self.dice.choice(users))
            elif what < 0.65:
                await self.file(self.dice.choice(users))
            elif what < 0.92:
                await self.edit(self.dice.choice(users))
            else:
                # So few that among the last that a tab has there is one of its user: rooms are no positions to come back to.
                await self.send(self.dice.choice(rooms))
            await asyncio.sleep(PUBLISH_PAUSE)

    async def finish(self, users, rooms):
        """A last message to everybody, edited for the last time: nothing can be missing behind it."""
        for channel in [*users, *rooms]:
            await self.send(channel)
        for user in users:
            await self.edit(user)


class Logs(unittest.TestCase):
    """What is asserted below would be seen."""

    def missed(self, *entries, **sent):
        log = Log()
        log.entries = list(entries)
        return log.missed({(channel.replace("_", ":"), "p"): count for channel, count in sent.items()})

    def test_what_is_missing_stands_behind_a_word_of_its_own_kind(self):
        user, room = [[(channel, "p", number) for number in range(9)] for channel in ("u", "room:r")]
        self.assertEqual(self.missed(user[0], user[1], u=2), ([], {}))
        self.assertEqual(self.missed(user[0], u=3), ([("u", "p", 1), ("u", "p", 2)], {}))
        self.assertEqual(self.missed(user[0], ROOM_GAP, REJOIN, user[2], u=3)[0], [("u", "p", 1)])
        self.assertEqual(self.missed(GAP, user[1], GAP, user[3], u=4), ([], {GAP: 2}))
        self.assertEqual(self.missed(REJOIN, room[2], room[4], room_r=5), ([("room:r", "p", 3)], {REJOIN: 2}))
        self.assertEqual(self.missed(room[0], GAP, room[2], REJOIN, ROOM_GAP, room[4], room_r=5), ([("room:r", "p", 1)], {ROOM_GAP: 1}))
        with self.assertRaises(AssertionError):
            self.missed(user[1], user[0], u=2)

    def test_the_last_edit_of_a_message_is_missed_unless_a_gap_comes_after_it(self):
        log = Log()
        log.entries, log.places, log.revisions = [("u", "p", 0), GAP, ("u", "p", 2)], {"old": 0, "new": 2}, {"old": 0, "new": 1}
        self.assertEqual(log.unedited({"old": 3, "new": 1}), [])
        self.assertEqual(log.unedited({"new": 2}), ["new"])


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
        """And in their rooms."""
        async with asyncio.timeout(60):
            await asyncio.gather(*(tab.online.wait() for tab in self.tabs))
            while any(tab.rooms and self.logs[tab].opens_joined < tab.opens for tab in self.tabs):
                await asyncio.sleep(0.02)

    def open_tabs(self, users, dice):
        self.logs, self.tabs = {}, []
        for number in range(USERS * TABS_OF_USER):
            log = Log()
            tab = Tab(users[number // TABS_OF_USER], lambda: dice.choice(self.ports), log.note, is_events=number % 4 == 3, dice=dice)
            if number % ROOM_EACH == 0:
                tab.rooms.add(f"r{number // ROOM_EACH % ROOMS}")
            self.logs[tab] = log
            self.tabs.append(tab)
        return open_all(self.tabs)

    async def roll(self, recovery, rounds):
        self.nodes = [self.node(port, recovery) for port in self.ports]
        dice = random.Random(3)
        users, rooms = [f"u{number}" for number in range(USERS)], [f"room:r{number}" for number in range(ROOMS)]
        await self.open_tabs(users, dice)
        await self.all_online()
        # The first one: where two nodes publish at once, a tab that has nothing yet could not say what it has.
        self.publishers = [Publisher(f"p{number}", [self.ports[number % 2], self.ports[1 - number % 2]], dice) for number in range(PUBLISHERS)]
        for publisher in self.publishers:
            for user in users:
                await publisher.send(user)
        running = [asyncio.ensure_future(publisher.run(users, rooms)) for publisher in self.publishers]
        for _ in range(rounds):
            for at in (0, 1):
                await self.restart(at, recovery)
                await self.all_online()
        for publisher in self.publishers:
            publisher.is_over = True
        await asyncio.gather(*running)
        await self.all_online()
        for publisher in self.publishers:
            await publisher.finish(users, rooms)
        async with asyncio.timeout(20):
            while not all(self.has_last(tab) for tab in self.tabs):
                await asyncio.sleep(0.05)
        for tab in self.tabs:
            tab.leave()
        for publisher in self.publishers:
            for api in publisher.nodes:
                api.close()

    def channels(self, tab):
        return [tab.user, *(f"room:{room}" for room in tab.rooms)]

    def has_last(self, tab):
        """Whether it has the last message of each channel, and the last edit of its user's."""
        log = self.logs[tab]
        wanted = {(publisher.name, channel): publisher.last[channel] for publisher in self.publishers for channel in self.channels(tab)}
        return all(message in log.places for message in wanted.values()) and all(
            log.revisions[publisher.last[tab.user]] == publisher.revisions[publisher.last[tab.user]] for publisher in self.publishers
        )

    def rolled(self, recovery, rounds):
        asyncio.run(self.roll(recovery, rounds))
        unsaid, said, unedited = {}, collections.Counter(), {}
        revisions = sum((publisher.revisions for publisher in self.publishers), collections.Counter())
        for tab, log in self.logs.items():
            missing, covered = log.missed({(channel, publisher.name): publisher.sent[channel] for publisher in self.publishers for channel in self.channels(tab)})
            said += covered
            if missing:
                unsaid[tab.user, tab.is_events] = missing
            if behind := log.unedited(revisions):
                unedited[tab.user, tab.is_events] = behind
        total = lambda what: sum(log.count(what) for log in self.logs.values())
        marks = {what: total(what) for what in (GAP, ROOM_GAP, REJOIN)}
        report = {
            "recovery": recovery,
            "restarts": 2 * rounds,
            "tabs": len(self.tabs),
            "reconnects": sum(tab.opens - 1 for tab in self.tabs),
            "messages_and_files": sum(sum(publisher.sent.values()) for publisher in self.publishers),
            "edits": sum(revisions.values()),
            "received": sum(len(log.entries) for log in self.logs.values()) - sum(marks.values()),
            "told": marks,
            "missed_behind": dict(said),
            "missed_without_a_word": sum(map(len, unsaid.values())),
            "last_edits_missed": sum(map(len, unedited.values())),
            "tried_elsewhere": dict(sum((publisher.turned for publisher in self.publishers), collections.Counter())),
            "slowest_send_s": round(max(publisher.slowest for publisher in self.publishers), 2),
        }
        print(json.dumps(report), flush=True)
        self.assertEqual(unsaid, {})
        self.assertEqual(unedited, {})
        self.assertGreater(report["reconnects"], len(self.tabs) * rounds * 0.8)
        self.assertGreater(said[ROOM_GAP], 0, "rooms are not kept")
        self.assertEqual(said[REJOIN], 0, "who joins a room again is told so")
        return report

    def test_with_recovery_in_redis_nobody_misses_anything(self):
        report = self.rolled("redis", rounds=2)
        self.assertEqual((report["told"][GAP], report["missed_behind"].get(GAP, 0)), (0, 0))

    def test_with_recovery_in_memory_whoever_misses_something_is_told(self):
        report = self.rolled("memory", rounds=1)
        self.assertGreater(report["told"][GAP], 0, "a node that was restarted remembers nothing")
        self.assertGreater(report["missed_behind"][GAP], 0)


if __name__ == "__main__":
    unittest.main()
