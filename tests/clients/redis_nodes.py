"""Tests of several gateways that share one Redis."""

import concurrent.futures
import json
import threading
import time
import unittest
import urllib.parse

import openai

from gateway import PATIENCE, Gateway, Tab, until
from redis_server import RedisServer, ports_of


class NodesTest(unittest.TestCase):
    """Tests that share gateways and the Redis behind them; each test has users of its own."""

    nodes = 2
    settings: dict = {}
    Redis = RedisServer
    _count = 0

    @classmethod
    def setUpClass(cls):
        cls.redis = cls.Redis()
        cls.addClassCleanup(cls.redis.remove)
        cls.gateways = [cls.node() for _ in range(cls.nodes)]
        for gateway in cls.gateways:
            until_ready(gateway)

    @classmethod
    def node(cls, **settings):
        gateway = Gateway(**{"redis": cls.redis.url, "worker": "none", "recovery": "redis", **cls.settings, **settings})
        cls.addClassCleanup(gateway.stop)
        return gateway

    @classmethod
    def tearDownClass(cls):
        for gateway in cls.gateways:
            left = gateway.process.poll()
            assert left is None, f"a gateway left with {left} during the tests:\n{gateway.log_text()}"

    def setUp(self):
        NodesTest._count += 1
        self.user = f"user-{NodesTest._count}"

    def tab(self, gateway, user=None):
        """A tab that every node reaches: that is so before its `hello`."""
        tab = gateway.tab(user or self.user, hello=True)
        self.addCleanup(tab.close)
        tab.find("hello")
        return tab

    def tab_after(self, gateway, position, user=None):
        """A tab that says what it has seen."""
        user = user or self.user
        query = urllib.parse.urlencode({"user": user, "name": user, "after": position})
        tab = Tab(gateway, path=f"/ws?{query}")
        self.addCleanup(tab.close)
        return tab

    def send(self, gateway, text, user=None):
        return gateway.api("send", {"channel_id": user or self.user, "text": text})

    def subscriber(self, *channels, patterns=()):
        reader = self.redis.subscriber(*channels, patterns=patterns)
        self.addCleanup(reader.close)
        return reader

    def client(self, gateway, **options):
        client = openai.OpenAI(base_url=f"{gateway.origin}/v1", api_key="any", timeout=PATIENCE, max_retries=0, **options)
        self.addCleanup(client.close)
        return client

    def ask(self, client, text="hi", **options):
        return client.chat.completions.create(model="tabcast", messages=[{"role": "user", "content": text}], **options)

    def apart(self, call, *arguments, **options):
        """Runs what waits for an answer while the test gives it."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown, wait=False)
        return pool.submit(call, *arguments, **options)

    def holder(self):
        """The one gateway that reads the outbound stream now."""

        def reading():
            ports = {int(connection["addr"].rsplit(":", 1)[1]) for connection in self.redis.connections() if connection["cmd"] == "xreadgroup"}
            found = [gateway for gateway in self.gateways if gateway.process.poll() is None and ports & ports_of(gateway.process)]
            return found if len(found) == 1 else None

        return until("one gateway reads the outbound stream", reading)[0]

    def assert_report(self, answer, tabs, nodes):
        self.assertEqual((answer["tabs"], answer["nodes"], answer["delivered"]), (tabs, nodes, tabs + nodes > 0), answer)


def until_ready(gateway, timeout=PATIENCE):
    until("the gateway is ready", lambda: gateway.http("GET", "/readyz").status == 200, timeout)


def texts(frames):
    return [frame["text"] for frame in frames if frame["type"] == "message"]


def gather(tab, *wanted):
    """The first frames that have the values of each of `wanted`, in whatever order they come."""
    found = {}

    def note(frame):
        for at, values in enumerate(wanted):
            if at not in found and all(frame.get(name) == value for name, value in values.items()):
                found[at] = frame
                break
        return len(found) == len(wanted)

    tab.until(note)
    return [found[at] for at in range(len(wanted))]


def is_online(gateway, user):
    """What one node says of a user, wherever the user's tabs are."""
    answer = gateway.http("GET", f"/api/users/{urllib.parse.quote(user, safe='')}")
    if answer.status != 200:
        raise AssertionError(f"{answer.status} {answer.body[:300]!r}")
    return answer.json()["online"]


class Watch:
    """Reads a tab along: every frame, and when it came."""

    def __init__(self, tab):
        self.tab = tab
        self.seen = []  # (monotonic time, frame)
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        while (text := self.tab.frames.get()) is not None:
            self.seen.append((time.monotonic(), json.loads(text)))

    def texts(self):
        return texts(frame for _, frame in self.seen)
