// From nothing to a chat in the page: what the README's "Two minutes" says, as somebody does it who has just found it.
//
// The first command runs in this checkout, so that a gateway that is built already is not built again. With
// WALK_FROM_NOTHING=1 it runs in a fresh clone with an empty target folder, and building counts.

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { after, before, describe, it } from "node:test";
import { Browser, assertClean, openTab, say, state, texts, until } from "../browser/harness.mjs";

const root = fileURLToPath(new URL("../..", import.meta.url));
const isFromNothing = process.env.WALK_FROM_NOTHING === "1";
const AT_ONCE = 10_000; // milliseconds from the end of the build to a chat

/** The section of the README that a newcomer follows. */
const section = () => readFileSync(path.join(root, "README.md"), "utf8").split("\n## Two minutes\n")[1].split("\n## ")[0];

describe("from nothing to a chat in the page", { concurrency: 1 }, () => {
  let folder;
  let browser;
  let gateway;
  let address;
  let output = "";
  let begun;
  let built;

  before(async () => {
    folder = mkdtempSync(path.join(tmpdir(), "tabcast-walk-"));
    browser = await new Browser().start();
  });
  after(async () => {
    gateway?.kill("SIGTERM");
    await browser?.stop();
    rmSync(folder, { recursive: true, force: true });
  });

  it("the first command of the README starts a gateway that prints its page's address", { timeout: 1_800_000 }, async () => {
    begun = Date.now();
    let checkout = root;
    const env = { ...process.env, TABCAST_LISTEN: "127.0.0.1:0" };
    delete env.TABCAST_BIN;
    if (isFromNothing) {
      execFileSync("git", ["clone", "--quiet", root, path.join(folder, "tabcast")]);
      checkout = path.join(folder, "tabcast");
      env.CARGO_TARGET_DIR = path.join(folder, "target");
    }
    const [, command] = section().match(/```sh\n([^#\n]+?) *#/);
    assert.equal(command, "cargo run --release");
    gateway = spawn(command, { shell: "/bin/bash", cwd: checkout, env, stdio: ["ignore", "pipe", "pipe"], detached: false });
    for (const stream of [gateway.stdout, gateway.stderr]) stream.on("data", (chunk) => (output += chunk));
    const says = (pattern) => () => {
      assert.equal(gateway.exitCode, null, output);
      return output.match(pattern);
    };
    await until("it is built", says(/^ *Running `/m), 1_800_000);
    built = Date.now();
    [, address] = await until("an address is printed", says(/ready: (http:\/\/\S+)/));
  });

  it("two tabs show what is written, and an answer that grows", async () => {
    const person = await browser.person();
    const tabs = [await openTab(person, address), await openTab(person, address)];
    await say(tabs[0], "is anybody there?");
    for (const tab of tabs) {
      await until("an answer", async () => (await texts(tab, "bot")).some((text) => text.includes("is anybody there?")));
      assert.deepEqual(await texts(tab, "own"), ["is anybody there?"]);
    }
    const seconds = (since) => ((Date.now() - since) / 1000).toFixed(1);
    // What building takes is the machine's: it is told, and is no limit of a test.
    console.log(`# a chat ${seconds(begun)} s after the first command, ${seconds(built)} s after it was built`);
    assert.ok(Date.now() - built < AT_ONCE, `${seconds(built)} s`);
    await assertClean(...tabs);
  });

  it("the README's one line from outside arrives in the page, and its /v1 answers", async () => {
    const [, line] = section().match(/`(curl [^`]+)`/);
    const person = await browser.person();
    const tab = await openTab(person, `${address}?user=walker`);
    const sent = line.replace("http://127.0.0.1:8080/", address).replace("NAME", "walker");
    assert.notEqual(sent, line);
    const answer = JSON.parse(execFileSync("/bin/bash", ["-c", sent.replace("curl ", "curl -fsS ")]));
    assert.equal(answer.tabs, 1);
    await until("the text", async () => (await texts(tab, "bot")).includes("Hello!"));
    const completion = await fetch(`${address}v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "any", messages: [{ role: "user", content: "Are you there?" }] }),
    });
    assert.equal(completion.status, 200);
    const { choices } = await completion.json();
    assert.ok(choices[0].message.content.length > 0);
    await state(tab, "online");
  });
});
