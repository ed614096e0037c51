// The status page: what a person sees of a node, in Chromium, on a desk and on a phone.

import assert from "node:assert/strict";
import { once } from "node:events";
import net from "node:net";
import { after, before, describe, it } from "node:test";
import { Browser, Server, assertClean, openTab, state, until, wordsIn } from "./harness.mjs";

const KEY = "operator-key-for-tests";
const QUEUES = { TABCAST_SESSION_QUEUE_BYTES_MAX: "65536", TABCAST_RECOVERY_BYTES_MAX: "32768", TABCAST_SHARDS: "2" };
let server;
let browser;

before(async () => {
  server = await new Server(QUEUES).start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

const status = (context, options) => openTab(context, `${server.origin}/status`, options);
const shown = (tab, selector) => tab.locator(selector).textContent();
const big = async (tab, id) => Number((await shown(tab, `#${id} .big b`)).replaceAll(",", ""));
const say = (user, text, to = server) => to.api("send", { channel_id: user, text });
const endings = (tab, user) => tab.locator("#ended li", { has: tab.locator(".whose", { hasText: user }) });

/** A tab that is connected and reads nothing but its head. */
async function deafTab(user, to = server) {
  const { hostname, port } = new URL(to.origin);
  const socket = net.connect({ host: hostname, port: Number(port) });
  socket.on("error", () => {});
  await once(socket, "connect");
  const head = [`GET /ws?user=${encodeURIComponent(user)} HTTP/1.1`, `Host: ${hostname}:${port}`, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", ""];
  socket.write(head.join("\r\n"));
  const [answer] = await once(socket, "data");
  assert.match(String(answer), /^HTTP\/1\.1 101 /);
  socket.pause();
  return socket;
}

/** Says so much to a tab that does not read that it is cut. */
async function cut(user) {
  const socket = await deafTab(user);
  const text = "x".repeat(15_000);
  await until(`${user} is cut`, async () => {
    for (let n = 0; n < 50; n++) await say(user, text);
    return (await server.api(`users/${encodeURIComponent(user)}`, undefined, "GET")).tabs === 0;
  });
  socket.destroy();
}

/** Whether nothing of the page is wider than the screen. */
const fits = (tab) => tab.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth);

describe("the status page", { concurrency: 1 }, () => {
  it("is served with a policy that lets nothing inline run, and has nothing of the node in it", async () => {
    const answer = await fetch(`${server.origin}/status`);
    assert.match(answer.headers.get("content-security-policy"), /default-src 'none'.*trusted-types 'none'/);
    const html = await answer.text();
    assert.doesNotMatch(html, /\son\w+=|<script>|<style|style=/);
    assert.doesNotMatch(html, new RegExp(String(new URL(server.origin).port)));
  });

  it("shows a node's values as they change", async () => {
    const person = await browser.person();
    const tab = await status(person);
    assert.equal(await shown(tab, "#health-word"), "Ready");
    assert.match(await shown(tab, "#health-more"), /development mode/);
    assert.equal(await tab.locator("#shards li").count(), 2);
    assert.equal(await shown(tab, "#redis-word"), "Not used");
    assert.equal(await shown(tab, "#refusals dt"), "Everybody was let in");
    const before = await big(tab, "sessions");
    const tabs = [await deafTab("ann"), await deafTab("ann"), await deafTab("bob")];
    await until("three more are connected", async () => (await big(tab, "sessions")) === before + 3);
    await until("ann has two tabs", async () => /ann2/.test((await tab.locator("#users tr").allTextContents()).join(" ")));
    const timer = setInterval(() => say("ann", "hello").catch(() => {}), 20);
    await until("messages are delivered", async () => (await big(tab, "deliveries")) > 10);
    clearInterval(timer);
    const drawn = () => tab.locator("#deliveries .line").getAttribute("d");
    const line = await drawn();
    await until("the line goes on", async () => (await drawn()).length > line.length);
    assert.match(await tab.locator("#deliveries svg").getAttribute("aria-label"), /in the last five minutes: from .* to /);
    tabs.forEach((socket) => socket.destroy());
    await until("they are gone", async () => (await big(tab, "sessions")) === before);
    await endings(tab, "bob").first().waitFor();
    assert.match(await endings(tab, "bob").first().textContent(), /Connection lost/);
    await assertClean(tab);
    await person.close();
  });

  it("says who was cut, and why, with the numbers", async () => {
    const person = await browser.person();
    const tab = await status(person);
    await cut("slow-sue");
    await endings(tab, "slow-sue").waitFor();
    const text = await endings(tab, "slow-sue").textContent();
    assert.match(text, /Cut: too slow/);
    assert.match(text, /[Ii]ts queue held [\d,]+ frames, [\d,]+ bytes, and the next frame had no room; the limit is 65,536 bytes\./);
    assert.match(text, /code 4008 · comes back by itself · WebSocket/);
    assert.match(await shown(tab, "#live"), /slow-sue: Cut: too slow|Connected/);
    // Who comes later sees it too, and finds it by the user.
    const later = await status(person);
    await endings(later, "slow-sue").waitFor();
    await later.locator("#filter").fill("SLOW-S");
    assert.equal(await later.locator("#ended li:visible").count(), 1);
    assert.match(await shown(later, "#found"), /1 disconnect of a user/);
    await later.locator("#filter").fill("nobody-of-that-name");
    assert.equal(await later.locator("#ended li:visible").count(), 0);
    assert.match(await shown(later, "#found"), /Nothing is known of “nobody-of-that-name”/);
    await later.locator("#filter").fill("");
    assert.ok((await later.locator("#ended li:visible").count()) >= 1);
    await assertClean(tab, later);
    await person.close();
  });

  it("is text in every place, whatever a user is called", async () => {
    const hostile = ["<img src=x onerror=alert(1)>", "</bdi><script>window.hit=1</script>", "\u202egnp.exe", `"'\`&lt;b&gt;`, "x".repeat(256), "日本 \u2028 users"];
    const person = await browser.person({ viewport: { width: 360, height: 740 } });
    const tab = await status(person);
    const sockets = [];
    for (const user of hostile) sockets.push(await deafTab(user));
    await until("all are among the top users", async () => {
      const names = await tab.locator("#users bdi").allTextContents();
      return hostile.every((user) => names.includes(user));
    });
    assert.ok(await fits(tab), "no name makes the page wider");
    sockets.forEach((socket) => socket.destroy());
    await until("all are among the disconnects", async () => {
      const names = await tab.locator("#ended .whose").allTextContents();
      return hostile.every((user) => names.includes(user));
    });
    assert.ok(await fits(tab), "no name makes the page wider");
    assert.equal(await tab.evaluate(() => window.hit), undefined);
    assert.equal(await tab.locator("#board img, #board script").count(), 0);
    await tab.locator("#filter").fill(hostile[0]);
    assert.equal(await tab.locator("#ended li:visible").count(), 1);
    await assertClean(tab);
    await person.close();
  });

  it("leads from a user to that user's disconnects by the keyboard alone", async () => {
    const person = await browser.person();
    const tab = await status(person);
    (await deafTab("kim")).destroy();
    await endings(tab, "kim").waitFor();
    const socket = await deafTab("kim");
    const name = tab.locator(".user", { hasText: "kim" });
    await name.focus();
    await tab.keyboard.press("Enter");
    assert.equal(await tab.locator("#filter").inputValue(), "kim");
    assert.equal(await tab.evaluate(() => document.activeElement.id), "filter");
    assert.deepEqual(new Set(await tab.locator("#ended li:visible .whose").allTextContents()), new Set(["kim"]));
    socket.destroy();
    await person.close();
  });

  it("says in words and signs what is not well, and takes frames with more and with less in them", async () => {
    const person = await browser.person({ viewport: { width: 360, height: 740 } });
    let frame = { type: "status", node: "far away", version: "9", timestamp: 1764115200, uptime_seconds: 7200, of_a_later_version: { x: [1] } };
    const before = (tab) => tab.route("**/events?watch=status", (route) => route.fulfill({ contentType: "text/event-stream", body: `: a comment\n\nretry: 900\n\ndata: ${JSON.stringify(frame)}\n\n` }));
    const tab = await status(person, { wait: null, before });
    await until("a frame with hardly anything", async () => (await shown(tab, "#node")) === "far away");
    assert.equal(await shown(tab, "#health-word"), "Not ready");
    assert.match(await shown(tab, "#health-more"), /^up 2 h/);
    assert.equal(await shown(tab, "#latency .big b"), "–");
    frame = {
      ...frame,
      health: { ready: false, draining: false, reason: "Redis has not answered for 4 s" },
      sessions: { now: 9_500, max: 10_000, users: 9_000, rooms: 3, streams: 1 },
      queues: { frames: 12, bytes: 3_000, budget_used_bytes: 96, budget_bytes: 100 },
      latency_micros: { p50: 800, p99: 1_250_000, count: 9 },
      shards: Array.from({ length: 56 }, () => ({ sessions: 170, busy_share: 0.95, queue_bytes: 1 })),
      redis: { healthy: false, reason: "it is away", canary_micros: 0, nodes: 1, spool_bytes: 2_048 },
      refusals: { tabs_of_user: 3, something_new: 1 },
      top_users: [{ user_id: "ann", tabs: 2, queue_frames: 1_024, queue_bytes: 1 << 20 }],
      ended: [{ at: 1764115199.5, user_id: null, session: "1", wire: "pigeon", reason: "some new reason", code: 4999, retryable: false, detail: "because" }],
    };
    await until("the other frame", async () => (await shown(tab, "#redis-word")) === "Not healthy");
    assert.match(await shown(tab, "#health-more"), /^Redis has not answered for 4 s/);
    // Not by the colour alone: another sign, and words.
    const sign = (selector) => tab.$eval(selector, (node) => getComputedStyle(node, "::before").content);
    assert.deepEqual([await sign("#redis .mark"), await sign("#health .mark")], ['"!"', '"!"']);
    assert.deepEqual(await tab.locator("#redis-facts dd").allTextContents(), ["it is away", "0 µs", "1", "2.0 KiB"]);
    assert.equal(await shown(tab, "#latency .big"), "1.3s");
    assert.equal(await tab.locator("#shards li").count(), 56);
    assert.equal(await tab.locator("#queued .bar i").getAttribute("data-level"), "bad");
    assert.deepEqual(await tab.locator("#refusals dt").allTextContents(), ["the user had all tabs it may have", "something new"]);
    assert.match((await tab.locator("#users tr").allTextContents()).join(), /ann21,0241.0 MiB/);
    assert.match(await shown(tab, "#ended li"), /\(nobody’s\)some new reasonbecause\..*does not come back by itself · pigeon/);
    assert.match(await tab.title(), /^\(!\) far away/);
    assert.ok(await fits(tab));
    await assertClean(tab);
    await person.close();
  });

  it("fits a phone, in the light and in the dark, and stays where it is", async () => {
    for (const colorScheme of ["light", "dark"]) {
      for (const width of [320, 360, 414]) {
        const person = await browser.person({ viewport: { width, height: 740 }, colorScheme, hasTouch: true, isMobile: true });
        const tab = await status(person);
        assert.ok(await fits(tab), `${width} ${colorScheme}`);
        const places = () => tab.$$eval(".tile, .panel", (nodes) => nodes.map((node) => node.getBoundingClientRect().top + scrollY));
        const before = await places();
        const first = await shown(tab, "#health-more");
        await until("time has gone by", async () => (await shown(tab, "#health-more")) !== first);
        assert.deepEqual(await places(), before, "news moves nothing");
        await assertClean(tab);
        await person.close();
      }
    }
  });

  it("says when there is no news, and goes on by itself", async () => {
    const own = await new Server(QUEUES).start();
    const person = await browser.person();
    try {
      const tab = await openTab(person, `${own.origin}/status`);
      own.process.kill("SIGSTOP");
      await state(tab, "stale");
      assert.match(await shown(tab, "#status-text"), /^No news for [3-9] s$/);
      own.process.kill("SIGCONT");
      await state(tab, "online");
      await own.stop("SIGKILL");
      await state(tab, "waiting");
      await own.start();
      await state(tab, "online", 30_000);
      const uptime = await shown(tab, "#health-more");
      assert.match(uptime, /^up [\d.]+ s/, "it is the new process that is shown");
      assert.ok((await wordsIn(tab, "waiting")).some((words) => /No connection; again in \d+ s/.test(words)));
    } finally {
      await person.close();
      await own.stop("SIGKILL");
    }
  });
});

describe("the status page with keys", { concurrency: 1 }, () => {
  const SECRET = "a-secret-for-tests-only-of-32-bytes";
  let guarded;
  before(async () => {
    guarded = await new Server({ TABCAST_TOKEN_KEYS: `kid=main,alg=HS256,secret=${SECRET}`, TABCAST_API_KEYS: "a-workers-key", TABCAST_OPERATOR_KEYS: KEY }).start();
  });
  after(() => guarded?.stop());

  async function answer(tab, value) {
    await tab.locator("#ask-value").fill(value);
    await tab.locator("#ask-value").press("Enter");
  }
  const why = (tab, words) => until(`it says ${words}`, async () => words.test(await shown(tab, "#ask-why")));

  it("asks for the key, says what is wrong with another, and keeps it for this tab", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${guarded.origin}/status`, { wait: null });
    await tab.locator("#ask[open]").waitFor();
    await why(tab, /is shown to its operators/);
    assert.equal(await shown(tab, "#sessions .big b"), "–", "without a key nothing is shown");
    await answer(tab, "some other key");
    await why(tab, /does not know that key/);
    await answer(tab, "a-workers-key");
    await why(tab, /not an operator’s/);
    await answer(tab, KEY);
    await state(tab, "online");
    await tab.reload();
    await state(tab, "online");
    const another = await openTab(person, `${guarded.origin}/status`, { wait: null });
    await another.locator("#ask[open]").waitFor();
    await another.keyboard.press("Escape");
    await state(another, "unauthorized");
    await another.locator("#key").click();
    await answer(another, KEY);
    await state(another, "online");
    await person.close();
  });

  it("takes the key from its address, and leaves no trace of it there", async () => {
    const person = await browser.person();
    const asked = [];
    const listen = (tab) => tab.on("request", (request) => asked.push(`${request.url()} ${request.headers().referer ?? ""}`));
    const tab = await openTab(person, `${guarded.origin}/status#key=${KEY}`, { before: listen });
    assert.equal(tab.url(), `${guarded.origin}/status`);
    assert.ok(asked.length > 3);
    // A browser names the whole address of a navigation to its own tools, and sends none of what stands after #.
    assert.deepEqual(asked.slice(1).filter((address) => address.includes(KEY)), []);
    assert.ok(!guarded.log.includes(KEY));
    assert.equal(await tab.evaluate((key) => document.documentElement.outerHTML.includes(key), KEY), false);
    await assertClean(tab);
    await person.close();
  });

  it("counts who was not let in, in words", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${guarded.origin}/status#key=${KEY}`);
    assert.equal((await fetch(`${guarded.origin}/events`)).status, 401);
    await until("it is counted", async () => /no token, or a bad one/.test(await shown(tab, "#refusals")));
    await person.close();
  });
});
