// Starts the binary and Chromium for a test file, and ends both.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const BINARY = process.env.TABCAST_BIN ?? fileURLToPath(new URL("../../target/release/tabcast", import.meta.url));
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

export async function until(what, check, timeoutMs = 15_000) {
  const end = Date.now() + timeoutMs;
  for (;;) {
    const value = await check();
    if (value) return value;
    if (Date.now() > end) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
}

export class Server {
  /** On a free port, which it keeps when it is started again. */
  constructor(env = {}) {
    const clean = Object.entries(process.env).filter(([name]) => !name.startsWith("TABCAST_"));
    this.env = { ...Object.fromEntries(clean), TABCAST_LISTEN: "127.0.0.1:0", TABCAST_DRAIN_SPREAD: "500ms", ...env };
  }

  async start() {
    this.log = "";
    this.process = spawn(BINARY, [], { env: this.env, stdio: ["ignore", "pipe", "pipe"] });
    for (const stream of [this.process.stdout, this.process.stderr]) stream.on("data", (chunk) => (this.log += chunk));
    this.exit = once(this.process, "exit");
    const [, address] = await until("the server is ready", () => {
      assert.equal(this.process.exitCode, null, `the server left:\n${this.log}`);
      return this.log.match(/ready: https?:\/\/(127\.0\.0\.1:\d+)\//);
    });
    this.env.TABCAST_LISTEN = address;
    this.origin = `${this.env.TABCAST_TLS_CERT ? "https" : "http"}://${address}`;
    return this;
  }

  async stop(signal = "SIGTERM") {
    if (this.process.exitCode === null && this.process.signalCode === null) this.process.kill(signal);
    return this.exit;
  }

  async api(route, body, method = "POST") {
    const response = await fetch(`${this.origin}/api/${route}`, { method, headers: { "content-type": "application/json" }, body: body && JSON.stringify(body) });
    assert.ok(response.ok, `${route}: ${response.status} ${await response.clone().text()}`);
    return response.json();
  }
}

/** What a page went through, recorded from inside so that nothing short is missed. */
function record() {
  window.seen = { typing: 0, edits: 0, added: 0, blobs: {}, violations: [], states: [] };
  const { createObjectURL } = URL;
  URL.createObjectURL = (blob) => {
    const url = createObjectURL.call(URL, blob);
    window.seen.blobs[url] = blob.type;
    return url;
  };
  document.addEventListener("securitypolicyviolation", (event) => window.seen.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
  document.addEventListener("DOMContentLoaded", () => {
    const status = document.getElementById("status");
    new MutationObserver(() => window.seen.states.push([status.dataset.state, document.getElementById("status-text").textContent])).observe(
      status, { subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["data-state"] });
    new MutationObserver((changes) => {
      if (document.getElementById("typing")?.classList.contains("on")) window.seen.typing += 1;
      for (const { type, addedNodes, target } of changes) {
        if (type === "characterData" && target.parentElement?.classList.contains("bubble")) window.seen.edits += 1;
        for (const node of addedNodes) if (node.nodeName === "LI") window.seen.added += 1;
      }
    }).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["class"] });
  });
}

export class Browser {
  async start() {
    this.folder = mkdtempSync(path.join(tmpdir(), "tabcast-browser-"));
    this.browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS, env: { ...process.env, HOME: this.folder } });
    return this;
  }

  async stop() {
    await this.browser.close();
    rmSync(this.folder, { recursive: true, force: true });
  }

  /** A person's browser: tabs of one context share their storage. */
  async person(options = {}) {
    const context = await this.browser.newContext({ viewport: { width: 1100, height: 760 }, ...options });
    context.setDefaultTimeout(15_000);
    await context.addInitScript(record);
    return context;
  }
}

export async function openTab(context, address, { wait = "online", before = () => {} } = {}) {
  const tab = await context.newPage();
  tab.problems = [];
  tab.on("console", (message) => ["error", "warning"].includes(message.type()) && tab.problems.push(message.text()));
  tab.on("pageerror", (error) => tab.problems.push(String(error)));
  await before(tab);
  tab.answer = await tab.goto(address);
  if (wait) await state(tab, wait);
  return tab;
}

export const state = (tab, name, timeout = 15_000) => tab.locator(`#status[data-state="${name}"]`).waitFor({ timeout });

/** The words that the status has shown in a state, also those that stood for a moment only. */
export const wordsIn = (tab, name) => tab.evaluate((wanted) => window.seen.states.filter(([state]) => state === wanted).map(([, words]) => words), name);

export async function say(tab, text) {
  await tab.locator("#text").fill(text);
  await tab.locator("#text").press("Enter");
}

/** The texts of the messages, oldest first; `own` or `bot` alone if asked. */
export const texts = (tab, whose = "") =>
  tab.$$eval({ "": "#log .item", own: "#log .item.own", bot: "#log .item:not(.own)" }[whose], (items) => items.map((item) => item.querySelector(".bubble").textContent));

/** Nothing was refused by the page's policy, nothing was thrown, nothing was logged as an error. */
export async function assertClean(...tabs) {
  for (const tab of tabs) {
    assert.deepEqual(tab.problems, []);
    assert.deepEqual(await tab.evaluate(() => window.seen.violations), []);
  }
}
