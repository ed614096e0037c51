"""Many gateways on one Redis are one: what is sent through any of them, who is there, answers, recovery, files."""

import base64
import contextlib
import itertools
import json
import random
import signal
import socket
import time
import unittest
import uuid

from gateway import PATIENCE, until
from redis_nodes import NodesTest, is_online, texts, until_ready
from redis_server import published
from scripted import content

STAR = {"sender": "star", "timestamp": 0.5}


class AUserOnManyNodes(NodesTest):
    nodes = 3

    def test_a_send_through_any_node_reaches_every_tab_and_says_how_many(self):
        a, b, c = self.gateways
        tabs = [self.tab(a), self.tab(a), self.tab(b)]
        for gateway, here, elsewhere in ((a, 2, 1), (b, 1, 1), (c, 0, 2)):
            answer = self.send(gateway, f"through {gateway.port} ü 🌟\u2028\"")
            self.assert_report(answer, here, elsewhere)
            got = [tab.text() for tab in tabs]
            self.assertEqual(len(set(got)), 1, got)
            frame = json.loads(got[0])
            self.assertEqual((frame["id"], frame["text"], frame["sender"]), (answer["id"], f"through {gateway.port} ü 🌟\u2028\"", "star"))
        self.assertTrue(all(tab.frames.empty() for tab in tabs), "once each")

    def test_every_kind_of_frame_is_the_same_on_every_node(self):
        a, b, c = self.gateways
        tabs = [self.tab(a), self.tab(b)]
        message = str(uuid.uuid4())
        data = bytes(range(256)) * 2_000
        for route, value in (
            ("send", {"text": "", "reply_to": message}),
            ("buttons", {"text": "?", "buttons": [{"label": "ü", "custom_id": "y", "style": "link", "url": "https://example.com/"}]}),
            ("file", {"filename": "bild ü.png", "mimetype": "image/png", "data": base64.b64encode(data).decode()}),
            ("edit", {"message_id": message, "text": "newer"}),
            ("typing", {"active": True}),
        ):
            with self.subTest(route):
                self.assert_report(c.api(route, {"channel_id": self.user, **value}), 0, 2)
                got = [tab.text() for tab in tabs]
                self.assertEqual(got[0], got[1])
                frame = json.loads(got[0])
                self.assertEqual({name: frame.get(name) for name in value if name != "message_id"}, {name: value[name] for name in value if name != "message_id"})

    def test_nobody_anywhere_is_nobody(self):
        a, b, _ = self.gateways
        self.assert_report(self.send(a, "x"), 0, 0)
        tab = self.tab(b)
        self.assert_report(self.send(a, "seen"), 0, 1)
        self.assertEqual(tab.frame()["text"], "seen")
        tab.close()
        gone = until("the tab's node is no longer reached", lambda: (answer := self.send(a, "x"))["nodes"] == 0 and answer)
        self.assertEqual((gone["delivered"], gone["reason"]), (False, "offline"))

    def test_ids_are_opaque(self):
        a, b, _ = self.gateways
        ids = ["{curly}", "user-*", "u[a-z]?", "a:b", "ü 🌟", "x" * 256, "percent%2F\\"]
        tabs = {user: self.tab(b, user) for user in ids}
        for number, user in enumerate(ids):
            self.assert_report(a.api("send", {"channel_id": f"webchat:{user}", "text": f"for {number}"}), 0, 1)
        for number, user in enumerate(ids):
            self.assertEqual(tabs[user].frame()["text"], f"for {number}")
            self.assertTrue(tabs[user].frames.empty())

    def test_rooms_reach_their_members_on_every_node(self):
        a, b, c = self.gateways
        room = f"den-{self.user}"
        members = [self.tab(a), self.tab(a, f"{self.user}-b"), self.tab(b, f"{self.user}-c")]
        outside = self.tab(b, f"{self.user}-outside")
        for tab in members:
            self.assertEqual(tab.ask(type="join", room=room)["type"], "ack")
        for gateway, here, elsewhere in ((a, 2, 1), (b, 1, 1), (c, 0, 2)):
            answer = gateway.api("send", {"channel_id": f"room:{room}", "text": f"to all {gateway.port}"})
            self.assertEqual((answer["tabs"], answer["delivered"]), (here, True), answer)
            self.assertGreaterEqual(answer["nodes"], elsewhere, "a room is sent to every node, whoever is in it")
            for tab in members:
                self.assertEqual(tab.frame()["text"], f"to all {gateway.port}")
        members[0].send({"type": "message", "text": "hello all", "room": room})
        for tab in members:
            self.assertEqual(tab.find("message", text="hello all")["sender"], self.user)
        self.assertEqual(members[2].ask(type="leave", room=room)["type"], "ack")
        c.api("send", {"channel_id": f"room:{room}", "text": "to who is left"})
        self.send(c, "to you", f"{self.user}-c")
        self.assertEqual((members[0].frame()["text"], members[2].frame()["text"]), ("to who is left", "to you"))
        self.assertTrue(outside.frames.empty())

    def test_what_a_user_writes_appears_in_the_tabs_on_other_nodes(self):
        a, b, _ = self.gateways
        mine, other = self.tab(a), self.tab(b)
        ack = mine.ask(type="message", text="from here")
        frame = other.frame()
        self.assertEqual((frame["id"], frame["text"], frame["sender"]), (ack["id"], "from here", self.user))

    def test_one_node_s_order_is_every_node_s_order(self):
        a, b, c = self.gateways
        tabs = [self.tab(a), self.tab(b), self.tab(c)]
        count = 2_000
        lines = "".join(json.dumps({"op": "send", "channel_id": self.user, "text": str(number)}) + "\n" for number in range(count))
        half = [lines[: (middle := lines.index("\n", len(lines) // 2) + 1)], lines[middle:]]
        for part in half:
            answer = b.http("POST", "/api/batch", part.encode(), {"Content-Type": "application/x-ndjson"})
            self.assertEqual(answer.status, 200)
            self.assertEqual({(line["tabs"], line["nodes"]) for line in map(json.loads, answer.body.splitlines())}, {(1, 2)})
        for tab in tabs:
            self.assertEqual(texts(tab.until(lambda frame: frame["text"] == str(count - 1))), [str(number) for number in range(count)])

    def test_when_all_nodes_publish_each_one_s_order_holds_in_every_tab(self):
        tabs = [self.tab(gateway) for gateway in self.gateways]
        each = 150

        def publish(gateway):
            for number in range(each):
                self.send(gateway, f"{gateway.port} {number}")

        publishers = [self.apart(publish, gateway) for gateway in self.gateways]
        seen = [[tab.frame()["text"] for _ in range(3 * each)] for tab in tabs]
        for publisher in publishers:
            publisher.result(PATIENCE)
        for order in seen:
            for gateway in self.gateways:
                mine = [text for text in order if text.startswith(f"{gateway.port} ")]
                self.assertEqual(mine, [f"{gateway.port} {number}" for number in range(each)])
        self.assertTrue(all(tab.frames.empty() for tab in tabs), "once each")


class WhoIsThere(NodesTest):
    def listed(self, gateway):
        answer = gateway.http("GET", "/api/users").json()
        return {user["user_id"]: user["tabs"] for user in answer["users"]}

    def test_a_user_is_online_on_every_node_until_the_last_tab_is_gone(self):
        a, b = self.gateways
        self.assertFalse(is_online(a, self.user) or is_online(b, self.user))
        first = self.tab(a)
        for gateway in self.gateways:
            until("online", lambda: is_online(gateway, self.user), 5)
            until("listed", lambda: self.listed(gateway).get(self.user) == 1, 5)
        second = self.tab(b)
        for gateway in self.gateways:
            until("both tabs are listed", lambda: self.listed(gateway).get(self.user) == 2, 5)
        first.close()
        until("one is left", lambda: self.listed(a).get(self.user) == 1, 10)
        self.assertTrue(is_online(a, self.user) and is_online(b, self.user))
        second.close()
        for gateway in self.gateways:
            until("offline", lambda: not is_online(gateway, self.user), 6)
            self.assertNotIn(self.user, self.listed(gateway))

    def test_a_user_who_is_cut_on_one_node_is_cut_on_all(self):
        a, b = self.gateways
        tabs = [self.tab(a), self.tab(b), self.tab(b)]
        other = self.tab(b, f"{self.user}-other")
        answer = a.http("DELETE", f"/api/users/{self.user}")
        self.assertEqual(answer.status, 200, answer.body)
        for tab in tabs:
            self.assertEqual(tab.closed()[0], (4010, "kicked"))
        again = self.tab(b)
        self.assert_report(self.send(a, "welcome back"), 0, 1)
        self.assertEqual(again.frame()["text"], "welcome back")
        self.assertTrue(other.frames.empty() and other.ending is None)

    def test_coming_and_going_is_published(self):
        a, b = self.gateways
        feed = self.subscriber("sg:presence")

        def next_edge():
            while True:
                edge = json.loads(published(feed)[1])
                if edge["user_id"] == self.user:
                    self.assertEqual(set(edge), {"user_id", "node", "online"})
                    return edge

        first = self.tab(a)
        came = next_edge()
        self.assertIs(came["online"], True)
        first.close()
        went = next_edge()
        self.assertEqual(went, {**came, "online": False})
        self.tab(b)
        elsewhere = next_edge()
        self.assertIs(elsewhere["online"], True)
        self.assertNotEqual(elsewhere["node"], came["node"])


class NodesThatGo(NodesTest):
    def test_the_users_of_a_dead_node_are_offline_within_ten_seconds_and_all_else_goes_on(self):
        a, b = self.gateways
        doomed, frozen = self.node(), self.node()
        lost, both, asleep, here = (f"{self.user}-{name}" for name in ("lost", "both", "asleep", "here"))
        self.tab(doomed, lost)
        self.tab(doomed, both)
        sleeper = self.tab(frozen, asleep)
        tabs = [self.tab(a, both), self.tab(b, here)]
        self.assertTrue(all(is_online(gateway, user) for gateway in self.gateways for user in (lost, asleep)))
        self.assert_report(self.send(a, "before", both), 1, 1)
        doomed.process.kill()
        frozen.process.send_signal(signal.SIGSTOP)
        self.addCleanup(frozen.process.send_signal, signal.SIGCONT)
        begin = time.monotonic()
        # Its users have to go offline by themselves; what is sent meanwhile must not suffer.
        for number in range(3):
            for gateway, user, tab in ((a, here, tabs[1]), (b, both, tabs[0])):
                sent = time.monotonic()
                answering = self.apart(self.send, gateway, f"{number}", user)
                tab.find("message", text=f"{number}")
                self.assertLess(time.monotonic() - sent, 1)
                answer = answering.result(PATIENCE)
                self.assertEqual((answer["delivered"], answer["nodes"] >= 1), (True, True), answer)
        for gateway in self.gateways:
            for user in (lost, asleep):
                until("its users are offline", lambda: not is_online(gateway, user), 12)
        print(f"offline after {time.monotonic() - begin:.2f} s", flush=True)
        self.assertTrue(is_online(a, both) and is_online(b, both))
        until("it is not counted any more", lambda: self.send(b, "after", both)["nodes"] == 1, 5)
        self.assert_report(self.send(a, "x", lost), 0, 0)
        # A node that only slept is one of them again, with its users.
        frozen.process.send_signal(signal.SIGCONT)
        for gateway in self.gateways:
            until("they are online again", lambda: is_online(gateway, asleep), 10)
        until("they are reached again", lambda: self.send(a, "good morning", asleep)["nodes"] == 1, 5)
        sleeper.find("message", text="good morning")

    def test_a_node_that_is_told_to_leave_takes_its_users_with_it(self):
        a, b = self.gateways
        leaving = self.node(drain_spread="1s", close_timeout="1s", drain_deadline="5s")
        tab = self.tab(leaving)
        self.assertTrue(is_online(a, self.user))
        leaving.terminate()
        self.assertEqual(tab.closed()[0][0], 1012)
        until("it has left", lambda: leaving.process.poll() is not None)
        self.assertEqual(leaving.process.returncode, 0)
        for gateway in (a, b):
            until("its users are offline at once", lambda: not is_online(gateway, self.user), 2)
        self.assert_report(self.send(b, "x"), 0, 0)


class AnotherDeployment(NodesTest):
    def test_with_another_prefix_shares_nothing(self):
        a, b = self.gateways
        stranger = self.node(redis_prefix="other:")
        until_ready(stranger)
        here, there = self.tab(a), self.tab(stranger)
        self.assert_report(self.send(b, "ours"), 0, 1)
        self.assert_report(self.send(stranger, "theirs"), 1, 0)
        self.assertEqual((here.frame()["text"], there.frame()["text"]), ("ours", "theirs"))
        self.assertEqual([len(gateway.http("GET", "/api/users").json()["users"]) for gateway in (b, stranger)], [1, 1])
        names = [*self.redis.control.keys("*"), *self.redis.control.pubsub_channels("*")]
        self.assertEqual([name for name in names if not name.startswith(("sg:", "other:"))], [])


class AnswersOfOtherNodes(NodesTest):
    """The tests are the worker: they read the inbound stream, and answer in every way there is."""

    settings = {"worker": "redis"}

    def setUp(self):
        super().setUp()
        self.server = self.redis.client(decode_responses=False)
        self.addCleanup(self.server.close)
        self.position = self.last()

    def last(self):
        newest = self.server.xrevrange("sg:stream:inbound", count=1)
        return newest[0][0] if newest else b"0"

    def question(self):
        """The next envelope on the inbound stream."""
        got = self.server.xread({"sg:stream:inbound": self.position}, count=1, block=int(PATIENCE * 1000))
        self.assertTrue(got, "nobody asked the worker")
        [(self.position, fields)] = got[0][1]
        self.assertEqual(list(fields), [b"e"])
        return json.loads(fields[b"e"])

    def publish(self, channel, frame, **form):
        """As any Python program would: ASCII, with spaces."""
        return self.server.publish(f"sg:{channel}", json.dumps(frame, **form))

    def add(self, **envelope):
        self.server.xadd("sg:stream:outbound:webchat", {"e": json.dumps({"platform": "webchat", **envelope})})

    def test_a_worker_that_knows_only_pub_sub_answers(self):
        forms = {"compact": {"separators": (",", ":")}, "with spaces": {}, "in another order": {"sort_keys": True}, "in lines": {"indent": 2}}
        for form, (gateway, is_stream) in zip(forms, itertools.product(self.gateways, (True, False))):
            with self.subTest(form):
                client = self.client(gateway)
                asking = self.apart(lambda: content(self.ask(client, stream=True)) if is_stream else self.ask(client).choices[0].message.content)
                channel = self.question()["channel_id"]
                message = str(uuid.uuid4())
                publish = lambda frame: self.publish(channel, frame, **forms[form])
                self.assertEqual(publish({"type": "message", "id": message, "text": "Grüße", **STAR}), 1, "it listens before it asks")
                publish({"type": "typing", "active": True})
                publish({"type": "edit", "id": message, "text": "Grüße, 世界 🌟\"\\\n", "timestamp": 0.5})
                publish({"type": "end", "reason": "stop"})
                self.assertEqual(asking.result(PATIENCE), "Grüße, 世界 🌟\"\\\n")

    def test_what_is_no_frame_does_not_end_a_stream(self):
        asking = self.apart(lambda: content(self.ask(self.client(self.gateways[0]), stream=True)))
        channel = self.question()["channel_id"]
        for junk in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"type":1}', b'{"type":"unheard of"}', b'{"type":"message"}', b"x" * 100_000):
            self.server.publish(f"sg:{channel}", junk)
        self.publish(channel, {"type": "message", "id": str(uuid.uuid4()), "text": "fine", **STAR})
        self.publish(channel, {"type": "end", "reason": "stop"})
        self.assertEqual(asking.result(PATIENCE), "fine")

    def test_a_worker_on_the_outbound_stream_answers(self):
        for gateway in self.gateways:
            with self.subTest(gateway.port):
                asking = self.apart(lambda: content(self.ask(self.client(gateway), stream=True)))
                channel = self.question()["channel_id"]
                for word in ("one", "zwei ü", "🌟"):
                    self.add(channel_id=channel, type="message", text=word)
                self.add(channel_id=channel, type="end", reason="stop")
                self.assertEqual(asking.result(PATIENCE).split("\n\n"), ["one", "zwei ü", "🌟"])

    def test_a_worker_answers_through_the_api_of_any_node(self):
        a, b = self.gateways
        asking = self.apart(lambda: content(self.ask(self.client(a), stream=True)))
        channel = self.question()["channel_id"]
        spy = self.subscriber(f"sg:{channel}")
        first = b.api("send", {"channel_id": channel, "text": "through b"})
        self.assertIs(first["delivered"], True)
        b.api("edit", {"channel_id": channel, "message_id": first["id"], "text": "through b, edited ü"})
        self.assertIs(b.api("end", {"channel_id": channel})["delivered"], True)
        self.assertEqual(asking.result(PATIENCE), "through b, edited ü")
        kinds = [json.loads(published(spy)[1])["type"] for _ in range(3)]
        self.assertEqual(kinds, ["message", "edit", "end"], "published once each")

    def test_an_answer_s_order_holds_whatever_its_length(self):
        a, b = self.gateways
        words = [f"{number}" for number in range(1_000)]
        asking = self.apart(lambda: content(self.ask(self.client(a), stream=True)))
        channel = self.question()["channel_id"]
        message = b.api("send", {"channel_id": channel, "text": words[0]})["id"]
        lines = [{"op": "edit", "channel_id": channel, "message_id": message, "text": " ".join(words[:end])} for end in range(2, len(words) + 1)]
        body = "".join(json.dumps(line) + "\n" for line in [*lines, {"op": "end", "channel_id": channel}])
        self.assertEqual(b.http("POST", "/api/batch", body.encode(), {"Content-Type": "application/x-ndjson"}).status, 200)
        self.assertEqual(asking.result(PATIENCE), " ".join(words))

    def test_a_stream_that_this_node_holds_is_fed_directly(self):
        a = self.gateways[0]
        asking = self.apart(lambda: content(self.ask(self.client(a), stream=True)))
        channel = self.question()["channel_id"]
        spy = self.subscriber(f"sg:{channel}", "sg:sse:the end of the test")
        self.assert_report(a.api("send", {"channel_id": channel, "text": "directly"}), 1, 0)
        a.api("end", {"channel_id": channel})
        self.assertEqual(asking.result(PATIENCE), "directly")
        a.api("send", {"channel_id": "sse:the end of the test", "text": "x"})
        self.assertEqual(published(spy)[0], "sg:sse:the end of the test", "what came before it would have come first")

    def test_frames_for_a_stream_that_nobody_holds_are_ascii_on_its_channel(self):
        spy = self.subscriber("sg:sse:by-others")
        words = "Grüße, 世界 🌟 \u2028\x85\x7f\x00\"\\\n\t"
        answer = self.gateways[0].api("send", {"channel_id": "sse:by-others", "text": words})
        self.assert_report(answer, 0, 1)
        channel, data = published(spy)
        self.assertRegex(data, rb"\A[ -~]+\Z", "nothing outside U+0020..U+007E")
        frame = json.loads(data)
        self.assertEqual(list(frame), ["type", "id", "text", "sender", "timestamp"])
        self.assertEqual((channel, frame["id"], frame["text"]), ("sg:sse:by-others", answer["id"], words))
        self.assertEqual(data, json.dumps(frame, separators=(",", ":")).replace("\x7f", "\\u007f").encode())
        self.gateways[1].api("file", {"channel_id": "sse:by-others", "filename": "ü\u2028.bin", "data": "AAH/"})
        data = published(spy)[1]
        self.assertRegex(data, rb"\A[ -~]+\Z")
        self.assertEqual((json.loads(data)["filename"], json.loads(data)["data"]), ("ü\u2028.bin", "AAH/"))
        self.gateways[1].api("end", {"channel_id": "sse:by-others", "reason": "timeout"})
        self.assertEqual(published(spy)[1], b'{"type":"end","reason":"timeout"}')
        self.assert_report(self.gateways[1].api("send", {"channel_id": "sse:nobody-at-all", "text": "x"}), 0, 0)

    def test_a_client_that_goes_away_cancels_through_the_inbound_stream(self):
        for gateway in self.gateways:
            stream = self.ask(self.client(gateway), stream=True)
            asked = self.question()
            stream.close()
            cancel = self.question()
            self.assertEqual(cancel["extra"]["cancel"], {"request_id": asked["channel_id"].removeprefix("sse:")})
        # A node listens for 15 s at least, so as not to miss who is about to ask.
        until("nobody listens any more", lambda: self.publish(asked["channel_id"], {"type": "typing", "active": True}) == 0, 20)


class TabsThatComeBackElsewhere(NodesTest):
    settings = {"recovery_frames_max": 500, "recovery_bytes_max": "256KiB"}

    def test_another_node_has_what_was_missed(self):
        a, b = self.gateways
        first = self.tab(a)
        ids = [self.send(a, text)["id"] for text in ("one", "two")]
        self.assertEqual([first.frame()["text"] for _ in ids], ["one", "two"])
        first.close()
        three = self.send(b, "three")["id"]
        a.api("edit", {"channel_id": self.user, "message_id": ids[0], "text": "one, edited"})
        b.api("edit", {"channel_id": self.user, "message_id": three, "text": "three, edited"})
        b.api("edit", {"channel_id": self.user, "message_id": three, "text": "three, edited twice"})
        a.api("file", {"channel_id": self.user, "filename": "f.txt", "data": "YWI="})
        a.api("typing", {"channel_id": self.user, "active": True})
        ordered = [("message", "three"), ("file", "f.txt")]
        for gateway in (b, a):
            with self.subTest(gateway.port):
                tab = self.tab_after(gateway, ids[1])
                self.send(a, f"live {gateway.port}")
                ordered.append(("message", f"live {gateway.port}"))
                seen = [(frame["type"], frame.get("text", frame.get("filename"))) for frame in tab.until(lambda frame: frame.get("text") == ordered[-1][1])]
                self.assertEqual([what for what in seen if what[0] != "edit"], ordered)
                self.assertEqual(sorted(what for what in seen if what[0] == "edit"), [("edit", "one, edited"), ("edit", "three, edited twice")])
                self.assertLess(seen.index(("message", "three")), seen.index(("edit", "three, edited twice")))
                tab.close()

    def test_with_nothing_missed_nothing_is_replayed(self):
        a, b = self.gateways
        position = self.send(a, "the last one")["id"]
        tab = self.tab_after(b, position)
        self.send(b, "live")
        self.assertEqual(tab.frame()["text"], "live")

    def test_an_unknown_position_is_a_gap_on_every_node(self):
        a, b = self.gateways
        self.send(a, "kept")
        for gateway in (a, b):
            tab = self.tab_after(gateway, str(uuid.uuid4()))
            self.assertEqual(tab.frame(), {"type": "gap", "reason": "unknown_position"})
            self.send(a, "live")
            self.assertEqual(tab.frame()["text"], "live", "never a partial replay")

    def come_and_go(self, count, publishers):
        """What a tab sees whose connection breaks again and again, each time to another node or the same, while some publish."""
        positions = [self.send(self.gateways[0], "start")["id"]]  # as the page does: up to 16, the newest first

        def publish(gateway):
            for number in range(count):
                self.send(gateway, f"{gateway.port} {number}")
                time.sleep(0.005)  # a pace, so that the rounds are many

        def publish_all():
            for publishing in [self.apart(publish, gateway) for gateway in publishers]:
                publishing.result(4 * PATIENCE)
            self.send(self.gateways[0], "end")

        publishing = self.apart(publish_all)
        dice = random.Random(7)
        seen, rounds = [], 0
        while seen[-1:] != ["end"]:
            rounds += 1
            tab = self.tab_after(dice.choice(self.gateways), ",".join(positions))
            for _ in range(dice.randrange(1, 12)):
                frame = tab.frame()
                self.assertEqual(frame["type"], "message", f"{frame} in round {rounds} after {seen[-1:]}")
                positions = [frame["id"], *positions][:16]
                seen.append(frame["text"])
                if frame["text"] == "end":
                    break
            if dice.random() < 0.3:
                tab.socket.socket.shutdown(socket.SHUT_RDWR)  # without a word
            else:
                tab.close()
        publishing.result(PATIENCE)
        self.assertGreater(rounds, 30)
        return seen

    def test_nothing_is_lost_doubled_or_moved_while_one_node_publishes(self):
        a = self.gateways[0]
        self.assertEqual(self.come_and_go(400, [a]), [*(f"{a.port} {number}" for number in range(400)), "end"])

    def test_nothing_is_lost_or_doubled_while_all_nodes_publish(self):
        seen = self.come_and_go(200, self.gateways)
        for gateway in self.gateways:
            mine = [int(text.split()[1]) for text in seen if text.startswith(f"{gateway.port} ")]
            lost = sorted(set(range(200)) - set(mine))
            doubled = sorted(number for number in set(mine) if mine.count(number) > 1)
            self.assertEqual((lost, doubled, mine), ([], [], list(range(200))))


class FilesOfOtherNodes(NodesTest):
    def test_a_link_opens_on_every_node(self):
        a, b = self.gateways
        data = bytes(range(256)) * 4_000
        answer = a.api("file", {"channel_id": self.user, "filename": "bild ü.png", "mimetype": "image/png", "data": base64.b64encode(data).decode()})
        path = "/files/" + answer["url"].removeprefix("webchat://file/")
        got = [gateway.http("GET", path) for gateway in (a, b)]
        for one in got:
            self.assertEqual((one.status, one.body[:200]), (200, data[:200]))
            self.assertTrue(one.body == data, "all of it")
        for name in ("Content-Type", "Content-Disposition", "X-Content-Type-Options", "Content-Security-Policy", "ETag", "Accept-Ranges"):
            self.assertEqual(got[0].headers[name], got[1].headers[name], name)
        part = b.http("GET", path, headers={"Range": "bytes=256-259"})
        self.assertEqual((part.status, part.body, part.headers["Content-Range"]), (206, b"\x00\x01\x02\x03", f"bytes 256-259/{len(data)}"))
        self.assertEqual(b.http("GET", path, headers={"If-None-Match": got[1].headers["ETag"]}).status, 304)

    def test_a_link_that_is_followed_again_and_again_asks_redis_once(self):
        a, b = self.gateways
        url = a.api("file", {"channel_id": self.user, "filename": "f.txt", "mimetype": "text/plain", "data": "YWI="})["url"]
        path = "/files/" + url.removeprefix("webchat://file/")
        until("the other node knows where it is", lambda: b.http("GET", path).status == 200)
        asked = self.gets()
        for _ in range(50):
            self.assertEqual(b.http("GET", path).body, b"ab")
        self.assertLessEqual(self.gets() - asked, 10, "its address is good for five seconds, also on a busy machine")

    def test_who_takes_nothing_of_a_file_leaves_room_for_who_does(self):
        (a, _), b = self.gateways, self.node(file_bytes_max="1MiB")
        until_ready(b)
        data = bytes(1 << 20)
        url = a.api("file", {"channel_id": self.user, "filename": "f.bin", "data": base64.b64encode(data).decode()})["url"]
        path = "/files/" + url.removeprefix("webchat://file/")
        until("the other node knows where it is", lambda: b.http("GET", path).status == 200)
        readers = []
        for _ in range(16):
            reader = socket.socket()
            self.addCleanup(reader.close)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", b.port))
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            self.assertEqual(reader.recv(12), b"HTTP/1.1 200")
            readers.append(reader)
        # As much as there is room for is held by those who do not take it.
        answer = b.http("GET", path)
        self.assertEqual((answer.status, len(answer.body)), (200, len(data)))
        # Whose was the oldest gets no more of it than was on its way.
        readers[0].settimeout(PATIENCE)
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while part := readers[0].recv(1 << 16):
                taken += len(part)
        self.assertLess(taken, len(data))
        self.assertIn("tabcast_evicted_connections_total 1\n", b.http("GET", "/metrics").body.decode())

    def test_who_takes_a_file_too_slowly_has_it_no_longer_than_others_can_wait(self):
        (a, _), b = self.gateways, self.node(file_bytes_max="4MiB")
        until_ready(b)
        data = bytes(4 << 20)
        url = a.api("file", {"channel_id": self.user, "filename": "f.bin", "data": base64.b64encode(data).decode()})["url"]
        path = "/files/" + url.removeprefix("webchat://file/")
        until("the other node knows where it is", lambda: b.http("GET", path).status == 200)
        readers = []
        for _ in range(16):
            reader = socket.socket()
            self.addCleanup(reader.close)
            reader.settimeout(PATIENCE)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", b.port))
            reader.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            self.assertEqual(reader.recv(12), b"HTTP/1.1 200")
            readers.append(reader)
        begun = time.monotonic()
        asking = self.apart(b.http, "GET", path)
        # The oldest goes on taking, never nothing for a second, at a pace that would need a minute for all of it.
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while part := readers[0].recv(4096):
                taken += len(part)
                time.sleep(max(0, begun + taken * 60 / len(data) - time.monotonic()))
        lasted = time.monotonic() - begun
        self.assertIn(asking.result(PATIENCE).status, (200, 503))
        self.assertLess(taken, len(data))
        self.assertGreater(lasted, 15, "it has a while, as it goes on taking")
        self.assertLess(lasted, 45)

    def gets(self):
        with self.redis.client() as redis:
            return redis.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"]

    def test_a_connection_that_broke_while_nobody_asked_costs_nobody_a_file(self):
        a, b = self.gateways
        answer = a.api("file", {"channel_id": self.user, "filename": "f.txt", "data": "eA=="})
        link = answer["url"].replace("webchat://file/", "/files/")
        for _ in range(2):
            # Where the other node is was forgotten meanwhile, and is asked for on a connection that is gone.
            time.sleep(5.1)
            self.redis.kill_clients("commands")
            self.assertEqual(b.http("GET", link).status, 200)

    def test_a_file_that_reached_a_tab_elsewhere_has_a_link_where_the_tab_is(self):
        a, b = self.gateways
        tab = self.tab(b)
        a.api("file", {"channel_id": self.user, "filename": "f.txt", "mimetype": "text/plain", "data": "YWI="})
        frame = tab.find("file")
        self.assertEqual(b.http("GET", f"/files/{frame['id']}/f.txt").body, b"ab")

    def test_a_link_of_nobody_is_404_and_one_of_a_node_that_is_gone_fails_soon(self):
        a, b = self.gateways
        self.assertEqual(b.http("GET", f"/files/{uuid.uuid4()}/f.txt").status, 404)
        doomed = self.node()
        url = doomed.api("file", {"channel_id": self.user, "filename": "f.txt", "data": "YWI="})["url"]
        path = "/files/" + url.removeprefix("webchat://file/")
        self.assertEqual(b.http("GET", path).body, b"ab")
        doomed.process.kill()
        begin = time.monotonic()
        answer = a.http("GET", path)
        self.assertIn(answer.status, (404, 502, 503, 504))
        self.assertTrue(answer.json()["error"]["code"])
        self.assertLess(time.monotonic() - begin, 10)


if __name__ == "__main__":
    unittest.main()
