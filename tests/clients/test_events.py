"""/events as an independent reader of event streams sees it (httpx-sse): positions, replays, gaps."""

import contextlib
import json
import threading
import unittest
import uuid

import httpx
import httpx_sse

from gateway import PATIENCE, GatewayTest


class Reading(GatewayTest):
    def setUp(self):
        super().setUp()
        self.http = httpx.Client(base_url=self.gateway.origin, timeout=PATIENCE)
        self.addCleanup(self.http.close)

    @contextlib.contextmanager
    def reader(self, position=None, after=None, **query):
        """Events as they come; it is connected once it is asked for something."""
        query = {"user": self.user, "name": self.user, "hello": "1", **({"after": after} if after else {}), **query}
        headers = {} if position is None else {"Last-Event-ID": position}
        with httpx_sse.connect_sse(self.http, "GET", "/events", params=query, headers=headers) as source:
            self.assertEqual(source.response.status_code, 200)
            self.assertEqual(source.response.headers["content-type"], "text/event-stream; charset=utf-8")
            events = source.iter_sse()
            yield events

    def connected(self, events):
        """Frames of tabcast's own have no position."""
        event = next(events)
        self.assertEqual((json.loads(event.data)["type"], event.id), ("hello", ""))

    def say(self, text):
        return self.gateway.api("send", {"channel_id": self.user, "text": text})["id"]

    def edit(self, message, text):
        self.gateway.api("edit", {"channel_id": self.user, "message_id": message, "text": text})

    def shown(self, events, last):
        """(id of the event, type, text) up to and with the text `last`."""
        seen = []
        while not seen or seen[-1][2] != last:
            event = next(events)
            frame = json.loads(event.data)
            seen.append((event.id, frame["type"], frame.get("text", frame.get("reason"))))
        return seen

    def some(self, *texts):
        """Messages that were read, and their ids."""
        with self.reader() as events:
            self.connected(events)
            ids = [self.say(text) for text in texts]
            self.assertEqual([text for _, _, text in self.shown(events, texts[-1])], list(texts))
        return ids


class Positions(Reading):
    def test_ordered_frames_are_positions(self):
        with self.reader() as events:
            self.connected(events)
            first = self.say("one")
            self.edit(first, "one, edited")
            self.gateway.api("typing", {"channel_id": self.user, "active": True})
            file = self.gateway.api("file", {"channel_id": self.user, "filename": "f", "data": ""})["id"]
            events = [next(events) for _ in range(4)]
        self.assertEqual([json.loads(event.data)["type"] for event in events], ["message", "edit", "typing", "file"])
        # An event without an id keeps the last one, as a browser's EventSource does.
        self.assertEqual([event.id for event in events], [first, first, first, file])
        self.assertEqual({event.event for event in events}, {"message"})

    def test_what_was_missed_comes_before_what_is_live_and_nothing_twice(self):
        one, two = self.some("one", "two")
        self.edit(one, "one, edited once")
        three = self.say("three")
        self.edit(one, "one, edited twice")
        self.edit(three, "three, edited")
        with self.reader(two) as events:
            self.say("live")
            seen = self.shown(events, "live")
        self.assertEqual([what[1:] for what in seen if what[1] != "hello"], [("message", "three"), ("edit", "one, edited twice"), ("edit", "three, edited"), ("message", "live")])

    def test_nothing_is_missed_or_doubled_while_others_publish(self):
        [position] = self.some("start")
        total = 40

        def publish():
            for number in range(total):
                self.say(f"n{number}")

        publisher = threading.Thread(target=publish)
        publisher.start()
        texts, connections = [], 0
        while not texts or texts[-1] != f"n{total - 1}":
            connections += 1
            with self.reader(position) as events:
                for _ in range(6):  # then the connection is cut
                    event = next(events)
                    frame = json.loads(event.data)
                    if frame["type"] == "hello":
                        continue
                    self.assertEqual(frame["type"], "message", frame)
                    position = event.id
                    texts.append(frame["text"])
                    if frame["text"] == f"n{total - 1}":
                        break
        publisher.join()
        self.assertEqual(texts, [f"n{number}" for number in range(total)])
        self.assertGreater(connections, 5)

    def test_the_query_names_a_position_too_and_the_header_counts(self):
        one, two, _ = self.some("one", "two", "three")
        with self.reader(after=one) as events:
            self.say("live")
            self.assertEqual([text for _, kind, text in self.shown(events, "live") if kind == "message"], ["two", "three", "live"])
        with self.reader(two, after=one) as events:
            self.say("live again")
            self.assertEqual([text for _, kind, text in self.shown(events, "live again") if kind == "message"], ["three", "live", "live again"])

    def test_the_newest_position_has_missed_nothing(self):
        *_, last = self.some("one", "two")
        with self.reader(last) as events:
            self.say("live")
            self.assertEqual([text for _, kind, text in self.shown(events, "live") if kind != "hello"], ["live"])

    def test_an_unknown_position_is_a_gap_and_no_part_of_a_replay(self):
        self.some("one", "two")
        for position in (str(uuid.uuid4()), "42", "not an id", "x" * 5000):
            with self.subTest(position[:20]), self.reader(position) as events:
                self.say(f"after {position[:9]}")
                seen = [what for what in self.shown(events, f"after {position[:9]}") if what[1] != "hello"]
                self.assertEqual([what[1:] for what in seen], [("gap", "unknown_position"), ("message", f"after {position[:9]}")])

    def test_no_position_is_no_gap(self):
        self.some("one")
        for position in (None, ""):
            with self.subTest(position), self.reader(position) as events:
                self.connected(events)
                self.say(f"live {position}")
                self.assertEqual([what[1] for what in self.shown(events, f"live {position}")], ["message"])

    def test_another_user_s_position_is_unknown(self):
        [position] = self.some("one")
        with self.reader(position, user=f"{self.user}-other") as events:
            seen = [json.loads(next(events).data) for _ in range(2)]
        self.assertIn({"type": "gap", "reason": "unknown_position"}, seen)
        self.assertNotIn("one", [frame.get("text") for frame in seen])


class ASmallBacklog(Reading):
    settings = {"recovery_frames_max": 4}

    def test_what_is_no_longer_kept_is_a_gap_never_a_part(self):
        ids = self.some(*[f"m{number}" for number in range(8)])
        for at, expected in {3: ["m4", "m5", "m6", "m7"], 2: None, 6: ["m7"]}.items():
            with self.subTest(at), self.reader(ids[at]) as events:
                end = next(events), next(events)
                frames = [json.loads(event.data) for event in end if "hello" not in event.data]
                while expected and len(frames) < len(expected):
                    frames.append(json.loads(next(events).data))
                if expected:
                    self.assertEqual([frame.get("text") for frame in frames], expected)
                else:
                    self.assertEqual(frames, [{"type": "gap", "reason": "unknown_position"}])


class WithoutRecovery(Reading):
    settings = {"recovery": "off"}

    def test_every_position_is_a_gap(self):
        *_, last = self.some("one", "two")
        with self.reader(last) as events:
            self.say("live")
            self.assertEqual([what[1:] for what in self.shown(events, "live") if what[1] != "hello"], [("gap", "unknown_position"), ("message", "live")])


if __name__ == "__main__":
    unittest.main()
