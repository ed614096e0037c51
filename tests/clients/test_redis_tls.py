"""A Redis that speaks TLS only, to a user who may do no more than a gateway has to."""

import os
import subprocess
import tempfile
import unittest

from gateway import Gateway, until
from redis_nodes import NodesTest
from redis_server import RedisServer, free_port

RIGHTS = ("~sg:*", "~{sg:*", "&sg:*", "+@all", "-@admin", "-@dangerous")


def certificates(folder):
    """An authority of its own, and what it says of `localhost`."""

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    with open(os.path.join(folder, "names"), "w") as names:
        names.write("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "redis.key", "-out", "redis.csr", "-subj", "/CN=localhost")
    openssl("x509", "-req", "-in", "redis.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "redis.pem", "-days", "2", "-extfile", "names")


class TlsServer(RedisServer):
    """Its plain port is for the tests' own questions; the gateways get the other."""

    def __init__(self):
        self.secrets = tempfile.TemporaryDirectory()
        certificates(self.secrets.name)
        self.ca, certificate, key = (os.path.join(self.secrets.name, name) for name in ("ca.pem", "redis.pem", "redis.key"))
        self.tls_port = free_port()
        options = ("--tls-port", str(self.tls_port), "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", self.ca, "--tls-auth-clients", "no")
        super().__init__(*options)
        self.control.acl_setuser("gate", enabled=True, passwords=["+p@ss word"], categories=[], commands=[], keys=[])
        self.control.execute_command("ACL", "SETUSER", "gate", *RIGHTS)
        self.url = f"rediss://gate:p%40ss%20word@localhost:{self.tls_port}/"

    def remove(self):
        super().remove()
        self.secrets.cleanup()


class OverTls(NodesTest):
    Redis = TlsServer

    @classmethod
    def node(cls, **settings):
        return super().node(worker="redis", redis_ca_file=cls.redis.ca, **settings)

    def test_nodes_work_with_no_more_rights_than_they_need(self):
        a, b = self.gateways
        tab = self.tab(b)
        answer = a.api("send", {"channel_id": self.user, "text": "hidden on its way"})
        self.assertEqual((answer["delivered"], answer["nodes"]), (True, 1))
        self.assertEqual(tab.find("message")["text"], "hidden on its way")
        ack = tab.ask(type="message", text="kept")
        self.assertTrue(ack["id"])
        until("the message is on the stream", lambda: self.redis.control.xlen("sg:stream:inbound") == 1)
        again = self.tab_after(a, answer["id"])
        self.assertEqual(again.frame()["text"], "kept")
        self.assertEqual(self.redis.control.acl_log(), [], "nothing was refused")

    def test_a_server_that_nobody_vouches_for_is_not_talked_to(self):
        alone = Gateway(redis=self.redis.url, worker="none")
        self.addCleanup(alone.stop)
        self.assertEqual(alone.http("GET", "/readyz").status, 503)
        self.assertNotIn("p@ss", alone.log_text())
        self.assertNotIn("p%40ss", alone.log_text())


if __name__ == "__main__":
    unittest.main()
