"""A node with many tabs and steady traffic is told to leave: what its tabs, its workers and the next node see of that.

    python drain.py [--tabs 10000] [--rate 400] [--SETTING VALUE …]

Two gateways are started. Tabs (a quarter of them event streams, two a user) open on the first one; workers publish to
users and rooms all the time; then SIGTERM. Each tab obeys its `retry_after_ms` and goes to the second one. One in a
hundred stops reading: it may hold up nobody, and finds everything that was its own when it reads on.
"""

import argparse
import asyncio
import bisect
import collections
import gc
import json
import random
import time

from gateway import Gateway
from reconnecting import Api, Tab, open_all, raise_open_files

TABS_OF_USER = 2
ROOM_TABS = 50
PUBLISHERS = 4
TURN = 0.05  # seconds from one batch of a publisher to the next
BIN = 0.5  # seconds of a column of the histogram of closes
RATE_SLACK = 1.2  # what a second of closes may have, of what is set: a shard that is held up may go on for one long step
STALLED_EACH = 100  # one of so many tabs reads nothing from the signal on, until the process has left


class Watch:
    """When this program last looked at all of its sockets. What it finds on one has come since `looked`.

    A program that gets no processor finds at once what came over a while; that must not be taken for a burst.
    """

    def __init__(self):
        self.ticks = collections.deque([time.monotonic()] * 3, maxlen=3)

    @property
    def looked(self):
        # In the turn of the loop before the last tick's, sockets were looked at before its tick, and after the one before.
        return self.ticks[0]

    async def run(self):
        while True:
            await asyncio.sleep(0.005)
            self.ticks.append(time.monotonic())


class DrainedTab(Tab):
    """Notes what came, when it was told, and when it went to the next node."""

    def __init__(self, watch, *arguments, **options):
        super().__init__(*arguments, **options)
        self.watch = watch
        self.got = collections.defaultdict(list)  # channel → numbers
        self.retry_after_told = None
        self.told_at = None
        self.told_since = None  # not before: `told_at` is when it was seen
        self.ending = None
        self.went_at = None

    def received(self, connection, frame):
        super().received(connection, frame)
        if frame["type"] == "message":
            channel, number = frame["text"].split(" ")
            self.got[channel].append(int(number))
        elif frame["type"] == "draining":
            self.retry_after_told = frame["retry_after_ms"] / 1000

    def told(self, connection):
        if self.told_at is None:
            self.told_since, self.told_at, self.ending = self.watch.looked, time.monotonic(), connection.end

    def over(self, connection):
        if self.ending is None:
            self.ending = connection.end
        super().over(connection)

    def open(self):
        if self.opens == 1 and self.went_at is None:
            self.went_at = time.monotonic()
        super().open()


class Drain:
    """One run. After `await run()` the attributes are what was seen; `problems` is what must not be."""

    def __init__(self, tabs, rate, **settings):
        self.count = tabs
        self.rate = rate
        self.settings = settings
        self.dice = random.Random(1)
        self.sent = collections.defaultdict(list)  # channel → how many tabs each message was counted for, by number
        self.refused = collections.Counter()  # status → lines and requests of publishers that were refused
        self.probes = []  # (when asked, route, status) since SIGTERM
        self.is_draining = False
        self.left_at = None

    async def run(self):
        self.first, self.second = Gateway(worker="none", **self.settings), Gateway(worker="none")
        try:
            await self.drain()
        finally:
            self.exit_code = self.first.process.poll()
            self.log = self.first.log_text()
            self.first.stop()
            self.second.stop()

    async def drain(self):
        port = lambda: self.second.port if self.is_draining else self.first.port
        self.watch = Watch()
        watching = asyncio.ensure_future(self.watch.run())
        self.tabs = [
            DrainedTab(self.watch, f"u{number // TABS_OF_USER}", port, lambda *_: None, is_events=number % 4 == 3, dice=self.dice) for number in range(self.count)
        ]
        for number, tab in enumerate(tab for tab in self.tabs if not tab.is_events):
            tab.rooms.add(f"r{number // ROOM_TABS}")
        self.acked = 0
        for tab in self.tabs:
            tab.heard = self.note_ack
        begin = time.monotonic()
        await open_all(self.tabs)
        while self.acked < sum(len(tab.rooms) for tab in self.tabs):
            await asyncio.sleep(0.01)
        self.opening_time = time.monotonic() - begin
        gc.freeze()  # going through all these tabs, it would be late for a second
        publishers = [asyncio.ensure_future(self.publish(part)) for part in range(PUBLISHERS)]
        await asyncio.sleep(2)
        self.stalled = set(self.tabs[::STALLED_EACH])
        for tab in self.stalled:
            tab.connection.transport.pause_reading()
        self.is_draining = True
        self.begin = time.monotonic()
        self.first.terminate()
        prober = asyncio.ensure_future(self.probe())
        while self.first.process.poll() is None:
            await asyncio.sleep(0.01)
        self.left_at = time.monotonic()
        watching.cancel()
        for tab in self.stalled:
            tab.connection.transport.resume_reading()
        await asyncio.gather(prober, *publishers)
        limit = self.left_at + 60
        while time.monotonic() < limit and any(tab.opens < 2 for tab in self.tabs):
            await asyncio.sleep(0.05)
        for tab in self.tabs:
            tab.leave()

    def note_ack(self, _, frame):
        self.acked += frame["type"] == "ack" and not self.is_draining

    async def publish(self, part):
        """Batches to users and rooms of its own, so that the order of sending is known, until nobody listens."""
        users = [f"u{number}" for number in range(part, self.count // TABS_OF_USER, PUBLISHERS)]
        rooms = sorted({room for tab in self.tabs for room in tab.rooms})[part::PUBLISHERS]
        api, due = Api(self.first.port), time.monotonic()
        while True:
            due += TURN
            await asyncio.sleep(max(0, due - time.monotonic()))
            channels = [self.dice.choice(users) for _ in range(max(1, round(self.rate * TURN / PUBLISHERS)))]
            channels += [f"room:{self.dice.choice(rooms)}"] if rooms else []
            following = collections.Counter({channel: len(self.sent[channel]) for channel in channels})
            lines = []
            for channel in channels:
                lines.append(json.dumps({"op": "send", "channel_id": channel, "text": f"{channel} {following[channel]}"}))
                following[channel] += 1
            try:
                status, body = await api.post("batch", "\n".join(lines).encode(), content_type="application/x-ndjson")
            except (OSError, EOFError):
                return api.close()
            if status != 200:
                # Nothing of it was sent: the numbers are used again.
                self.refused[status] += 1
                continue
            for channel, answer in zip(channels, map(json.loads, body.splitlines()), strict=True):
                # A line that was refused has used its number all the same: nobody may have it.
                self.sent[channel].append(answer.get("tabs"))
                if "error" in answer:
                    self.refused[answer["error"]["code"]] += 1

    async def probe(self):
        """Whoever comes now is refused, each on a connection of its own, until nobody accepts any more."""
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        requests = {
            "/readyz": "GET /readyz HTTP/1.1\r\n",
            "/ws": f"GET /ws?user=late&name=late HTTP/1.1\r\n{upgrade}",
            "/events": "GET /events?user=late&name=late HTTP/1.1\r\n",
        }
        while True:
            for route, request in requests.items():
                asked = time.monotonic()
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.first.port)
                except OSError:
                    return
                try:
                    writer.write(f"{request}Host: {self.first.host}\r\n\r\n".encode())
                    status = await asyncio.wait_for(reader.readline(), 10)
                except OSError:
                    status = b""
                finally:
                    writer.close()
                if not status:
                    await asyncio.sleep(1)
                    if self.first.process.poll() is not None:
                        return  # it was in the listener's queue when the process left
                self.probes.append((asked - self.begin, route, status.decode("latin-1").split(" ")[1] if status else "no answer"))
            await asyncio.sleep(0.1)

    # ---- what was seen ----

    def seconds(self, setting, default):
        return float(self.settings.get(setting, default).rstrip("s"))

    @property
    def deadline(self):
        return self.seconds("drain_deadline", "30s")

    @property
    def rate_max(self):
        """How many may be closed in a second: what is set, unless the deadline leaves no time for that."""
        latest = self.deadline - self.seconds("close_timeout", "5s")
        return max(int(self.settings.get("drain_closes_per_second_max", 2_000)), self.count / latest)

    @property
    def exit_time(self):
        return self.left_at - self.begin

    def readers(self):
        return [tab for tab in self.tabs if tab not in self.stalled and tab.told_at]

    def moments(self):
        """When tabs were told the end, in seconds since the signal."""
        return sorted(tab.told_at - self.begin for tab in self.readers())

    def closes(self):
        """How many tabs were told the end in each half second since the signal."""
        bins = collections.Counter(int(moment / BIN) for moment in self.moments())
        return [bins[number] for number in range(max(bins, default=0) + 1)]

    def closes_in_a_second(self):
        """The most that were closed within one second for certain, however late this program saw them."""
        told = sorted((tab.told_at, tab.told_since) for tab in self.readers())
        seen, since = [at for at, _ in told], [at for _, at in told]
        # Both grow: who was seen later has come after a later look.
        return max((bisect.bisect_right(seen, begin + 1) - at for at, begin in enumerate(since)), default=0)

    def returns(self):
        return sorted(tab.went_at for tab in self.readers() if tab.went_at)

    def appointments(self):
        """When the tabs were told to come back: when they do, but for the time that this program is late."""
        return [tab.told_at + tab.retry_after_told for tab in self.readers() if tab.retry_after_told]

    def problems(self):
        found = []
        for tab in self.tabs:
            expected = ("ended", None) if tab.is_events else ("closed", 1012)
            if tab.ending != expected or tab.retry_after_told is None:
                found.append(f"{tab.user} ended with {tab.ending}, and was told to come back after {tab.retry_after_told}")
            elif tab.opens != 2:
                found.append(f"{tab.user} came back {tab.opens - 1} times")
            elif tab.went_at - tab.told_at < tab.retry_after_told - 0.05:
                found.append(f"{tab.user} came back after {tab.went_at - tab.told_at:.2f} s instead of {tab.retry_after_told} s")
            for channel, numbers in tab.got.items():
                counts = self.sent[channel]
                expected = [number for number in range(numbers[-1] + 1) if number >= len(counts) or counts[number] is not None]
                if numbers != expected:
                    found.append(f"{tab.user} got {numbers} of {channel} and not {expected}")
        last = collections.defaultdict(list)
        for tab in self.tabs:
            for channel, numbers in tab.got.items():
                last[channel].append(numbers[-1])
        for channel, counts in self.sent.items():
            for number, count in enumerate(counts):
                reached = sum(number <= newest for newest in last[channel])
                # A tab is out of its rooms' count a moment before it is told to come back.
                if count is not None and (reached < count or (reached > count and not channel.startswith("room:"))):
                    found.append(f"message {number} of {channel} was counted for {count} tabs and written to {reached}")
        if self.closes_in_a_second() > self.rate_max * RATE_SLACK:
            found.append(f"{self.closes_in_a_second()} tabs were closed within a second, where {self.rate_max:g} may be")
        for when, route, status in self.probes:
            if status != "503" and when > 0.5:
                found.append(f"{route} was answered {status} {when:.2f} s after the signal")
        if self.exit_code != 0 or self.exit_time > self.deadline:
            found.append(f"the process left with {self.exit_code} after {self.exit_time:.1f} s")
        return found

    def report(self):
        closes, returns = self.closes(), self.returns()
        delivered = sum(len(numbers) for tab in self.tabs for numbers in tab.got.values())
        refused_from = min((when for when, route, status in self.probes if status == "503"), default=None)
        return {
            "tabs": self.count,
            "stalled": len(self.stalled),
            "opened_in_s": round(self.opening_time, 1),
            "published": sum(map(len, self.sent.values())),
            "delivered": delivered,
            "refused_publishes": dict(self.refused),
            "refused_newcomers": sum(status == "503" for _, _, status in self.probes),
            "first_refused_after_s": refused_from and round(refused_from, 3),
            "closes_each_500ms": closes,
            "closes_a_second_max": self.closes_in_a_second(),
            "closes_seen_in_a_second_max": peak(self.moments(), 1),
            "seen_late_by_s_max": round(max(tab.told_at - tab.told_since for tab in self.readers()), 3),
            "last_close_after_s": round(self.moments()[-1], 2) if self.moments() else None,
            "exit_after_s": round(self.exit_time, 2),
            "exit_code": self.exit_code,
            "appointments_a_second_max": peak(self.appointments(), 1),
            "appointments_100ms_max": peak(self.appointments(), 0.1),
            "reconnects_a_second_max": peak(returns, 1),
            "reconnects_100ms_max": peak(returns, 0.1),
            "reconnects_over_s": round(returns[-1] - returns[0], 1) if returns else None,
        }


def peak(moments, window):
    """The most that fall into any window of so many seconds."""
    most, inside = 0, collections.deque()
    for moment in sorted(moments):
        inside.append(moment)
        while inside[0] <= moment - window:
            inside.popleft()
        most = max(most, len(inside))
    return most


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tabs", type=int, default=10_000)
    parser.add_argument("--rate", type=int, default=400, help="messages to users a second")
    options, settings = parser.parse_known_args()
    pairs = [setting.removeprefix("--").replace("-", "_") for setting in settings]
    if raise_open_files() < options.tabs + 500:
        parser.error("not so many descriptors may be open here: ulimit -Hn")
    drain = Drain(options.tabs, options.rate, **dict(zip(pairs[::2], settings[1::2])))
    asyncio.run(drain.run())
    print(json.dumps(drain.report(), indent=2))
    problems = drain.problems()
    print(*problems[:20], f"{len(problems)} problems", sep="\n")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
