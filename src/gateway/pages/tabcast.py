"""A worker's client of tabcast: the old adapter's method names, over the gateway's /api or over Redis Streams.

    from tabcast import WebChatAdapter              # Python 3.9 or later, nothing to install

    async def handle(message, adapter):
        await adapter.send(message.channel_id, f"You said: {message.text}")

    WebChatAdapter(handle).run()                    # until SIGINT or SIGTERM; in a loop of your own: start(), stop()

Messages come to a webhook here (the gateway's `worker = "webhook"`, `webhook_url = "http://127.0.0.1:9000/"`), answers go by /api;
with `redis_url` both are Redis Streams (`worker = "redis"`; needs the package `redis`). What is no argument is WEBCHAT_URL,
WEBCHAT_TOKEN (one of `api_keys`), WEBCHAT_LISTEN, WEBCHAT_SECRET (`webhook_secret`), WEBCHAT_REDIS. Handlers of one channel take turns.
A message is done when its handler returns, for the webhook after 10 s at the latest, and comes again if that fails or the bot is
gone before. What is lost on the way out is said again, and arrives once. A client of /v1 that leaves cancels its handler; a handler
that returns ends its answer. Over Redis `send_file` returns "", as the gateway chooses the id, and `edit_message` always True.
"""
from __future__ import annotations
import asyncio, base64, collections, concurrent.futures, contextlib, datetime, functools, hmac, http.client, importlib, io, itertools, json
import logging, os, random, signal, socket, threading, time, urllib.parse, uuid
from typing import Any, Awaitable, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple
log = logging.getLogger("tabcast")
log_once = functools.lru_cache(maxsize=None)(log.error)
LOST, MALFORMED = (OSError, asyncio.TimeoutError, http.client.HTTPException), (KeyError, TypeError, ValueError)
BODY_BYTES_MAX, BODIES_BYTES_MAX, CONNECTIONS_MAX, LINGER_TIME, TAKEN_MAX = 16 << 20 | 64 << 10, 64 << 20, 128, 1.0, 10_000  # to the webhook; messages known

class TabcastError(Exception):
    """`code`: the gateway's (README, "Codes"), or `unreachable`, `stream_exists`, `stream_full`, `no_secret`. `status`: 0 without HTTP."""
    def __init__(self, code: str, message: str, status: int = 0) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.status = code, status

# A pressed button has its custom_id as `text`, and `extra["button"]`. Attachments: {filename, mimetype, data: bytes}. Times are UTC.
IncomingMessage = NamedTuple("IncomingMessage", [
    ("platform", str), ("channel_id", str), ("user_id", str), ("user_name", str), ("text", str), ("is_addressed", bool),
    ("attachments", List[Dict[str, Any]]), ("channel_name", str), ("timestamp", datetime.datetime), ("message_id", str),
    ("reply_to_id", Optional[str]), ("extra", Dict[str, Any]), ("reactions", List[Any]), ("unified_user_id", Optional[str]), ("user_aliases", List[str])])

def read(body: bytes) -> IncomingMessage:
    """From an envelope: JSON, or MessagePack, whose maps do not begin with a brace (needs the package `msgpack`)."""
    e: Any = json.loads(body) if body[:1] == b"{" else importlib.import_module("msgpack").unpackb(body)
    files = [{**file, "data": base64.b64decode(file["data"]) if isinstance(file["data"], str) else file["data"]} for file in e["attachments"]]
    return IncomingMessage(e["platform"], e["channel_id"], e["user_id"], e["display_name"], e["content"], e["is_addressed"], files,
                           e["room_name"] or "", datetime.datetime.fromtimestamp(e["timestamp"], datetime.timezone.utc), e["message_id"],
                           e["reply_to"], e["extra"], e["reactions"], e["unified_user_id"], e["user_aliases"])

def described(view: Any) -> Any:
    """A list of buttons or a component view, of dicts or of objects with `children`, `label`, `custom_id`, …"""
    if isinstance(view, (list, tuple, Mapping)):
        return view if isinstance(view, Mapping) else [described(part) for part in view]
    named = {key: getattr(view, key, None) for key in ("label", "custom_id", "emoji", "style", "url", "disabled")}
    named["style"] = getattr(named["style"], "name", named["style"])
    own = {key: part if isinstance(part, bool) else str(part) for key, part in named.items() if part is not None}
    return {**own, "children": described(view.children)} if hasattr(view, "children") else own

def in_turn(lanes: Dict[str, Any], key: str, work: Callable[[], Awaitable[Any]]) -> "asyncio.Task[Any]":
    """Does `work` when all is over that was asked for `key` before. `lanes` has what ends with the last of each key."""
    before, over = lanes.get(key), asyncio.get_running_loop().create_future()
    async def turn() -> Any: return (before and await asyncio.wait([before]), await work())[1]
    def end(_: Any) -> None:  # after the end before: who is cancelled while it waits lets nobody overtake
        _ = lanes[key] is over and lanes.pop(key)
        over.set_result(None)
    lanes[key], task = over, asyncio.ensure_future(turn())
    task.add_done_callback(lambda done: before.add_done_callback(end) if before else end(done))
    return task

def kept(tasks: Set["asyncio.Task[Any]"], task: "asyncio.Task[Any]") -> "asyncio.Task[Any]":
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task

class WebChatAdapter:
    name, redis_prefix = "webchat", "sg:"
    handlers_max, requests_max = 64, 16  # messages taken and not done; calls under way, a thread and a connection each
    reserve_max = 64  # over Redis, messages taken that wait for a place, so that a cancel behind them is heard
    attempts_max, timeout, claim_idle = 6, 30.0, 60.0  # of calls, and handlers with Redis; seconds: of an attempt, until an entry is left
    def __init__(self, handler: Optional[Callable[[IncomingMessage, WebChatAdapter], Awaitable[Any]]] = None, *, url: str = "",
                 token: str = "", secret: str = "", webhook: Optional[Tuple[str, int]] = None, redis_url: str = "",
                 operator_token: str = "", bot: Tuple[str, str, str] = ("star", "Star", "@Star")) -> None:
        """`webhook` is where to listen; without a handler nothing does. `operator_token` is for `disconnect` alone."""
        host, _, port = os.environ.get("WEBCHAT_LISTEN", "127.0.0.1:9000").rpartition(":")
        self.webhook, self.on_message, self.operator_token = webhook or (host.strip("[]"), int(port)), handler, operator_token
        self.bot_identity, self.is_running = dict(zip(("platform", "user_id", "display_name", "mention"), (self.name, *bot))), True
        self.url = urllib.parse.urlsplit(url or os.environ.get("WEBCHAT_URL", "http://127.0.0.1:8080"))
        self.token, self.redis_url = token or os.environ.get("WEBCHAT_TOKEN", ""), redis_url or os.environ.get("WEBCHAT_REDIS", "")
        self.secret = (secret or os.environ.get("WEBCHAT_SECRET", "")).encode()
        self._pool = concurrent.futures.ThreadPoolExecutor(self.requests_max, "tabcast")
        self._connections: Dict[int, http.client.HTTPConnection] = {}  # by thread
        self._sending, self._handling, self._handlers = ({}, {}, {})  # type: Dict[str, Any], Dict[str, Any], Dict[str, Any]
        self._streams, self._taken = {}, {}  # type: Dict[str, asyncio.Queue[Dict[str, Any]]], Dict[str, asyncio.Task[bool]]  # the oldest first
        self._under_way, self._answers, self._awaited = set(), set(), {}  # type: Set[Any], Set[asyncio.Task[Any]], Dict[asyncio.StreamWriter, int]
        self._end, self._redis, self._places = None, None, None  # type: Optional[Callable[[], Any]], Any, Any
    # ---- what goes out ----
    async def send(self, channel_id: str, content: str, reply_to: Optional[str] = None) -> str:
        return str((await self._call("send", channel_id, text=content, reply_to=reply_to))["id"])
    async def send_file(self, channel_id: str, data: bytes, filename: str, mimetype: str = "application/octet-stream") -> str:
        fields = {"filename": filename, "mimetype": mimetype, "data": base64.b64encode(data).decode()}
        return str((await self._call("file", channel_id, **fields)).get("url", ""))
    async def send_with_buttons(self, channel_id: str, content: str, view: Any) -> str:
        fields = {"buttons" if isinstance(view, (list, tuple)) else "view": described(view)}
        return str((await self._call("buttons", channel_id, text=content, **fields))["id"])
    async def edit_message(self, channel_id: str, message_id: str, content: str) -> bool:
        return bool((await self._call("edit", channel_id, message_id=message_id, text=content))["delivered"])
    async def end(self, channel_id: str, reason: str = "stop") -> None: await self._call("end", channel_id, reason=reason)  # or error, …
    async def start_typing(self, channel_id: str, active: bool = True) -> None:
        with contextlib.suppress(TabcastError): await self._call("typing", channel_id, active=active)
    stop_typing = functools.partialmethod(start_typing, active=False)
    async def fetch_history(self, channel_id: str, limit: int = 100) -> List[IncomingMessage]: return []  # what tabs missed the gateway says
    def prompt_context(self) -> List[Dict[str, str]]: return [self.bot_identity] if self.is_running else []
    def create_sse_queue(self, request_id: str, frames_max: int = 1024) -> "asyncio.Queue[Dict[str, Any]]":
        """From here on what is sent to `sse:{request_id}` is put into this queue, as frames, and nowhere else; its end wakes the reader."""
        if request_id in self._streams: raise TabcastError("stream_exists", f"there is a stream {request_id} already")
        return self._streams.setdefault(request_id, asyncio.Queue(frames_max))
    def remove_sse_queue(self, request_id: str) -> None:
        if (queue := self._streams.pop(request_id, None)) is not None:
            _ = queue.full() and queue.get_nowait()
            queue.put_nowait({"type": "end", "reason": "cancelled"})
    async def _user(self, method: str, id: str) -> Any: return await self._ask(method, f"/api/users/{urllib.parse.quote(id, '')}")
    async def get_sessions(self, user_id: str) -> List[Dict[str, Any]]: return list((await self._user("GET", user_id))["sessions"])
    async def is_online(self, user_id: str) -> bool: return bool((await self._user("GET", user_id))["online"])
    async def active_users(self) -> List[str]: return [user["user_id"] for user in (await self._ask("GET", "/api/users"))["users"]]
    async def total_connections(self) -> int: return int((await self._ask("GET", "/api/users"))["tab_count"])
    async def disconnect(self, user_id: str) -> int: return int((await self._user("DELETE", user_id))["closed"])  # sessions that it had
    async def _call(self, op: str, channel_id: str, **fields: Any) -> Dict[str, Any]:
        given, chosen = {key: value for key, value in fields.items() if value is not None}, {"id": str(uuid.uuid4()), "delivered": True}
        if (queue := self._streams.get(channel_id[4:]) if channel_id.startswith("sse:") else None) is not None:
            if queue.full(): raise TabcastError("stream_full", "the stream's reader is behind")
            kind = {"type": "message", "sender": self.bot_identity["user_id"]} if op in ("send", "buttons") else {"type": op}
            said = {"id" if key == "message_id" else key: value for key, value in {"message_id": chosen["id"], **given}.items()}
            queue.put_nowait({**kind, **said, "timestamp": time.time()})
            return chosen
        body = {"channel_id": channel_id, **given}
        if not self.redis_url:  # an edit may be said twice; so many keys would push out those that count
            key = str(chosen["id"]) if op in ("send", "buttons", "file") else ""
            return dict(await in_turn(self._sending, channel_id, lambda: self._ask("POST", f"/api/{op}", body, key)))
        own = {"message_id": chosen["id"]} if op in ("send", "buttons") else {}
        body.update(own, platform=self.name, type="message" if op == "send" else op, message_key=chosen["id"])
        from redis.exceptions import RedisError
        stream, entry = f"{self.redis_prefix}stream:outbound:webchat", {"e": json.dumps(body)}
        try: await in_turn(self._sending, channel_id, lambda: self._client().xadd(stream, entry, maxlen=100_000))
        except RedisError as lost: raise TabcastError("unreachable", str(lost)) from lost
        return chosen
    def _client(self) -> Any:
        import redis.asyncio.retry, redis.backoff
        retry = redis.asyncio.retry.Retry(redis.backoff.FullJitterBackoff(cap=10, base=0.1), self.attempts_max)
        self._redis = self._redis or redis.asyncio.Redis.from_url(self.redis_url, retry=retry, protocol=2)
        return self._redis
    async def _ask(self, method: str, path: str, body: Any = None, key: str = "") -> Dict[str, Any]:  # type: ignore[return]
        token = self.operator_token if method == "DELETE" else self.token
        headers = {"Content-Type": "application/json", "Idempotency-Key": key, "Authorization": token and f"Bearer {token}"}
        request = (method, path, json.dumps(body).encode(), {name: value for name, value in headers.items() if value})
        for attempt in itertools.count(1):
            try:
                status, after, text = await asyncio.get_running_loop().run_in_executor(self._pool, self._request, *request)
                answer: Dict[str, Any] = json.loads(text)
                if status < 300: return answer
                error = TabcastError(answer["error"]["code"], answer["error"]["message"], status)
            except (*LOST, *MALFORMED) as lost:
                status, after, error = 503, 0, TabcastError("unreachable", f"{type(lost).__name__}: {lost}")
            if status not in (408, 429, 500, 502, 503, 504) or attempt >= self.attempts_max: raise error
            await asyncio.sleep(min(after, 60) + random.uniform(0, min(10.0, 0.1 * 2**attempt)))
    def _request(self, method: str, path: str, body: bytes, headers: Dict[str, str]) -> Tuple[int, int, bytes]:
        """On a thread of the pool, each of which keeps its connection, until stop()."""
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        connection = self._connections.setdefault(threading.get_ident(), kind(self.url.netloc, timeout=self.timeout))
        try:
            connection.request(method, self.url.path.rstrip("/") + path, body if method == "POST" else None, headers)
            response = connection.getresponse()
            after = response.headers.get("Retry-After", "")
            return response.status, int(after) if after.isdecimal() else 0, response.read()
        except BaseException:
            connection.close()  # the next request opens it anew
            raise
    # ---- what comes in ----
    def run(self) -> None:
        async def until_signalled() -> None:
            stopped = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM): asyncio.get_running_loop().add_signal_handler(number, stopped.set)
            await asyncio.gather(self.start(), stopped.wait())
            await self.stop()
        asyncio.run(until_signalled())
    async def start(self) -> None:
        self.is_running = True
        if self.on_message is None or self._end is not None: return
        if not self.redis_url and not self.secret and self.webhook[0] not in ("127.0.0.1", "::1", "localhost"):
            raise TabcastError("no_secret", "a webhook that others can reach needs a secret")
        self._places = asyncio.Semaphore(self.handlers_max)
        receiving = None if self.redis_url else await asyncio.start_server(self._receive, *self.webhook)
        self._end = receiving.close if receiving else kept(self._answers, asyncio.ensure_future(self._consume())).cancel
    async def stop(self) -> None:
        """Takes nothing more, and returns when all handlers have. Sends still work, over new connections; and so does start()."""
        self.is_running, end, self._end = False, self._end, None
        if end is not None: end()
        for writer in self._awaited: writer.close()
        while self._under_way or self._answers: await asyncio.wait(self._under_way | self._answers)
        self._pool.shutdown(wait=False)
        self._pool = concurrent.futures.ThreadPoolExecutor(self.requests_max, "tabcast")
        while self._connections:
            connection = self._connections.popitem()[1]  # of a thread that may still read for a handler that was cancelled: wake it
            with contextlib.suppress(OSError, TypeError): socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)
            connection.close()
        client, self._redis = self._redis, None
        if client is not None: await client.aclose()
    def _take(self, message: IncomingMessage) -> "asyncio.Task[bool]":
        """Its handler's turn, and whether it is done then. One that comes again shares it, unless it has failed."""
        task = self._taken.pop(message.message_id, None)
        if task is None or (task.done() and not task.result()):
            lane = message.channel_id + ("\0" if "cancel" in message.extra else "")  # it does not wait for what it cancels
            task = kept(self._under_way, in_turn(self._handling, lane, lambda: self._handle(message)))
        self._taken[message.message_id] = task
        while len(self._taken) > TAKEN_MAX: del self._taken[next(iter(self._taken))]
        return task
    async def _handle(self, message: IncomingMessage) -> bool:
        if "cancel" in message.extra:  # nobody waits for the answer any more
            return message.channel_id not in self._handlers or self._handlers[message.channel_id].cancel() or True
        async def handler() -> None:
            async with self._places: await self.on_message(message, self)  # type: ignore[misc]
        work = self._handlers[message.channel_id] = asyncio.ensure_future(handler())
        await asyncio.wait([work])
        del self._handlers[message.channel_id]
        reason = "cancelled" if work.cancelled() else "error" if work.exception() else "stop"
        if reason == "error": log.error("the handler of message %s failed", message.message_id, exc_info=work.exception())
        if "openai" in message.extra:
            with contextlib.suppress(TabcastError): await self.end(message.channel_id, reason)
        return reason != "error" or "openai" in message.extra
    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # who speaks no HTTP gets no answer
        kept(self._answers, asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.closing(writer), contextlib.suppress(EOFError, ImportError, asyncio.LimitOverrunError, *LOST, *MALFORMED):
            ends = "keep-alive"
            while self.is_running and ends == "keep-alive":
                self._await(writer, 0)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
                method, _, _ = head[:head.index(b"\r\n")].split(b" ")
                headers = http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2]))
                status, length = self._refusal(method, headers), int(headers.get("Content-Length", 0))
                if not status and 0 <= length <= BODY_BYTES_MAX:  # a question's last text comes twice, of the 8 MiB that /v1 takes
                    self._await(writer, length)
                    body = await asyncio.wait_for(reader.readexactly(length), 60)
                    self._awaited.pop(writer, None)
                    status, length = await self._hear(headers, body), 0
                ends = "keep-alive" if status in (200, 500, 503) else "close"
                writer.write(f"HTTP/1.1 {status or 413} -\r\nAllow: POST\r\nRetry-After: 1\r\nConnection: {ends}\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
                if ends == "close": await asyncio.wait_for(reader.readexactly(min(length, 1 << 16)), LINGER_TIME)  # before that many hear no answer; still awaited
        self._awaited.pop(writer, None)
    def _await(self, writer: asyncio.StreamWriter, length: int) -> None:  # of a body, 0: a head; who is awaited longest makes room
        self._awaited.pop(writer, None)
        self._awaited[writer] = length
        while (are_many := len(self._awaited) > CONNECTIONS_MAX) or sum(self._awaited.values()) > BODIES_BYTES_MAX:
            with contextlib.closing(next(other for other, part in self._awaited.items() if are_many or part)) as longest: del self._awaited[longest]
    def _refusal(self, method: bytes, headers: http.client.HTTPMessage) -> int:  # before a body is read; 0: none
        if method != b"POST": return 405
        # without a secret: of a page in a browser here, which asks nobody before it posts a text, but never without its origin
        if not self.secret: return 403 if "Origin" in headers or headers.get_content_type() != "application/json" else 0
        return 0 if len(headers.get("X-Tabcast-Signature", "")) == 71 and abs(time.time() - int(headers.get("X-Tabcast-Timestamp", 0))) <= 300 else 401
    async def _hear(self, headers: http.client.HTTPMessage, body: bytes) -> int:
        signature = "sha256=" + hmac.new(self.secret, headers.get("X-Tabcast-Timestamp", "").encode() + b"." + body, "sha256").hexdigest()
        if self.secret and not hmac.compare_digest(signature.encode(), headers["X-Tabcast-Signature"].encode()): return 401
        if "cancel" not in (message := read(body)).extra and len(self._under_way) >= self.handlers_max: return 503
        task = self._take(message)
        await asyncio.wait([task], timeout=0 if "openai" in message.extra else 10)
        return 500 if task.done() and not task.result() else 200
    async def _consume(self) -> None:  # as one of the group of workers: what it takes is its own until it is acknowledged, or left
        from redis.exceptions import RedisError, ResponseError
        failures, claim_at, client = collections.Counter(), 0.0, self._client()  # type: collections.Counter[bytes], float, Any
        stream, group, name = f"{self.redis_prefix}stream:inbound", f"{self.redis_prefix}workers", uuid.uuid4().hex
        async def finish(id: bytes, fields: Dict[bytes, bytes]) -> None:
            is_done, failures[id] = True, failures[id] + 1
            try:
                task = self._take(read(fields[b"e"]))
                while not (await asyncio.wait([task], timeout=self.claim_idle / 3))[0]:  # or another would claim it
                    with contextlib.suppress(RedisError): await client.xclaim(stream, group, name, 0, [id], justid=True)
                is_done = task.result()
            except ImportError:
                is_done = bool(log_once("a message is MessagePack: install `msgpack`, or give the gateway `redis_envelope = \"json\"`"))
            except MALFORMED as wrong: log.error("the entry %s is no message: %r", id, wrong)
            if is_done or failures[id] >= self.attempts_max:
                failures.pop(id, None)
                with contextlib.suppress(RedisError): await client.xack(stream, group, id)
            while len(failures) > TAKEN_MAX: del failures[next(iter(failures))]  # others are done with those
        while self.is_running:  # the client may swallow a cancel
            try:
                if is_full := len(self._under_way) >= self.handlers_max:  # a bot that has places reads at once
                    await asyncio.wait(self._under_way, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                if (count := self.handlers_max + self.reserve_max - len(self._under_way)) <= 0: continue
                if time.monotonic() >= claim_at:
                    with contextlib.suppress(ResponseError): await client.xgroup_create(stream, group, id="0", mkstream=True)  # there is one
                    entries = (await client.xautoclaim(stream, group, name, int(self.claim_idle * 1000), count=count))[1]
                    claim_at = time.monotonic() + (self.claim_idle / 4 if len(entries) < count else 0)
                else: entries = []
                if not entries:  # a bot that looks often for what others left reads all the same
                    answer = await client.xreadgroup(group, name, {stream: ">"}, count=count, block=None if is_full else 500)
                    entries = [entry for _, part in answer or [] for entry in part]
                for id, fields in entries: kept(self._answers, asyncio.ensure_future(finish(id, fields or {})))
                await asyncio.sleep(0)
            except RedisError as lost:
                log.warning("Redis: %s", lost)
                claim_at = await asyncio.sleep(0.5, 0.0)

if __name__ == "__main__": WebChatAdapter(lambda message, adapter: adapter.send(message.channel_id, f"You said: {message.text}")).run()
