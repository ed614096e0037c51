// permessage-deflate with what Chromium itself offers: the page works as it does without, on fewer bytes.

import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { Browser, Server, assertClean, openTab, say, texts, until } from "./harness.mjs";

let server;
let browser;

before(async () => {
  server = await new Server({ TABCAST_DEFLATE: "on", TABCAST_WORKER: "none" }).start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

const LONG = "again and again, “and again” 🌟 ".repeat(200).trim();

async function metric(name) {
  const text = await (await fetch(`${server.origin}/metrics`)).text();
  return Number(text.match(new RegExp(`^tabcast_${name}_total (\\d+)$`, "m"))[1]);
}

/** A tab, and the headers of its WebSocket's handshake as the browser's network panel shows them. */
async function opened(person, user) {
  const handshakes = [];
  const watch = async (tab) => {
    const panel = await person.newCDPSession(tab);
    panel.on("Network.webSocketHandshakeResponseReceived", ({ response }) => handshakes.push(response));
    await panel.send("Network.enable");
  };
  const tab = await openTab(person, `${server.origin}/?user=${user}`, { before: watch });
  const [response] = await until("the handshake was seen", () => handshakes.length > 0 && handshakes);
  const header = (headers, wanted) => Object.entries(headers ?? {}).find(([name]) => name.toLowerCase() === wanted)?.[1];
  return { tab, offered: header(response.requestHeaders, "sec-websocket-extensions"), accepted: header(response.headers, "sec-websocket-extensions") };
}

describe("the page in Chromium with compression", { concurrency: 1 }, () => {
  it("negotiates it, and shows and sends long texts", async () => {
    const person = await browser.person();
    const { tab, offered, accepted } = await opened(person, "ann");
    assert.match(offered, /^permessage-deflate/);
    assert.equal(accepted, "permessage-deflate; server_no_context_takeover; client_no_context_takeover");
    const frames = await metric("deflated_frames");
    await server.api("send", { channel_id: "ann", text: LONG });
    await until("the long text is there", async () => (await texts(tab, "bot")).length === 1);
    assert.deepEqual(await texts(tab, "bot"), [LONG]);
    assert.equal((await metric("deflated_frames")) - frames, 1);
    // What the page itself sends is compressed by the browser, and comes back to its other tab.
    const { tab: other } = await opened(person, "ann");
    await say(tab, LONG);
    await until("the other tab shows it", async () => (await texts(other, "own")).includes(LONG));
    await server.api("send", { channel_id: "ann", text: "short" });
    await until("the short text is there", async () => (await texts(tab, "bot")).length === 2);
    await assertClean(tab, other);
    await person.close();
  });

  it("sees the same as a tab without it, in fewer bytes", async () => {
    const person = await browser.person();
    const { tab } = await opened(person, "bob");
    const [json, form] = [await metric("deflated_json_bytes"), await metric("deflated_form_bytes")];
    for (let number = 0; number < 20; number += 1) await server.api("send", { channel_id: "bob", text: `${number} ${LONG}` });
    await until("all texts are there", async () => (await texts(tab, "bot")).length === 20);
    assert.deepEqual(await texts(tab, "bot"), Array.from({ length: 20 }, (_, number) => `${number} ${LONG}`));
    assert.ok((await metric("deflated_form_bytes")) - form < ((await metric("deflated_json_bytes")) - json) / 10);
    await assertClean(tab);
    await person.close();
  });
});
