"""Autobahn's cases of RFC 6455 and RFC 7692, all of them, against the example `echo`: the gateway's own driver, reader, writer and
limits. What each case says is committed in autobahn.json, and a difference fails.

`python test_autobahn.py >autobahn.json` writes it anew. A case is what became of its messages, then of its closing handshake; the
three that are INFORMATIONAL probe what the RFC leaves open, and no peer can pass or fail them.

kosoku has a fault of its own: it fails a peer that sends a message without compression on a connection which negotiated it, as any may
(RFC 7692 §6: RSV1 says which messages are compressed). Autobahn's cases 12.* and 13.* hash what comes back. What came compressed
kosoku hands them as `bytes`; what did not, as a `str`, and the case ends with "Strings must be encoded before hashing" (they were
written for Python 2, where the two are one). Whoever leaves alone what would get no smaller meets that where single messages are of 16
to 256 bytes and no context is kept from one to the next: 13.2.1-3, 13.5.1-3, 13.6.1-3 and 13.7.1-3 ask for the latter. So would this
server, which never keeps a context, there and in 12.1.1-2, 12.2.1-3, 12.3.1-2, 12.4.1-2, 12.5.1-6, 12.5.11, 13.1.1-2 and 13.4.1-2. The
example compresses every answer, smaller or not (`Reaction::ReplyDeflated`), and so none of them fails.
"""

import asyncio
import json
import os
import pathlib
import re
import subprocess
import sys
import unittest
import warnings

import kosoku

HERE = pathlib.Path(__file__).resolve().parent
ECHO = os.environ.get("TABCAST_ECHO", str(HERE.parents[1] / "target/release/examples/echo"))
CASES = 517
AT_ONCE = 4  # so that cases which wait do not make the others wait


def run_all():
    """Each case, and what became of its messages and of its closing handshake."""
    with subprocess.Popen([ECHO, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True) as echo:
        try:
            url = re.search(r"ws://\S+/", echo.stdout.readline())[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # kosoku leaves the files of its cases open
                results = asyncio.run(run_against(url))
        finally:
            echo.kill()
    return {result.case_id: [result.behavior.value, result.behavior_close.value] for result in results}


async def run_against(url):
    try:
        return await kosoku.run_fuzzingclient(url, concurrency=AT_ONCE)
    except kosoku.FailureError as failure:
        return failure.results


class AutobahnTest(unittest.TestCase):
    maxDiff = None

    def test_every_case_is_as_committed_and_none_fails(self):
        results = run_all()
        self.assertEqual(len(results), CASES)
        committed = json.loads((HERE / "autobahn.json").read_text())
        self.assertEqual({case: [committed.get(case), now] for case, now in results.items() if committed.get(case) != now}, {})
        self.assertEqual(committed.keys(), results.keys())
        self.assertEqual({case: said for case, said in results.items() if not set(said) <= {"OK", "INFORMATIONAL"}}, {})


if __name__ == "__main__":
    lines = [f"{json.dumps(case)}: {json.dumps(said)}" for case, said in run_all().items()]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")
