// SillyTavern with the gateway as its custom OpenAI-compatible endpoint: what its interface asks of its own server, and
// then the interface itself in Chromium, for a chat as a person has it.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import net from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { after, before, describe, it } from "node:test";
import { Browser, Server, until } from "../browser/harness.mjs";
import { Worker } from "../browser/worker.mjs";

const ROOT = path.dirname(fileURLToPath(import.meta.resolve("sillytavern/package.json")));
/** It compiles its interface when it is started first. */
const START_MS = 120_000;
let folder;
let tavern;
let worker;
let server;

/** It takes no port of its own choice. */
async function freePort() {
  const probe = net.createServer().listen(0, "127.0.0.1");
  await once(probe, "listening");
  const { port } = probe.address();
  probe.close();
  await once(probe, "close");
  return port;
}

class Tavern {
  async start(port) {
    this.origin = `http://127.0.0.1:${port}`;
    const config = path.join(folder, "config.yaml");
    writeFileSync(config, "skipContentCheck: false\nbrowserLaunch:\n  enabled: false\nwhitelistMode: false\ndisableCsrfProtection: true\nextensions:\n  enabled: false\n");
    const options = ["--port", port, "--dataRoot", path.join(folder, "data"), "--configPath", config, "--disableCsrf", "--whitelist", "false"];
    this.log = "";
    this.process = spawn(process.execPath, [path.join(ROOT, "server.js"), ...options.map(String)], { env: { ...process.env, HOME: folder, NODE_ENV: "production" }, stdio: ["ignore", "pipe", "pipe"] });
    for (const stream of [this.process.stdout, this.process.stderr]) stream.on("data", (chunk) => (this.log += chunk));
    this.exit = once(this.process, "exit");
    await until(
      "SillyTavern is ready",
      () => {
        assert.equal(this.process.exitCode, null, `SillyTavern left:\n${this.log}`);
        return fetch(this.origin).then(({ ok }) => ok, () => false);
      },
      START_MS,
    );
    return this;
  }

  async stop() {
    this.process?.kill("SIGKILL");
    await this.exit;
  }

  post(route, body, signal) {
    return fetch(`${this.origin}/api/backends/chat-completions/${route}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
  }

  status(url = `${server.origin}/v1`) {
    return this.post("status", { reverse_proxy: "", proxy_password: "", chat_completion_source: "custom", custom_url: url, custom_include_headers: "" });
  }

  /** What `createGenerationParameters` of its interface makes for the source "custom". */
  generate(type, messages, { stream = false, signal, ...more } = {}) {
    const body = {
      type, messages, stream, model: "tabcast", temperature: 1, frequency_penalty: 0, presence_penalty: 0, top_p: 1, max_tokens: 300, logit_bias: {}, stop: [], chat_completion_source: "custom",
      user_name: "User", char_name: "Assistant", group_names: [], include_reasoning: true, reasoning_effort: "auto", enable_web_search: false, request_images: false, custom_prompt_post_processing: "",
      custom_url: `${server.origin}/v1`, custom_include_body: "", custom_exclude_body: "", custom_include_headers: "", ...more,
    };
    return this.post("generate", body, signal);
  }
}

before(async () => {
  folder = mkdtempSync(path.join(tmpdir(), "tabcast-tavern-"));
  worker = await new Worker().start();
  server = await new Server(worker.env).start();
  worker.server = server;
  tavern = await new Tavern().start(await freePort());
});
after(async () => {
  await tavern?.stop();
  await server?.stop();
  worker?.stop();
  rmSync(folder, { recursive: true, force: true });
});

const HI = [{ role: "user", content: "Hi" }];

/** The texts of a stream as its interface reads them: whole records, up to `[DONE]`. */
async function read(response, until = () => false) {
  let [rest, text] = ["", ""];
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const records = (rest + part).split("\n\n");
    rest = records.pop();
    for (const record of records.filter((one) => one.startsWith("data: "))) {
      if (record === "data: [DONE]") return { text, isDone: true };
      const value = JSON.parse(record.slice(6));
      if (value.error) return { text, error: value.error };
      text += value.choices[0]?.delta?.content ?? "";
    }
    if (until(text)) break;
  }
  return { text, isDone: false };
}

describe("SillyTavern's server", { concurrency: 1 }, () => {
  it("checks the status, which lists the models", async () => {
    for (const url of [`${server.origin}/v1`, `${server.origin}/v1/`]) {
      const { data, error } = await (await tavern.status(url)).json();
      assert.equal(error, undefined);
      assert.deepEqual(data.map(({ id }) => id), ["tabcast"]);
    }
  });

  it("sends its test message, and quiet generations, without a stream", async () => {
    const answering = tavern.generate("quiet", HI);
    const turn = await worker.question();
    assert.equal(turn.message.content, "Hi");
    await turn.say("Hel", "Hello!");
    const answer = await (await answering).json();
    assert.equal(answer.choices[0].message.content, "Hello!");
    assert.equal(answer.choices[0].finish_reason, "stop");
  });

  it("streams, as the worker goes", async () => {
    const messages = [{ role: "system", content: "Write Assistant's next reply." }, { role: "assistant", content: "Hello." }, { role: "user", content: "how are you? 🌟" }, { role: "system", content: "[Start a new chat]" }];
    const response = await tavern.generate("normal", messages, { stream: true });
    assert.ok(response.ok);
    const turn = await worker.question();
    assert.equal(turn.message.content, "how are you? 🌟", "the last that a user said");
    assert.deepEqual(turn.message.extra.openai.messages, messages);
    const answering = read(response);
    await turn.say("I", "I am", "I am fine 🌟");
    assert.deepEqual(await answering, { text: "I am fine 🌟", isDone: true });
  });

  it("stops a stream and a whole answer when its button is pressed", async () => {
    const controller = new AbortController();
    const response = await tavern.generate("normal", HI, { stream: true, signal: controller.signal });
    const turn = await worker.question();
    await turn.send("on and on");
    const reading = read(response, (text) => text.length > 0);
    assert.equal((await reading).text, "on and on");
    controller.abort();
    assert.ok(await worker.untilCancelled(turn));

    const second = new AbortController();
    const answering = assert.rejects(tavern.generate("quiet", HI, { signal: second.signal }));
    const quiet = await worker.question();
    second.abort();
    await answering;
    assert.ok(await worker.untilCancelled(quiet));
  });

  it("shows errors, of requests and of streams", async () => {
    const bad = await tavern.generate("normal", [], { stream: true });
    assert.equal(bad.status, 400);
    assert.match((await bad.json()).error.message, /messages/);
    const answering = tavern.generate("quiet", HI);
    await (await worker.question()).end("error");
    assert.ok((await (await answering).json()).error.message);
    const response = await tavern.generate("normal", HI, { stream: true });
    const turn = await worker.question();
    const reading = read(response);
    await turn.send("half");
    await turn.end("error");
    const { text, error } = await reading;
    assert.deepEqual([text, error.code], ["half", "worker_error"]);
  });
});

describe("SillyTavern's interface", { concurrency: 1 }, () => {
  let browser;
  let tab;

  before(async () => {
    browser = await new Browser().start();
    const person = await browser.person();
    tab = await person.newPage();
    await tab.goto(tavern.origin);
    // It asks a newcomer's name.
    await tab.locator("dialog[open] .popup-input, dialog[open] .onboarding").first().waitFor();
    await tab.locator("dialog[open] .popup-button-ok").last().click();
    await tab.locator("#send_textarea").waitFor();
  });
  after(() => browser?.stop());

  const connect = (url) =>
    tab.evaluate((value) => {
      const set = (selector, to, event) => {
        const field = document.querySelector(selector);
        if (field.type === "checkbox") field.checked = to;
        else field.value = to;
        window.$(field).trigger(event);
      };
      set("#main_api", "openai", "change");
      set("#chat_completion_source", "custom", "change");
      set("#custom_api_url_text", value, "input");
      set("#custom_model_id", "tabcast", "input");
      set("#stream_toggle", true, "change");
      document.querySelector("#api_button_openai").click();
    }, url);

  async function write(text) {
    await tab.locator("#send_textarea").fill(text);
    // Right after it has connected its interface is still busy, and takes nothing; a second press that comes too soon
    // would ask for an answer to nothing.
    const isTaken = async () => (await tab.locator("#send_textarea").inputValue()) === "";
    await until("it is sent", async () => {
      await tab.evaluate(() => document.querySelector("#send_but").click());
      return until("it is taken", isTaken, 3000).catch(() => false);
    });
  }

  const last = () => tab.locator("#chat .last_mes");
  const isBusy = () => tab.locator("#mes_stop").isVisible();

  it("connects: the status is valid, and the model can be chosen", async () => {
    await connect(`${server.origin}/v1`);
    await until("it is connected", async () => /Valid/.test(await tab.locator(".online_status_text").last().textContent()));
    assert.ok((await tab.locator("#model_custom_select option").allTextContents()).includes("tabcast"));
  });

  const shown = async () => (await last().locator(".mes_text").textContent()).trim();

  /** An answer that grows until some of it is shown: its interface may show a step only with the next one. */
  async function grow(turn) {
    let text = "They shine";
    const message = await turn.send(text);
    await until("its beginning is shown", async () => {
      await turn.edit(message, (text += " and shine"));
      return /^They shine( and shine)+$/.test(await shown());
    });
    return { message, text };
  }

  it("shows an answer as it grows", async () => {
    await write("how are the stars tonight?");
    const turn = await worker.question();
    assert.equal(turn.message.content, "how are the stars tonight?");
    const { message, text } = await grow(turn);
    assert.ok(await isBusy());
    await turn.edit(message, `${text}. 🌟`);
    await turn.end();
    await until("it is done", async () => !(await isBusy()));
    assert.equal(await shown(), `${text}. 🌟`);
  });

  it("stops it by its button, and the worker is told", async () => {
    await write("go on");
    const turn = await worker.question();
    await grow(turn);
    await tab.locator("#mes_stop").click();
    assert.ok(await worker.untilCancelled(turn));
    await until("it has stopped", async () => !(await isBusy()));
    assert.match(await shown(), /^They shine/);
  });

  it("generates quietly, beside the chat", async () => {
    const before = await tab.locator("#chat .mes").count();
    const quiet = tab.evaluate(() => window.SillyTavern.getContext().generateQuietPrompt({ quietPrompt: "Sum it up." }));
    const turn = await worker.question();
    await turn.say("stars", "stars shine");
    assert.equal(await quiet, "stars shine");
    assert.equal(await tab.locator("#chat .mes").count(), before);
  });
});
