"""A gateway that was built without traces, as the released one is: nothing of them is sent, exported or handed on."""

import concurrent.futures
import json
import os
import socket
import unittest
from unittest import mock

from gateway import PATIENCE, Gateway
from redis_server import RedisServer, published
from scripted import Worker

TRACE = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "vendor=1"}


class WithoutTheFeature(unittest.TestCase):
    def test_no_trace_goes_on_and_no_collector_is_called(self):
        collector = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(collector.close)
        redis, worker = RedisServer(), Worker()
        self.addCleanup(redis.remove)
        self.addCleanup(worker.stop)
        endpoint = f"http://127.0.0.1:{collector.getsockname()[1]}"
        with mock.patch.dict(os.environ, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_TRACES_SAMPLER": "always_on"}):
            gateway = Gateway(redis=redis.url, worker="webhook", webhook_url=worker.url)
        self.addCleanup(gateway.stop)
        worker.gateway = gateway
        subscriber = redis.client(decode_responses=False).pubsub()
        self.addCleanup(subscriber.close)
        # A stream that no gateway holds goes to whoever listens.
        subscriber.subscribe("sg:sse:elsewhere")
        self.assertEqual(subscriber.get_message(timeout=PATIENCE)["type"], "subscribe")
        gateway.api("send", {"channel_id": "sse:elsewhere", "text": "hi"}, **TRACE)
        _, frame = published(subscriber)
        self.assertEqual(json.loads(frame).keys(), {"type", "id", "text", "sender", "timestamp"})
        question = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(gateway.http, "POST", "/v1/chat/completions", question, {"Content-Type": "application/json", **TRACE})
            turn = worker.question()
            turn.say("done")
            self.assertEqual(asked.result(PATIENCE).json()["choices"][0]["message"]["content"], "done")
        self.assertFalse(any(name in turn.headers or name in turn.message for name in TRACE))
        # What there were to export would be exported before the end.
        gateway.terminate()
        self.assertEqual(gateway.process.wait(PATIENCE), 0)
        collector.setblocking(False)
        with self.assertRaises(BlockingIOError):
            collector.accept()


if __name__ == "__main__":
    unittest.main()
