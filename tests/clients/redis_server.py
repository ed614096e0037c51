"""A real Redis, alone or as a cluster, that tests stop, freeze and fill; and a wire to it that can be slow or cut."""

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import threading

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gateway import PATIENCE, until

ROLE = re.compile(r"tabcast-(?P<node>.+):(?P<role>[^:]+)")
SLOTS = 1 << 14


def free_port():
    """A port with one free 10,000 above it for a cluster's bus, neither of them one that the kernel gives to clients.

    So nobody takes it while its server is stopped, and nobody who tries to connect is connected to themselves.
    """
    while True:
        port = random.randrange(15_000, 22_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


def ports_of(process):
    """The local ports of all TCP sockets of a process: which of the server's clients it is."""
    own = set()
    for descriptor in os.listdir(f"/proc/{process.pid}/fd"):
        try:
            own.add(os.readlink(f"/proc/{process.pid}/fd/{descriptor}"))
        except FileNotFoundError:
            pass  # closed in between
    with open(f"/proc/{process.pid}/net/tcp") as table:
        sockets = [line.split() for line in list(table)[1:]]
    return {int(fields[1].split(":")[1], 16) for fields in sockets if f"socket:[{fields[9]}]" in own}


class RedisServer:
    """One server that keeps nothing on disk: started again, it is empty, and at the same port."""

    def __init__(self, *options):
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.options = options
        self.folder = tempfile.TemporaryDirectory()
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder.name, "--save", "", "--appendonly", "no", "--loglevel", "warning"]
        self.process = subprocess.Popen([*command, *self.options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        self.control = self.client()
        until("Redis answers", self.answers)

    restart = start

    def answers(self):
        if self.process.poll() is not None:
            raise AssertionError(f"redis-server left with {self.process.returncode}")
        try:
            return self.control.ping()
        except redis.exceptions.ConnectionError:
            return False

    def client(self, **options):
        """A client of its own, of texts; `decode_responses=False` for one of bytes."""
        settings = {"decode_responses": True, "socket_timeout": PATIENCE, "protocol": 2, "retry": Retry(NoBackoff(), 1), **options}
        return redis.Redis(host="127.0.0.1", port=self.port, **settings)

    def stop(self):
        """As a crash would."""
        self.process.kill()
        self.process.wait()
        self.control.close()

    def remove(self):
        """For good."""
        self.stop()
        self.folder.cleanup()

    def pause(self):
        """It is there and takes bytes, and does nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def connections(self, role=None):
        """What CLIENT LIST says of gateways' connections: they are named `tabcast-<node>:<role>`."""
        found = []
        for connection in self.control.client_list():
            named = ROLE.fullmatch(connection["name"])
            if named and role in (None, named["role"]):
                found.append({**connection, **named.groupdict()})
        return found

    def roles(self):
        return sorted({connection["role"] for connection in self.connections()})

    def kill_clients(self, role):
        """Cuts the connections of one role, of all nodes; how many there were."""
        killed = [self.control.client_kill_filter(_id=connection["id"]) for connection in self.connections(role)]
        return sum(killed)

    def client_pause(self, seconds):
        """CLIENT PAUSE: whatever is asked is answered afterwards."""
        self.control.client_pause(int(seconds * 1000), all=True)

    def pubsub_buffer(self, limit):
        """Bytes that may wait for a subscriber before it is cut."""
        self.control.config_set("client-output-buffer-limit", f"pubsub {limit} 0 0")

    def subscriber(self, *channels, patterns=()):
        """Who reads along, of bytes, once the subscriptions are confirmed."""
        reader = self.client(decode_responses=False).pubsub()
        for subscribe, names in ((reader.subscribe, channels), (reader.psubscribe, patterns)):
            for name in names:
                subscribe(name)
                if reader.get_message(timeout=PATIENCE) is None:
                    raise AssertionError(f"no subscription to {name}")
        return reader


def published(subscriber, timeout=PATIENCE):
    """The next message that a subscriber gets: (channel, bytes)."""
    message = subscriber.get_message(ignore_subscribe_messages=True, timeout=timeout)
    if message is None:
        raise AssertionError(f"nothing was published within {timeout} s")
    return message["channel"].decode(), message["data"]


class RedisCluster:
    """Three masters, each with a third of the slots."""

    def __init__(self):
        self.servers = [RedisServer("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "2000") for _ in range(3)]
        self.url = ",".join(server.url for server in self.servers)
        bounds = [SLOTS * part // 3 for part in range(4)]
        for epoch, server in enumerate(self.servers, 1):
            server.control.execute_command("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            server.control.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[epoch - 1], bounds[epoch] - 1)
            if epoch > 1:
                server.control.execute_command("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port)
        until("every master knows the whole cluster", lambda: all(map(self.is_whole, self.servers)))

    def is_whole(self, server):
        state = server.control.cluster("INFO")
        return state["cluster_state"] == "ok" and state["cluster_slots_assigned"] == str(SLOTS) and state["cluster_size"] == "3"

    def client(self, **options):
        return redis.RedisCluster(host="127.0.0.1", port=self.servers[0].port, **{"decode_responses": True, "socket_timeout": PATIENCE, **options})

    def remove(self):
        for server in self.servers:
            server.remove()

    def id_of(self, server):
        return server.control.execute_command("CLUSTER", "MYID")

    def slot(self, key):
        return self.servers[0].control.execute_command("CLUSTER", "KEYSLOT", key)

    def owner(self, slot):
        for first, last, (_, port, *_), *_ in self.servers[0].control.execute_command("CLUSTER", "SLOTS"):
            if int(first) <= slot <= int(last):
                return next(server for server in self.servers if server.port == int(port))
        raise AssertionError(f"nobody has slot {slot}")

    def migrate_slot(self, slot, to):
        """Moves a slot and its keys while the cluster runs, in the steps that Redis documents."""
        source = self.owner(slot)
        if source is to:
            return
        to.control.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.control.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))
        while keys := source.control.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.control.execute_command("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        for server in (to, source, *self.servers):
            server.control.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to))

    def channels(self):
        """Every channel that a gateway has subscribed to, in either way."""
        return sorted({channel for server in self.servers for kind in ("CHANNELS", "SHARDCHANNELS") for channel in server.control.execute_command("PUBSUB", kind)})


class Link:
    """A wire to a server's port: `delay` seconds each way, and it can be cut."""

    def __init__(self, port):
        self.target = port
        self.delay = 0.0
        self.is_cut = False
        self.writers = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.run(asyncio.start_server(self.accept, "127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    async def accept(self, reader, writer):
        if self.is_cut:
            return writer.transport.abort()
        try:
            onward_reader, onward = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return writer.transport.abort()
        self.writers |= {writer, onward}
        await asyncio.gather(self.carry(reader, onward), self.carry(onward_reader, writer))
        self.writers -= {writer, onward}

    async def carry(self, reader, writer):
        """What comes in goes out in its order, `delay` later."""
        under_way = asyncio.Queue()
        later = asyncio.ensure_future(self.deliver(under_way, writer))
        try:
            while part := await reader.read(1 << 16):
                under_way.put_nowait((self.loop.time() + self.delay, part))
        except OSError:
            pass
        under_way.put_nowait((self.loop.time() + self.delay, b""))
        await later

    async def deliver(self, under_way, writer):
        while True:
            due, part = await under_way.get()
            await asyncio.sleep(max(0.0, due - self.loop.time()))
            if not part:
                return writer.close()
            writer.write(part)

    async def abort(self):
        for writer in self.writers:
            writer.transport.abort()

    def cut(self):
        """Every connection is reset, and so is every new one."""
        self.is_cut = True
        self.run(self.abort())

    def mend(self):
        self.is_cut = False

    async def end(self):
        self.server.close()
        self.is_cut = True
        await self.abort()
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=PATIENCE)

    def remove(self):
        self.run(self.end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()
