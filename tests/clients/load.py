"""The mixed load of `tests/soak`: tabs that come, go, stall and come back; workers that number what they send; questions; nonsense.

Each ordered frame from a worker carries its channel, its worker and its number. A tab follows the numbers: one that comes
twice or late is a fault at once, one that is missing is kept until the end, when it is known who was told what.
"""

import asyncio
import base64
import collections
import json
import os
import random
import time
import typing
import uuid

from reconnecting import Api, Tab, client_frame

MARK = "soak"
NODE_GONE = {"ConnectionRefusedError", "ConnectionResetError", "BrokenPipeError", "IncompleteReadError"}
RECOVERY_TIME = 20.0  # seconds after a fault in which what it has lost may show
ACK_TIME = 60.0  # seconds within which a connection that holds answers what was written to it
# Frames that one message between nodes may have had in it, at the pace of this load. What was lost without a gap can be no
# more than the nodes have counted as lost between them.
FRAMES_OF_MESSAGE_MAX = 4
LATELY = 60  # events of a tab that are shown with its fault
NONSENSE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST /api/send HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{\"text\":1",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]",
)
BAD_FRAMES = (
    b"\x81\x02hi",  # not masked
    b"\xc1\x80\0\0\0\0",  # a reserved bit
    b"\x83\x80\0\0\0\0",  # an opcode that does not exist
    client_frame(1, b"\xff\xfe"),  # no UTF-8
    client_frame(8, b"\x03"),  # half a close code
    b"\x81\xff" + b"\x7f" + b"\xff" * 7 + b"\0\0\0\0",  # longer than anything
)


class Sent(typing.NamedTuple):
    begin: float
    end: float
    told: str  # what the answer said of its delivery


class Window:
    """The time of one fault: from the moment that it is made until it is mended."""

    def __init__(self, harm, begin):
        self.harm = harm
        self.begin = begin
        self.end = float("inf")


class SoakTab(Tab):
    """Follows the numbers of each channel and worker."""

    def __init__(self, load, user, **options):
        super().__init__(user, load.choose, lambda *_: None, dice=load.dice, **options)
        self.load = load
        self.following = {}  # (channel, worker) → the number that comes next
        self.skipped = {}  # the same, as it was when a gap was announced
        self.announced = collections.defaultdict(set)  # (channel, worker) → the numbers that a gap has said it missed
        self.revisions = collections.OrderedDict()  # message → its newest revision
        self.waiting = {}  # client id → when it was written
        self.stalled = False
        self.lately = collections.deque(maxlen=LATELY)  # what came to it and happened to it, for whoever looks into a fault

    def received(self, connection, frame):
        super().received(connection, frame)
        kind = frame["type"]
        if kind != "edit":
            self.note(f"{kind} {frame.get('text', frame.get('filename', frame.get('reason', '')))[:30]}")
        if kind in ("message", "file"):
            mark, *place = frame.get("text", frame.get("filename")).split("|")[:4]
            if mark == MARK:
                self.follow((place[0], place[1]), int(place[2]))
        elif kind == "edit":
            self.revise(frame["id"], frame["text"])
        elif kind == "gap":
            self.load.gaps[frame["reason"]] += 1
            of_rooms = frame["reason"] == "room_not_kept"
            self.forget(lambda channel: channel.startswith("room:") == of_rooms)
        elif kind in ("ack", "error"):
            client_id = frame.get("client_id")
            if self.waiting.pop(client_id, None):
                self.load.counts[f"written: {frame.get('code', kind)}"] += 1
            elif client_id in self.rooms:  # joined: from here on nothing of it may be missing
                self.leave_behind(f"room:{client_id}")

    def note(self, what):
        self.lately.append(f"{time.monotonic() - self.load.begin:.2f} {what}")

    def follow(self, key, number):
        self.load.counts["received"] += 1
        room = key[0].removeprefix("room:")
        if room != key[0] and room not in self.rooms:
            return
        if key in self.skipped:
            missing = range(self.skipped.pop(key), number)
            self.load.counts["missed, announced by a gap"] += len(missing)
            self.announced[key].update(missing)
        following = self.following.get(key, number)
        if number < following and number in self.announced[key] and self.load.waited_for_redis(key, number):
            # What README says of it: it may come behind later ones. But once.
            self.announced[key].remove(number)
            self.load.counts["missed by a gap while Redis was away, and came later"] += 1
        elif number < following:
            self.load.fault(f"{self.user}: {key} {number} came after {following - 1}; lately: {list(self.lately)}")
        for missing in range(following, number):
            self.load.holes.append((time.monotonic(), self.user, key, missing))
        self.following[key] = max(following, number + 1)

    def revise(self, message, text):
        mark, revision, *_ = text.split("|")
        if mark != MARK:
            return
        if int(revision) < self.revisions.get(message, 0):
            self.load.fault(f"{self.user}: edit {revision} of {message} came after {self.revisions[message]}")
        self.revisions[message] = int(revision)
        if len(self.revisions) > 100:
            self.revisions.popitem(last=False)

    def forget(self, which):
        for key in [key for key in self.following if which(key[0])]:
            self.skipped.setdefault(key, self.following.pop(key))

    def leave_behind(self, channel):
        """What comes of that channel next is the first."""
        for numbers in (self.following, self.skipped, self.announced):
            for key in [key for key in numbers if key[0] == channel]:
                del numbers[key]

    def opened(self, connection):
        super().opened(connection)
        self.note(f"opened at {connection.transport.get_extra_info('peername')[1]} with {len(self.positions)} positions")
        self.load.counts["opened"] += 1

    def over(self, connection):
        if connection is self.connection:
            kind, detail = ("left", None) if self.is_leaving else connection.end
            self.note(f"ended: {kind} {detail}")
            self.load.endings[f"{kind} {detail[0] if kind == 'refused' else detail or ''}".strip() if kind != "unreachable" else kind] += 1
            self.waiting.clear()
            self.stalled = False
            # Rooms are not kept; and who has nothing has no position to come back to.
            for channel in {key[0] for key in (*self.following, *self.skipped) if key[0].startswith("room:") or not self.positions}:
                self.leave_behind(channel)
        super().over(connection)

    def has_last(self):
        """Whether it got the newest message of the worker that writes to its user, and its last edit."""
        for worker in self.load.workers.values():
            message, revision = worker.last.get(self.user, (None, 0))
            if revision and self.revisions.get(message) != revision:
                return False
        newest = {key: len(sent) for key, sent in self.load.sent.items() if key[0] == self.user and key[1].startswith("w")}
        return all(self.following.get(key) == count for key, count in newest.items())

    def write(self):
        client_id = uuid.uuid4().hex
        self.waiting[client_id] = time.monotonic()
        self.connection.send({"type": "message", "text": f"I say {client_id}", "client_id": client_id})


class Load:
    """Everything that goes on. `nodes` are ports; tasks run until `stop`."""

    def __init__(self, ports, seed, users, tabs, rooms, lifetime, rate):
        self.ports = ports
        self.dice = random.Random(seed)
        self.users = [f"u{number}" for number in range(users)]
        self.rooms = [f"r{number}" for number in range(rooms)]
        self.tabs_wanted = tabs
        self.lifetime = lifetime
        self.rate = rate
        self.tabs = []
        self.sent = collections.defaultdict(list)  # (channel, worker) → Sent, by number
        self.holes = []
        self.faults = []
        self.windows = []  # of all that was done to Redis and to a node
        self.counts = collections.Counter()
        self.endings = collections.Counter()
        self.gaps = collections.Counter()
        self.lost = {}  # what is missing beside what the nodes have counted as lost, once `attributed` has looked
        self.begin = time.monotonic()
        self.is_over = False

    def choose(self):
        return self.dice.choice(self.ports)

    def fault(self, what):
        self.counts["faults"] += 1
        if len(self.faults) < 50:
            self.faults.append(what)

    def is_during(self, begin, end, harm=None):
        """Whether that time has to do with such a fault, or any: the nodes notice it, and all is whole again, after a while."""
        return any(harm in (None, window.harm) and begin < window.end + RECOVERY_TIME and end > window.begin - 2 for window in self.windows)

    def waited_for_redis(self, key, number):
        """Whether that frame of a user was sent while Redis was away, or not long after: another node has it from its spool."""
        if key[0].startswith("room:") or number >= len(sent := self.sent[key]):
            return False
        return any(self.is_during(sent[number].begin, sent[number].end, harm) for harm in ("kill_redis", "freeze_redis"))

    async def pause(self, seconds):
        await asyncio.sleep(self.dice.uniform(0.5, 1.5) * seconds)

    def online(self, which=lambda tab: True):
        return [tab for tab in self.tabs if tab.online.is_set() and not tab.stalled and which(tab)]

    # ---- tabs ----

    def add_tab(self):
        tab = SoakTab(self, self.dice.choice(self.users), is_events=self.dice.random() < 0.3)
        if not tab.is_events and self.dice.random() < 0.3:
            tab.rooms.add(self.dice.choice(self.rooms))
        self.tabs.append(tab)
        tab.open()

    async def come_and_go(self):
        """As many tabs as wanted; each leaves some day, or loses its connection and comes back."""
        while not self.is_over:
            while len(self.tabs) < self.tabs_wanted:
                self.add_tab()
                await asyncio.sleep(0.01)
            await self.pause(self.lifetime / self.tabs_wanted)
            if not (candidates := self.online()):
                continue
            tab = self.dice.choice(candidates)
            if self.dice.random() < 0.3:
                tab.connection.transport.abort()
                self.counts["connections cut by their client"] += 1
            else:
                self.tabs.remove(tab)
                tab.leave()
                self.counts["left"] += 1

    async def change_rooms(self):
        while not self.is_over:
            await self.pause(2)
            if members := self.online(lambda tab: tab.rooms and not tab.is_events):
                tab = self.dice.choice(members)
                room, other = next(iter(tab.rooms)), self.dice.choice(self.rooms)
                tab.rooms = {other}
                tab.connection.send({"type": "leave", "room": room})
                tab.leave_behind(f"room:{room}")
                tab.connection.send({"type": "join", "room": other, "client_id": other})

    async def write(self):
        while not self.is_over:
            await self.pause(1)
            if writers := self.online(lambda tab: not tab.is_events):
                self.dice.choice(writers).write()
            late = [tab.user for tab in self.online() if any(when < time.monotonic() - ACK_TIME for when in tab.waiting.values())]
            for user in late:
                self.fault(f"{user} wrote something that was not answered within {ACK_TIME} s")

    async def stall(self, every):
        """A tab stops reading, gets more than may wait for it, and reads on."""
        api = Api(self.ports[0])
        while not self.is_over:
            await self.pause(every)
            if not (candidates := self.online()):
                continue
            tab, connection = (chosen := self.dice.choice(candidates)), chosen.connection
            tab.stalled = True
            connection.transport.pause_reading()
            self.counts["stalled"] += 1
            worker = Worker(self, f"flood{self.counts['stalled']}", api)
            for _ in range(24):
                await worker.file(tab.user, 100_000)
            await self.pause(10)
            tab.stalled = False
            if not connection.transport.is_closing():
                connection.transport.resume_reading()
        api.close()

    # ---- files ----

    async def fetch_on(self, every):
        """The link of a file that was just sent leads to its bytes, whichever node is asked."""
        while not self.is_over:
            await self.pause(every)
            if sent := [worker.file_sent for worker in self.workers.values() if worker.file_sent]:
                await self.fetch(self.choose(), *self.dice.choice(sent))

    async def fetch(self, port, link, content, begin):
        """Without one of the nodes, or without Redis, which knows where they are, a file may not be there."""
        api = Api(port)
        try:
            status, body = await api.get(link, timeout=20)
        except (OSError, EOFError) as error:
            status, body = type(error).__name__, b""
        finally:
            api.close()
        if status == 200 and body == content:
            self.counts["files fetched"] += 1
        elif status != 200 and self.is_during(begin, time.monotonic()):
            self.counts[f"files not fetched, during a fault: {status}"] += 1
        else:
            ago = time.monotonic() - begin
            self.fault(f"{link}, sent {ago:.1f} s ago, was answered {status} by port {port} with {len(body)} bytes instead of {len(content)}")

    # ---- questions, and nonsense ----

    async def ask(self, every):
        while not self.is_over:
            await self.pause(every)
            begin, question = time.monotonic(), " ".join(["why"] * self.dice.randrange(1, 12) + [uuid.uuid4().hex])
            try:
                text, is_done, said = await asyncio.wait_for(self.answer(self.choose(), question), 120)
            except ConnectionRefusedError:
                continue
            except (OSError, EOFError) as error:
                text, is_done, said = "", False, None
                lost = type(error).__name__
            else:
                lost = "it ended"
            if is_done and text == f"You said: {question}":
                self.counts["answers complete"] += 1
            elif said:
                self.counts[f"answers: {said}"] += 1
            elif self.is_during(begin, time.monotonic(), "kill_redis"):
                self.counts["answers cut short by a lost Redis"] += 1
            else:
                self.fault(f"an answer had no end and no error ({lost}): {text!r} for {question!r}")

    async def answer(self, port, question):
        """(text, whether it ended as it should, what error was said)."""
        body = json.dumps({"model": "tabcast", "stream": True, "messages": [{"role": "user", "content": question}]}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            status = int((await reader.readline()).split(b" ")[1])
            if status != 200:
                return "", False, f"refused with {status}"
            text, is_done = "", False
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    is_done = True
                elif line.startswith(b"data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return text, False, chunk["error"]["code"]
                    for choice in chunk["choices"]:
                        text += choice["delta"].get("content") or ""
            return text, is_done, None
        finally:
            writer.close()

    async def talk_nonsense(self, every):
        """Whatever comes is answered or cut, and within its time."""
        while not self.is_over:
            await self.pause(every)
            port = self.choose()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            try:
                if self.dice.random() < 0.5:
                    writer.write(self.dice.choice(NONSENSE))
                else:
                    key = base64.b64encode(os.urandom(16)).decode()
                    writer.write(f"GET /ws?user=fool&name=fool HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
                    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
                    writer.write(self.dice.choice(BAD_FRAMES))
                await asyncio.wait_for(reader.read(1), 30)
                self.counts["nonsense answered or cut"] += 1
            except TimeoutError:
                self.fault("nonsense was not answered within 30 s")
            except (OSError, EOFError):
                self.counts["nonsense answered or cut"] += 1
            finally:
                writer.close()

    # ---- the whole ----

    def start(self, stall_every):
        workers = [Worker(self, f"w{number}", Api(self.ports[number % 2]), Api(self.ports[1 - number % 2])) for number in range(2)]
        # Each user is written to by one worker: where two nodes publish at once there is no one order.
        self.workers = dict(enumerate(workers))
        work = [self.come_and_go(), self.change_rooms(), self.write(), self.stall(stall_every), self.fetch_on(1), self.ask(2), self.talk_nonsense(3)]
        work += [worker.run(self.users[part::2], self.rooms[part::2]) for part, worker in self.workers.items()]
        self.tasks = [asyncio.ensure_future(one) for one in work]

    async def stop(self):
        """Ends the work. Then each user gets a last message, so that nothing can be missing behind it."""
        self.is_over = True
        done, late = await asyncio.wait(self.tasks, timeout=180)
        for task in late:
            task.cancel()
            self.fault(f"{task.get_coro().__name__} did not end")
        for task in done:
            if error := task.exception():
                self.fault(f"{task.get_coro().__name__}: {error!r}")
        behind = self.tabs
        # A tab that was cut while it did not read learns of that only now, comes back, and may be told of a gap.
        for _ in range(3):
            if behind:
                behind = await self.last_messages({tab.user for tab in behind})
        for tab in behind:
            self.fault(f"{tab.user} did not get the last message to it, or its last edit")
        await self.last_files()

    async def last_files(self):
        """From each node, also from the one that did not get it: nothing is at fault any more."""
        for part, worker in self.workers.items():
            await worker.file(self.users[part], 30_000)
            for port in self.ports:
                before = self.counts["files fetched"]
                await self.fetch(port, *worker.file_sent)
                if self.counts["files fetched"] == before:
                    self.fault(f"the last file of {worker.name} is not there")

    async def last_messages(self, users):
        """A message to each of them, edited twice, once all are online; who has not got that after a while."""
        async with asyncio.timeout(120):
            await asyncio.gather(*(tab.online.wait() for tab in self.tabs))
        for part, worker in self.workers.items():
            for user in self.users[part::2]:
                if user in users:
                    await worker.message(user)
                    await worker.edit(user)
                    await worker.edit(user)
        end = time.monotonic() + 30
        while (behind := [tab for tab in self.tabs if not tab.has_last()]) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        return behind

    async def leave(self):
        for tab in self.tabs:
            tab.leave()
        for worker in self.workers.values():
            worker.close()
        await asyncio.wait_for(asyncio.gather(*(tab.gone.wait() for tab in self.tabs)), 60)

    def attributed(self, lost_messages):
        """Why frames did not come that no gap announced: reason → how many. What is left has no reason, and is a fault.

        `lost_messages`: what the nodes counted as lost between them. What goes to a user is lost only if Redis took it and
        died; who is in a room is told by a gap. More than was counted cannot be lost that way.
        """
        reasons, frames = collections.Counter(), set()
        for when, user, key, number in self.holes:
            sent = self.sent[key][number]
            if sent.told != "delivered":
                reasons[f"its sender was told: {sent.told}"] += 1
            elif lost_messages and not key[0].startswith("room:") and self.is_during(sent.begin, when, "kill_redis"):
                reasons["Redis died with it, counted in tabcast_broker_lost_messages"] += 1
                frames.add((key, number))
            else:
                reasons["unexplained"] += 1
                self.fault(f"{user} did not get {key} {number}, sent at {sent.begin:.1f}, taken after {sent.end - sent.begin:.2f} s, missed at {when:.1f}")
        self.lost = {"messages_between_nodes": lost_messages, "frames": len(frames), "frames_max": lost_messages * FRAMES_OF_MESSAGE_MAX}
        if self.lost["frames"] > self.lost["frames_max"]:
            self.fault(f"{len(frames)} frames are missing where Redis was killed, and the nodes count {lost_messages} messages as lost")
        return reasons


class Worker:
    """Sends numbered messages, files and buttons, each until one of its nodes takes it; and edits."""

    def __init__(self, load, name, *apis):
        self.load = load
        self.name = name
        self.apis = collections.deque(apis)
        self.last = {}  # user → [id of the last message, its revision]
        self.file_sent = None  # of the last file: (the path of its link, its bytes, when it was sent)

    async def post(self, route, value):
        key, begin = str(uuid.uuid4()), time.monotonic()
        while True:
            try:
                status, body = await self.apis[0].post(route, value, key, timeout=30)
            except (OSError, EOFError) as error:
                status, body = type(error).__name__, b""
            if status == 200:
                answer = json.loads(body)
                told = "delivered" if answer["delivered"] else answer.get("reason", "not delivered")
                return answer, Sent(begin, time.monotonic(), told)
            if status != 503 and status not in NODE_GONE:
                self.load.fault(f"{route} was answered {status} {body[:200]!r}")
            self.load.counts[f"sends tried again: {json.loads(body)['error']['code'] if status == 503 else status}"] += 1
            self.apis.rotate()
            await asyncio.sleep(0.1)

    async def number(self, channel, route, make):
        log = self.load.sent[channel, self.name]
        mark = f"{MARK}|{channel}|{self.name}|{len(log)}"
        answer, sent = await self.post(route, {"channel_id": channel, **make(mark)})
        log.append(sent)
        self.load.counts[f"sent: {route}"] += 1
        return answer

    async def message(self, channel):
        padding = "x" * self.load.dice.choice((10, 100, 100, 1_000))
        answer = await self.number(channel, "send", lambda mark: {"text": f"{mark}|{padding}"})
        self.last[channel] = [answer["id"], 0]

    async def buttons(self, channel):
        await self.number(channel, "buttons", lambda mark: {"text": f"{mark}|?", "buttons": [{"label": "yes", "custom_id": "y"}]})

    async def file(self, channel, size):
        begin, content = time.monotonic(), os.urandom(size)
        answer = await self.number(channel, "file", lambda mark: {"filename": f"{mark}|f", "data": base64.b64encode(content).decode()})
        self.file_sent = (answer["url"].replace("webchat://file/", "/files/"), content, begin)

    async def edit(self, channel):
        if channel in self.last:
            self.last[channel][1] += 1
            message, revision = self.last[channel]
            await self.post("edit", {"channel_id": channel, "message_id": message, "text": f"{MARK}|{revision}|{'y' * 100}"})
            self.load.counts["sent: edit"] += 1

    async def run(self, users, rooms):
        dice = self.load.dice
        while not self.load.is_over:
            await self.load.pause(len(self.load.workers) / self.load.rate)
            user, what = dice.choice(users), dice.random()
            if what < 0.65:
                await self.message(user)
            elif what < 0.72:
                await self.buttons(user)
            elif what < 0.79:
                await self.file(user, dice.choice((100, 5_000, 30_000)))
            elif what < 0.92:
                await self.edit(user)
            else:
                await self.message(f"room:{dice.choice(rooms)}")

    def close(self):
        for api in self.apis:
            api.close()
