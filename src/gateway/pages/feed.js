// What the node tells once a second, over an event stream that is read by fetch: only that can send a key.

import { stored } from "/dom.js";

const RETRY_MS = { least: 500, most: 15_000 };
const SILENT_MS = 40_000; // past it even the heartbeat is missing
const RECORD_CHARS_MAX = 4 << 20;

/** The `data:` of each record of an event stream, as text. One with a name is no frame: it says that the stream is over. */
export class Records {
  #rest = "";

  add(text) {
    const records = (this.#rest + text).split("\n\n");
    this.#rest = records.pop();
    if (this.#rest.length > RECORD_CHARS_MAX) throw new Error("a record without an end");
    return records.flatMap((record) => {
      const lines = record.startsWith("event:") ? [] : record.split("\n").filter((line) => line.startsWith("data:"));
      return lines.length ? [lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n")] : [];
    });
  }
}

/** Waits a little longer each time, and never as long as somebody else. */
export const pause = (attempt, random = Math.random) => Math.min(RETRY_MS.most, RETRY_MS.least * 2 ** attempt) * (0.5 + random() / 2);

/** An operator's key: kept in this tab only, and taken out of the address at once. */
export function keptKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (location.hash.includes("key=")) history.replaceState(null, "", location.pathname + location.search);
  return given ? stored(sessionStorage, "tabcast-key", given) : stored(sessionStorage, "tabcast-key");
}

/**
 * Reads as long as the page lives. `on` hears `state(name, words)` and `frame(value)`, and gives another key when it is
 * asked by `key(reason)`: null if there is none to be had, and then nothing is read before `again` is called.
 */
export class Feed {
  #abort = null;
  #wake = null;
  #attempt = 0;

  constructor(on, key) {
    this.on = on;
    this.key = key;
  }

  async run() {
    for (;;) {
      const wait = await this.#read();
      if (wait !== 0) await this.#pause(wait);
    }
  }

  /** Asks again now, perhaps with another key. */
  again(key) {
    if (key !== undefined) this.key = key;
    this.#attempt = 0;
    this.#wake?.();
    this.#abort?.abort();
  }

  #pause(ms) {
    return new Promise((resolve) => {
      const timer = ms === Infinity ? null : setTimeout(resolve, ms);
      this.#wake = () => (clearTimeout(timer), resolve());
    }).finally(() => (this.#wake = null));
  }

  /** One connection; how long to wait for the next. */
  async #read() {
    this.on.state("connecting", this.#attempt ? "Connecting again" : "Connecting");
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    try {
      const headers = this.key ? { authorization: `Bearer ${this.key}` } : {};
      const response = await fetch("/events?watch=status", { headers, signal, cache: "no-store", credentials: "omit" });
      if (response.status === 401 || response.status === 403) return await this.#refused(response);
      if (!response.ok) return this.#later(await problem(response));
      await this.#listen(response);
      return this.#later("The stream has ended");
    } catch (error) {
      if (error.name === "AbortError" && this.#attempt === 0) return 0;
      return this.#later("No connection");
    } finally {
      this.#abort = null;
    }
  }

  async #listen(response) {
    const records = new Records();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let silent;
    try {
      for (;;) {
        silent = setTimeout(() => this.#abort?.abort(), SILENT_MS);
        const { done, value } = await reader.read();
        clearTimeout(silent);
        if (done) return;
        for (const text of records.add(value)) {
          const frame = JSON.parse(text);
          if (frame.type === "status") {
            this.#attempt = 0;
            this.on.frame(frame);
          }
        }
      }
    } finally {
      clearTimeout(silent);
    }
  }

  async #refused(response) {
    const reason = await problem(response);
    this.on.state("unauthorized", "No key");
    const key = await this.on.key(response.status, reason, this.key);
    if (!key) return Infinity;
    this.key = key;
    return 0;
  }

  #later(why) {
    const ms = pause(this.#attempt);
    this.#attempt += 1;
    this.on.state("waiting", `${why}; again in ${Math.max(1, Math.round(ms / 1000))} s`);
    return ms;
  }
}

async function problem(response) {
  const { error } = await response.json().catch(() => ({}));
  return String(error?.message ?? `The server said ${response.status}`);
}
