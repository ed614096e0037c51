"""The reference worker: a bot on Redis Streams. It echoes, and answers /v1 word by word.

    python redis_worker.py [--cluster] [--msgpack] redis://127.0.0.1:6379

It reads the inbound stream as one consumer of a group, so that many workers share the work, and writes its answers to
the outbound stream. An entry is acked when it was answered: a worker that dies in between leaves it to the next one.
Each answer's `message_key` is made of the question's id, so that the gateway delivers it once however often it is said.
"""

import argparse
import json
import threading
import time
import uuid

import msgpack
import redis

ENVELOPE = "e"  # the one field of an entry


def pack(envelope, form):
    return msgpack.packb(envelope) if form == "msgpack" else json.dumps(envelope, ensure_ascii=False).encode()


def unpack(data):
    """JSON begins with a brace; a map of MessagePack never does."""
    return json.loads(data) if data[:1] == b"{" else msgpack.unpackb(data)


class RedisWorker:
    """Runs until it is stopped. `client` is of bytes, to one server or to a cluster."""

    prefix = "sg:"
    block = 500  # milliseconds that one read may wait
    pause = 0.02  # seconds between two words, about as fast as a language model

    def __init__(self, client, form="json", name=None, claim_idle=30_000):
        self.client = client
        self.form = form
        self.name = name or f"worker-{uuid.uuid4().hex[:8]}"
        self.claim_idle = claim_idle  # milliseconds after which another worker's entry is taken over
        self.inbound = f"{self.prefix}stream:inbound"
        self.outbound = f"{self.prefix}stream:outbound:webchat"
        self.group = f"{self.prefix}workers"
        self.asked = []  # every envelope as it came
        self.cancelled = set()
        self.is_stopped = threading.Event()

    # ---- reading ----

    def run(self):
        """Outlives Redis: when it is back, empty or not, the work goes on."""
        is_ready = False
        while not self.is_stopped.is_set():
            try:
                if not is_ready:
                    self.join()
                    self.claim()
                    is_ready = True
                for _, entries in self.read():
                    for entry, fields in entries:
                        self.take(entry, fields)
            except redis.exceptions.RedisError:  # lost, or restarted empty: without the group
                is_ready = False
                self.is_stopped.wait(0.1)

    def read(self):
        answer = self.client.xreadgroup(self.group, self.name, {self.inbound: ">"}, count=64, block=self.block) or []
        return answer.items() if isinstance(answer, dict) else answer

    def join(self):
        try:
            self.client.xgroup_create(self.inbound, self.group, id="0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def claim(self):
        """What a worker that is gone has left unanswered, this one's earlier life included."""
        start = "0-0"
        while True:
            start, entries, *_ = self.client.xautoclaim(self.inbound, self.group, self.name, self.claim_idle, start)
            for entry, fields in entries:
                self.take(entry, fields)
            if start in (b"0-0", "0-0"):
                return

    def take(self, entry, fields):
        if not fields:  # trimmed away before anybody answered it
            return self.ack(entry)
        message = unpack(fields[ENVELOPE.encode()])
        self.asked.append(message)
        extra = message["extra"]
        if "cancel" in extra:
            self.cancelled.add(extra["cancel"]["request_id"])
            return self.ack(entry)
        if "openai" in extra:  # takes a while: the next question does not wait for it
            return threading.Thread(target=self.tell, args=(entry, message), daemon=True).start()
        self.say(message, 0, **self.answer(message))
        self.ack(entry)

    def ack(self, entry):
        self.persist(self.client.xack, self.inbound, self.group, entry)

    def persist(self, command, *arguments, **options):
        """Says it until it was heard, at least once."""
        while True:
            try:
                return command(*arguments, **options)
            except redis.exceptions.RedisError:
                if self.is_stopped.wait(0.1):
                    raise

    # ---- answering ----

    def say(self, message, number, **envelope):
        """Puts one answer on the stream; `number` tells it from the others to the same question."""
        base = {"channel_id": message["channel_id"], "platform": message["platform"], "trace_id": message["trace_id"], "message_key": f"{message['message_id']}:{number}"}
        entry = {ENVELOPE: pack({**base, **envelope}, self.form)}
        self.persist(self.client.xadd, self.outbound, entry, maxlen=100_000, approximate=True)

    def answer(self, message):
        if button := message["extra"].get("button"):
            return {"type": "edit", "message_id": button["message_id"], "text": f"You chose {message['content']}"}
        if message["content"] == "/buttons":
            return {"type": "buttons", "text": "Which?", "buttons": [{"label": "This", "custom_id": "this"}]}
        if message["content"] == "/file":
            data = b"content of the file"
            return {"type": "file", "filename": "answer.txt", "mimetype": "text/plain", "data": data if self.form == "msgpack" else "Y29udGVudCBvZiB0aGUgZmlsZQ=="}
        return {"type": "message", "text": f"You said: {message['content']}"}

    def tell(self, entry, message):
        """Answers a request of /v1, by a message that grows, until all is said or nobody listens any more."""
        request = message["channel_id"].removeprefix("sse:")
        # Made of the question's, so that it is the same when the question is answered again.
        answer = str(uuid.uuid5(uuid.UUID(message["message_id"]), "answer"))
        words = f"You said: {message['content']}".split(" ")
        number = 0
        while number < len(words) and request not in self.cancelled:
            number += 1
            self.say(message, number, type="message" if number == 1 else "edit", message_id=answer, text=" ".join(words[:number]))
            time.sleep(self.pause)
        self.say(message, number + 1, type="end", reason="cancelled" if request in self.cancelled else "stop")
        self.ack(entry)

    # ---- running ----

    def start(self):
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def stop(self):
        self.is_stopped.set()
        self.thread.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--cluster", action="store_true", help="the URL is of one node of a Redis Cluster")
    parser.add_argument("--msgpack", action="store_true", help="answer in MessagePack instead of JSON")
    options = parser.parse_args()
    kind = redis.RedisCluster if options.cluster else redis.Redis
    worker = RedisWorker(kind.from_url(options.url), "msgpack" if options.msgpack else "json")
    try:
        worker.run()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
