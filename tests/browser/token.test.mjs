// The page where tokens are asked for: it gets one from its address or a prompt, and again when it ends.

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { after, before, describe, it } from "node:test";
import { Browser, Server, openTab, say, state, texts, until } from "./harness.mjs";

const SECRET = "a-secret-for-tests-only-of-32-bytes";
let server;
let browser;

before(async () => {
  const env = { TABCAST_TOKEN_KEYS: `kid=main,alg=HS256,secret=${SECRET}`, TABCAST_TOKEN_LEEWAY: "0s" };
  server = await new Server(env).start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

function token(claims, secret = SECRET) {
  const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const text = `${part({ typ: "JWT", alg: "HS256", kid: "main" })}.${part({ exp: Math.floor(Date.now() / 1000) + 600, ...claims })}`;
  return `${text}.${createHmac("sha256", secret).update(text).digest("base64url")}`;
}

async function answer(tab, value) {
  await tab.locator("#ask-value").fill(value);
  await tab.locator("#ask-value").press("Enter");
}

describe("the page with tokens", { concurrency: 1 }, () => {
  it("takes a token from its address, and leaves no trace of it there", async () => {
    const person = await browser.person();
    const address = `${server.origin}/#token=${token({ sub: "tina", name: "Tina T." })}`;
    const tabs = [await openTab(person, address), await openTab(person, address)];
    for (const tab of tabs) {
      assert.equal(tab.url(), `${server.origin}/`);
      assert.equal(await tab.locator("#who-name").textContent(), "Tina T.");
    }
    await say(tabs[0], "it is me");
    await until("the other tab shows it as own", async () => (await texts(tabs[1], "own")).includes("it is me"));
    await tabs[0].reload();
    await state(tabs[0], "online");
    for (const tab of tabs) assert.deepEqual(tab.problems, []);
    await person.close();
  });

  it("asks for one, and asks again if the server refuses it", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${server.origin}/`, { wait: null });
    await tab.locator("#ask[open]").waitFor();
    await answer(tab, token({ sub: "tim" }, "another-secret-that-is-not-the-one"));
    await until("it says that the token was refused", async () => /did not accept/.test(await tab.locator("#ask-why").textContent()));
    await answer(tab, token({ sub: "tim" }));
    await state(tab, "online");
    assert.equal(await tab.locator("#who-name").textContent(), "tim");
    await person.close();
  });

  it("can be left signed out, and signed in later", async () => {
    const person = await browser.person();
    const tab = await openTab(person, `${server.origin}/`, { wait: null });
    await tab.locator("#ask[open]").waitFor();
    await tab.keyboard.press("Escape");
    await state(tab, "unauthorized");
    await tab.locator("#connect").click();
    await answer(tab, token({ sub: "tom" }));
    await state(tab, "online");
    await person.close();
  });

  it("asks for a new one when it has ended, and sends what was typed meanwhile", async () => {
    const person = await browser.person();
    // Long enough for a browser on a busy machine to be online before.
    const soon = Math.floor(Date.now() / 1000) + 12;
    const tab = await openTab(person, `${server.origin}/#token=${token({ sub: "tess", exp: soon })}`);
    await tab.locator("#ask[open]").waitFor({ timeout: 60_000 });
    assert.match(await tab.locator("#ask-why").textContent(), /has ended/);
    await tab.keyboard.press("Escape");
    await say(tab, "kept for later");
    await tab.locator("#connect").click();
    await answer(tab, token({ sub: "tess" }));
    await state(tab, "online");
    await tab.locator(".item.own:not(.pending):not(.failed)").waitFor();
    assert.deepEqual(await texts(tab, "own"), ["kept for later"]);
    await person.close();
  });
});
