// Coming back: EventSource of Chromium and of npm on /events, and the page on its WebSocket.

import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { EventSource } from "eventsource";
import { Browser, Server, assertClean, openTab, say, state, texts, until } from "./harness.mjs";
import { Relay } from "./relay.mjs";

const NOTICE = "Some messages may be missing here.";
let server;
let relay;
let browser;
let users = 0;

before(async () => {
  server = await new Server().start();
  relay = await new Relay(server).start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  relay?.stop();
  await server?.stop();
});

const freshUser = () => `events-${process.pid}-${++users}`;
const send = async (user, text) => (await server.api("send", { channel_id: user, text })).id;
const edit = (user, id, text) => server.api("edit", { channel_id: user, message_id: id, text });
const tabsOf = async (user) => (await server.api(`users/${user}`, undefined, "GET")).tabs;
const shown = (frames) => frames.map(({ type, text, reason }) => [type, text ?? reason].join(" "));

/** The two readers that come back by themselves, under one face: `frames()` are those so far, `ids()` their positions. */
const READERS = {
  "npm's EventSource": async (address) => {
    const frames = [];
    const ids = [];
    const source = new EventSource(address);
    source.onmessage = ({ data, lastEventId }) => {
      frames.push(JSON.parse(data));
      ids.push(lastEventId);
    };
    return { frames: async () => frames, ids: async () => ids, isOpen: async () => source.readyState === EventSource.OPEN, close: () => source.close() };
  },
  "Chromium's EventSource": async (address) => {
    const person = await browser.person();
    const tab = await person.newPage();
    await tab.goto(`${relay.origin}/favicon.svg`); // a page of that origin without a script of ours
    await tab.evaluate((url) => {
      window.frames_ = [];
      window.ids = [];
      window.source = new EventSource(url);
      window.source.onmessage = ({ data, lastEventId }) => {
        window.frames_.push(JSON.parse(data));
        window.ids.push(lastEventId);
      };
    }, address);
    return {
      frames: () => tab.evaluate(() => window.frames_),
      ids: () => tab.evaluate(() => window.ids),
      isOpen: () => tab.evaluate(() => window.source.readyState === EventSource.OPEN),
      close: () => person.close(),
    };
  },
};

for (const [name, open] of Object.entries(READERS)) {
  describe(name, { concurrency: 1 }, () => {
    async function reader() {
      const user = freshUser();
      const source = await open(`${relay.origin}/events?user=${user}`);
      await until("it is connected", async () => (await source.isOpen()) && (await tabsOf(user)) === 1);
      return { user, source };
    }

    const has = (source, text) => until(`it has ${text}`, async () => (await source.frames()).some((frame) => frame.text === text), 30_000);

    it("gets what it missed while its connection was cut, once and in order", async () => {
      const { user, source } = await reader();
      const first = await send(user, "one");
      await has(source, "one");
      assert.deepEqual(await source.ids(), [first]);
      relay.cut();
      await until("the server knows", async () => (await tabsOf(user)) === 0);
      const two = await send(user, "two");
      await send(user, "three");
      await edit(user, first, "one, edited");
      await edit(user, two, "two, ed");
      await edit(user, two, "two, edited");
      const four = await send(user, "four");
      relay.mend();
      await has(source, "four");
      await send(user, "live");
      await has(source, "live");
      assert.deepEqual(shown(await source.frames()), ["message one", "message two", "message three", "edit one, edited", "edit two, edited", "message four", "message live"]);
      assert.equal((await source.ids()).at(-2), four);
      await source.close();
    });

    it("is cut again and again, and misses nothing", async () => {
      const { user, source } = await reader();
      await send(user, "start");
      await has(source, "start"); // before its first event a reader has no position
      const expected = ["message start"];
      for (let round = 0; round < 3; round += 1) {
        for (let number = 0; number < 5; number += 1) {
          expected.push(`message ${round}.${number}`);
          await send(user, `${round}.${number}`);
          if (number === round) relay.cut();
        }
        relay.mend();
        await has(source, `${round}.4`);
      }
      assert.deepEqual(shown(await source.frames()), expected);
      await source.close();
    });

    it("is told of a gap after the server was killed, then goes on", async () => {
      const { user, source } = await reader();
      await send(user, "one");
      await has(source, "one");
      await server.stop("SIGKILL");
      await server.start();
      await until("it is back", async () => (await tabsOf(user)) === 1, 30_000);
      await send(user, "live");
      await has(source, "live");
      assert.deepEqual(shown(await source.frames()), ["message one", "gap unknown_position", "message live"]);
      await source.close();
    });

    it("comes back after a drain, when it was told to", async () => {
      const { user, source } = await reader();
      await send(user, "one");
      await has(source, "one");
      const [code] = await server.stop("SIGTERM");
      assert.equal(code, 0, server.log);
      await server.start();
      await until("it is back", async () => (await tabsOf(user)) === 1, 30_000);
      const kinds = (await source.frames()).map(({ type }) => type);
      assert.deepEqual(kinds.slice(0, 2), ["message", "draining"]);
      await source.close();
    });
  });
}

describe("the page", { concurrency: 1 }, () => {
  const notices = (tab) => tab.getByText(NOTICE).count();

  /** One tab whose connection can be cut, one whose cannot. */
  async function twoTabs(origins) {
    const user = freshUser();
    const person = await browser.person();
    const tabs = [];
    for (const origin of origins) tabs.push(await openTab(person, `${origin}/?user=${user}`));
    return { user, person, tabs };
  }

  it("shows what it missed once and in order, and no notice", async () => {
    const { user, person, tabs } = await twoTabs([relay.origin, server.origin]);
    const [cut, other] = tabs;
    const first = await send(user, "one");
    for (const tab of tabs) await until("the first", async () => (await texts(tab)).length === 1);
    relay.cut();
    await state(cut, "waiting");
    await send(user, "two");
    await edit(user, first, "one, edited");
    await send(user, "three");
    const four = await send(user, "four");
    await edit(user, four, "four, edited");
    const expected = ["one, edited", "two", "three", "four, edited"];
    await until("the other has them", async () => (await texts(other)).join() === expected.join());
    relay.mend();
    await state(cut, "online", 60_000);
    await until("it has them too", async () => (await texts(cut)).join() === expected.join());
    await send(user, "live");
    for (const tab of tabs) {
      await until("and what comes then", async () => (await texts(tab)).at(-1) === "live");
      assert.deepEqual(await texts(tab), [...expected, "live"]);
      assert.equal(await notices(tab), 0);
      assert.equal((await tab.evaluate(() => window.seen)).added, 5, "nothing was drawn twice");
    }
    await assertClean(other);
    await person.close();
  });

  it("sees the end of an answer that went on without it", async () => {
    const { person, tabs } = await twoTabs([relay.origin, server.origin]);
    const [cut, other] = tabs;
    await say(cut, "a long question ".repeat(12).trim());
    await until("the answer has begun", async () => (await texts(cut, "bot")).length === 1);
    relay.cut();
    await state(cut, "waiting");
    await until("the other has all of it", async () => (await texts(other, "bot"))[0]?.endsWith("question"));
    await until("the dots are gone", () => other.$eval("#typing", (dots) => !dots.classList.contains("on")));
    relay.mend();
    await state(cut, "online", 60_000);
    await until("so has this one", async () => (await texts(cut)).join() === (await texts(other)).join());
    assert.equal(await notices(cut), 0);
    await person.close();
  });

  it("says that something may be missing when the server forgot", async () => {
    const { user, person, tabs } = await twoTabs([server.origin]);
    await send(user, "one");
    await until("the first", async () => (await texts(tabs[0])).length === 1);
    await server.stop("SIGKILL");
    await server.start();
    await state(tabs[0], "online", 60_000);
    await tabs[0].getByText(NOTICE).waitFor();
    assert.equal(await notices(tabs[0]), 1);
    await person.close();
  });

  it("says so after every loss without recovery", async () => {
    const forgetful = await new Server({ TABCAST_RECOVERY: "off" }).start();
    const line = await new Relay(forgetful).start();
    const user = freshUser();
    const person = await browser.person();
    const tab = await openTab(person, `${line.origin}/?user=${user}`);
    const post = (text) => forgetful.api("send", { channel_id: user, text });
    await post("one");
    await until("the first", async () => (await texts(tab)).length === 1);
    line.cut();
    await state(tab, "waiting");
    await post("two");
    line.mend();
    await state(tab, "online", 60_000);
    await tab.getByText(NOTICE).waitFor();
    await post("three");
    await until("the next", async () => (await texts(tab)).at(-1) === "three");
    assert.deepEqual(await texts(tab), ["one", "three"]);
    await person.close();
    line.stop();
    await forgetful.stop();
  });
});
