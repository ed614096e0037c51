// What strangers write, and what pages of other origins try, in a real browser.

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";
import { after, before, describe, it } from "node:test";
import { Browser, Server, assertClean, openTab, say, state, texts, until } from "./harness.mjs";

const SECRET = "a-secret-for-tests-only-of-32-bytes";
const MARKUP = [
  "<script>document.title='pwned'</script>",
  "\"><img src=x onerror=\"document.title='pwned'\">",
  "' autofocus onfocus='document.title=\"pwned\"'",
  "<svg onload=document.title='pwned'><iframe srcdoc=\"<script>top.document.title='pwned'</script>\">",
  "</bdi></li></ol></textarea></title><style>*{display:none}</style>",
  "javascript:document.title='pwned'",
  "data:text/html,<script>top.document.title='pwned'</script>",
  "&lt;b&gt; {{constructor.constructor('document.title=1')()}}",
  "a\u2028b\u202egnp.exe\u0085c",
];

let open; // development mode
let guarded; // with tokens
let browser;
let foreign; // a server of the attacker's
let foreignPort;

before(async () => {
  open = await new Server().start();
  guarded = await new Server({ TABCAST_TOKEN_KEYS: `kid=main,alg=HS256,secret=${SECRET}` }).start();
  browser = await new Browser().start();
  foreign = createServer((_, response) => response.end("<!doctype html><title>foreign</title><body>a page of somebody else"));
  foreign.listen(0, "127.0.0.1");
  await once(foreign, "listening");
  foreignPort = foreign.address().port;
});
after(async () => {
  foreign?.close();
  foreign?.closeAllConnections();
  await browser?.stop();
  await open?.stop();
  await guarded?.stop();
});

function token(claims) {
  const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const text = `${part({ typ: "JWT", alg: "HS256", kid: "main" })}.${part({ exp: Math.floor(Date.now() / 1000) + 600, ...claims })}`;
  return `${text}.${createHmac("sha256", SECRET).update(text).digest("base64url")}`;
}

/** Nothing in the page came from a text: no element, handler or address but those that the page itself makes. */
async function assertInert(tab) {
  const found = await tab.evaluate(() => {
    const all = [...document.querySelectorAll("*")];
    return {
      handlers: all.filter((node) => [...node.attributes].some(({ name }) => name.startsWith("on"))).map((node) => node.outerHTML),
      scripts: [...document.querySelectorAll("script")].map((node) => node.src),
      foreign: [...document.querySelectorAll("iframe, object, embed, base, style, form[action], meta[http-equiv]")].map((node) => node.outerHTML),
      addresses: all.flatMap((node) => ["href", "src", "action", "formaction"].map((name) => node.getAttribute(name)).filter(Boolean)),
      title: document.title,
    };
  });
  const { origin } = new URL(tab.url());
  assert.deepEqual([found.handlers, found.foreign], [[], []]);
  assert.deepEqual(found.scripts, [`${origin}/app.js`]);
  for (const address of found.addresses) assert.match(address, /^(\/[a-z]|#i-|https:\/\/web\.example\/|blob:http:\/\/127\.0\.0\.1:)/, address);
  assert.notEqual(found.title, "pwned");
}

describe("what strangers write", { concurrency: 1 }, () => {
  it("is text in every place where the page shows it", async () => {
    const room = `${MARKUP[1]} ${process.pid}`;
    const person = await browser.person();
    const dialogs = [];
    const [neighbour, tab] = [
      await openTab(person, `${open.origin}/?user=${encodeURIComponent(MARKUP[0])}&room=${encodeURIComponent(room)}`),
      await openTab(person, `${open.origin}/?user=reader&room=${encodeURIComponent(room)}`),
    ];
    tab.on("dialog", (dialog) => dialogs.push(dialog.message()) && dialog.dismiss());
    for (const one of [neighbour, tab]) await one.locator("#room.joined").waitFor();
    assert.equal(await neighbour.locator("#who-name").textContent(), MARKUP[0]);
    assert.equal(await tab.locator("#room").textContent(), `# ${room}`);
    await say(neighbour, "it is me");
    await until("the neighbour's name", async () => (await tab.locator("#log .from").allTextContents()).includes(MARKUP[0]));
    for (const markup of MARKUP) {
      const button = { label: markup.slice(0, 80), custom_id: markup, emoji: markup, url: markup };
      const buttons = [button, { ...button, style: "link" }, { ...button, label: "", custom_id: "" }, { label: "web", custom_id: "", url: "https://web.example/" }];
      const { id } = await open.api("send", { channel_id: `room:${room}`, text: markup });
      await open.api("edit", { channel_id: `room:${room}`, message_id: id, text: `${markup}!` });
      await open.api("buttons", { channel_id: `room:${room}`, text: markup, buttons });
      const filename = markup.replaceAll("\u0085", "");
      await open.api("file", { channel_id: `room:${room}`, filename, mimetype: filename, data: Buffer.from(markup).toString("base64") });
      await open.api("file", { channel_id: `room:${room}`, filename, mimetype: "image/png", data: Buffer.from(markup).toString("base64") });
      await until("all of it", async () => {
        const shown = await texts(tab, "bot");
        return shown.includes(`${markup}!`) && shown.includes(markup) && (await tab.locator("a.file").count()) > 0;
      });
      await say(tab, markup);
    }
    await until("no picture that is none", async () => (await tab.locator("a.file").count()) === 2 * MARKUP.length);
    // Quoted, in a reply and in its preview.
    await tab.locator(".item .reply").last().click();
    await say(tab, MARKUP[1]);
    await tab.locator(".quote").first().waitFor();
    for (const download of await tab.$$eval("a.file", (links) => links.map((link) => link.download))) assert.doesNotMatch(download, /[/\\\u202e]/u);
    await assertInert(tab);
    await assertInert(neighbour);
    await assertClean(tab, neighbour);
    assert.deepEqual(dialogs, []);
    await person.close();
  });

  it("could not become markup even by a mistake of the page's", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${open.origin}/?user=types`);
    for (const sink of ["document.body.innerHTML = '<img src=x>'", "document.write('x')", "setTimeout('1')", "document.createElement('script').text = '1'"]) {
      const refused = await tab.evaluate(`(() => { try { ${sink}; return null; } catch (error) { return error.name; } })()`);
      assert.equal(refused, "TypeError", sink);
    }
    await person.close();
  });
});

/** Everything that a page can do without being allowed to; resolves to what it got to see. */
async function attack(tab, victim, user) {
  return tab.evaluate(async ({ victim, user }) => {
    const got = {};
    const quietly = (promise) => Promise.race([promise.catch((error) => `refused: ${error.name}`), new Promise((resolve) => setTimeout(resolve, 4000, "nothing"))]);
    const web = victim.replace("http", "ws");
    const socket = (url, protocols) =>
      quietly(new Promise((resolve, reject) => {
        const link = new WebSocket(url, protocols);
        link.onopen = () => resolve("open");
        link.onerror = reject;
      }));
    const stream = (url, options) =>
      quietly(new Promise((resolve, reject) => {
        const source = new EventSource(url, options);
        source.onopen = () => resolve("open");
        source.onerror = () => (source.close(), reject(new Error("closed")));
      }));
    const read = (path, options) => quietly(fetch(victim + path, options).then((response) => (response.type === "opaque" ? "opaque" : response.text())));
    got.socket = await socket(`${web}/ws?user=${user}&name=x&hello=1`);
    got.socketWithProtocol = await socket(`${web}/ws?user=${user}`, ["tabcast"]);
    got.stream = await stream(`${victim}/events?user=${user}`);
    got.streamWithCookie = await stream(`${victim}/events?user=${user}`, { withCredentials: true });
    got.users = await read("/api/users", { credentials: "include" });
    got.models = await read("/v1/models", { credentials: "include" });
    const text = JSON.stringify({ channel_id: user, text: "forged" });
    for (const type of ["text/plain", "application/x-www-form-urlencoded", "application/json"]) {
      got[`write as ${type}`] = await read("/api/send", { method: "POST", mode: type === "application/json" ? "cors" : "no-cors", credentials: "include", headers: { "content-type": type }, body: text });
    }
    got.raw = await read(`/api/file?channel_id=${user}&filename=forged`, { method: "POST", headers: { "x-tabcast-raw": "1" }, body: "x" });
    // A form that makes a body which is JSON all the same.
    for (const enctype of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]) {
      const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { name: `f-${enctype}` }));
      const form = document.body.appendChild(Object.assign(document.createElement("form"), { method: "post", enctype, target: frame.name, action: `${victim}/api/send` }));
      form.append(Object.assign(document.createElement("input"), { name: text.slice(0, -1) + ',"x":"', value: '"}' }));
      const loaded = new Promise((resolve) => (frame.onload = resolve));
      form.submit();
      await quietly(loaded);
    }
    navigator.sendBeacon(`${victim}/api/send`, text);
    const page = document.body.appendChild(Object.assign(document.createElement("iframe"), { name: "framed", src: `${victim}/` }));
    await quietly(new Promise((resolve) => (page.onload = resolve)));
    return got;
  }, { victim, user });
}

function assertNothingSeen(got) {
  for (const [way, seen] of Object.entries(got)) assert.ok(/^(refused|nothing|opaque)/.test(seen), `${way}: ${seen}`);
}

/** What stands where our page was to be framed: the address of it, and whether it is our page. */
const frameOf = (page) => page.frames().find((frame) => frame.name() === "framed").evaluate(() => ({ href: location.href, isOurs: document.getElementById("composer") !== null }));

describe("pages of other origins", { concurrency: 1 }, () => {
  it("can do nothing in development mode, from another site or another port, by another name or none", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${open.origin}/?user=victim`);
    for (const site of [`http://127.0.0.1:${foreignPort}`, `http://localhost:${foreignPort}`]) {
      const page = await openTab(person, `${site}/`, { wait: null });
      assertNothingSeen(await attack(page, open.origin, "victim"));
      assert.equal((await frameOf(page)).isOurs, false, "it is not even served to a frame");
      // In a sandbox a page has the origin "null".
      await page.evaluate((victim) => {
        window.told = new Promise((resolve) => addEventListener("message", ({ data }) => resolve(data)));
        const script = `const w = new WebSocket("${victim.replace("http", "ws")}/ws?user=victim"); w.onopen = () => parent.postMessage("open", "*"); w.onerror = () => parent.postMessage("refused", "*")`;
        document.body.append(Object.assign(document.createElement("iframe"), { sandbox: "allow-scripts", srcdoc: `<script>${script}</scr` + "ipt>" }));
      }, open.origin);
      assert.equal(await page.evaluate(() => window.told), "refused");
      await page.close();
    }
    // A name of the attacker's that leads to this machine: the page would be of one origin with what it asks.
    for (const [name, value] of [["host", "rebound.example"], ["host", `rebound.example:${new URL(open.origin).port}`]]) {
      const { request } = await import("node:http");
      const status = await new Promise((resolve) => request(`${open.origin}/api/users`, { headers: { [name]: value } }, (response) => resolve(response.resume().statusCode)).end());
      assert.equal(status, 403);
    }
    await say(tab, "only this");
    await until("the answer", async () => (await texts(tab, "bot")).length > 0);
    assert.deepEqual(await texts(tab, "own"), ["only this"]);
    assert.equal((await texts(tab)).filter((text) => text.includes("forged")).length, 0);
    assert.equal(await tab.locator("a.file").count(), 0);
    await person.close();
  });

  it("get nothing by the cookie of somebody who is signed in", async () => {
    const person = await browser.person();
    const host = new URL(guarded.origin).hostname;
    // The least that a cookie can be guarded by: cookies know no ports, so this one comes along from the attacker's.
    await person.addCookies([{ name: "tabcast_token", value: token({ sub: "victim" }), domain: host, path: "/" }]);
    const tab = await openTab(person, `${guarded.origin}/`);
    const page = await openTab(person, `http://${host}:${foreignPort}/`, { wait: null });
    assertNothingSeen(await attack(page, guarded.origin, "victim"));
    const framed = await frameOf(page);
    assert.match(framed.href, /^chrome-error:/, "the browser puts a page of its own there");
    assert.equal(framed.isOurs, false);
    assert.equal(await state(tab, "online").then(() => "online"), "online");
    assert.deepEqual(await texts(tab), []);
    await person.close();
  });
});

describe("a token", { concurrency: 1 }, () => {
  it("is in no address that the page asks for, nor in a referrer", async () => {
    const person = await browser.person();
    const asked = [];
    person.on("request", (request) => asked.push(request.url(), JSON.stringify(request.headers().referer ?? "")));
    const jwt = token({ sub: "tina" });
    const tab = await openTab(person, `${guarded.origin}/#token=${jwt}`, { before: (one) => one.on("websocket", (link) => asked.push(link.url())) });
    await say(tab, "hello");
    await until("the answer", async () => (await texts(tab, "bot")).length > 0);
    await tab.reload();
    await state(tab, "online");
    assert.ok(asked.some((address) => address.startsWith("ws:")), "the socket's address was seen");
    for (const address of asked) assert.ok(!address.includes(jwt.slice(-20)), address);
    await person.close();
  });
});
