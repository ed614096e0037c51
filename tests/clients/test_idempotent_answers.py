"""An `Idempotency-Key` stands for one question or send of whoever gave it, however many do so at the same time."""

import http.client
import json
import queue
import threading
import unittest

from gateway import PATIENCE, GatewayTest, token

SECRET = "a-secret-for-tests-only-of-32-bytes"
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


class TwoWorkers(GatewayTest):
    workers = ("key-of-one-worker-in-24-b", "key-of-another-worker-24b")
    settings = {"worker": "none", "api_keys": ",".join(workers), "token_keys": f"kid=main,alg=HS256,secret={SECRET}"}

    def test_have_keys_of_their_own(self):
        jwt = token(SECRET, sub=self.user)
        tab = self.gateway.tab(None, additional_headers={"Authorization": f"Bearer {jwt}"})
        self.addCleanup(tab.close)
        send = lambda worker, text: self.gateway.api("send", {"channel_id": self.user, "text": text}, Authorization=f"Bearer {worker}", Idempotency_Key="order-17")
        answers = {worker: [send(worker, "one text") for _ in range(2)] for worker in self.workers}
        ids = []
        for first, again in answers.values():
            self.assertEqual(again, first, "a repeat is answered as the first was")
            self.assertTrue(first["delivered"])
            ids.append(first["id"])
        self.assertNotEqual(*ids)
        last = self.gateway.api("send", {"channel_id": self.user, "text": "last"}, Authorization=f"Bearer {self.workers[0]}")
        self.assertEqual([frame["id"] for frame in tab.until(lambda frame: frame["id"] == last["id"])], [*ids, last["id"]])
        # The same key for something else is refused to whoever used it.
        other = self.gateway.post("send", {"channel_id": self.user, "text": "other"}, Authorization=f"Bearer {self.workers[1]}", Idempotency_Key="order-17")
        self.assertEqual(self.assert_error(other, 422)["code"], "idempotency_mismatch")


if __name__ == "__main__":
    unittest.main()
