// A page at 3 a.m.: ann complains that her chat keeps leaving. An operator finds out why, with `tabcast top` alone and with
// `/status` alone, and has nothing but the gateway's address and the operator's key.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { once } from "node:events";
import net from "node:net";
import { promisify } from "node:util";
import { createHmac } from "node:crypto";
import { fileURLToPath } from "node:url";
import { after, before, describe, it } from "node:test";
import { Browser, Server, assertClean, openTab, until } from "../browser/harness.mjs";

const BINARY = process.env.TABCAST_BIN ?? fileURLToPath(new URL("../../target/release/tabcast", import.meta.url));
const [SECRET, WORKER, OPERATOR] = ["token", "worker", "operator"].map((name) => `${name}-key-${"0123456789abcdef".repeat(2)}`);
const WHY = /its queue held .* the limit is 65,536 bytes/;

const encoded = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
function token(sub) {
  const signed = `${encoded({ alg: "HS256", typ: "JWT", kid: "main" })}.${encoded({ sub, exp: Math.floor(Date.now() / 1000) + 600 })}`;
  return `${signed}.${createHmac("sha256", SECRET).update(signed).digest("base64url")}`;
}

describe("from a page at 3 a.m. to the reason why a user was cut", { concurrency: 1 }, () => {
  let server;
  let browser;
  const sockets = [];

  before(async () => {
    server = await new Server({
      TABCAST_TOKEN_KEYS: `kid=main,alg=HS256,secret=${SECRET}`, TABCAST_API_KEYS: WORKER, TABCAST_OPERATOR_KEYS: OPERATOR,
      TABCAST_SESSION_QUEUE_BYTES_MAX: "65536", TABCAST_RECOVERY_BYTES_MAX: "32768", TABCAST_HANDSHAKES_PER_ADDRESS_PER_SECOND_MAX: "0",
    }).start();
    browser = await new Browser().start();
    // Many others come and go meanwhile, and one of them is kicked.
    for (let n = 0; n < 60; n++) (await connect(`other-${n}`)).destroy();
    sockets.push(await connect("ann"), await connect("ben"));
    await api("users/ben", undefined, OPERATOR, "DELETE");
    // The network of ann's phone is slow: it takes nothing of what a bot says.
    const text = "x".repeat(15_000);
    await until("ann is cut", async () => {
      for (let n = 0; n < 50; n++) await api("send", { channel_id: "webchat:ann", text });
      return (await api("users/ann", undefined, WORKER, "GET")).tabs === 0;
    });
    for (let n = 60; n < 120; n++) (await connect(`other-${n}`)).destroy();
  });
  after(async () => {
    for (const socket of sockets) socket.destroy();
    await browser?.stop();
    await server?.stop();
  });

  async function api(route, body, key = WORKER, method = "POST") {
    const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
    const response = await fetch(`${server.origin}/api/${route}`, { method, headers, body: body && JSON.stringify(body) });
    assert.ok(response.ok, `${route}: ${response.status}`);
    return response.json();
  }

  /** A tab that reads no more than its head. */
  async function connect(user) {
    const { hostname, port } = new URL(server.origin);
    const socket = net.connect({ host: hostname, port: Number(port) });
    socket.on("error", () => {});
    await once(socket, "connect");
    const head = ["GET /ws HTTP/1.1", `Host: ${hostname}:${port}`, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
      "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", `Authorization: Bearer ${token(user)}`];
    socket.write(`${head.join("\r\n")}\r\n\r\n`);
    const [answer] = await once(socket, "data");
    assert.match(String(answer), /^HTTP\/1\.1 101 /);
    socket.pause();
    return socket;
  }

  const top = (args, key = OPERATOR) => promisify(execFile)(BINARY, ["top", "--url", server.origin, "--once", ...args], { env: { ...process.env, TABCAST_KEY: key } });

  it("tabcast top tells it", async () => {
    const { stdout } = await top(["--user", "ann"]);
    assert.match(stdout, /ann/);
    assert.match(stdout, /slow consumer/);
    assert.match(stdout, WHY);
    assert.doesNotMatch(stdout, /other-/);
    const { stdout: ben } = await top(["--user", "ben"]);
    assert.match(ben, /kicked/);
    await assert.rejects(top(["--user", "ann"], WORKER), ({ code, stderr }) => code === 3 && stderr.length > 0, "a worker's key is refused");
  });

  it("the page /status tells it", async () => {
    const person = await browser.person({ viewport: { width: 390, height: 780 } });
    const tab = await openTab(person, `${server.origin}/status`, { wait: null });
    await tab.locator("#ask-value").fill(OPERATOR);
    await tab.locator("#ask-value").press("Enter");
    await tab.locator('#status[data-state="online"]').waitFor();
    await tab.locator("#filter").fill("ann");
    const ended = tab.locator("#ended li:visible");
    await until("ann's is the only one", async () => (await ended.count()) === 1);
    const words = await ended.first().textContent();
    assert.match(words, /ann/);
    assert.match(words, /too slow.*code 4008/);
    assert.match(words, new RegExp(WHY.source, "i"));
    // It asked without a key first, as in development mode none is needed: the console says so.
    tab.problems = tab.problems.filter((problem) => !problem.includes("401"));
    await assertClean(tab);
  });
});
