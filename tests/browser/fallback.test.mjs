// The page where no WebSocket gets through, and where there is no network.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, describe, it } from "node:test";
import { Blocked } from "./blocked.mjs";
import { Browser, Server, assertClean, openTab, say, state, texts, until, wordsIn } from "./harness.mjs";

let server;
let browser;
let proxy;

before(async () => {
  server = await new Server().start();
  proxy = await new Blocked(server).start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  proxy?.stop();
  await server?.stop();
});

const statusText = (tab) => tab.locator("#status-text").textContent();

describe("the page behind a proxy that lets no WebSocket through", { concurrency: 1 }, () => {
  it("says so, and goes on working: messages, answers, buttons, files, rooms", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${proxy.origin}/?user=ann&room=den`);
    const twin = await openTab(person, `${server.origin}/?user=bob&room=den`);
    assert.equal(await statusText(tab), "Online, without WebSocket");
    assert.equal(await statusText(twin), "Online");
    await until("both are in the room", async () => (await tab.locator("#room.joined").count()) && (await twin.locator("#room.joined").count()));
    await say(tab, "from behind the proxy");
    await say(twin, "from before it");
    for (const one of [tab, twin]) await until("both texts", async () => (await texts(one)).filter((text) => text.startsWith("from ")).length === 2);
    await until("nothing is pending", async () => (await tab.locator(".pending").count()) === 0);

    const alone = await openTab(person, `${proxy.origin}/?user=cid`);
    await say(alone, "/buttons");
    await alone.locator(".choice").first().click();
    await until("the press counts", async () => (await alone.locator(".choice.chosen").count()) === 1);
    await say(alone, "/file");
    await alone.locator(".picture").waitFor();
    // A handshake that fails is told by the browser itself, each time.
    for (const one of [tab, alone]) one.problems = one.problems.filter((problem) => !/WebSocket connection to .* failed/.test(problem));
    await assertClean(tab, twin, alone);
    await person.close();
  });

  it("comes back over the stream after a restart, and over a WebSocket once one gets through", async () => {
    const person = await browser.person();
    await person.route("**/tabcast.js", async (route) => {
      const response = await route.fetch();
      const source = await response.text();
      const hasty = source.replace("webSocketRetryMs: 120_000", "webSocketRetryMs: 200"); // else the test lasts two minutes
      assert.notEqual(hasty, source);
      await route.fulfill({ response, body: hasty });
    });
    const tab = await openTab(person, `${proxy.origin}/?user=dan`);
    await server.stop();
    await until("it is away", async () => (await tab.locator("#status").getAttribute("data-state")) !== "online");
    await say(tab, "meanwhile");
    await server.start();
    await state(tab, "online");
    await until("it was sent", async () => (await tab.locator(".item.own[data-id]").count()) === 1);
    assert.equal(await statusText(tab), "Online, without WebSocket");
    const sockets = [];
    tab.on("websocket", (socket) => sockets.push(socket));
    const refused = proxy.refused;
    await until("tries that are in vain", () => proxy.refused >= refused + 2);
    assert.equal(await statusText(tab), "Online, without WebSocket");
    proxy.lets.webSockets = true;
    await until("a WebSocket", async () => (await statusText(tab)) === "Online");
    await say(tab, "by WebSocket");
    await until("that was sent, too", async () => (await tab.locator(".item.own[data-id]").count()) === 2); // the page was not loaded anew
    assert.ok(!sockets.at(-1).isClosed());
    proxy.lets.webSockets = false;
    await person.close();
  });
});

describe("the README's own page", () => {
  it("shows what is sent and answered, in ten lines", async () => {
    const readme = readFileSync(new URL("../../README.md", import.meta.url), "utf8");
    const [, html] = readme.match(/```html\n([^]*?)```/);
    const person = await browser.browser.newContext(); // without what records the chat page
    const tab = await person.newPage();
    const problems = [];
    tab.on("pageerror", (error) => problems.push(String(error)));
    await tab.route(/chat\.html$/, (route) => route.fulfill({ contentType: "text/html; charset=utf-8", body: html }));
    await tab.goto(`${server.origin}/chat.html`);
    await until("it is online", async () => (await tab.title()) === "online");
    await tab.locator("input").fill("by ten lines");
    await tab.locator("input").press("Enter");
    await tab.locator("li", { hasText: "ann: by ten lines" }).waitFor();
    await tab.locator("li", { hasText: "star: " }).first().waitFor();
    assert.deepEqual(problems, []);
    await person.close();
  });
});

describe("the page without a network", { concurrency: 1 }, () => {
  it("says that it is offline, tries nothing until there is one, and then comes back at once", async () => {
    const person = await browser.person();
    proxy.lets.webSockets = true;
    const tab = await openTab(person, `${proxy.origin}/?user=eve`);
    const asked = [];
    tab.on("request", (request) => asked.push(request.url()));
    tab.on("websocket", (socket) => asked.push(socket.url()));
    await person.setOffline(true);
    proxy.cut();
    await state(tab, "offline");
    assert.equal(await statusText(tab), "Offline");
    await say(tab, "written offline");
    await new Promise((resolve) => setTimeout(resolve, 2000)); // four times the first pause
    assert.deepEqual(asked, []);
    assert.deepEqual(await wordsIn(tab, "waiting"), []);
    proxy.mend();
    await person.setOffline(false);
    await state(tab, "online");
    await until("it was sent", async () => (await tab.locator(".item.own[data-id]").count()) === 1);
    await person.close();
  });
});
