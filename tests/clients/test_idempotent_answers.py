"""An `Idempotency-Key` of an answer stands for one question, however many ask it at the same time."""

import http.client
import json
import queue
import threading
import unittest

from gateway import PATIENCE, GatewayTest

CLIENTS = 6
ROUNDS = 20


class IdempotentAnswers(GatewayTest):
    # Nobody answers, so that the first request is under way until its client leaves.
    settings = {"worker": "none", "shards": 4}

    def ask(self, key, together, answers, leave):
        """Sends the last byte of its request with all the others, and stays until they have their answers too."""
        text = "x" * 300_000
        body = json.dumps({"model": "m", "stream": True, "messages": [{"role": "user", "content": text}]}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=PATIENCE)
        try:
            connection.putrequest("POST", "/v1/chat/completions")
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), "Idempotency-Key": key}.items():
                connection.putheader(name, value)
            connection.endheaders(body[:-1])
            together.wait(PATIENCE)
            connection.send(body[-1:])
            response = connection.getresponse()
            answers.put((response.status, response.headers["x-request-id"]))
            leave.wait(PATIENCE)
            response.close()
        except (OSError, http.client.HTTPException, threading.BrokenBarrierError) as error:
            answers.put((0, repr(error)))
        finally:
            connection.close()

    def test_one_of_many_at_once_is_answered_and_named_to_the_others(self):
        for number in range(ROUNDS):
            with self.subTest(round=number):
                together, answers, leave = threading.Barrier(CLIENTS), queue.SimpleQueue(), threading.Event()
                threads = [threading.Thread(target=self.ask, args=(f"{self.user}-{number}", together, answers, leave)) for _ in range(CLIENTS)]
                for thread in threads:
                    thread.start()
                got = [answers.get(timeout=2 * PATIENCE) for _ in threads]
                leave.set()
                for thread in threads:
                    thread.join(PATIENCE)
                self.assertEqual(sorted(status for status, _ in got), [200] + [409] * (CLIENTS - 1), got)
                self.assertEqual(len({request for _, request in got}), 1, "a refusal names the answer")


if __name__ == "__main__":
    unittest.main()
