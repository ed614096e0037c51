"""What `tests/soak` would see: its ledger of what is missing, of last edits and of files, with faults made by hand."""

import asyncio
import http.server
import threading
import time
import unittest

from load import FRAMES_OF_MESSAGE_MAX, RECOVERY_TIME, Load, Sent, SoakTab, Window, Worker


class Ledger(unittest.TestCase):
    def setUp(self):
        self.load = Load([1, 2], seed=1, users=4, tabs=0, rooms=1, lifetime=1, rate=1)
        self.worker = Worker(self.load, "w0")
        self.load.workers = {0: self.worker}
        self.now = time.monotonic()

    def kill_redis(self, ago):
        window = Window("kill_redis", self.now - ago)
        window.end = window.begin + 3
        self.load.windows.append(window)

    def holes(self, count, told="delivered", channel="u0"):
        for number in range(count):
            self.load.sent[channel, "w0"].append(Sent(self.now, self.now, told))
            self.load.holes.append((self.now, "u0", (channel, "w0"), number))

    def faults(self, lost_messages):
        self.load.attributed(lost_messages)
        return self.load.faults

    def test_a_killed_redis_excuses_no_more_than_the_nodes_have_counted_as_lost(self):
        self.kill_redis(ago=1)
        self.holes(2 * FRAMES_OF_MESSAGE_MAX)
        self.assertEqual(self.faults(lost_messages=2), [])
        self.holes(1, channel="u1")
        (fault,) = self.faults(lost_messages=2)
        self.assertIn("the nodes count 2 messages as lost", fault)
        self.assertEqual(self.load.lost, {"messages_between_nodes": 2, "frames": 2 * FRAMES_OF_MESSAGE_MAX + 1, "frames_max": 2 * FRAMES_OF_MESSAGE_MAX})

    def test_a_frame_that_several_tabs_miss_is_one(self):
        self.kill_redis(ago=1)
        self.holes(FRAMES_OF_MESSAGE_MAX)
        self.load.holes *= 3
        self.assertEqual(self.faults(lost_messages=1), [])

    def test_without_a_fault_or_a_word_to_the_sender_nothing_is_excused(self):
        self.holes(1, told="offline")
        self.assertEqual(self.faults(lost_messages=1), [])
        self.holes(1, channel="u1")
        self.kill_redis(ago=RECOVERY_TIME + 60)
        self.assertEqual(len(self.faults(lost_messages=1)), 1)
        self.load.faults.clear()
        self.kill_redis(ago=1)
        self.holes(1, channel="room:r0")
        self.assertEqual(len(self.faults(lost_messages=1)), 1, "a gap says what is missing in a room")

    def follow(self, *numbers, channel="u0"):
        """The faults of a tab that was told of a gap where None stands."""
        self.load.faults.clear()
        self.load.sent[channel, "w0"] = [Sent(self.now, self.now, "delivered")] * 9
        tab = SoakTab(self.load, "u0")
        tab.rooms.add("r0")
        for number in numbers:
            if number is None:
                tab.forget(lambda _: True)
            else:
                tab.follow((channel, "w0"), number)
        return len(self.load.faults)

    def test_only_what_a_gap_has_announced_while_redis_was_away_may_come_behind_later_ones_and_once(self):
        self.assertEqual(self.follow(1, None, 4, 2), 1, "Redis was not away")
        self.kill_redis(ago=1)
        self.assertEqual(self.follow(1, 2, 3), 0)
        self.assertEqual(self.follow(1, None, 4, 2, 3, 5), 0)
        self.assertEqual(self.follow(1, None, 4, 2, 2), 1, "twice")
        self.assertEqual(self.follow(1, None, 4, 1), 1, "it had that one")
        self.assertEqual(self.follow(1, 4, 2), 1, "no gap")
        self.assertEqual(self.follow(1, None, 4, 2, channel="room:r0"), 1, "rooms are not kept")

    def test_a_tab_without_the_last_edit_has_not_the_last(self):
        tab = SoakTab(self.load, "u0")
        self.worker.last["u0"] = ["m", 0]
        self.assertTrue(tab.has_last())
        self.worker.last["u0"] = ["m", 2]
        tab.revise("m", "soak|1|")
        self.assertFalse(tab.has_last())
        tab.revise("m", "soak|2|")
        self.assertTrue(tab.has_last())
        self.load.sent["u0", "w0"].append(None)
        self.assertFalse(tab.has_last(), "nor one that has not its message")


class Files(unittest.TestCase):
    def setUp(self):
        class Answering(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = b"other" if self.path == "/files/other" else b"content"
                self.send_response(404 if self.path == "/files/gone" else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.load = Load([], seed=1, users=1, tabs=0, rooms=1, lifetime=1, rate=1)

    def fetch(self, link):
        """The faults of one more look at that link."""
        before = len(self.load.faults)
        asyncio.run(self.load.fetch(self.server.server_address[1], link, b"content", time.monotonic()))
        return self.load.faults[before:]

    def test_other_bytes_are_a_fault_at_any_time_and_none_are_one_without_a_fault_under_way(self):
        self.assertEqual((self.fetch("/files/same"), self.load.counts["files fetched"]), ([], 1))
        self.assertEqual((len(self.fetch("/files/other")), len(self.fetch("/files/gone"))), (1, 1))
        self.load.windows.append(Window("restart_node", time.monotonic()))
        self.assertEqual((len(self.fetch("/files/other")), self.fetch("/files/gone")), (1, []))
        self.assertEqual(self.load.counts["files fetched"], 1)


if __name__ == "__main__":
    unittest.main()
