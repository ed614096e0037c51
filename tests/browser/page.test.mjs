// The page as people use it: two tabs of one user, the demo worker behind the server.

import assert from "node:assert/strict";
import { after, before, describe, it } from "node:test";
import { Browser, Server, assertClean, openTab, say, state, texts, until, wordsIn } from "./harness.mjs";

let server;
let browser;
let users = 0;

before(async () => {
  server = await new Server().start();
  browser = await new Browser().start();
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

const freshUser = () => `page-${process.pid}-${++users}`;

async function twoTabs(options) {
  const user = freshUser();
  const person = await browser.person(options);
  const address = `${server.origin}/?user=${user}`;
  return { user, person, tabs: [await openTab(person, address), await openTab(person, address)] };
}

describe("the page", { concurrency: 1 }, () => {
  it("is served with a policy that lets nothing inline run", async () => {
    const response = await fetch(`${server.origin}/`);
    assert.equal(response.status, 200);
    assert.match(response.headers.get("content-type"), /^text\/html; ?charset=utf-8$/i);
    assert.equal(response.headers.get("x-content-type-options"), "nosniff");
    const policy = Object.fromEntries(response.headers.get("content-security-policy").split(";").map((part) => part.trim().split(/\s+(.*)/s).slice(0, 2)));
    assert.equal(policy["default-src"], "'none'");
    assert.equal(policy["script-src"], "'self'");
    assert.equal(policy["style-src"], "'self'");
    assert.equal(policy["frame-ancestors"], "'none'");
    const html = await response.text();
    assert.ok(!html.includes("{{"), "every placeholder is filled");
    assert.match(html, /<meta name="tabcast-mode" content="development">/);
    for (const file of ["app.js", "tabcast.js", "style.css", "favicon.svg"]) {
      const { status, headers } = await fetch(`${server.origin}/${file}`);
      assert.equal(status, 200, file);
      assert.match(headers.get("content-type"), { js: /javascript/, css: /text\/css/, svg: /image\/svg\+xml/ }[file.split(".")[1]], file);
    }
  });

  it("shows a message, the typing dots and the streamed answer in both tabs, each once", async () => {
    const { person, tabs } = await twoTabs();
    await say(tabs[0], "how are the stars tonight?");
    for (const tab of tabs) {
      await until("the answer holds the question", async () => (await texts(tab, "bot")).some((text) => text.includes("how are the stars tonight?")));
      await until("the dots are gone", () => tab.$eval("#typing", (dots) => !dots.classList.contains("on")));
      assert.deepEqual(await texts(tab, "own"), ["how are the stars tonight?"]);
      assert.equal((await texts(tab, "bot")).length, 1);
      const seen = await tab.evaluate(() => window.seen);
      assert.ok(seen.typing > 0, "the dots were shown");
      assert.ok(seen.edits > 1, `the answer grew in place (${seen.edits} edits)`);
      assert.equal(seen.added, 2, "no message was drawn again");
    }
    assert.deepEqual(await texts(tabs[0]), await texts(tabs[1]));
    await tabs[0].locator("#log .item.own:not(.pending) time").waitFor();
    await assertClean(...tabs);
    await person.close();
  });

  it("lets a button be pressed by keyboard, and answers in both tabs", async () => {
    const { person, tabs } = await twoTabs();
    await say(tabs[0], "/buttons");
    for (const tab of tabs) await tab.locator(".choice").first().waitFor();
    const before = await Promise.all(tabs.map((tab) => texts(tab, "bot")));
    await tabs[0].locator("#text").focus();
    await until("Shift+Tab reaches a button", async () => {
      await tabs[0].keyboard.press("Shift+Tab");
      return tabs[0].evaluate(() => document.activeElement.matches("button.choice:enabled"));
    });
    await tabs[0].keyboard.press("Enter");
    for (const [at, tab] of tabs.entries()) await until("an answer to the button", async () => (await texts(tab, "bot")).length > before[at].length);
    await tabs[0].locator(".choice.chosen").waitFor();
    await assertClean(...tabs);
    await person.close();
  });

  it("draws all six styles of button, and opens links only to the web", async () => {
    const { user, person, tabs } = await twoTabs();
    const styles = ["primary", "secondary", "success", "danger", "link", "premium"];
    const buttons = styles.map((style) => ({ label: style, custom_id: style, style, ...(style === "link" && { url: "https://example.com/a" }) }));
    buttons.push({ label: "no", custom_id: "", style: "link", url: "javascript:alert(1)" }, { label: "off", custom_id: "off", disabled: true });
    await server.api("buttons", { channel_id: user, text: "choose", buttons });
    for (const tab of tabs) {
      await tab.locator(".choice").nth(7).waitFor();
      for (const style of styles) assert.equal(await tab.locator(`.choice.${style}`, { hasText: style }).count(), 1, style);
      const link = tab.locator("a.choice");
      assert.equal(await link.count(), 1);
      assert.equal(await link.getAttribute("href"), "https://example.com/a");
      assert.match(await link.getAttribute("rel"), /noopener/);
      assert.ok(await tab.locator(".choice", { hasText: "no" }).isDisabled());
      assert.ok(await tab.locator(".choice", { hasText: "off" }).isDisabled());
    }
    await assertClean(...tabs);
    await person.close();
  });

  it("shows an image in both tabs, and never what a browser would run", async () => {
    const { user, person, tabs } = await twoTabs();
    await say(tabs[0], "/file");
    for (const tab of tabs) {
      await tab.locator(".picture img").waitFor();
      await until("the image is drawn", () => tab.$eval(".picture img", (image) => image.complete && image.naturalWidth > 0));
    }
    const drawing = Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" onload="document.title=1"/>');
    for (const mimetype of ["image/svg+xml", "text/html", "application/pdf"]) {
      await server.api("file", { channel_id: user, filename: "thing.bin", mimetype, data: drawing.toString("base64") });
    }
    for (const tab of tabs) {
      await tab.locator("a.file").nth(2).waitFor();
      assert.equal(await tab.locator(".picture").count(), 1);
      const kinds = await tab.$$eval("a.file", (links) => links.map((link) => [link.download, window.seen.blobs[link.href]]));
      assert.deepEqual(kinds, Array(3).fill(["thing.bin", "application/octet-stream"]));
    }
    await assertClean(...tabs);
    await person.close();
  });

  it("shows markup as text", async () => {
    const { user, person, tabs } = await twoTabs();
    const markup = '<img src=x onerror="document.title=666"><b>bold</b>&amp;\u2028<script>document.title=667</script>';
    await say(tabs[0], markup);
    await server.api("send", { channel_id: user, text: markup });
    for (const tab of tabs) {
      await until("both messages", async () => (await texts(tab)).filter((text) => text === markup).length >= 2);
      assert.equal(await tab.locator("#log b, #log .bubble img, #log script").count(), 0);
      assert.doesNotMatch(await tab.title(), /66/);
    }
    await assertClean(...tabs);
    await person.close();
  });

  it("sends a file that was chosen, and shows it at the message", async () => {
    const { person, tabs } = await twoTabs();
    const pixel = Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==", "base64");
    await tabs[0].locator("#files").setInputFiles({ name: "pixel.png", mimeType: "image/png", buffer: pixel });
    await tabs[0].locator("#attached li").waitFor();
    await say(tabs[0], "with a picture");
    await tabs[0].locator(".item.own:not(.pending) .picture img").waitFor();
    await until("the other tab has the text", async () => (await texts(tabs[1], "own")).includes("with a picture"));
    assert.equal(await tabs[0].locator("#attached li").count(), 0);
    await assertClean(...tabs);
    await person.close();
  });

  it("keeps its place while reading, and says that there is more", async () => {
    const { user, person, tabs } = await twoTabs();
    const [tab] = tabs;
    for (let line = 0; line < 40; line += 1) await server.api("send", { channel_id: user, text: `line ${line}` });
    await until("all lines", async () => (await texts(tab)).length === 40);
    await until("it is at the end", () => tab.$eval("#scroll", (box) => box.scrollHeight - box.scrollTop - box.clientHeight < 2));
    await tab.locator("#scroll").hover();
    await tab.mouse.wheel(0, -900);
    const place = () => tab.$eval("#scroll", (box) => box.scrollHeight - box.scrollTop - box.clientHeight);
    await until("it has scrolled up", async () => (await place()) > 300);
    const top = await tab.$eval("#scroll", (box) => box.scrollTop);
    await server.api("send", { channel_id: user, text: "the newest" });
    await tab.locator("#pill").waitFor();
    assert.equal(await tab.$eval("#scroll", (box) => box.scrollTop), top);
    await tab.locator("#pill").click();
    await until("it is at the end again", async () => (await place()) < 2);
    assert.ok(await tab.locator("#pill").isHidden());
    await assertClean(...tabs);
    await person.close();
  });

  it("shows what others say in a room, with their names", async () => {
    const room = `room-${process.pid}`;
    const people = await Promise.all([browser.person(), browser.person()]);
    const names = [freshUser(), freshUser()];
    const tabs = await Promise.all(people.map((person, at) => openTab(person, `${server.origin}/?user=${names[at]}&room=${room}`)));
    for (const tab of tabs) await tab.locator("#room.joined").waitFor();
    await server.api("send", { channel_id: `room:${room}`, text: "to the room" });
    for (const tab of tabs) await until("the broadcast", async () => (await texts(tab)).includes("to the room"));
    await say(tabs[0], "hello, neighbour");
    const item = tabs[1].locator(".item:not(.own)", { has: tabs[1].getByText("hello, neighbour", { exact: true }) });
    await item.waitFor();
    assert.equal(await item.locator(".from").textContent(), names[0]);
    assert.deepEqual(await texts(tabs[0], "own"), ["hello, neighbour"]);
    await assertClean(...tabs);
    for (const person of people) await person.close();
  });

  it("is one user in all tabs of a browser, until the name is changed", async () => {
    const person = await browser.person();
    const tabs = [await openTab(person, `${server.origin}/`), await openTab(person, `${server.origin}/`)];
    const name = await tabs[0].locator("#who-name").textContent();
    assert.match(name, /^guest-[0-9a-f]{4}$/);
    assert.equal(await tabs[1].locator("#who-name").textContent(), name);
    const next = freshUser();
    await tabs[0].locator("#who").click();
    await tabs[0].locator("#ask-value").fill(next);
    await tabs[0].locator("#ask-value").press("Enter");
    for (const tab of tabs) {
      await until("the new name", async () => (await tab.locator("#who-name").textContent()) === next);
      await state(tab, "online");
    }
    await until("the server knows both tabs", async () => (await server.api("users", undefined, "GET")).users.some(({ user_id: id, tabs: count }) => id === next && count === 2));
    await assertClean(...tabs);
    await person.close();
  });

  it("does not come back after an operator ended it, until asked", async () => {
    const { user, person, tabs } = await twoTabs();
    await server.api(`users/${user}`, undefined, "DELETE");
    for (const tab of tabs) {
      await state(tab, "closed");
      assert.match(await tab.locator("#status-text").textContent(), /operator/);
    }
    await tabs[0].locator("#connect").click();
    await state(tabs[0], "online");
    assert.equal(await tabs[1].locator("#status").getAttribute("data-state"), "closed");
    await assertClean(...tabs);
    await person.close();
  });

  for (const colorScheme of ["light", "dark"]) {
    it(`fits a phone and a desk in ${colorScheme}`, async () => {
      const sizes = [{ viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true }, { viewport: { width: 1280, height: 800 } }, { viewport: { width: 320, height: 480 }, isMobile: true, hasTouch: true }];
      for (const size of sizes) {
        const { user, person, tabs } = await twoTabs({ ...size, colorScheme, reducedMotion: "reduce" });
        const [tab] = tabs;
        await server.api("send", { channel_id: user, text: `${"averyverylongword".repeat(30)} and more\n`.repeat(3) });
        await server.api("buttons", { channel_id: user, text: "", buttons: [{ label: "W".repeat(80), custom_id: "w", style: "primary" }] });
        await tab.locator(".choice").waitFor();
        const { wide, composer, ground } = await tab.evaluate(() => ({
          wide: Math.max(document.documentElement.scrollWidth, document.querySelector("#scroll").scrollWidth) - innerWidth,
          composer: document.querySelector("#composer").getBoundingClientRect().bottom - innerHeight,
          ground: getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number),
        }));
        assert.ok(wide <= 0, `${wide} px too wide`);
        assert.ok(composer <= 0.5, `the composer is ${composer} px below the screen`);
        assert.equal(ground[0] < 128, colorScheme === "dark");
        assert.ok((await tab.screenshot()).length > 5000);
        await assertClean(...tabs);
        await person.close();
      }
    });
  }
});

describe("a server that goes away", { concurrency: 1 }, () => {
  it("is waited for after kill -9, and a message typed meanwhile arrives once", async () => {
    const { person, tabs } = await twoTabs();
    await server.stop("SIGKILL");
    for (const tab of tabs) {
      const words = await until("it waits", async () => (await wordsIn(tab, "waiting"))[0] && wordsIn(tab, "waiting"));
      for (const text of words) assert.match(text, /Reconnecting in \d+ s|Offline/);
    }
    await say(tabs[0], "typed while it was away");
    await tabs[0].locator(".item.own.pending").waitFor();
    await server.start();
    for (const tab of tabs) {
      await state(tab, "online", 60_000);
    }
    await tabs[0].locator(".item.own:not(.pending)").waitFor();
    await until("it is answered", async () => (await texts(tabs[0], "bot")).some((text) => text.includes("typed while it was away")));
    await until("the dots are gone", () => tabs[0].$eval("#typing", (dots) => !dots.classList.contains("on")));
    assert.deepEqual(await texts(tabs[0], "own"), ["typed while it was away"]);
    assert.equal((await texts(tabs[0], "bot")).length, 1);
    await say(tabs[0], "and now both");
    for (const tab of tabs) await until("both tabs have it", async () => (await texts(tab, "own")).filter((text) => text === "and now both").length === 1);
    for (const tab of tabs) assert.deepEqual(await tab.evaluate(() => window.seen.violations), []);
    await person.close();
  });

  it("says when to come back on SIGTERM, and leaves with 0", async () => {
    const { person, tabs } = await twoTabs();
    const [code] = await server.stop("SIGTERM");
    assert.equal(code, 0, server.log);
    for (const tab of tabs) await until("it waits", async () => (await wordsIn(tab, "waiting")).length > 0);
    await server.start();
    for (const tab of tabs) await state(tab, "online", 60_000);
    await person.close();
  });
});
