"""A worker behind a webhook whose every word the test decides, and tests of /v1 that share one with a gateway."""

import base64
import concurrent.futures
import http.server
import json
import queue
import threading

import openai

from gateway import PATIENCE, GatewayTest, until


class Turn:
    """A question as the worker got it, and the ways to answer it: the routes of /api."""

    def __init__(self, worker, message, headers):
        self.worker = worker
        self.message = message
        self.headers = headers
        self.channel = message["channel_id"]
        self.id = message["extra"].get("request_id")

    def call(self, route, **value):
        key = {"Authorization": f"Bearer {self.worker.key}"} if self.worker.key else {}
        return self.worker.gateway.api(route, {"channel_id": self.channel, **value}, **key)

    def send(self, text):
        return self.call("send", text=text)["id"]

    def edit(self, message, text):
        return self.call("edit", message_id=message, text=text)

    def typing(self, active=True):
        return self.call("typing", active=active)

    def buttons(self, text, *buttons):
        return self.call("buttons", text=text, buttons=list(buttons))["id"]

    def file(self, filename, mimetype, data):
        return self.call("file", filename=filename, mimetype=mimetype, data=base64.b64encode(data).decode())

    def end(self, reason="stop"):
        return self.call("end", reason=reason)

    def say(self, *texts, reason="stop"):
        """A message that grows by edits, and the end."""
        message = self.send(texts[0])
        for text in texts[1:]:
            self.edit(message, text)
        self.end(reason)


class Worker(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.gateway = None
        self.key = None
        self.takes = threading.Event()  # while it is not set, what is asked is not even taken
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.forget()

    def forget(self):
        """For the next test."""
        self.questions = queue.SimpleQueue()
        self.ids = []  # of all that was asked
        self.cancelled = []
        self.answer = None  # takes each turn at once, on a thread of its own, instead of `question`
        self.takes.set()

    @property
    def asked(self):
        return len(self.ids)

    def question(self):
        try:
            return self.questions.get(timeout=PATIENCE)
        except queue.Empty:
            raise AssertionError("nobody asked the worker") from None

    def stop(self):
        self.takes.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # a gateway that was ended in the middle of a request


class _Receiver(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        worker = self.server
        cancel = message["extra"].get("cancel")
        if cancel:
            worker.cancelled.append(cancel["request_id"])
        else:
            worker.takes.wait(PATIENCE)
            turn = Turn(worker, message, self.headers)
            worker.ids.append(turn.id)
            if worker.answer:
                threading.Thread(target=worker.answer, args=(turn,), daemon=True).start()
            else:
                worker.questions.put(turn)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


class OpenAITest(GatewayTest):
    """Tests that share a gateway and its worker. `key` is the worker's, where the gateway has keys."""

    key = None

    @classmethod
    def setUpClass(cls):
        cls.worker = Worker()
        cls.addClassCleanup(cls.worker.stop)
        cls.settings = {"worker": "webhook", "webhook_url": cls.worker.url, "webhook_backoff_min": "20ms", "webhook_backoff_max": "100ms", **cls.settings}
        super().setUpClass()
        cls.worker.gateway, cls.worker.key = cls.gateway, cls.key

    def setUp(self):
        super().setUp()
        self.worker.forget()

    def client(self, key="any", **options):
        options = {"timeout": PATIENCE, **options}
        client = openai.OpenAI(base_url=f"{self.gateway.origin}/v1", api_key=key, **options)
        self.addCleanup(client.close)
        return client

    def ask(self, client, text="hi", **options):
        return client.chat.completions.create(model="tabcast", messages=[{"role": "user", "content": text}], **options)

    def apart(self, call, *arguments, **options):
        """Runs what waits for an answer while the test gives it."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown, wait=False)
        return pool.submit(call, *arguments, **options)

    def until_cancelled(self, turn):
        until("the worker is told that nobody waits", lambda: turn.id in self.worker.cancelled)
        answer = turn.call("send", text="too late")
        self.assertEqual((answer["delivered"], answer["reason"]), (False, "no_such_stream"))


def content(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
