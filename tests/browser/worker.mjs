// A worker behind a webhook whose every word the test decides.

import { once } from "node:events";
import http from "node:http";
import { until } from "./harness.mjs";

/** A question as the worker got it, and the ways to answer it. */
class Turn {
  constructor(worker, message) {
    Object.assign(this, { worker, message, id: message.extra.request_id });
  }

  call(route, body) {
    return this.worker.server.api(route, { channel_id: this.message.channel_id, ...body });
  }

  async send(text) {
    return (await this.call("send", { text })).id;
  }

  edit(id, text) {
    return this.call("edit", { message_id: id, text });
  }

  end(reason = "stop") {
    return this.call("end", { reason });
  }

  async say(...texts) {
    const id = await this.send(texts[0]);
    for (const text of texts.slice(1)) await this.edit(id, text);
    await this.end();
  }
}

export class Worker {
  /** `server` is set once there is one: it needs `env` to start. */
  async start() {
    this.questions = [];
    this.cancelled = [];
    this.asked = 0;
    this.listener = http.createServer(async (request, response) => {
      let body = "";
      for await (const part of request.setEncoding("utf8")) body += part;
      const message = JSON.parse(body);
      const { cancel } = message.extra;
      if (cancel) this.cancelled.push(cancel.request_id);
      else this.asked += this.questions.push(new Turn(this, message)) && 1;
      response.writeHead(204).end();
    });
    this.listener.listen(0, "127.0.0.1");
    await once(this.listener, "listening");
    this.env = { TABCAST_WORKER: "webhook", TABCAST_WEBHOOK_URL: `http://127.0.0.1:${this.listener.address().port}/` };
    return this;
  }

  question() {
    return until("a question", () => this.questions.shift());
  }

  async untilCancelled(turn) {
    await until("the worker is told that nobody waits", () => this.cancelled.includes(turn.id));
    const { delivered, reason } = await turn.call("send", { text: "too late" });
    return !delivered && reason === "no_such_stream";
  }

  stop() {
    this.listener.closeAllConnections();
    this.listener.close();
  }
}
