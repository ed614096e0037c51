"""permessage-deflate with a client that brings its own implementation: what it offers, reads and sends."""

import json
import os
import re
import zlib

from gateway import GatewayTest, close_code, masked
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate

TEXT = "again and again, “and again” 🌟 " * 60


def compressed(text, level=9, window_bits=15):
    """A client's payload for a text (RFC 7692 §7.2.1)."""
    state = zlib.compressobj(level, zlib.DEFLATED, -window_bits)
    return (state.compress(text) + state.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Compressed(GatewayTest):
    settings = {"deflate": "on", "worker": "none"}

    def metric(self, name):
        text = self.gateway.http("GET", "/metrics").body.decode()
        return int(re.search(rf"^tabcast_{name}_total (\d+)$", text, re.M)[1])

    def extension(self, tab):
        """What was negotiated, if anything."""
        return next((e for e in tab.socket.protocol.extensions if isinstance(e, PerMessageDeflate)), None)

    def deflated_tab(self, **options):
        tab = self.tab(compression="deflate", **options)
        self.assertIsNotNone(self.extension(tab))
        return tab

    def test_what_the_library_offers_by_default_is_accepted_without_context(self):
        extension = self.extension(self.deflated_tab())
        self.assertTrue(extension.remote_no_context_takeover)
        self.assertTrue(extension.local_no_context_takeover)
        self.assertEqual(extension.remote_max_window_bits, 15)

    def test_tabs_with_and_without_it_see_the_same_and_it_is_compressed_once(self):
        before = self.metric("deflated_frames")
        tabs = [self.deflated_tab() if at % 2 else self.tab() for at in range(6)]
        for number in range(20):
            self.gateway.api("send", {"channel_id": self.user, "text": f"{number} {TEXT}"})
            self.gateway.api("send", {"channel_id": self.user, "text": f"{number} short"})
        seen = [[tab.text() for _ in range(40)] for tab in tabs]
        for texts in seen[1:]:
            self.assertEqual(texts, seen[0])
        self.assertEqual([json.loads(text)["text"] for text in seen[0][::2]], [f"{number} {TEXT}" for number in range(20)])
        self.assertEqual(self.metric("deflated_frames") - before, 20)

    def test_texts_of_every_size_come_whole(self):
        tab = self.deflated_tab()
        for size in (0, 1, 400, 511, 512, 4_000, 16_384, 70_000, 500_000, 2_000_000):
            noise = os.urandom(size // 4).hex() + "x" * (size // 2)
            self.gateway.api("send", {"channel_id": self.user, "text": noise})
            self.assertEqual(tab.frame()["text"], noise, size)

    def test_files_come_as_they_are(self):
        before = self.metric("deflated_frames")
        tab = self.deflated_tab()
        self.gateway.api("file", {"channel_id": self.user, "filename": "a", "data": "QUFB" * 10_000})
        self.assertEqual(tab.find("file")["data"], "QUFB" * 10_000)
        self.assertEqual(self.metric("deflated_frames"), before)

    def test_what_the_library_compresses_is_understood(self):
        tab = self.deflated_tab()
        for text in ("short", TEXT, "x" * 16_384):
            ack = tab.ask(type="message", text=text)
            self.assertEqual(ack["type"], "ack")
            self.assertEqual(tab.find("message", sender=self.user)["text"], text)

    def test_offers_that_cannot_be_accepted_leave_the_connection_without(self):
        tab = self.tab(extensions=[ClientPerMessageDeflateFactory(server_max_window_bits=8)])
        self.assertIsNone(self.extension(tab))
        self.gateway.api("send", {"channel_id": self.user, "text": TEXT})
        self.assertEqual(tab.frame()["text"], TEXT)
        accepted = [ClientPerMessageDeflateFactory(server_max_window_bits=bits) for bits in (9, 12, 15)]
        for factory in (*accepted, ClientPerMessageDeflateFactory(client_max_window_bits=9)):
            tab = self.tab(extensions=[factory])
            self.assertIsNotNone(self.extension(tab))
            self.gateway.api("send", {"channel_id": self.user, "text": TEXT})
            self.assertEqual(tab.frame()["text"], TEXT)
            self.assertEqual(tab.ask(type="message", text=TEXT)["type"], "ack")

    def deflated_raw_tab(self):
        return self.raw_tab(extensions="permessage-deflate")

    def test_every_window_and_level_is_inflated(self):
        tab = self.deflated_tab()
        raw, _ = self.deflated_raw_tab()
        text = json.dumps({"type": "message", "text": TEXT}).encode()
        for window_bits in range(9, 16):
            for level in range(10):
                raw.sendall(masked(0x41, compressed(text, level, window_bits)))
                self.assertEqual(tab.frame()["text"], TEXT, (window_bits, level))

    def test_a_bomb_costs_no_more_than_the_limit(self):
        for size in (2 << 20, 64 << 20):
            raw, stream = self.deflated_raw_tab()
            raw.sendall(masked(0x41, compressed(b" " * size)))
            self.assertEqual(close_code(stream)[0], 1009)

    def test_what_is_not_compressed_as_it_says_ends_with_1007(self):
        for payload in (b"nonsense", compressed(b"\xff\xfe"), compressed(TEXT.encode())[:20]):
            raw, stream = self.deflated_raw_tab()
            raw.sendall(masked(0x41, payload))
            self.assertEqual(close_code(stream)[0], 1007, payload)

    def test_the_bit_is_refused_where_it_may_not_be(self):
        bad = {
            "a ping": masked(0x49, b""),
            "a continuation": masked(0x41, b"a", final=False) + masked(0x40, b"b"),
            "another bit": masked(0x21, b"a"),
        }
        for what, frames in bad.items():
            raw, stream = self.deflated_raw_tab()
            raw.sendall(frames)
            self.assertEqual(close_code(stream)[0], 1002, what)
        raw, stream = self.raw_tab()
        raw.sendall(masked(0x41, compressed(b"{}")))
        self.assertEqual(close_code(stream)[0], 1002, "not negotiated")


class Off(GatewayTest):
    settings = {"worker": "none"}

    def test_by_default_nothing_is_negotiated(self):
        tab = self.tab(compression="deflate")
        self.assertEqual(tab.socket.protocol.extensions, [])
        self.gateway.api("send", {"channel_id": self.user, "text": TEXT})
        self.assertEqual(tab.frame()["text"], TEXT)
