// From a Python bot to the gateway with a changed import: the bot stays as it was written for the adapter inside a
// FastAPI process, and people talk to it in the page.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import net from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { after, before, describe, it } from "node:test";
import { Browser, Server, assertClean, openTab, say, texts, until } from "../browser/harness.mjs";

const BOT = `import asyncio
from webchat_adapter import WebChatAdapter

async def handle(message, adapter):
    await adapter.start_typing(message.channel_id)
    if message.text == "report":
        await adapter.send_file(message.channel_id, b"a,b\\n1,2\\n", "report.csv", "text/csv")
    else:
        answer = await adapter.send(message.channel_id, "Let me think.")
        await adapter.edit_message(message.channel_id, answer, f"{message.user_name}, {message.text.upper()}!")
    await adapter.stop_typing(message.channel_id)

async def main():
    adapter = WebChatAdapter()
    adapter.on_message = handle
    await adapter.start()
    await asyncio.Event().wait()

asyncio.run(main())
`;

/** A port that was free a moment ago. */
async function freePort() {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

describe("from a Python bot to the gateway", { concurrency: 1 }, () => {
  let folder;
  let server;
  let browser;
  let bot;

  before(async () => {
    folder = mkdtempSync(path.join(tmpdir(), "tabcast-walk-"));
    browser = await new Browser().start();
  });
  after(async () => {
    bot?.kill("SIGKILL");
    await browser?.stop();
    await server?.stop();
    rmSync(folder, { recursive: true, force: true });
  });

  it("one line of it changes, the client comes from the gateway, and people in the page notice nothing", async () => {
    const port = await freePort();
    server = await new Server({ TABCAST_WORKER: "webhook", TABCAST_WEBHOOK_URL: `http://127.0.0.1:${port}/` }).start();
    const client = await fetch(`${server.origin}/tabcast.py`);
    assert.ok(client.headers.get("etag"));
    writeFileSync(path.join(folder, "tabcast.py"), await client.text());
    const moved = BOT.replace("from webchat_adapter import", "from tabcast import");
    writeFileSync(path.join(folder, "bot.py"), moved);
    const settings = { WEBCHAT_URL: server.origin, WEBCHAT_LISTEN: `127.0.0.1:${port}` };
    // -S: no package but the standard library is found.
    bot = spawn("python3", ["-B", "-S", "bot.py"], { cwd: folder, env: { ...process.env, ...settings }, stdio: "inherit" });

    const person = await browser.person();
    const tab = await openTab(person, `${server.origin}/?user=ann`);
    await say(tab, "hello");
    await until("the bot's answer", async () => (await texts(tab, "bot")).includes("ann, HELLO!"));
    assert.ok((await tab.evaluate(() => window.seen.typing)) > 0, "the dots were shown");
    await say(tab, "report");
    await until("the file", async () => (await tab.locator("#log").textContent()).includes("report.csv"));
    await assertClean(tab);
  });

  it("the gateway is restarted, and neither the bot nor the tab has to be", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${server.origin}/?user=ben`);
    await server.stop();
    await server.start();
    await say(tab, "again");
    await until("the bot's answer", async () => (await texts(tab, "bot")).includes("ben, AGAIN!"));
    assert.equal(bot.exitCode, null);
  });
});
