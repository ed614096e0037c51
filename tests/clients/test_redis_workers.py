"""Workers on Redis Streams: the chat of many nodes with one of them, both forms of entries, and nothing that is lost."""

import base64
import json
import re
import signal
import time
import unittest
import uuid

import msgpack

from gateway import PATIENCE, until
from redis_nodes import NodesTest, Watch, gather, texts
from redis_worker import RedisWorker, pack, unpack
from scripted import content

INBOUND, OUTBOUND = "sg:stream:inbound", "sg:stream:outbound:webchat"
GROUP = "sg:gateway:webchat"
DEAD = f"{OUTBOUND}:dead"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
FIELDS = {
    *("channel_key", "platform", "channel_id", "user_id", "username", "display_name", "content", "message_id", "timestamp", "attachments"),
    *("reply_to", "room_name", "is_dm", "trace_id", "enqueued_at", "is_addressed", "user_aliases", "unified_user_id", "reactions", "extra"),
}


class WorkersTest(NodesTest):
    settings = {"worker": "redis"}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.server = cls.redis.client(decode_responses=False)
        cls.addClassCleanup(cls.server.close)

    def add(self, form="json", **envelope):
        return self.server.xadd(OUTBOUND, {"e": pack({"platform": "webchat", **envelope}, form)})

    def inbound(self):
        return [unpack(fields[b"e"]) for _, fields in self.server.xrange(INBOUND)]

    def until_acked(self, timeout=PATIENCE):
        until("no entry is pending", lambda: self.server.xpending(OUTBOUND, GROUP)["pending"] == 0 and self.server.xinfo_groups(OUTBOUND)[0]["lag"] == 0, timeout)


class AChat(WorkersTest):
    form = "json"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.worker = RedisWorker(cls.redis.client(decode_responses=False), cls.form).start()
        cls.addClassCleanup(cls.worker.stop)

    def asked(self, message):
        """What the worker got: once."""
        [asked] = until("the worker got it", lambda: [asked for asked in self.worker.asked if asked["message_id"] == message])
        return asked

    def test_tabs_on_both_nodes_see_the_same_chat(self):
        a, b = self.gateways
        tabs = [self.tab(a), self.tab(b)]
        for number, tab in enumerate([*tabs, *tabs]):
            tab.send({"type": "message", "text": f"question {number} ü", "client_id": f"{number}"})
            wanted = {"sender": self.user, "text": f"question {number} ü"}, {"sender": "star", "text": f"You said: question {number} ü"}
            ack, *chat = gather(tab, {"type": "ack", "client_id": f"{number}"}, *wanted)
            self.assertEqual(chat[0]["id"], ack["id"])
            [other] = set(tabs) - {tab}
            self.assertEqual(gather(other, *wanted), chat, "the same messages, with the same ids")
        self.assertTrue(all(tab.frames.empty() for tab in tabs), "each once")

    def test_what_the_worker_is_told(self):
        a, b = self.gateways
        tab = self.tab(a)
        shown = self.send(b, "shown")["id"]
        data = bytes(range(256))
        attachment = {"filename": "ü.bin", "mimetype": "image/png", "data": base64.b64encode(data).decode()}
        before = time.time()
        ack = tab.ask(type="message", text="look 🌟", reply_to=shown, attachments=[attachment], user_id="mallory")
        asked = self.asked(ack["id"])
        self.assertEqual(set(asked), FIELDS)
        self.assertEqual((asked["platform"], asked["channel_id"], asked["channel_key"]), ("webchat", f"webchat:{self.user}", f"webchat:{self.user}"))
        self.assertEqual((asked["user_id"], asked["username"], asked["display_name"], asked["content"]), (self.user, self.user, self.user, "look 🌟"))
        self.assertEqual((asked["reply_to"], asked["is_dm"], asked["is_addressed"], asked["room_name"]), (shown, True, True, None))
        self.assertTrue(before - 1 < asked["timestamp"] <= asked["enqueued_at"] < time.time() + 1)
        [sent] = asked["attachments"]
        self.assertEqual((sent["filename"], sent["mimetype"]), ("ü.bin", "image/png"))
        self.assertEqual(sent["data"] if isinstance(sent["data"], bytes) else base64.b64decode(sent["data"]), data)
        self.assertTrue(asked["trace_id"])

    def test_buttons_that_are_pressed_on_another_node(self):
        a, b = self.gateways
        one, other = self.tab(a), self.tab(b)
        one.send({"type": "message", "text": "/buttons"})
        shown = [tab.until(lambda frame: frame.get("buttons"))[-1] for tab in (one, other)]
        self.assertEqual(shown[0], shown[1])
        other.send({"type": "button", "message_id": shown[0]["id"], "custom_id": "this", "client_id": "press"})
        edit = {"type": "edit", "id": shown[0]["id"], "text": "You chose this"}
        ack, _ = gather(other, {"type": "ack", "client_id": "press"}, edit)
        gather(one, edit)
        asked = self.asked(ack["id"])
        self.assertEqual((asked["content"], asked["extra"]["button"]), ("this", {"message_id": shown[0]["id"], "custom_id": "this"}))

    def test_a_file_of_the_worker_s_has_a_link_on_both_nodes(self):
        a, b = self.gateways
        tabs = [self.tab(a), self.tab(b)]
        tabs[1].send({"type": "message", "text": "/file"})
        frames = [tab.find("file") for tab in tabs]
        self.assertEqual(frames[0], frames[1])
        self.assertEqual(base64.b64decode(frames[0]["data"]), b"content of the file")
        for gateway in self.gateways:
            got = gateway.http("GET", f"/files/{frames[0]['id']}/answer.txt")
            self.assertEqual((got.status, got.body, got.headers["Content-Type"]), (200, b"content of the file", "text/plain"))

    def test_a_room_s_members_on_both_nodes_get_the_answer(self):
        a, b = self.gateways
        room = f"den-{self.user}"
        members = [self.tab(a), self.tab(b, f"{self.user}-b")]
        for tab in members:
            self.assertEqual(tab.ask(type="join", room=room)["type"], "ack")
        members[0].send({"type": "message", "text": "hello all", "room": room, "client_id": "hello"})
        wanted = {"sender": self.user, "text": "hello all"}, {"sender": "star", "text": "You said: hello all"}
        ack, *chat = gather(members[0], {"type": "ack", "client_id": "hello"}, *wanted)
        self.assertEqual(gather(members[1], *wanted), chat)
        asked = self.asked(ack["id"])
        self.assertEqual((asked["channel_id"], asked["room_name"], asked["is_dm"]), (f"room:{room}", room, False))

    def test_answers_of_v1_on_both_nodes(self):
        for gateway in self.gateways:
            for is_stream in (True, False):
                with self.subTest(port=gateway.port, is_stream=is_stream):
                    answer = self.ask(self.client(gateway), "four words of mine", stream=is_stream)
                    text = content(answer) if is_stream else answer.choices[0].message.content
                    self.assertEqual(text, "You said: four words of mine")

    def test_a_client_that_goes_away_stops_the_worker(self):
        stream = self.ask(self.client(self.gateways[1]), "word " * 500, stream=True)
        request = next(stream).id
        next(stream)
        stream.close()
        until("the worker is told", lambda: request in self.worker.cancelled)
        until("it has nothing left to do", lambda: self.server.xpending(INBOUND, "sg:workers")["pending"] == 0)


class AChatInMessagePack(AChat):
    form = "msgpack"
    settings = {**AChat.settings, "redis_envelope": "msgpack"}

    def test_what_the_gateway_writes_is_messagepack(self):
        tab = self.tab(self.gateways[0])
        tab.ask(type="message", text="x", attachments=[{"filename": "f", "mimetype": "a/b", "data": "AAH/"}])
        [(_, fields)] = self.server.xrevrange(INBOUND, count=1)
        envelope = msgpack.unpackb(fields[b"e"])
        self.assertEqual(envelope["attachments"], [{"filename": "f", "mimetype": "a/b", "data": b"\x00\x01\xff"}])


class NamesOfOnesOwn(NodesTest):
    """Streams and groups that are called what others call them: nothing is where it would be by default."""

    names = {"redis_inbound_stream": "ask:these", "redis_inbound_group": "bots", "redis_outbound_stream": "say:those", "redis_outbound_group": "fronts"}
    settings = {"worker": "redis", **names}

    def test_the_chat_goes_over_them_and_what_is_malformed_beside_them(self):
        a, b = self.gateways
        server = self.redis.client(decode_responses=False)
        self.addCleanup(server.close)
        worker = RedisWorker(server)
        worker.inbound, worker.group, worker.outbound = "ask:these", "bots", "say:those"
        self.addCleanup(worker.start().stop)
        tabs = [self.tab(a), self.tab(b)]
        for number, tab in enumerate(tabs):
            tab.send({"type": "message", "text": f"question {number}"})
            for each in tabs:
                each.find("message", text=f"You said: question {number}")
        until("the worker acked both", lambda: server.xpending("ask:these", "bots")["pending"] == 0)
        until("a gateway acked both answers", lambda: server.xinfo_groups("say:those")[0]["pending"] == server.xinfo_groups("say:those")[0]["lag"] == 0)
        self.assertEqual([group["name"] for stream in ("ask:these", "say:those") for group in server.xinfo_groups(stream)], [b"bots", b"fronts"])
        self.assertEqual([server.xlen(stream) for stream in ("ask:these", "say:those")], [2, 2])
        server.xadd("say:those", {"e": b"no envelope"})
        until("it is put aside", lambda: server.exists("say:those:dead"))
        self.assertEqual([key for key in server.scan_iter("*stream:*")], [])


class OutboundEntries(WorkersTest):
    def test_both_forms_say_the_same(self):
        a, b = self.gateways
        target = str(uuid.uuid4())
        data = bytes(range(256))
        for form in ("json", "msgpack"):
            with self.subTest(form):
                user = f"{self.user}-{form}"
                tabs = [self.tab(a, user), self.tab(b, user)]
                channel = f"webchat:{user}"
                self.add(form, channel_id=channel, type="message", text="Grüße 🌟\u2028", reply_to=target)
                self.add(form, channel_id=channel, type="buttons", text="?", buttons=[{"label": "Y", "custom_id": "y", "style": "success"}])
                self.add(form, channel_id=channel, type="file", filename="ü.bin", mimetype="image/png", data=data if form == "msgpack" else base64.b64encode(data).decode())
                self.add(form, channel_id=channel, type="edit", message_id=target, text="newer")
                self.add(form, channel_id=channel, type="typing", active=True)
                for tab in tabs:
                    message, buttons, file, edit, typing = (tab.frame() for _ in range(5))
                    self.assertEqual((message["type"], message["text"], message["reply_to"], message["sender"]), ("message", "Grüße 🌟\u2028", target, "star"))
                    self.assertRegex(message["id"], UUID)
                    self.assertEqual(buttons["buttons"], [{"label": "Y", "custom_id": "y", "style": "success"}])
                    self.assertEqual((file["filename"], file["mimetype"], base64.b64decode(file["data"])), ("ü.bin", "image/png", data))
                    self.assertEqual((edit["type"], edit["id"], edit["text"]), ("edit", target, "newer"))
                    self.assertEqual(typing, {"type": "typing", "active": True})
        self.until_acked()

    def test_a_message_key_is_taken_once_and_no_key_always(self):
        a, b = self.gateways
        tabs = [self.tab(a), self.tab(b)]
        key = f"key-{self.user}"
        for text, more in (("one", {"message_key": key}), ("again", {"message_key": key}), ("two", {"message_key": f"{key}-2"}), ("three", {}), ("three", {})):
            self.add(channel_id=self.user, type="message", text=text, **more)
        self.until_acked()
        self.add("msgpack", channel_id=self.user, type="message", text="later", message_key=key)
        self.add(channel_id=self.user, type="message", text="end")
        for tab in tabs:
            self.assertEqual(texts(tab.until(lambda frame: frame["text"] == "end")), ["one", "two", "three", "three", "end"])
        self.until_acked()

    def test_what_cannot_be_read_is_put_aside_with_its_reason(self):
        tabs = [self.tab(gateway) for gateway in self.gateways]
        good = {"channel_id": self.user, "platform": "webchat", "type": "message", "text": "x"}
        bad = [
            *({"x": b"no envelope"}, {"e": b""}, {"e": b"{"}, {"e": b"[]"}, {"e": b"null"}, {"e": b"\xc1"}, {"e": b"\x81\xa1"}, {"e": b"\xff" * 100}),
            *({"e": b'{"a":' * 5_000}, {"e": b"\x91" * 5_000}, {"e": msgpack.packb(["a list"])}, {"e": b'{"channel_id":"\xff"}'}),
            *({"e": json.dumps({**good, **wrong}).encode()} for wrong in (
                *({"type": "unheard of"}, {"type": 1}, {"type": None}, {"channel_id": ""}, {"channel_id": "a\u0000b"}, {"channel_id": "x" * 300}, {"channel_id": 7}),
                *({"text": None}, {"text": 1}, {"reply_to": "no id"}, {"type": "edit", "message_id": "no id"}, {"type": "edit"}, {"type": "typing", "active": "yes"}),
                *({"type": "buttons", "buttons": [{"label": "x", "custom_id": "y"}] * 26}, {"type": "file", "filename": "f", "data": "no base64!"}, {"type": "end", "channel_id": "sse:x", "reason": "odd"}),
            )),
        ]
        before = self.server.xlen(DEAD)
        for number, fields in enumerate(bad):
            self.server.xadd(OUTBOUND, fields)
            self.add(channel_id=self.user, type="message", text=f"{number}")
        for tab in tabs:
            self.assertEqual(texts(tab.until(lambda frame: frame["text"] == f"{len(bad) - 1}")), [f"{number}" for number in range(len(bad))])
        self.until_acked()
        dead = [fields for _, fields in self.server.xrange(DEAD)][before:]
        self.assertEqual(len(dead), len(bad), [fields.get(b"reason") for fields in dead])
        for fields, entry in zip(bad, dead):
            with self.subTest(str(fields)[:80]):
                self.assertTrue(entry[b"reason"].decode().strip())
                self.assertEqual(entry.get(b"e", b""), fields.get("e", b""), "as it came")

    def test_entries_for_nobody_are_done_with(self):
        for channel in ("webchat:nobody", "room:empty", "sse:nobody"):
            self.add(channel_id=channel, type="message", text="x")
        self.add(channel_id="sse:nobody", type="end", reason="stop")
        before = self.server.xlen(DEAD)
        self.until_acked()
        self.assertEqual(self.server.xlen(DEAD), before)


class WhatIsAcked(WorkersTest):
    nodes = 1

    def until_answered(self, tab, clients, answers, timeout=PATIENCE):
        while missing := clients - set(answers):
            frame = tab.until(lambda frame: frame["type"] in ("ack", "error") and frame.get("client_id") in missing, timeout)[-1]
            answers[frame["client_id"]] = frame

    def assert_kept(self, answers):
        """Nothing that was acked is lost, and what stands there twice is the same message."""
        kept = self.inbound()
        for client, answer in answers.items():
            if answer["type"] == "ack":
                self.assertIn(answer["id"], [message["message_id"] for message in kept], client)
            else:
                self.assertTrue(answer["code"], answer)
        for client in answers:
            self.assertLessEqual(len({message["message_id"] for message in kept if message["content"] == client}), 1, client)

    def test_is_on_the_stream_and_in_its_order(self):
        tab = self.tab(self.gateways[0])
        for number in range(20):
            ack = tab.ask(type="message", text=f"{number}")
            [(_, fields)] = self.server.xrevrange(INBOUND, count=1)
            self.assertEqual(unpack(fields[b"e"])["message_id"], ack["id"], "at the moment of the ack")
        clients = [f"{self.user}-{number}" for number in range(200)]
        for client in clients:
            tab.send({"type": "message", "text": client, "client_id": client})
        answers = {}
        self.until_answered(tab, set(clients), answers)
        self.assertEqual({answer["type"] for answer in answers.values()}, {"ack"})
        kept = [message["content"] for message in self.inbound() if message["content"] in answers]
        self.assertEqual(kept, clients)

    def outage(self, begin, end, seconds):
        gateway = self.gateways[0]
        tab, other = self.tab(gateway), self.tab(gateway)
        clients = [f"{self.user}-{number}" for number in range(10)]
        begin()
        moment = time.monotonic()
        try:
            for client in clients:
                tab.send({"type": "message", "text": client, "client_id": client})
            answers = {}
            while (left := moment + seconds - time.monotonic()) > 0:
                try:
                    frame = tab.frame(left)
                except AssertionError:
                    break
                self.assertNotEqual(frame["type"], "ack", f"Redis cannot have it: {frame}")
                if frame["type"] == "error":
                    answers[frame["client_id"]] = frame
            self.assertTrue(other.frames.empty(), "no ack, no echo")
        finally:
            end()
        self.until_answered(tab, set(clients), answers)
        self.assert_kept(answers)
        # What was refused is said again, under the same name, and then it is there.
        refused = {client for client, answer in answers.items() if answer["type"] == "error"}
        again = {}
        for client in sorted(refused):
            tab.send({"type": "message", "text": client, "client_id": client})
        self.until_answered(tab, refused, again)
        retried = {client for client, answer in again.items() if answer["type"] == "error"}
        for client in retried:
            until("it is taken in the end", lambda: tab.ask(type="message", text=client, client_id=client)["type"] == "ack")
        self.assert_kept({client: answer for client, answer in again.items() if answer["type"] == "ack"})
        self.assertEqual(set(clients) - {message["content"] for message in self.inbound()}, set())
        print(f"{len(clients) - len(refused)} acked after the outage, {len(refused)} refused during it", flush=True)

    def test_while_redis_is_frozen_nothing_is(self):
        self.outage(self.redis.pause, self.redis.resume, 4)

    def test_while_redis_is_gone_nothing_is(self):
        self.outage(self.redis.stop, self.redis.restart, 3)

    def test_survives_connections_that_break(self):
        tab = self.tab(self.gateways[0])
        clients = [f"{self.user}-{number}" for number in range(300)]
        for number, client in enumerate(clients):
            tab.send({"type": "message", "text": client, "client_id": client})
            if number % 60 == 30:
                for role in self.redis.roles():
                    self.redis.kill_clients(role)
        answers = {}
        self.until_answered(tab, set(clients), answers)
        self.assert_kept(answers)
        first_seen = list(dict.fromkeys(message["content"] for message in self.inbound() if message["content"] in answers))
        acked = [client for client in clients if answers[client]["type"] == "ack"]
        self.assertEqual([client for client in first_seen if client in set(acked)], acked)
        self.assertGreater(len(acked), 100)


class TheReaderOfTheOutboundStreamDies(WorkersTest):
    nodes = 3

    def test_every_entry_arrives_in_order_and_none_is_left_behind(self):
        total, batch = 10_000, 100
        reader = self.holder()
        stayed = type(self).gateways = [gateway for gateway in self.gateways if gateway is not reader]
        users = [f"{self.user}-{number}" for number in range(10)]
        watches = {user: Watch(self.tab(stayed[number % 2], user)) for number, user in enumerate(users)}
        arrived = lambda: sum(len(watch.seen) for watch in watches.values())
        for start in range(0, total, batch):
            with self.server.pipeline(transaction=False) as pipeline:
                for number in range(start, start + batch):
                    envelope = {"platform": "webchat", "channel_id": f"webchat:{users[number % 10]}", "type": "message", "text": f"{number}", "message_key": f"{self.user}:{number}"}
                    pipeline.xadd(OUTBOUND, {"e": pack(envelope, "json" if number % 3 else "msgpack")})
                pipeline.execute()
            if start == total // 4:
                reader.process.send_signal(signal.SIGSTOP)  # so that there is a backlog to be in the middle of
                stopped_at = arrived()
            elif start == total // 2:
                reader.process.send_signal(signal.SIGCONT)
                until("it goes on", lambda: arrived() > stopped_at)
                reader.process.kill()
                killed, done = time.monotonic(), arrived()
        last = {user: f"{total - 10 + number}" for number, user in enumerate(users)}
        until("every tab has its last text", lambda: all(last[user] in watch.texts()[-30:] for user, watch in watches.items()), 60)
        after = [moment for watch in watches.values() for moment, frame in watch.seen if int(frame["text"]) >= total // 2 + 2 * batch]
        print(f"{done} of {total} had arrived when the reader was killed; resumed after {min(after) - killed:.2f} s", flush=True)
        self.assertLess(min(after) - killed, 8)
        self.until_acked()
        doubles = 0
        for number, user in enumerate(users):
            seen = watches[user].texts()
            self.assertEqual(list(dict.fromkeys(seen)), [f"{count}" for count in range(number, total, 10)], user)
            doubles += len(seen) - total // 10
        print(f"{doubles} of {total} doubled", flush=True)
        self.assertLess(doubles, total // 5, "what was not acked yet, no more")
        # What was said before the crash is remembered after it.
        self.add(channel_id=users[0], type="message", text="doubled", message_key=f"{self.user}:0")
        self.add(channel_id=users[0], type="message", text="-1")
        until("the last one", lambda: watches[users[0]].texts()[-1] == "-1")
        self.assertNotIn("doubled", watches[users[0]].texts())
        self.assertIn(self.holder(), stayed)


if __name__ == "__main__":
    unittest.main()
