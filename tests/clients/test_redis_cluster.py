"""Two gateways on a Redis Cluster of three masters, also while slots move."""

import time
import unittest

from gateway import until
from redis_nodes import gather, is_online
from redis_server import RedisCluster
from redis_worker import RedisWorker
from scripted import content
from test_redis_faults import FaultsTest


class ThreeMasters(FaultsTest):
    settings = {**FaultsTest.settings, "worker": "redis", "redis_cluster": "true"}
    Redis = RedisCluster

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        client = cls.redis.client(decode_responses=False)
        cls.addClassCleanup(client.close)
        cls.worker = RedisWorker(client).start()
        cls.addClassCleanup(cls.worker.stop)

    def test_sends_and_rooms_reach_every_node(self):
        a, b = self.gateways
        tabs = [self.tab(a), self.tab(b)]
        for gateway in (a, b):
            answer = self.send(gateway, f"through {gateway.port}")
            self.assertEqual((answer["tabs"], answer["delivered"]), (1, True))
            self.assertLessEqual(answer["nodes"], 1)
            self.assertNotIn("at_least", answer, "who is where is known of a user")
            for tab in tabs:
                self.assertEqual(tab.frame()["text"], f"through {gateway.port}")
        room = f"den-{self.user}"
        for tab in tabs:
            self.assertEqual(tab.ask(type="join", room=room)["type"], "ack")
        for text, count in (("to all", 2), ("to whoever is left", 1)):
            answer = a.api("send", {"channel_id": f"room:{room}", "text": text})
            self.assertEqual((answer["tabs"], answer["delivered"]), (1, True))
            # Who hears a channel of another master is not told to this one: a lower bound, and marked so.
            self.assertIs(answer["at_least"], True)
            self.assertLessEqual(answer["nodes"], 1)
            for tab in tabs[:count]:
                self.assertEqual(tab.frame()["text"], text)
            self.assertEqual(tabs[1].ask(type="leave", room=room)["type"], "ack")
        self.assert_all_arrived()

    def test_who_is_there(self):
        a, b = self.gateways
        tab = self.tab(a)
        until("online on both", lambda: is_online(a, self.user) and is_online(b, self.user), 5)
        tab.close()
        until("offline on both", lambda: not (is_online(a, self.user) or is_online(b, self.user)), 10)

    def test_the_worker_answers_tabs_and_v1_on_both_nodes(self):
        tabs = [self.tab(gateway) for gateway in self.gateways]
        for number, tab in enumerate(tabs):
            tab.send({"type": "message", "text": f"question {number}", "client_id": f"{number}"})
            gather(tab, {"type": "ack", "client_id": f"{number}"}, {"text": f"You said: question {number}"})
            [other] = set(tabs) - {tab}
            gather(other, {"text": f"You said: question {number}"})
        for gateway in self.gateways:
            self.assertEqual(content(self.ask(self.client(gateway), "some words", stream=True)), "You said: some words")

    def test_a_tab_that_comes_back_to_the_other_node_gets_what_it_missed(self):
        a, b = self.gateways
        ids = [self.send(a, text)["id"] for text in ("one", "two", "three")]
        tab = self.tab_after(b, ids[0])
        self.assertEqual([tab.frame()["text"] for _ in range(2)], ["two", "three"])
        self.send(a, "live")
        self.assertEqual(tab.frame()["text"], "live")

    def test_the_slots_of_the_nodes_channels_move_while_frames_flow(self):
        channels = self.redis.channels()
        self.assertTrue(channels)
        for slot in sorted({self.redis.slot(channel) for channel in channels}):
            owner = self.redis.owner(slot)
            to = self.redis.servers[(self.redis.servers.index(owner) + 1) % 3]
            self.redis.migrate_slot(slot, to)
            moved = time.monotonic()
            self.assert_local()
            self.resumed(moved, "slot moved: resumed")
        missing = self.assert_all_arrived(may_miss=True)
        print(f"{len(missing)} texts were under way to a slot that moved", flush=True)
        self.assertEqual(missing, [])
        self.assert_whole_again()

    def test_the_slots_of_the_streams_move_while_the_worker_answers(self):
        tabs = [self.tab(gateway) for gateway in self.gateways]
        for number, key in enumerate(("sg:stream:inbound", "sg:stream:outbound:webchat")):
            slot = self.redis.slot(key)
            owner = self.redis.owner(slot)
            self.redis.migrate_slot(slot, self.redis.servers[(self.redis.servers.index(owner) + 1) % 3])
            moved = time.monotonic()
            tabs[0].send({"type": "message", "text": f"moved {number}"})
            for tab in tabs:
                tab.find("message", text=f"You said: moved {number}")
            print(f"{key} moved: answered after {time.monotonic() - moved:.2f} s", flush=True)
        self.assert_all_arrived()

    def test_a_master_that_is_frozen_takes_no_local_delivery_down(self):
        for server in self.redis.servers:
            server.pause()
        begin = time.monotonic()
        try:
            self.until_unready(begin)
            self.during(1)
        finally:
            for server in self.redis.servers:
                server.resume()
        # The masters have to find each other again before they answer.
        until("the cluster is whole", lambda: all(map(self.redis.is_whole, self.redis.servers)))
        self.resumed(time.monotonic())
        self.assert_all_arrived()
        self.assert_whole_again()


if __name__ == "__main__":
    unittest.main()
