"""SIGTERM with many tabs and steady traffic, and what each route answers meanwhile. `drain.py` does it with 10,000 tabs."""

import asyncio
import functools
import json
import unittest

from drain import Drain, peak
from gateway import PATIENCE, Gateway, until
from reconnecting import raise_open_files


class ManyTabs(unittest.TestCase):
    def drained(self, tabs, rate=200, **settings):
        # A gateway lets in no more tabs than 95 % of them.
        self.assertGreater(raise_open_files() * 0.9, tabs, "so many descriptors may be open: ulimit -Hn")
        drain = Drain(tabs, rate, drain_deadline="25s", close_timeout="5s", **settings)
        asyncio.run(drain.run())
        print(json.dumps(drain.report()), flush=True)
        self.assertEqual(drain.problems(), [], drain.log)
        self.assertNotIn("deadline has passed", drain.log)
        self.assertGreater(len(drain.probes), 10)
        return drain

    def assert_even(self, drain, seconds):
        """Not faster than in so many seconds, and about a quarter of the tabs in each quarter of the time that it took.

        A machine that is busy sees them late, and a shard that gets no processor takes longer.
        """
        moments = drain.moments()
        self.assertGreater(moments[-1], seconds - 0.5)
        for quarter in (1, 2, 3):
            self.assertAlmostEqual(moments[quarter * len(moments) // 4], moments[-1] * quarter / 4, delta=moments[-1] / 5)

    def test_are_closed_evenly_over_the_spread_and_lose_nothing(self):
        drain = self.drained(600, drain_spread="4s")
        self.assert_even(drain, 4)
        self.assertLess(drain.exit_time, drain.moments()[-1] + 5 + 3, "who does not read holds up the end for close_timeout at most")
        waits = [tab.retry_after_told for tab in drain.tabs]
        self.assertGreater(max(waits) - min(waits), 6, "they come back spread over the drain's time and 5 s")

    def test_take_longer_if_they_are_too_many_for_the_rate(self):
        drain = self.drained(250, drain_spread="1s", drain_closes_per_second_max=50)
        self.assert_even(drain, 5)
        drain.settings["drain_closes_per_second_max"] = 30
        self.assertIn("tabs were closed within a second, where 30 may be", " ".join(drain.problems()), "it would have been seen")

    def test_by_the_thousand_are_closed_no_faster_than_at_the_default_rate(self):
        drain = self.drained(10_000, rate=400, drain_spread="1s")
        self.assertGreater(drain.moments()[-1], 4.9, "2,000 a second")
        self.assertLess(drain.exit_time, drain.moments()[-1] + 5 + 10, "who does not read holds up the end for close_timeout at most")
        self.assertLess(peak(drain.appointments(), 1), 1_500, "no more than that are asked to come back within a second")


class Requests(unittest.TestCase):
    """Twelve connections that were there before, spread over all shards."""

    def drain(self, tabs):
        self.gateway = Gateway(worker="none", drain_spread="5s", drain_deadline="30s", shards=4)
        self.addCleanup(self.gateway.stop)
        self.tabs = [self.gateway.tab(f"u{number}") for number in range(tabs)]
        self.kept = [self.gateway.connection() for _ in range(12)]
        for closing in (*self.tabs, *self.kept):
            self.addCleanup(closing.close)
        for connection in self.kept:
            self.assertEqual(self.ask(connection, "GET", "/readyz")[0], 200)
        self.gateway.terminate()
        until("readiness flips", lambda: self.gateway.http("GET", "/readyz").status == 503, 2)

    def ask(self, connection, method, path, body=None, **headers):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def fresh(self, *arguments, **headers):
        connection = self.gateway.connection()
        self.addCleanup(connection.close)
        return self.ask(connection, *arguments, **headers)

    def send(self, ask):
        body = json.dumps({"channel_id": "u39", "text": "still there?"})
        status, _, body = ask("POST", "/api/send", body, **{"Content-Type": "application/json"})
        self.assertEqual(status, 200, body)
        return json.loads(body)

    def assert_refused(self, answer):
        status, headers, body = answer
        self.assertEqual((status, json.loads(body)["error"]["code"]), (503, "draining"), body)
        self.assertGreater(int(headers["Retry-After"]), 0)
        self.assertIn("application/json", headers["Content-Type"])

    def test_of_who_comes_are_refused_with_when_to_come_back_and_the_others_are_answered(self):
        self.drain(40)
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version": "13"}
        question = json.dumps({"model": "tabcast", "messages": [{"role": "user", "content": "hi"}]})
        for way, ask in (("a connection from before", functools.partial(self.ask, self.kept[0])), ("a new one", self.fresh)):
            with self.subTest(way):
                self.assert_refused(ask("GET", "/readyz"))
                self.assert_refused(ask("GET", "/ws?user=late&name=late", **upgrade))
                self.assert_refused(ask("GET", "/events?user=late&name=late"))
                unread = ask("POST", "/v1/chat/completions", question, **{"Content-Type": "application/json"})
                self.assert_refused(unread)
                self.assertEqual(unread[1]["Connection"], "close")
                for path in ("/healthz", "/metrics", "/", "/tabcast.js", "/v1/models", "/api/users"):
                    self.assertEqual(ask("GET", path)[0], 200, path)
                self.assertIs(self.send(ask)["delivered"], True, "u39 came last and leaves last")
        last = self.tabs[39]
        last.send({"type": "message", "text": "too late", "client_id": "c"})
        self.assertEqual(last.find("error")["code"], "draining")
        (code, _), before = last.closed()
        self.assertEqual((code, before[-1]["type"]), (1012, "draining"))
        self.assertEqual(self.gateway.process.wait(PATIENCE), 0)
        with self.assertRaises(ConnectionRefusedError):
            self.gateway.http("GET", "/readyz")

    def test_of_workers_are_answered_by_every_shard_until_the_last_tab_of_all_is_gone(self):
        self.drain(12)  # so few that some shards are empty long before the others
        rounds = 0
        try:
            while True:
                for connection in self.kept:
                    self.send(functools.partial(self.ask, connection))
                rounds += 1
        except ConnectionError:
            until("all tabs are gone when a connection is closed", lambda: all(tab.ending for tab in self.tabs), 0.5)
        self.assertGreater(rounds, 3)
        self.assertEqual({tab.ending[0] for tab in self.tabs}, {1012})
        self.assertEqual(self.gateway.process.wait(PATIENCE), 0)


if __name__ == "__main__":
    unittest.main()
