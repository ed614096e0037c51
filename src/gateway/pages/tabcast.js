// The browser's side of tabcast: one connection that comes back by itself, and an outbox that outlives it.
//
//   const client = new Tabcast({ query: () => ({ user: "alice" }) });
//   client.addEventListener("message", ({ detail }) => show(detail.text));
//   client.connect();
//   const { id } = await client.send({ type: "message", text: "hello" });
//
// Events: `state` (detail: see `Tabcast.state`) and one for each frame type in FRAME_TYPES (detail: the frame).
// Frames of other types are ignored, as the protocol asks.

/** Close codes after which coming back by itself makes no sense. */
const FINAL_CODES = new Set([1000, 1002, 1003, 1007, 1008, 1009, 4010]);
const CODE_LOST = 1006;
const CODE_TOKEN_EXPIRED = 4001;

const FRAME_TYPES = new Set(["message", "file", "edit", "typing", "end", "hello", "ack", "error", "pong", "gap", "draining"]);

/** Every limit, with its unit in its name; `new Tabcast({ limits: { … } })` changes single ones. */
const LIMITS = Object.freeze({
  /** The first wait is a random part of this, each later one of twice as much, up to the maximum. */
  backoffMs: 500,
  backoffMaxMs: 30_000,
  /** A connection that lasted this long starts the backoff afresh. */
  stableMs: 10_000,
  /** A handshake that takes longer is given up. */
  handshakeMs: 15_000,
  /** Silence for this long while something waits for its ack asks for a sign of life. */
  ackMs: 10_000,
  /** A sign of life must come within this after a ping. */
  pongMs: 5_000,
  /** What may wait for its ack, sent or not. */
  outboxFramesMax: 100,
  outboxCharsMax: 16 << 20,
  /** Ordered frames that are named when it comes back. Those of rooms are not kept by the server: one of the others is needed. */
  positionsMax: 16,
  /** "Still typing" is not said more often. */
  typingMs: 4_000,
});

/** Why something that was sent came to nothing: a code of the server's `error` frame, or `outbox_full` or `closed`. */
export class TabcastError extends Error {
  constructor(code, message) {
    super(message);
    this.name = "TabcastError";
    this.code = code;
  }
}

/** 128 random bits in hexadecimal; works on plain http too, where `crypto.randomUUID` does not exist. */
export function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * One way to reach the server. Another one takes and returns the same: `open` once, `text` for each frame,
 * `close({ code, reason })` once; after `close()` has been called, nothing more.
 */
export function webSocketLink({ path, query, token, open, text, close }) {
  const url = new URL(path, location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  const socket = token ? new WebSocket(url, ["tabcast", `tabcast.bearer.${token}`]) : new WebSocket(url);
  socket.onopen = open;
  socket.onmessage = (event) => typeof event.data === "string" && text(event.data);
  socket.onclose = ({ code, reason }) => close({ code, reason });
  return {
    send: (frame) => socket.send(frame),
    close(code, reason) {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close(code, reason);
    },
  };
}

export class Tabcast extends EventTarget {
  #path;
  #query;
  #token;
  #openLink;
  #limits;

  #state = Object.freeze({ name: "idle" });
  #attempt = 0;
  #positions = []; // ids of the last ordered frames, the newest first: what comes after them is asked for
  #generation = 0; // a callback of an older connection finds another number, and does nothing
  #link = null;
  #retryTimer = 0;
  #stableTimer = 0;
  #pongTimer = 0;
  #ackTimer = 0;
  #retryAfterMs = null;
  #isRefused = false;
  #heardAt = 0;
  #typingSaid = { active: false, at: 0 };

  #outbox = new Map(); // client id → { text, room, sent, resolve, reject }, in the order of sending
  #outboxChars = 0;
  #rooms = new Map(); // name → { clientId, joined, resolve, reject }

  /**
   * `query()` gives the parameters of the address. `token(reason)` gives, now or later, a token, `null` for none
   * needed, or `undefined` for "there is none, stop"; `reason` is "start", "reconnect", "expired" or "refused".
   */
  constructor({ path = "/ws", query = () => ({}), token = () => null, link = webSocketLink, limits = {} } = {}) {
    super();
    this.#path = path;
    this.#query = query;
    this.#token = token;
    this.#openLink = link;
    this.#limits = { ...LIMITS, ...limits };
    addEventListener("online", () => this.#wake());
    addEventListener("pageshow", () => this.#wake());
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.#wake());
  }

  /** `{ name }` of idle, connecting, online, waiting (`retryAt`, `code`), unauthorized, or closed (`code`, `reason`). */
  get state() {
    return this.#state;
  }

  /** Connects, or, if it waits to do so, does it now. */
  connect() {
    if (this.#state.name === "online" || this.#state.name === "connecting") return;
    this.#open(this.#state.name === "idle" ? "start" : "reconnect");
  }

  /** Ends the connection and starts another, for a changed identity. What is in the outbox is refused. */
  restart() {
    this.close();
    this.#attempt = 0;
    this.#positions = [];
    this.#open("start");
  }

  /** Ends the connection for good. */
  close() {
    this.#finish(1000, "closed by this page");
  }

  /** Sends a frame, now or once connected, again after a loss, until it is acked: `{ id }` if a message came of it. */
  send(frame) {
    const clientId = frame.client_id ?? randomId();
    const text = JSON.stringify({ ...frame, client_id: clientId });
    return new Promise((resolve, reject) => {
      const full = this.#outbox.size >= this.#limits.outboxFramesMax || this.#outboxChars + text.length > this.#limits.outboxCharsMax;
      if (full) return reject(new TabcastError("outbox_full", "Too much is waiting to be sent."));
      if (this.#state.name === "closed") return reject(new TabcastError("closed", "Not connected."));
      this.#outbox.set(clientId, { text, room: frame.room, sent: false, resolve, reject });
      this.#outboxChars += text.length;
      this.#flush();
    });
  }

  /** Joins a room, again after each reconnect. Resolves once broadcasts reach this tab. */
  join(room) {
    return new Promise((resolve, reject) => {
      this.#rooms.set(room, { clientId: "", joined: false, resolve, reject });
      this.#sendJoin(room);
    });
  }

  leave(room) {
    if (this.#rooms.delete(room)) this.#transmit({ type: "leave", room });
  }

  /** Tells the worker that the person types; said once in a while, and never queued. */
  typing(active, room) {
    const now = performance.now();
    const { active: was, at } = this.#typingSaid;
    if (active === was && (!active || now - at < this.#limits.typingMs)) return;
    if (this.#transmit({ type: "typing", active, ...(room && { room }) })) this.#typingSaid = { active, at: now };
  }

  /** Asks for a sign of life, and starts anew if none comes. The server's own heartbeat is not visible to a page. */
  check() {
    if (this.#pongTimer || !this.#transmit({ type: "ping" })) return;
    this.#pongTimer = setTimeout(() => this.#drop(), this.#limits.pongMs);
  }

  // ---- connection ----

  #set(state) {
    this.#state = Object.freeze(state);
    this.dispatchEvent(new CustomEvent("state", { detail: this.#state }));
  }

  #wake() {
    if (this.#state.name === "waiting" && !this.#retryIsOrdered()) this.#open("reconnect");
    else if (this.#state.name === "online" && performance.now() - this.#heardAt > this.#limits.ackMs) this.check();
  }

  #retryIsOrdered() {
    return this.#state.ordered === true; // the server named the moment, so that not all come at once
  }

  async #open(why) {
    const generation = ++this.#generation;
    clearTimeout(this.#retryTimer);
    this.#set({ name: "connecting" });
    const token = await (async () => this.#token(why))().catch(() => undefined);
    if (generation !== this.#generation) return;
    if (token === undefined) return this.#set({ name: "unauthorized" });

    let opened = false;
    const current = (act) => (value) => generation === this.#generation && act(value);
    const lost = current(({ code, reason }) => this.#lost({ opened, code, reason, token }));
    const handshake = setTimeout(() => !opened && generation === this.#generation && this.#drop(token), this.#limits.handshakeMs);
    try {
      this.#link = this.#openLink({
        path: this.#path,
        query: { ...this.#query(), ...(this.#positions.length > 0 && { after: this.#positions.join(",") }) },
        token,
        open: current(() => {
          opened = true;
          clearTimeout(handshake);
          this.#opened();
        }),
        text: current((text) => this.#receive(text)),
        close: (ending) => {
          clearTimeout(handshake);
          lost(ending);
        },
      });
    } catch {
      clearTimeout(handshake);
      this.#open("refused"); // a token with characters that no header can carry
    }
  }

  #opened() {
    this.#heardAt = performance.now();
    this.#retryAfterMs = null;
    this.#typingSaid = { active: false, at: 0 };
    this.#stableTimer = setTimeout(() => (this.#attempt = 0), this.#limits.stableMs);
    this.#set({ name: "online" });
    for (const room of this.#rooms.keys()) this.#sendJoin(room);
    this.#flush();
  }

  /** The connection does not answer: as if it had been lost, without waiting for its close. */
  #drop(token = null) {
    const opened = this.#state.name === "online";
    this.#link?.close();
    this.#generation += 1;
    this.#lost({ opened, code: CODE_LOST, reason: "no answer", token });
  }

  #unlink() {
    this.#link = null;
    for (const timer of [this.#retryTimer, this.#stableTimer, this.#pongTimer, this.#ackTimer]) clearTimeout(timer);
    this.#pongTimer = this.#ackTimer = 0;
    for (const entry of this.#outbox.values()) entry.sent = false;
    for (const entry of this.#rooms.values()) entry.joined = false;
  }

  async #lost({ opened, code, reason, token }) {
    this.#unlink();
    if (FINAL_CODES.has(code)) return this.#finish(code, reason);
    if (code === CODE_TOKEN_EXPIRED) return this.#attempt++ === 0 ? this.#open("expired") : this.#retry("expired", code);
    if (opened) return this.#retry("reconnect", code);

    const generation = ++this.#generation;
    const { status, retryAfterMs } = await this.#askWhy(token);
    if (generation !== this.#generation) return;
    if (status === 401) return this.#open("refused");
    if (status === 403) return this.#finish(403, "the server refuses this page or this token");
    this.#retryAfterMs = retryAfterMs;
    this.#isRefused = true;
    this.#retry("reconnect", code);
  }

  /** A browser does not say why a handshake was refused; the same request without the upgrade does. */
  async #askWhy(token) {
    try {
      const url = new URL(this.#path, location.href);
      for (const [name, value] of Object.entries(this.#query())) url.searchParams.set(name, value);
      const response = await fetch(url, {
        headers: token ? { authorization: `Bearer ${token}` } : {},
        cache: "no-store",
        signal: AbortSignal.timeout(this.#limits.pongMs),
      });
      await response.body?.cancel();
      const seconds = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
      return { status: response.status, retryAfterMs: seconds > 0 ? seconds * 1000 : null };
    } catch {
      return { status: 0, retryAfterMs: null };
    }
  }

  #retry(why, code) {
    const { backoffMs, backoffMaxMs } = this.#limits;
    const ordered = this.#retryAfterMs !== null;
    const pause = Math.random() * Math.min(backoffMaxMs, backoffMs * 2 ** this.#attempt);
    // A node that drains tells each tab another time; a refusal is the same for all, who must not come back at once.
    const wait = ordered ? this.#retryAfterMs + (this.#isRefused ? pause : 0) : pause;
    this.#retryAfterMs = null;
    this.#isRefused = false;
    this.#attempt = Math.min(this.#attempt + 1, 16);
    this.#retryTimer = setTimeout(() => this.#open(why), wait);
    this.#set({ name: "waiting", retryAt: Date.now() + wait, ordered, code });
  }

  #finish(code, reason) {
    this.#link?.close(1000);
    this.#generation += 1;
    this.#unlink();
    this.#set({ name: "closed", code, reason });
    const refused = [...this.#outbox.values()];
    this.#outbox.clear();
    this.#outboxChars = 0;
    for (const { reject } of refused) reject(new TabcastError("closed", "The connection ended before this was sent."));
  }

  // ---- frames ----

  #transmit(frame) {
    if (this.#state.name !== "online") return false;
    this.#link.send(JSON.stringify(frame));
    return true;
  }

  #sendJoin(room) {
    const entry = this.#rooms.get(room);
    entry.clientId = randomId();
    this.#transmit({ type: "join", room, client_id: entry.clientId });
  }

  #flush() {
    if (this.#state.name !== "online") return;
    for (const entry of this.#outbox.values()) {
      const room = this.#rooms.get(entry.room);
      if (entry.sent || (room && !room.joined)) continue; // the answer could pass by before the join
      entry.sent = true;
      this.#link.send(entry.text);
    }
    if (this.#outbox.size > 0 && !this.#ackTimer) this.#ackTimer = setTimeout(() => this.#ackIsDue(), this.#limits.ackMs);
  }

  #ackIsDue() {
    this.#ackTimer = 0;
    if (this.#outbox.size === 0) return;
    if (performance.now() - this.#heardAt >= this.#limits.ackMs) this.check();
    this.#flush();
  }

  #receive(text) {
    this.#heardAt = performance.now();
    clearTimeout(this.#pongTimer);
    this.#pongTimer = 0;
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return;
    }
    if (!FRAME_TYPES.has(frame?.type)) return;
    if (frame.type === "message" || frame.type === "file") this.#positions = [frame.id, ...this.#positions].slice(0, this.#limits.positionsMax);
    if (frame.type === "ack") this.#acked(frame);
    else if (frame.type === "error" && this.#refused(frame)) return;
    else if (frame.type === "draining") this.#retryAfterMs = Math.max(0, Number(frame.retry_after_ms) || 0);
    this.dispatchEvent(new CustomEvent(frame.type, { detail: frame }));
  }

  #take(clientId) {
    const entry = this.#outbox.get(clientId);
    if (entry && this.#outbox.delete(clientId)) this.#outboxChars -= entry.text.length;
    return entry;
  }

  #roomOf(clientId) {
    return [...this.#rooms].find(([, entry]) => entry.clientId === clientId) ?? [];
  }

  #acked({ client_id: clientId, id }) {
    this.#take(clientId)?.resolve({ id });
    const [, room] = this.#roomOf(clientId);
    if (!room) return;
    room.joined = true;
    room.resolve();
    this.#flush();
  }

  /** True if someone who waits was told. What the server refuses because it shuts down waits for the next connection. */
  #refused({ client_id: clientId, code, message }) {
    if (!clientId) return false;
    if (code === "draining" && this.#outbox.has(clientId)) return true;
    const error = new TabcastError(code, message);
    const [name, room] = this.#roomOf(clientId);
    if (room) {
      this.#rooms.delete(name);
      room.reject(error);
      this.#flush();
      return true;
    }
    const entry = this.#take(clientId);
    entry?.reject(error);
    return entry !== undefined;
  }
}
