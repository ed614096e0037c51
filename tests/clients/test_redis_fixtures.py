"""What the tests with Redis stand on does what it says."""

import threading
import time
import unittest

import redis

from gateway import PATIENCE, until
from redis_server import Link, RedisCluster, RedisServer, published


class TheFixtures(unittest.TestCase):
    def test_a_server_comes_back_empty_at_its_port_and_waits_while_it_is_frozen(self):
        server = RedisServer()
        self.addCleanup(server.remove)
        client = server.client()
        client.set("key", "value")
        server.stop()
        with self.assertRaises(redis.exceptions.ConnectionError):
            client.get("key")
        server.restart()
        self.assertIsNone(client.get("key"))
        server.pause()
        timer = threading.Timer(0.3, server.resume)
        timer.start()
        self.addCleanup(timer.join)
        begin = time.monotonic()
        self.assertTrue(client.ping())
        self.assertGreater(time.monotonic() - begin, 0.25)

    def test_connections_are_found_and_cut_by_their_role(self):
        server = RedisServer()
        self.addCleanup(server.remove)
        named = [server.client(client_name=f"tabcast-n1:{role}") for role in ("publish", "subscribe")]
        ids = [client.client_id() for client in named]
        self.assertEqual(server.roles(), ["publish", "subscribe"])
        self.assertEqual(server.kill_clients("publish"), 1)
        self.assertNotEqual(named[0].client_id(), ids[0])
        self.assertEqual(named[1].client_id(), ids[1])

    def test_a_slot_moves_with_its_keys(self):
        cluster = RedisCluster()
        self.addCleanup(cluster.remove)
        client = cluster.client()
        self.addCleanup(client.close)
        client.set("key", "value")
        slot = cluster.slot("key")
        to = next(server for server in cluster.servers if server is not cluster.owner(slot))
        cluster.migrate_slot(slot, to)
        self.assertIs(cluster.owner(slot), to)
        self.assertEqual(to.control.get("key"), "value")
        until("the others know", lambda: client.get("key") == "value")

    def test_a_link_is_slow_is_cut_and_is_mended(self):
        server = RedisServer()
        self.addCleanup(server.remove)
        link = Link(server.port)
        self.addCleanup(link.remove)
        client = redis.Redis.from_url(link.url, decode_responses=True, socket_timeout=PATIENCE, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
        self.addCleanup(client.close)
        client.set("key", "value")
        reader = server.subscriber("news")
        self.addCleanup(reader.close)
        link.delay = 0.1
        begin = time.monotonic()
        with client.pipeline(transaction=False) as pipeline:
            for number in range(50):
                pipeline.publish("news", number)
            pipeline.execute()
        self.assertTrue(0.19 < time.monotonic() - begin < 5)
        self.assertEqual([published(reader)[1] for _ in range(50)], [b"%d" % number for number in range(50)])
        link.cut()
        for _ in range(2):
            with self.assertRaises(redis.exceptions.ConnectionError):
                client.get("key")
        link.mend()
        self.assertEqual(client.get("key"), "value")


if __name__ == "__main__":
    unittest.main()
