"""The paths of `/v1`, as clients join them to their base URLs."""

import json
import unittest

from gateway import GatewayTest


class AnswerPaths(GatewayTest):
    settings = {"models": "org/one"}

    def test_one_slash_at_the_end_is_none(self):
        ask = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
        for method, path, body, status in [
            ("POST", "/v1/chat/completions", ask, 200),
            ("GET", "/v1/models", None, 200),
            ("GET", "/v1/models/org%2Fone", None, 200),
            ("GET", "/v1/chat/completions", None, 405),
            ("POST", "/v1/models", ask, 405),
            ("GET", "/v1/chat/completions/nobody/events", None, 404),
            ("DELETE", "/v1/chat/completions/nobody", None, 404),
            ("GET", "/v1", None, 404),
        ]:
            with self.subTest(path, method=method):
                plain, slashed = [self.gateway.http(method, path + end, body, {"Content-Type": "application/json"}) for end in ("", "/")]
                self.assertEqual((plain.status, slashed.status), (status, status), slashed.body[:300])
                self.assertEqual(slashed.headers["Allow"], plain.headers["Allow"])


if __name__ == "__main__":
    unittest.main()
