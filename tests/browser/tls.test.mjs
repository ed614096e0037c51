// The page over https, with a certificate of the test's own.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { after, before, describe, it } from "node:test";
import { Browser, Server, assertClean, openTab, say, state, texts, until } from "./harness.mjs";

let folder;
let server;
let browser;

before(async () => {
  folder = mkdtempSync(path.join(tmpdir(), "tabcast-tls-"));
  const [certificate, key] = ["cert.pem", "key.pem"].map((name) => path.join(folder, name));
  const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
  execFileSync("openssl", ["req", "-x509", ...curve, "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-days", "2", "-addext", "subjectAltName=IP:127.0.0.1"], { stdio: "ignore" });
  server = await new Server({ TABCAST_TLS_CERT: certificate, TABCAST_TLS_KEY: key }).start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  await server?.stop();
  rmSync(folder, { recursive: true, force: true });
});

describe("the page over https", { concurrency: 1 }, () => {
  it("shows one message in two tabs, and the bot's answer in both", async () => {
    const person = await browser.person({ ignoreHTTPSErrors: true });
    const tabs = [await openTab(person, `${server.origin}/?user=tess`), await openTab(person, `${server.origin}/?user=tess`)];
    assert.equal(tabs[0].url().split(":")[0], "https");
    await say(tabs[0], "over a secret line");
    for (const tab of tabs) {
      await until("the message is there", async () => (await texts(tab, "own")).includes("over a secret line"));
      await until("the bot has answered", async () => (await texts(tab, "bot")).some((text) => text.includes("over a secret line")));
    }
    await assertClean(...tabs);
    await person.close();
  });

  it("comes back after a restart", async () => {
    const person = await browser.person({ ignoreHTTPSErrors: true });
    const tab = await openTab(person, `${server.origin}/?user=theo`);
    await server.stop("SIGKILL");
    await until("it notices", async () => (await tab.locator("#status").getAttribute("data-state")) !== "online");
    await server.start();
    await state(tab, "online");
    await say(tab, "again");
    await until("the message is there", async () => (await texts(tab, "own")).includes("again"));
    await person.close();
  });
});
