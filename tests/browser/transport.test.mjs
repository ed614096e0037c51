// The connection's rules, against a scripted server: the page is real, its WebSocket ends in this file.

import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { Browser, Server, openTab, say, state, texts, until, wordsIn } from "./harness.mjs";

let server;
let browser;

before(async () => {
  server = await new Server().start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

/** A tab whose every connection goes to `script(socket, number)`; `sockets` are those made so far. */
async function scripted(script, address = "/?user=me") {
  const person = await browser.person();
  const sockets = [];
  const before = (tab) =>
    tab.routeWebSocket(/\/ws\?/, (socket) => {
      const send = (frame) => socket.send(JSON.stringify(frame));
      const entry = { at: Date.now(), frames: [], url: socket.url(), send, end: (code, reason) => socket.close({ code, reason }) };
      socket.onMessage((text) => {
        const frame = JSON.parse(text);
        entry.frames.push(frame);
        entry.onFrame?.(frame);
      });
      sockets.push(entry);
      script(entry, sockets.length);
    });
  const tab = await openTab(person, `${server.origin}${address}`, { before });
  return { person, tab, sockets };
}

const message = (id, text, sender = "me") => ({ type: "message", id, text, sender, timestamp: Date.now() / 1000 });
const ID = "6c84fb90-12c4-41e1-840d-7b25c5ee7750";

describe("the connection", { concurrency: 1 }, () => {
  it("asks for a hello, as the user that the address names", async () => {
    const { person, sockets } = await scripted(() => {});
    const { searchParams } = new URL(sockets[0].url);
    assert.deepEqual(Object.fromEntries(searchParams), { user: "me", name: "me", hello: "1" });
    await person.close();
  });

  it("comes back after a refusal later than it was told, by a pause of its own", async () => {
    const full = await new Server({ TABCAST_TABS_PER_USER_MAX: "1" }).start();
    const person = await browser.person();
    await openTab(person, `${full.origin}/?user=me`);
    const before = async (tab) => {
      await tab.addInitScript(() => (Math.random = () => 0.999));
      // Why a handshake was refused is asked without the upgrade.
      await tab.route(/\/ws\?/, (route) => route.fulfill({ status: 503, headers: { "retry-after": "5" } }));
    };
    const tab = await openTab(person, `${full.origin}/?user=me`, { wait: "waiting", before });
    // Retry-After is the same for everybody.
    assert.equal((await wordsIn(tab, "waiting"))[0], "Reconnecting in 6 s");
    await person.close();
    await full.stop();
  });

  for (const code of [1000, 1002, 1003, 1007, 1008, 1009, 4010]) {
    it(`does not come back after ${code}`, async () => {
      const { person, tab, sockets } = await scripted((socket) => (socket.onFrame = () => socket.end(code, "enough")));
      await say(tab, "x");
      await state(tab, "closed");
      await tab.locator(".item.failed .retry").waitFor();
      assert.ok(await tab.locator("#connect").isVisible());
      assert.equal(sockets.length, 1);
      await person.close();
    });
  }

  for (const code of [1001, 1011, 1012, 1013, 4001, 4008, 4009]) {
    it(`comes back after ${code}, and sends again what was not acked, under the same id`, async () => {
      const { person, tab, sockets } = await scripted((socket, number) => {
        socket.onFrame = (frame) => {
          if (frame.type !== "message") return;
          if (number === 1) socket.end(code, "later");
          else socket.send({ type: "ack", client_id: frame.client_id, id: ID });
        };
      });
      await say(tab, "keep me");
      await tab.locator(`.item.own[data-id="${ID}"]`).waitFor();
      const [first, second] = sockets.map((socket) => socket.frames.find(({ type }) => type === "message"));
      assert.ok(first.client_id);
      assert.deepEqual(second, first);
      assert.deepEqual(await texts(tab), ["keep me"]);
      await person.close();
    });
  }

  it("comes back when the server said, not sooner", async () => {
    const { person, tab, sockets } = await scripted((socket, number) => {
      if (number > 1) return;
      socket.onFrame = () => {
        socket.send({ type: "draining", retry_after_ms: 1500 });
        socket.end(1012, "service restart");
        socket.ended = Date.now();
      };
    });
    await say(tab, "x");
    await until("the second connection", () => sockets.length === 2);
    assert.notDeepEqual(await wordsIn(tab, "waiting"), []);
    const waited = sockets[1].at - sockets[0].ended;
    assert.ok(waited >= 1400, `${waited} ms`);
    await person.close();
  });

  it("keeps what a draining server refused for the next connection", async () => {
    const { person, tab, sockets } = await scripted((socket, number) => {
      socket.onFrame = (frame) => {
        if (frame.type !== "message") return;
        if (number > 1) return socket.send({ type: "ack", client_id: frame.client_id, id: ID });
        socket.send({ type: "error", code: "draining", message: "shutting down", client_id: frame.client_id });
        socket.send({ type: "draining", retry_after_ms: 50 });
        socket.end(1012, "service restart");
      };
    });
    await say(tab, "later then");
    await tab.locator(`.item.own[data-id="${ID}"]`).waitFor();
    assert.equal(sockets.length, 2);
    assert.deepEqual(await texts(tab), ["later then"]);
    await person.close();
  });

  for (const order of ["the ack before the echo", "the echo before the ack", "the echo alone, then the ack of the repeat"]) {
    it(`shows an own message once: ${order}`, async () => {
      const { person, tab } = await scripted((socket, number) => {
        socket.onFrame = (frame) => {
          if (frame.type !== "message") return;
          const ack = { type: "ack", client_id: frame.client_id, id: ID };
          const echo = message(ID, frame.text);
          if (order.startsWith("the ack")) for (const next of [ack, echo]) socket.send(next);
          else if (order.endsWith("before the ack")) for (const next of [echo, ack]) socket.send(next);
          else if (number === 1) {
            socket.send(echo);
            socket.end(1012, "service restart");
          } else socket.send(ack);
        };
      });
      await say(tab, "once");
      await tab.locator(`.item.own[data-id="${ID}"]:not(.pending)`).waitFor();
      await until("nothing is pending", async () => (await tab.locator(".pending").count()) === 0);
      assert.deepEqual(await texts(tab), ["once"]);
      await person.close();
    });
  }

  it("shows the same text from another tab beside its own", async () => {
    const other = "6c84fb90-12c4-41e1-840d-7b25c5ee7751";
    const { person, tab } = await scripted((socket) => {
      socket.onFrame = (frame) => {
        if (frame.type !== "message") return;
        socket.send(message(other, frame.text));
        socket.send({ type: "ack", client_id: frame.client_id, id: ID });
        socket.send(message(ID, frame.text));
      };
    });
    await say(tab, "twins");
    await until("both", async () => (await texts(tab, "own")).length === 2);
    assert.equal(await tab.locator(`[data-id="${ID}"]`).count(), 1);
    assert.equal(await tab.locator(`[data-id="${other}"]`).count(), 1);
    await person.close();
  });

  it("shows a refusal at the message, and tries again under the same id when asked", async () => {
    let tries = 0;
    const { person, tab, sockets } = await scripted((socket) => {
      socket.onFrame = ({ type, client_id: clientId }) => {
        if (type !== "message") return;
        tries += 1;
        socket.send(tries === 1 ? { type: "error", code: "overloaded", message: "try again later", client_id: clientId } : { type: "ack", client_id: clientId, id: ID });
      };
    });
    await say(tab, "please");
    assert.match(await tab.locator(".item.failed .problem").textContent(), /try again later/);
    await tab.locator(".retry").click();
    await tab.locator(`.item.own[data-id="${ID}"]:not(.failed)`).waitFor();
    const ids = sockets[0].frames.filter(({ type }) => type === "message").map(({ client_id: id }) => id);
    assert.equal(ids.length, 2);
    assert.equal(ids[0], ids[1]);
    await person.close();
  });

  it("joins its room again after each reconnect, and sends there only once joined", async () => {
    const { person, tab, sockets } = await scripted((socket, number) => {
      socket.onFrame = (frame) => {
        if (frame.type === "join") {
          socket.join = frame;
          if (number === 1) return socket.end(1012, "service restart");
          return setTimeout(() => socket.send({ type: "ack", client_id: frame.client_id }), 200);
        }
        if (frame.type === "message") socket.send({ type: "ack", client_id: frame.client_id, id: ID });
      };
    }, "/?user=me&room=den");
    await say(tab, "to the den");
    await tab.locator(`.item.own[data-id="${ID}"]`).waitFor();
    await until("joined again", async () => (await tab.locator("#room.joined").count()) === 1);
    assert.deepEqual(sockets.map(({ join }) => join?.room), ["den", "den"]);
    const kinds = sockets[1].frames.map(({ type }) => type).filter((type) => type === "join" || type === "message");
    assert.deepEqual(kinds, ["join", "message"]);
    assert.equal(sockets[1].frames.find(({ type }) => type === "message").room, "den");
    await person.close();
  });

  it("ignores frames that it does not know, and broken ones", async () => {
    const { person, tab } = await scripted((socket) => {
      for (const odd of [{ type: "delta", id: ID, text: "x" }, { type: "state" }, { type: 7 }, null, [], "text", { type: "gap", reason: "unknown_position" }]) socket.send(odd);
      socket.send(message(ID, "still here", "star"));
    });
    await until("the message after them", async () => (await texts(tab)).includes("still here"));
    assert.deepEqual(tab.problems, []);
    await person.close();
  });

  it("shows the text of an edit whose message it never saw, and a late edit in place", async () => {
    const { person, tab } = await scripted((socket) => {
      socket.send({ type: "edit", id: ID, text: "half", timestamp: 1 });
      socket.send({ type: "edit", id: ID, text: "half and whole", timestamp: 2 });
      socket.send({ type: "edit", id: ID, text: "other", timestamp: 3 });
    });
    await until("the last text", async () => (await texts(tab, "bot")).join() === "other");
    await person.close();
  });
});
