// /v1 as the official JavaScript SDK sees it, in Node and in a page of a listed origin.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createReadStream } from "node:fs";
import http from "node:http";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { after, before, describe, it } from "node:test";
import OpenAI from "openai";
import { Browser, Server, until } from "./harness.mjs";
import { Worker } from "./worker.mjs";

const MESSAGES = [{ role: "user", content: "hi" }];
let worker;
let server;
let client;

before(async () => {
  worker = await new Worker().start();
  server = await new Server({ ...worker.env, TABCAST_ANSWERS_PER_USER_MAX: "4" }).start();
  worker.server = server;
  client = new OpenAI({ baseURL: `${server.origin}/v1`, apiKey: "any", timeout: 15_000 });
});
after(async () => {
  await server?.stop();
  worker?.stop();
});

const ask = (options, of = client, request = {}) => of.chat.completions.create({ model: "tabcast", messages: MESSAGES, ...options }, request);
const textOf = (chunks) => chunks.map(({ choices }) => choices[0]?.delta.content ?? "").join("");

async function all(stream, chunks = []) {
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

describe("the official SDK", { concurrency: 1 }, () => {
  it("lists the models", async () => {
    const { data } = await client.models.list();
    assert.deepEqual(data.map(({ id, object, owned_by: owner }) => [id, object, owner]), [["tabcast", "model", "tabcast"]]);
    assert.equal((await client.models.retrieve("tabcast")).id, "tabcast");
  });

  it("reads a stream step by step, as the worker makes it", async () => {
    const stream = await ask({ stream: true, stream_options: { include_usage: true } });
    const turn = await worker.question();
    const chunks = stream[Symbol.asyncIterator]();
    const next = async () => (await chunks.next()).value;
    const first = await next();
    assert.deepEqual(first.choices, [{ index: 0, delta: { role: "assistant", content: "" }, logprobs: null, finish_reason: null }]);
    assert.equal(first.id, turn.id);
    assert.match(first.id, /^chatcmpl-[0-9a-f]{32}$/);
    const message = await turn.send("Grü");
    assert.equal((await next()).choices[0].delta.content, "Grü");
    await turn.edit(message, "Grüße 🌟\u2028");
    assert.equal((await next()).choices[0].delta.content, "ße 🌟\u2028");
    await turn.end();
    assert.deepEqual((await next()).choices, [{ index: 0, delta: {}, logprobs: null, finish_reason: "stop" }]);
    const last = await next();
    assert.deepEqual([last.choices, last.usage], [[], { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 }]);
    assert.deepEqual(await chunks.next(), { value: undefined, done: true });
  });

  it("reads a whole answer, with usage", async () => {
    const answering = ask({ temperature: 0.2 });
    const turn = await worker.question();
    assert.deepEqual(turn.message.extra.openai, { model: "tabcast", messages: MESSAGES, params: { temperature: 0.2 } });
    await turn.say("draft", "final");
    const { data, response } = await answering.withResponse();
    assert.equal(response.headers.get("x-request-id"), turn.id);
    assert.equal(data._request_id, turn.id);
    assert.deepEqual(data.choices, [{ index: 0, message: { role: "assistant", content: "final" }, logprobs: null, finish_reason: "stop" }]);
    assert.deepEqual(data.usage, { prompt_tokens: 1, completion_tokens: 2, total_tokens: 3 });
  });

  it("collects content with its own helper", async () => {
    const runner = client.chat.completions.stream({ model: "tabcast", messages: MESSAGES });
    await (await worker.question()).say("a", "ab", "abc");
    assert.equal(await runner.finalContent(), "abc");
  });

  it("leaves a stream: by abort, by its controller, by breaking off", async () => {
    const leave = {
      abort: async (stream, controller) => controller.abort(),
      controller: async (stream) => stream.controller.abort(),
      break: async (stream) => {
        for await (const chunk of stream) if (chunk) break;
      },
    };
    for (const [name, go] of Object.entries(leave)) {
      const controller = new AbortController();
      const stream = await ask({ stream: true }, client, { signal: controller.signal });
      const turn = await worker.question();
      await go(stream, controller);
      assert.ok(await worker.untilCancelled(turn), name);
    }
  });

  it("leaves a whole answer: by abort, and by its timeout", async () => {
    const controller = new AbortController();
    const aborted = assert.rejects(ask({}, client, { signal: controller.signal }), OpenAI.APIUserAbortError);
    const first = await worker.question();
    controller.abort();
    await aborted;
    assert.ok(await worker.untilCancelled(first));
    const late = assert.rejects(ask({}, client, { timeout: 300, maxRetries: 0 }), OpenAI.APIConnectionTimeoutError);
    const second = await worker.question();
    await late;
    assert.ok(await worker.untilCancelled(second));
  });

  it("asks anew after its own timeout, and the first is cancelled", async () => {
    const answering = ask({}, client, { timeout: 800, maxRetries: 1 });
    const first = await worker.question();
    const second = await worker.question();
    await second.say("the second time");
    assert.equal((await answering).choices[0].message.content, "the second time");
    assert.ok(await worker.untilCancelled(first));
  });

  it("throws the class of each error, and tries again only where nothing was asked", async () => {
    const refused = async (call, kind, status, code, type) => {
      const error = await call.then(() => assert.fail("it was answered"), (thrown) => thrown);
      assert.ok(error instanceof kind, `${error}`);
      assert.deepEqual([error.status, error.code, error.type], [status, code, type]);
      assert.ok(error.message);
      return error;
    };
    const asked = worker.asked;
    const bad = await refused(ask({ messages: [] }), OpenAI.BadRequestError, 400, null, "invalid_request_error");
    assert.equal(bad.param, "messages");
    await refused(client.models.retrieve("none"), OpenAI.NotFoundError, 404, "not_found", "invalid_request_error");

    const keyed = { headers: { "idempotency-key": `key-${process.pid}` } };
    const stream = await ask({ stream: true }, client, keyed);
    const conflict = await refused(ask({}, client, keyed), OpenAI.ConflictError, 409, "conflict", "invalid_request_error");
    assert.equal(conflict.requestID, (await worker.question()).id);
    stream.controller.abort();
    await until("it was cancelled", () => worker.cancelled.includes(conflict.requestID));

    const streams = [];
    for (let count = 0; count < 4; count += 1) streams.push(await ask({ stream: true }));
    await refused(ask({}, client, { maxRetries: 0 }), OpenAI.RateLimitError, 429, "too_many_answers", "rate_limit_error");
    for (const each of streams) each.controller.abort();
    for (let count = 0; count < 4; count += 1) assert.ok(await worker.untilCancelled(await worker.question()));
    assert.equal(worker.asked - asked, 5);

    for (const [reason, status, code] of [["error", 500, "worker_error"], ["timeout", 504, "timeout"], ["cancelled", 503, "cancelled"]]) {
      const before = worker.asked;
      const answering = refused(ask({}), OpenAI.InternalServerError, status, code, "server_error");
      const turn = await worker.question();
      await turn.end(reason);
      assert.equal((await answering).requestID, turn.id);
      assert.equal(worker.asked, before + 1, "the SDK does not ask again");
    }
  });

  it("throws an error of the middle of a stream after what came before it", async () => {
    const stream = await ask({ stream: true });
    const turn = await worker.question();
    await turn.send("half");
    await turn.end("error");
    const chunks = [];
    await assert.rejects(all(stream, chunks), (error) => error instanceof OpenAI.APIError && error.code === "worker_error" && error.type === "server_error");
    assert.equal(textOf(chunks), "half");
  });

  it("finds a detached answer again", async () => {
    const stream = await ask({ stream: true }, client, { headers: { "x-tabcast-detach": "true" } });
    const turn = await worker.question();
    const message = await turn.send("one");
    stream.controller.abort();
    await turn.edit(message, "one, two");
    const again = await client.get(`/chat/completions/${turn.id}/events`, { stream: true });
    await turn.end();
    assert.equal(textOf(await all(again)), "one, two");
    assert.ok(!worker.cancelled.includes(turn.id));
  });

  it("refuses keys that are not its own", async () => {
    const keyed = await new Server({ TABCAST_WORKER: "none", TABCAST_API_KEYS: "worker-key", TABCAST_OPENAI_KEYS: "olga:key-of-olga" }).start();
    const as = (apiKey) => new OpenAI({ baseURL: `${keyed.origin}/v1`, apiKey }).models.list();
    await assert.rejects(as("wrong"), (error) => error instanceof OpenAI.AuthenticationError && error.code === "invalid_api_key");
    await assert.rejects(as("worker-key"), (error) => error instanceof OpenAI.PermissionDeniedError && error.type === "permission_error");
    assert.equal((await as("key-of-olga")).data.length, 1);
    await keyed.stop();
  });
});

describe("the same SDK in a page of another origin", { concurrency: 1 }, () => {
  const ROOT = path.dirname(fileURLToPath(import.meta.resolve("openai")));
  const pages = http.createServer((request, response) => {
    const file = path.join(ROOT, path.normalize(request.url));
    if (request.url === "/") return response.writeHead(200, { "content-type": "text/html" }).end("<!doctype html><title>a page</title>");
    createReadStream(file)
      .on("error", () => response.writeHead(404).end())
      .on("open", () => response.writeHead(200, { "content-type": "text/javascript" }))
      .pipe(response);
  });
  let browser;
  let keyed;

  before(async () => {
    pages.listen(0, "127.0.0.1");
    await once(pages, "listening");
    browser = await new Browser().start();
    const origin = `http://127.0.0.1:${pages.address().port}`;
    keyed = await new Server({ TABCAST_OPENAI_KEYS: "olga:key-of-olga", TABCAST_ALLOWED_ORIGINS: origin }).start();
  });
  after(async () => {
    await browser?.stop();
    await keyed?.stop();
    pages.close();
  });

  /** Asks from a page that came from `host`; a page may not read what its origin is not listed for. */
  async function from(host) {
    const person = await browser.person();
    const tab = await person.newPage();
    await tab.goto(`http://${host}:${pages.address().port}/`);
    const result = await tab.evaluate(async (baseURL) => {
      const { default: OpenAI } = await import("/index.mjs");
      const client = new OpenAI({ baseURL, apiKey: "key-of-olga", dangerouslyAllowBrowser: true, maxRetries: 0 });
      try {
        const { data: stream, response } = await client.chat.completions.create({ model: "tabcast", messages: [{ role: "user", content: "from a page" }], stream: true }).withResponse();
        let text = "";
        for await (const chunk of stream) text += chunk.choices[0].delta.content ?? "";
        const whole = await client.chat.completions.create({ model: "tabcast", messages: [{ role: "user", content: "whole" }] });
        const code = await client.models.retrieve("none").catch((error) => error.code);
        return { text, id: response.headers.get("x-request-id"), whole: whole.choices[0].message.content, code };
      } catch (error) {
        return { error: error.constructor.name };
      }
    }, `${keyed.origin}/v1`);
    await person.close();
    return result;
  }

  it("is served if the origin is listed", async () => {
    const { text, id, whole, code } = await from("127.0.0.1");
    assert.deepEqual([text, whole, code], ["You said: from a page", "You said: whole", "not_found"]);
    assert.match(id, /^chatcmpl-/, "a page may read the id");
  });

  it("reads nothing if it is not", async () => {
    const { error } = await from("localhost");
    assert.ok(error, "it was answered");
  });
});
