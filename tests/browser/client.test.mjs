// The module that pages use, in Node: against a real gateway, through proxies that let no WebSocket pass, and by its types.

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { getEventListeners } from "node:events";
import { readFileSync } from "node:fs";
import { after, before, describe, it } from "node:test";
import { gzipSync } from "node:zlib";
import { Blocked, Silent } from "./blocked.mjs";
import { Server, until } from "./harness.mjs";
import { Relay, Slow } from "./relay.mjs";

const MODULE = new URL("../../src/gateway/pages/tabcast.js", import.meta.url);
const { Tabcast, TabcastError } = await import(MODULE);
const QUICK = { backoffMs: 20, backoffMaxMs: 200 };

let server;
let users = 0;
const clients = [];
const proxies = [];

before(async () => (server = await new Server().start()));
after(async () => {
  for (const client of clients) client.close();
  for (const proxy of proxies) proxy.stop();
  await server.stop();
});

/** A client of a user of its own, and all that it has heard. */
function client(options = {}, { user = `node-${++users}`, at = server.origin } = {}) {
  const made = new Tabcast({ url: at, query: () => ({ user, name: user }), ...options, limits: { ...QUICK, ...options.limits } });
  made.user = user;
  made.heard = [];
  made.states = [];
  for (const type of ["message", "file", "edit", "typing", "gap", "error", "draining"]) made.addEventListener(type, ({ detail }) => made.heard.push(detail));
  made.addEventListener("state", ({ detail }) => made.states.push(detail));
  clients.push(made);
  return made;
}

async function online(made, transport) {
  if (made.state.name === "idle") made.connect();
  await until(`online by ${transport ?? "anything"}`, () => made.state.name === "online" && (!transport || made.state.transport === transport));
  return made;
}

async function through(Kind, from = server) {
  const proxy = await new Kind(from).start();
  proxies.push(proxy);
  return proxy;
}

const texts = (made, from) => made.heard.filter(({ type, sender }) => type === "message" && (!from || sender === from)).map(({ text }) => text);

describe("in Node", { concurrency: 1 }, () => {
  it("needs to be told where the server is", () => {
    assert.throws(() => new Tabcast(), TypeError);
  });

  it("sends with an ack, and hears what others see", async () => {
    const one = await online(client());
    const twin = await online(client({}, { user: one.user }));
    const { id } = await one.send({ type: "message", text: "hello 🌟" });
    await until("the echo", () => twin.heard.some((frame) => frame.id === id && frame.text === "hello 🌟" && frame.sender === one.user));
    await until("the demo's answer", () => texts(one).length > 1);
    assert.equal(one.state.transport, "websocket");
  });

  it("says why something was refused", async () => {
    const one = await online(client());
    await assert.rejects(one.send({ type: "message", text: "x".repeat(20_000) }), (error) => error instanceof TabcastError && error.code === "too_large");
    await assert.rejects(one.send({ type: "button", message_id: "none", custom_id: "x" }), { code: "bad_field" });
  });

  it("joins rooms and leaves them", async () => {
    const one = await online(client());
    await one.join("lobby");
    await server.api("send", { channel_id: "room:lobby", text: "first" });
    await until("the first", () => texts(one).includes("first"));
    one.leave("lobby");
    await one.send({ type: "message", text: "in between" }); // what it sends is carried out in order
    await server.api("send", { channel_id: "room:lobby", text: "second" });
    await server.api("send", { channel_id: one.user, text: "third" });
    await until("the third", () => texts(one).includes("third"));
    assert.ok(!texts(one).includes("second"));
  });

  it("comes back after a restart when it was told to, and sends what waited", async () => {
    const own = await new Server({ TABCAST_DRAIN_SPREAD: "1s" }).start();
    const one = await online(client({}, { at: own.origin }));
    await own.stop();
    await until("it waits", () => one.state.name !== "online");
    const { retry_after_ms: ms } = one.heard.find(({ type }) => type === "draining");
    const ordered = one.states.find(({ name }) => name === "waiting");
    assert.equal(ordered.ordered, true);
    assert.ok(ordered.retryAt - Date.now() <= ms && ms > 0);
    const sent = one.send({ type: "message", text: "meanwhile" });
    const at = Date.now();
    await own.start();
    assert.ok((await sent).id);
    assert.ok(Date.now() >= Math.min(ordered.retryAt, at) && one.states.filter(({ name }) => name === "connecting").length >= 2);
    one.close();
    await own.stop();
  });

  it("does not come back when it was cut", async () => {
    const one = await online(client());
    await server.api(`users/${one.user}`, undefined, "DELETE");
    await until("the end", () => one.state.name === "closed");
    assert.equal(one.state.code, 4010);
    await assert.rejects(one.send({ type: "message", text: "x" }), { code: "closed" });
  });

  it("opens what a listener has started, and nothing besides", async () => {
    const one = client();
    let second;
    const again = ({ detail }) => {
      if (detail.name !== "closed") return;
      one.removeEventListener("state", again);
      one.connect();
      second = one.send({ type: "message", text: "second" });
    };
    one.addEventListener("state", again);
    one.connect();
    const first = one.send({ type: "message", text: "first" });
    one.close();
    await assert.rejects(first, { code: "closed" });
    assert.ok((await second).id);
  });

  it("notices a connection that is dead, without anybody doing anything", async () => {
    const relay = await through(Relay);
    const one = await online(client({ limits: { silenceMs: 300, pongMs: 200 } }, { at: relay.origin }));
    await new Promise((resolve) => setTimeout(resolve, 1000)); // it asks, and is answered
    assert.deepEqual(one.states.map(({ name }) => name), ["connecting", "online"]);
    relay.freeze();
    await until("it came back", () => one.states.filter(({ name }) => name === "online").length === 2, 5000);
  });
});

describe("a slow upload", { concurrency: 1 }, () => {
  const large = { type: "message", text: "a file", attachments: [{ filename: "f", data: "A".repeat(1 << 20) }] };

  it("does not end its own WebSocket, whoever asks for a sign of life meanwhile", async () => {
    const relay = await through(Slow);
    const one = await online(client({ limits: { silenceMs: 100, ackMs: 100, pongMs: 50 } }, { at: relay.origin }));
    const sent = one.send(large);
    one.check();
    assert.ok((await sent).id);
    assert.deepEqual(one.states.map(({ name }) => name), ["connecting", "online"]);
  });

  it("does not end its own POST", async () => {
    const proxy = Object.assign(await through(Blocked), { carry: Slow.prototype.carry, bytesPerSecond: 1 << 20 });
    const one = await online(client({ limits: { ackMs: 100, pongMs: 50, postMs: 200 } }, { at: proxy.origin }), "events");
    const sent = one.send(large);
    one.check();
    assert.ok((await sent).id);
    assert.deepEqual(one.states.map(({ name }) => name), ["connecting", "connecting", "online"]);
  });

  it("is given up when nothing of it arrives", async () => {
    const relay = await through(Relay);
    const one = await online(client({ limits: { silenceMs: 100, ackMs: 100, pongMs: 50, uploadCharsPerSecondMin: 1 << 21 } }, { at: relay.origin }));
    relay.freeze();
    const sent = one.send(large);
    assert.ok((await sent).id);
    assert.equal(one.states.filter(({ name }) => name === "online").length, 2);
  });
});

describe("with tokens, in Node", { concurrency: 1 }, () => {
  const SECRET = "a secret of more than thirty-two bytes";
  const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  function tokenFor(user, seconds, more = {}) {
    const signed = `${part({ alg: "HS256", typ: "JWT", kid: "a" })}.${part({ sub: user, exp: Math.floor(Date.now() / 1000) + seconds, ...more })}`;
    return `${signed}.${createHmac("sha256", SECRET).update(signed).digest("base64url")}`;
  }
  let keyed;
  before(async () => {
    keyed = await new Server({ TABCAST_TOKEN_KEYS: `kid=a,alg=HS256,secret=${SECRET}`, TABCAST_API_KEYS: "worker", TABCAST_TOKEN_LEEWAY: "0s", TABCAST_INBOUND_BYTES_PER_SECOND_MAX: "64KiB" }).start();
  });
  after(() => keyed.stop());

  for (const transport of ["websocket", "events"]) {
    it(`asks for a new token when one expires, over ${transport}`, async () => {
      const at = transport === "events" ? (await through(Blocked, keyed)).origin : keyed.origin;
      const reasons = [];
      const token = async (reason) => {
        reasons.push(reason);
        return tokenFor("ann", reasons.length === 1 ? 2 : 3600);
      };
      const one = await online(client({ token, query: () => ({}) }, { at }), transport);
      await until("a new token", () => reasons.length === 2);
      await online(one, transport);
      assert.deepEqual(reasons, ["start", "expired"]);
      assert.ok((await one.send({ type: "message", text: "still me" })).id);
    });

    it(`stops when the same token is refused twice, over ${transport}`, async () => {
      const at = transport === "events" ? (await through(Blocked, keyed)).origin : keyed.origin;
      let asked = 0;
      const one = client({ token: () => (asked += 1) && "not.a.token", query: () => ({}) }, { at });
      one.connect();
      await until("the end", () => one.state.name === "unauthorized");
      assert.equal(asked, 2);
    });

    it(`joins only what its token names, over ${transport}`, async () => {
      const at = transport === "events" ? (await through(Blocked, keyed)).origin : keyed.origin;
      const one = await online(client({ token: () => tokenFor("bob", 3600, { rooms: ["team-*"] }), query: () => ({}) }, { at }), transport);
      await one.join("team-a");
      await assert.rejects(one.join("lobby"), { code: "forbidden" });
      await assert.rejects(one.send({ type: "message", text: "x", room: "lobby" }), { code: "forbidden" });
      assert.ok((await one.send({ type: "message", text: "x", room: "team-a" })).id);
    });
  }

  it("says that large messages come too fast, over events, which are refused unread", async () => {
    const at = (await through(Blocked, keyed)).origin;
    const one = await online(client({ token: () => tokenFor("dora", 3600), query: () => ({}) }, { at }), "events");
    const attachments = [{ filename: "f", mimetype: "image/png", data: Buffer.alloc(1 << 20).toString("base64") }];
    assert.ok((await one.send({ type: "message", text: "after a silence", attachments })).id);
    // The first is worked off at 64 KiB a second.
    await assert.rejects(one.send({ type: "message", text: "too soon", attachments }), { code: "rate_limited" });
  });

  it("slows down when every new token is refused", async () => {
    let asked = 0;
    const one = client({ token: () => `bad.token.${(asked += 1)}`, query: () => ({}), limits: { backoffMs: 10_000, backoffMaxMs: 10_000 } }, { at: keyed.origin });
    one.connect();
    await until("it waits", () => one.state.name === "waiting");
    assert.equal(asked, 2);
    one.close();
  });

  for (const [how, fail] of [["rejects", () => Promise.reject(new Error("no network"))], ["throws", () => { throw new Error("a bug"); }], ["never answers", () => new Promise(() => {})]]) {
    it(`asks again, for the same reason, when the token ${how}`, async () => {
      const reasons = [];
      const token = (reason) => (reasons.push(reason) < 3 ? fail() : tokenFor("cid", 3600));
      const one = await online(client({ token, query: () => ({}), limits: { tokenMs: 50 } }, { at: keyed.origin }));
      assert.deepEqual(reasons, ["start", "start", "start"]);
      assert.deepEqual(one.states.map(({ name }) => name), ["connecting", "waiting", "connecting", "waiting", "connecting", "online"]);
    });
  }
});

describe("where no WebSocket gets through", { concurrency: 1 }, () => {
  for (const Kind of [Blocked, Silent]) {
    it(`goes on over an event stream: ${Kind.name}`, async () => {
      const proxy = await through(Kind);
      const one = await online(client({ limits: { handshakeMs: 500 } }, { at: proxy.origin }), "events");
      const twin = await online(client({}, { user: one.user }), "websocket");
      const sent = await Promise.all(["a", "b", "c", "d"].map((text) => one.send({ type: "message", text })));
      await until("the echoes", () => sent.every(({ id }) => [one, twin].every(({ heard }) => heard.some((frame) => frame.id === id))));
      assert.deepEqual(texts(twin, one.user), ["a", "b", "c", "d"]);
      await assert.rejects(one.send({ type: "message", text: "x".repeat(20_000) }), { code: "too_large" });
      await assert.rejects(one.send({ type: "message", text: "x".repeat(2 << 20) }), { code: "too_large" });
      assert.equal(one.state.transport, "events");
      assert.equal(proxy.refused, 1);
    });
  }

  it("joins rooms and leaves them", async () => {
    const one = client({}, { at: (await through(Blocked)).origin });
    const early = one.join("early");
    await online(one, "events");
    await early;
    await Promise.all([one.join("hall"), one.join("a room & more")]);
    for (const room of ["early", "hall", "a room & more"]) await server.api("send", { channel_id: `room:${room}`, text: `to ${room}` });
    await until("all three", () => texts(one).length >= 3);
    assert.ok((await one.send({ type: "message", text: "in the hall", room: "hall" })).id);
    await until("its own words", () => texts(one).includes("in the hall"));
    one.leave("hall");
    await one.join("after"); // both by one new stream
    await server.api("send", { channel_id: "room:hall", text: "gone" });
    await server.api("send", { channel_id: "room:after", text: "last" });
    await until("the last", () => texts(one).includes("last"));
    assert.deepEqual(texts(one), ["to early", "to hall", "to a room & more", "in the hall", "last"]);
  });

  it("misses nothing while the stream is away, and sends again what was not answered", async () => {
    const proxy = await through(Blocked);
    const one = await online(client({}, { at: proxy.origin }), "events");
    await server.api("send", { channel_id: one.user, text: "before" });
    await until("the first", () => texts(one).includes("before"));
    proxy.cut();
    await until("it waits", () => one.state.name === "waiting");
    await server.api("send", { channel_id: one.user, text: "meanwhile" });
    const sent = one.send({ type: "message", text: "mine" });
    proxy.mend();
    assert.ok((await sent).id);
    await until("what it missed", () => ["meanwhile", "mine"].every((text) => texts(one).includes(text)));
    assert.deepEqual(texts(one).filter((text) => ["before", "meanwhile", "mine"].includes(text)).sort(), ["before", "meanwhile", "mine"]);
  });

  it("does not come back when it was cut, and says why", async () => {
    const one = await online(client({}, { at: (await through(Blocked)).origin }), "events");
    await server.api(`users/${one.user}`, undefined, "DELETE");
    await until("the end", () => one.state.name === "closed");
    assert.deepEqual([one.state.code, one.state.reason], [4010, "kicked"]);
  });

  it("notices a stream that is dead", async () => {
    const proxy = await through(Blocked);
    const one = await online(client({ limits: { silenceMs: 500 } }, { at: proxy.origin }), "events");
    proxy.freeze();
    await until("it came back", () => one.states.filter(({ name }) => name === "online").length >= 2, 5000);
  });

  it("takes a WebSocket again when one gets through, and misses nothing", async () => {
    const proxy = await through(Blocked);
    const one = await online(client({ limits: { webSocketRetryMs: 100 } }, { at: proxy.origin }), "events");
    await one.join("r");
    await until("tries that are in vain", () => proxy.refused >= 3);
    assert.equal(one.states.filter(({ name }) => name === "waiting").length, 0, "the stream is not touched by them");
    let sent = 0;
    const sending = (async () => {
      while (one.state.transport !== "websocket") await server.api("send", { channel_id: one.user, text: `n ${sent++}` });
    })();
    proxy.lets.webSockets = true;
    await online(one, "websocket");
    await sending;
    await one.send({ type: "message", text: "once it has joined", room: "r" });
    await server.api("send", { channel_id: "room:r", text: "in the room" });
    await until("rooms too", () => texts(one).includes("in the room"));
    await until("all of them", () => texts(one).filter((text) => text.startsWith("n ")).length === sent);
    assert.deepEqual(texts(one).filter((text) => text.startsWith("n ")), Array.from({ length: sent }, (_, n) => `n ${n}`));
  });

  const ways = {
    "a join": (one) => void one.join("other"),
    "leaving a room": (one) => one.leave("r"),
    "a WebSocket that works": (one, proxy) => void (proxy.lets.webSockets = true),
  };
  for (const [what, act] of Object.entries(ways)) {
    it(`does not break off a POST for ${what}`, async () => {
      const { fetch } = globalThis;
      const posts = [];
      let release;
      const held = new Promise((resolve) => (release = resolve));
      globalThis.fetch = async (address, request) => {
        const response = await fetch(address, request);
        if (request?.method !== "POST" || !request.body.includes('"slow"')) return response;
        posts.push(JSON.parse(request.body).client_id);
        if (posts.length > 1) return response;
        await new Promise((resolve, reject) => {
          held.then(resolve);
          request.signal.addEventListener("abort", () => reject(request.signal.reason));
        });
        return response;
      };
      try {
        const proxy = await through(Blocked);
        const webSocketRetryMs = act === ways["a WebSocket that works"] ? 50 : 60_000;
        const one = await online(client({ limits: { webSocketRetryMs } }, { at: proxy.origin }), "events");
        await one.join("r");
        const before = one.states.length;
        const slow = one.send({ type: "message", text: "slow" });
        const next = one.send({ type: "message", text: "next" });
        await until("the POST is under way", () => posts.length === 1);
        act(one, proxy);
        await new Promise((resolve) => setTimeout(resolve, 300)); // six times the pause before a WebSocket is tried
        assert.equal(one.states.length, before);
        release();
        assert.ok((await slow).id && (await next).id);
        await until("the next connection", () => one.states.length === before + 2 && one.state.name === "online");
        assert.equal(posts.length, 1);
      } finally {
        globalThis.fetch = fetch;
      }
    });
  }

  it("can do without", async () => {
    const one = client({ events: null }, { at: (await through(Blocked)).origin });
    one.connect();
    await until("it waits", () => one.state.name === "waiting");
    one.close();
  });
});

describe("rooms that are refused, or not waited for", { concurrency: 1 }, () => {
  /** A link to a server that is played by the test: what is sent is answered by `answer(frame)`. */
  function played(answer) {
    const played = { sent: [], links: [] };
    played.link = ({ open, text, close }) => {
      const link = { drop: () => close({ code: 1006, reason: "" }), close() {} };
      link.send = (frame) => {
        played.sent.push(JSON.parse(frame));
        const answered = answer(JSON.parse(frame), played.links.length);
        if (answered) setImmediate(() => text(JSON.stringify(answered)));
      };
      played.links.push(link);
      setImmediate(open);
      return link;
    };
    return played;
  }
  const acked = ({ client_id }) => ({ type: "ack", client_id });
  const refused = (code) => ({ client_id }) => ({ type: "error", code, message: `no: ${code}`, client_id });
  const pendingAfter = (promise) => Promise.race([promise, new Promise((resolve) => setTimeout(resolve, 50, "pending"))]);

  for (const code of ["rate_limited", "overloaded"]) {
    it(`says that a room is ${code} after a reconnect, and tries again`, async () => {
      let refusals = 0;
      const server = played((frame, links) => (links === 1 || frame.type !== "join" || ++refusals > 3 ? acked : refused(code))(frame));
      const one = await online(client({ link: server.link, events: null }));
      await one.join("r");
      server.links[0].drop();
      await until("four joins", () => refusals === 4);
      assert.deepEqual(one.heard.map(({ type, code, room }) => [type, code, room]), Array(3).fill(["error", code, "r"]));
      await one.send({ type: "message", text: "x", room: "r" });
      assert.equal(one.states.filter(({ name }) => name === "online").length, 2);
    });
  }

  for (const code of ["forbidden", "limit_reached"]) {
    it(`says that a room is ${code} after a reconnect, and leaves it`, async () => {
      const server = played((frame, links) => (links === 1 || frame.type !== "join" ? acked : refused(code))(frame));
      const one = await online(client({ link: server.link, events: null }));
      await one.join("r");
      server.links[0].drop();
      await until("the error", () => one.heard.length === 1);
      assert.deepEqual(one.heard.map(({ type, code, room }) => [type, code, room]), [["error", code, "r"]]);
      await one.send({ type: "message", text: "x", room: "r" }); // does not wait for the room
      server.links[1].drop();
      await until("online again", () => one.states.filter(({ name }) => name === "online").length === 3);
      await one.send({ type: "message", text: "y" });
      assert.equal(server.sent.filter(({ type }) => type === "join").length, 2);
    });
  }

  it("keeps what a server that drains refuses for the next connection", async () => {
    const server = played((frame, links) => (links === 1 && frame.type === "join" ? refused("draining") : acked)(frame));
    const one = await online(client({ link: server.link, events: null }));
    const joined = one.join("r");
    assert.equal(await pendingAfter(joined), "pending");
    server.links[0].drop();
    await joined;
    assert.deepEqual(one.heard, []);
  });

  it("joins once, however often it is asked", async () => {
    const server = played(acked);
    const one = await online(client({ link: server.link }));
    await Promise.all([one.join("r"), one.join("r")]);
    await one.join("r");
    assert.equal(server.sent.filter(({ type }) => type === "join").length, 1);
  });

  it("says to who waits for a room that it was left, or that the connection is over", async () => {
    const server = played(() => null);
    const one = await online(client({ link: server.link }));
    const left = assert.rejects(one.join("a"), { code: "closed" });
    one.leave("a");
    await left;
    const closed = assert.rejects(one.join("b"), { code: "closed" });
    one.close();
    await closed;
    await assert.rejects(one.join("c"), { code: "closed" });
  });

  it("goes on joining over a restart, and joins what it had joined after a close", async () => {
    const server = played((frame, links) => (links === 1 ? null : acked(frame)));
    const one = await online(client({ link: server.link }));
    const joined = one.join("a");
    one.restart();
    await joined;
    one.close();
    one.connect();
    await until("a third join", () => server.sent.filter(({ type }) => type === "join").length === 3);
  });
});

describe("what a page tells", () => {
  const page = new EventTarget();
  const types = ["online", "offline", "pageshow"];
  const listeners = () => types.map((type) => getEventListeners(page, type).length);
  before(() => (globalThis.addEventListener = page.addEventListener.bind(page)));
  after(() => delete globalThis.addEventListener);

  it("is heard from the first connect() until close(), and again after the next", async () => {
    const one = client();
    assert.deepEqual(listeners(), [0, 0, 0]);
    await online(one);
    one.restart();
    await online(one);
    assert.deepEqual(listeners(), [1, 1, 1]);
    one.close();
    assert.deepEqual(listeners(), [0, 0, 0]);
    one.connect();
    await online(one);
    assert.deepEqual(listeners(), [1, 1, 1]);
    await server.api(`users/${one.user}`, undefined, "DELETE");
    await until("the end", () => one.state.name === "closed");
    assert.deepEqual(listeners(), [0, 0, 0]);
  });

  it("ends a wait", async () => {
    const relay = await through(Relay);
    const one = await online(client({ limits: { backoffMs: 60_000, backoffMaxMs: 60_000 } }, { at: relay.origin }));
    relay.cut();
    await until("it waits", () => one.state.name === "waiting");
    relay.mend();
    page.dispatchEvent(new Event("online"));
    await online(one);
    one.close();
  });
});

describe("a listener that ends the connection", { concurrency: 1 }, () => {
  for (const transport of ["websocket", "events"]) {
    for (const name of ["connecting", "online"]) {
      it(`as soon as it is ${name}, over ${transport}, ends all of it`, async () => {
        const at = transport === "events" ? (await through(Blocked)).origin : server.origin;
        let asked = 0;
        const one = client({ token: () => (asked += 1) && null, limits: { webSocketRetryMs: 50 } }, { at });
        one.join("r").catch(() => {});
        one.addEventListener("state", ({ detail }) => detail.name === name && (detail.transport ?? transport) === transport && one.close());
        one.connect();
        await until("the end", () => one.state.name === "closed");
        await new Promise((resolve) => setTimeout(resolve, 300)); // six times the pause before a WebSocket is tried
        assert.equal(one.states.at(-1).name, "closed");
        assert.equal(asked, name === "online" ? 1 : 0);
      });

      it(`as soon as it is ${name}, over ${transport}, may start another`, async () => {
        const at = transport === "events" ? (await through(Blocked)).origin : server.origin;
        const one = client({}, { at });
        const joined = one.join("r");
        const again = ({ detail }) => {
          if (detail.name !== name) return;
          one.removeEventListener("state", again);
          one.restart();
        };
        one.addEventListener("state", again);
        await online(one, transport);
        await joined;
        assert.ok((await one.send({ type: "message", text: "here", room: "r" })).id);
        assert.equal(one.states.filter((state) => state.name === "online").length, name === "online" ? 2 : 1);
      });
    }
  }
});

describe("the file", () => {
  it("is one small module without dependencies", () => {
    const source = readFileSync(MODULE, "utf8");
    assert.doesNotMatch(source, /^\s*import\b|\bimport\(/m);
    assert.ok(source.length < 28_000 && gzipSync(source, { level: 9 }).length < 9_000, `${source.length} bytes, ${gzipSync(source).length} compressed`);
  });

  it("is served as it is here, with its types", async () => {
    for (const [name, type] of [["tabcast.js", "text/javascript"], ["tabcast.d.ts", "application/typescript"]]) {
      const response = await fetch(`${server.origin}/${name}`);
      assert.equal(response.headers.get("content-type"), `${type}; charset=utf-8`);
      assert.equal(await response.text(), readFileSync(new URL(name, MODULE), "utf8"));
      const etag = response.headers.get("etag");
      const again = await fetch(`${server.origin}/${name}`, { headers: { "if-none-match": etag } });
      assert.equal(again.status, 304);
    }
  });
});
