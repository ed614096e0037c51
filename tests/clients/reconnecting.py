"""Tabs by the thousand on one event loop that come back by themselves, as the page does: WebSockets and event streams.

Raw sockets and a parser of our own, because ten thousand clients of a library cost more processor than the server.
What they do when a connection ends is what `src/gateway/pages/tabcast.js` does: a random pause that doubles, or the
one that the server named; and they say which messages they have, the newest first.
"""

import asyncio
import base64
import json
import os
import random
import resource
import struct
import urllib.parse

BACKOFF = 0.5  # seconds: the first pause is a random part of it, each later one of twice as much
BACKOFF_MAX = 30.0
STABLE = 10.0  # seconds after which a connection that held starts the pauses afresh
HANDSHAKE = 15.0  # seconds
POSITIONS_MAX = 16
FINAL = {1000, 1002, 1003, 1007, 1008, 1009, 4010}  # close codes after which nobody comes back
ORDERED = {"message", "file"}


def raise_open_files():
    """As many descriptors as the hard limit allows; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def client_frame(opcode, payload):
    """A client's frame (RFC 6455 §5.2) with a mask of zeros, which leaves the payload as it is."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 0xFE, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0xFF, size)
    return head + b"\0\0\0\0" + payload


class Connection(asyncio.Protocol):
    """One connection from its request to its end, which is told to its tab.

    The end is one of: ("unreachable", error), ("refused", (status, seconds)), ("closed", code) after a close frame,
    ("ended", None) after a stream's last chunk, ("lost", None) without either.
    """

    def __init__(self, tab, request):
        self.tab = tab
        self.request = request
        self.buffer = bytearray()
        self.text = b""
        self.parse = self._head
        self.end = ("lost", None)
        self.is_open = False
        self.transport = None

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data):
        self.buffer += data
        self.parse()

    def connection_lost(self, error):
        self.tab.over(self)

    def send(self, frame):
        self.transport.write(client_frame(1, json.dumps(frame).encode()))

    def _head(self):
        if (at := self.buffer.find(b"\r\n\r\n")) < 0:
            return
        lines = self.buffer[:at].decode("latin-1").split("\r\n")
        del self.buffer[: at + 4]
        status = int(lines[0].split(" ", 2)[1])
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
        if status not in (101, 200):
            self.end = ("refused", (status, float(headers.get("retry-after", 0))))
            self.parse = self.buffer.clear
            return self.transport.close()
        self.is_open = True
        self.parse = self._frames if status == 101 else self._chunks
        self.tab.opened(self)
        self.parse()

    def _frames(self):
        buffer, at = self.buffer, 0
        while len(buffer) - at >= 2:
            size, head = buffer[at + 1], 2
            if size >= 126:
                head = 4 if size == 126 else 10
                size = int.from_bytes(buffer[at + 2 : at + head])
            if len(buffer) - at < head + size or len(buffer) - at < head:
                break
            opcode, payload = buffer[at] & 0x0F, bytes(buffer[at + head : at + head + size])
            at += head + size
            if opcode == 1:
                self.tab.received(self, json.loads(payload))
            elif opcode == 9:
                self.transport.write(client_frame(10, payload))
            elif opcode == 8:
                self.end = ("closed", struct.unpack("!H", payload[:2])[0])
                self.tab.told(self)
                self.transport.write(client_frame(8, payload[:2]))
        del buffer[:at]

    def _chunks(self):
        buffer = self.buffer
        while (line := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:line].split(b";")[0], 16)
            if len(buffer) < line + 2 + size + 2:
                return
            self.text += buffer[line + 2 : line + 2 + size]
            del buffer[: line + 2 + size + 2]
            if size == 0:
                self.end = ("ended", None)
                self.tab.told(self)
                return self.transport.close()
            *records, self.text = self.text.split(b"\n\n")
            for record in records:
                for field in record.split(b"\n"):
                    if field.startswith(b"data: "):
                        self.tab.received(self, json.loads(field[6:]))
                    elif field.startswith(b"retry: "):
                        self.tab.retry_after = int(field[7:]) / 1000


class Tab:
    """One client. `choose()` names the port for each attempt, as a balancer would; `heard(tab, frame)` gets each frame.

    What a test wants to know of beside the frames it overrides: `opened`, `told`, `over`.
    """

    def __init__(self, user, choose, heard, is_events=False, dice=random):
        self.user = user
        self.choose = choose
        self.heard = heard
        self.is_events = is_events
        self.dice = dice
        self.rooms = set()
        self.positions = []
        self.connection = None
        self.attempt = 0
        self.retry_after = None
        self.is_leaving = False
        self.opens = 0
        self.timer = None
        self.task = None
        self.online = asyncio.Event()
        self.gone = asyncio.Event()

    def open(self):
        """Connects, now; whatever comes of it."""
        self.timer = None
        self.task = asyncio.ensure_future(self._connect(self.choose()))

    async def _connect(self, port):
        connection = self.connection = Connection(self, self._request(port))
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HANDSHAKE):
                await loop.create_connection(lambda: connection, "127.0.0.1", port)
        except OSError as error:  # a timeout is one too
            connection.end = ("unreachable", error)
            self.over(connection)
        else:
            self.timer = loop.call_later(HANDSHAKE, self._give_up, connection)

    def _give_up(self, connection):
        if not connection.is_open:
            connection.transport.abort()

    def _request(self, port):
        query = {"user": self.user, "name": self.user, **({"after": ",".join(self.positions)} if self.positions else {})}
        rooms = [("room", room) for room in sorted(self.rooms)] if self.is_events else []
        path = ("/events?" if self.is_events else "/ws?") + urllib.parse.urlencode([*query.items(), *rooms])
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
        if not self.is_events:
            key = base64.b64encode(os.urandom(16)).decode()
            lines += ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
        return "\r\n".join([*lines, "", ""]).encode()

    def opened(self, connection):
        if self.timer:
            self.timer.cancel()
        self.timer = asyncio.get_running_loop().call_later(STABLE, setattr, self, "attempt", 0)
        self.opens += 1
        for room in () if self.is_events else self.rooms:
            connection.send({"type": "join", "room": room, "client_id": room})
        self.online.set()

    def received(self, connection, frame):
        if frame["type"] in ORDERED:
            self.positions = [frame["id"], *self.positions[: POSITIONS_MAX - 1]]
        elif frame["type"] == "draining":
            self.retry_after = frame["retry_after_ms"] / 1000
        self.heard(self, frame)

    def told(self, connection):
        """The server said that it is the end; the connection ends behind it."""

    def over(self, connection):
        if connection is not self.connection:
            return
        if self.timer:
            self.timer.cancel()
        self.connection = self.timer = None
        self.online.clear()
        kind, detail = connection.end
        if self.is_leaving or (kind == "closed" and detail in FINAL):
            return self.gone.set()
        if kind == "refused" and detail[1]:
            self.retry_after = detail[1]
        pause = self.retry_after
        if pause is None:
            pause = self.dice.random() * min(BACKOFF_MAX, BACKOFF * 2**self.attempt)
        self.retry_after = None
        self.attempt = min(self.attempt + 1, 16)
        self.timer = asyncio.get_running_loop().call_later(pause, self.open)

    def leave(self):
        """Ends for good."""
        self.is_leaving = True
        if self.connection and self.connection.transport:
            if self.connection.is_open and not self.is_events:
                self.connection.transport.write(client_frame(8, b"\x03\xe8"))
            self.connection.transport.close()
        else:
            if self.timer:
                self.timer.cancel()
            if self.task:
                self.task.cancel()
            self.gone.set()


class Api:
    """The routes of a worker over one connection that is kept, and made anew when it ends."""

    def __init__(self, port):
        self.port = port
        self.streams = None

    async def post(self, route, value, key=None, content_type="application/json", timeout=30.0):
        """(status, body). An `OSError` or `EOFError` says that no answer came."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        lines = [f"POST /api/{route} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        lines += [f"Idempotency-Key: {key}"] if key else []
        return await self.ask("\r\n".join([*lines, "", ""]).encode() + body, timeout)

    async def get(self, path, timeout=30.0):
        return await self.ask(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode(), timeout)

    async def ask(self, request, timeout):
        try:
            async with asyncio.timeout(timeout):
                if self.streams is None:
                    self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
                reader, writer = self.streams
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {name.lower(): text.strip() for name, text in (line.split(":", 1) for line in head[1:] if line)}
                body = await reader.readexactly(int(headers["content-length"]))
        except (OSError, EOFError, asyncio.CancelledError):
            self.close()
            raise
        if headers.get("connection") == "close":
            self.close()
        return int(head[0].split(" ", 2)[1]), body

    def close(self):
        if self.streams:
            self.streams[1].close()
        self.streams = None


async def open_all(tabs, at_once=200):
    """Opens them, so many at a time, and returns when all are online."""
    gate = asyncio.Semaphore(at_once)

    async def one(tab):
        async with gate:
            tab.open()
            await tab.online.wait()

    await asyncio.gather(*(one(tab) for tab in tabs))
