// @ts-self-types="./tabcast.d.ts"
// A client of tabcast for browsers and Node 22: one connection that comes back by itself, and an outbox that outlives it.
//
//   const client = new Tabcast({ token: () => fetch("/my/token").then((response) => response.text()) });
//   client.addEventListener("message", ({ detail }) => show(detail.text));
//   client.connect();
//   const { id } = await client.send({ type: "message", text: "hello" });
//
// Outside a page say where: `new Tabcast({ url: "https://chat.example" })`. Types are in `/tabcast.d.ts`, beside this file.
// Where no WebSocket gets through, it goes on over `/events` and POST; a WebSocket is tried again now and then.
//
// Events: `state` (detail: see `Tabcast.state`) and one for each frame type in FRAME_TYPES (detail: the frame).
// Frames of other types are ignored, as the protocol asks.

/** Close codes after which coming back by itself makes no sense. */
const FINAL_CODES = new Set([1000, 1002, 1003, 1007, 1008, 1009, 4010]);
const CODE_LOST = 1006;
const CODE_TOKEN_EXPIRED = 4001;
/** Answers to a POST after which the connection is made anew, and the same is sent again. */
const RETRYABLE = new Set([401, 403, 408, 429, 500, 502, 503, 504]);

const FRAME_TYPES = new Set(["message", "file", "edit", "typing", "end", "hello", "ack", "error", "pong", "gap", "draining"]);

/** Every limit, with its unit in its name; `new Tabcast({ limits: { … } })` changes single ones. */
const LIMITS = Object.freeze({
  /** The first wait is a random part of this, each later one of twice as much, up to the maximum. */
  backoffMs: 500,
  backoffMaxMs: 30_000,
  /** A connection that lasted this long starts the backoff afresh. */
  stableMs: 10_000,
  /** A token that takes longer is asked for again later; where a person is asked, make it more. */
  tokenMs: 30_000,
  /** A handshake that takes longer is given up. */
  handshakeMs: 15_000,
  /** Silence for this long while something waits for its ack asks for a sign of life. */
  ackMs: 10_000,
  /**
   * Silence for this long, and up to a fifth more, asks for a sign of life in any case: without one the connection is dead,
   * noticed within 77 s. The server pings and cuts its side within 45 s, unseen by a page; this is for a path that is dead
   * for us alone, and seldom enough that a million silent tabs ask 15,000 times a second, together.
   */
  silenceMs: 60_000,
  /** Where no WebSocket got through, one is tried again this often. */
  webSocketRetryMs: 120_000,
  /** How long one POST may take, besides the time for what it carries. */
  postMs: 60_000,
  /** A sign of life must come within this after a ping, besides the time for what goes before it. */
  pongMs: 5_000,
  /** The slowest upload that is waited for: three minutes for 1.4 MB. */
  uploadCharsPerSecondMin: 8_192,
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

/** Only a browser knows, and only that there is no network at all. */
const isOffline = () => globalThis.navigator?.onLine === false;

function addressOf(base, path, query) {
  const url = new URL(path, base);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  return url;
}

/**
 * One way to reach the server. Another one takes and returns the same: `open` once, `text` for each frame,
 * `close({ code, reason })` once; after `close()` has been called, nothing more.
 */
export function webSocketLink({ base, path, query, after, token, open, text, close }) {
  const url = addressOf(base, path, { ...query, ...(after && { after }) });
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = token ? new WebSocket(url, ["tabcast", `tabcast.bearer.${token}`]) : new WebSocket(url);
  const forget = () => (socket.onopen = socket.onmessage = socket.onerror = socket.onclose = null);
  let opened = false;
  socket.onopen = () => {
    opened = true;
    open();
  };
  socket.onmessage = (event) => typeof event.data === "string" && text(event.data);
  socket.onclose = ({ code, reason }) => close({ code, reason });
  socket.onerror = () => {
    if (opened) return;
    forget(); // Node closes nothing that was never open
    close({ code: CODE_LOST, reason: "" });
  };
  return {
    send: (frame) => socket.send(frame),
    close(code, reason) {
      forget();
      socket.onerror = () => {};
      socket.close(code, reason);
    },
  };
}

/**
 * The same over an event stream and one POST for each frame, in their order. `reply` gets the answers of those, `alive` is
 * called for whatever comes over the stream, `close` may also say `status` and `retryAfterMs`. Rooms are joined by opening.
 */
export function eventStreamLink({ base, path, query, after, rooms, token, postMs, uploadCharsPerSecondMin, open, text, reply, alive, close }) {
  const stream = addressOf(base, path, { ...query, ...(after && { after }) });
  stream.searchParams.delete("room");
  for (const room of rooms) stream.searchParams.append("room", room);
  const outgoing = addressOf(base, path, query);
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const controller = new AbortController();
  let posts = Promise.resolve();
  let posting = 0;
  let isLeaving = false;

  const end = (ending) => {
    if (controller.signal.aborted) return;
    controller.abort();
    close({ code: CODE_LOST, reason: "", ...ending });
  };
  const refusal = ({ status, headers }) => ({ status, retryAfterMs: Number.parseInt(headers.get("retry-after") ?? "", 10) * 1000 || null });

  async function read() {
    const response = await fetch(stream, { headers, cache: "no-store", signal: controller.signal });
    const isStream = response.ok && response.headers.get("content-type")?.startsWith("text/event-stream");
    if (!isStream) return end(refusal(response)); // or something in between answers for the server
    open();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let record = { event: "message", data: [] };
    let line = "";
    const took = () => {
      const [, name, value] = /^([a-z]*):? ?(.*)$/s.exec(line) ?? [];
      if (name === "data") record.data.push(value);
      else if (name === "event") record.event = value;
      if (line !== "") return;
      const { event, data } = record;
      record = { event: "message", data: [] };
      if (event === "close") end(JSON.parse(data.join("")));
      else if (data.length > 0) text(data.join("\n"));
    };
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return end({});
      alive();
      const [first, ...others] = value.split("\n");
      line += first;
      for (const next of others) {
        took();
        line = next;
      }
    }
  }

  async function post(frame) {
    const timer = setTimeout(end, postMs + (frame.length * 1000) / uploadCharsPerSecondMin, {});
    try {
      const request = { method: "POST", headers: { ...headers, "content-type": "application/json" }, body: frame, cache: "no-store", signal: controller.signal };
      const response = await fetch(outgoing, request);
      if (response.status === 204) return;
      const { error, ...answer } = await response.json();
      if (!answer.type && RETRYABLE.has(response.status)) end(refusal(response));
      // What is refused unread comes without its id.
      else reply(JSON.stringify({ type: "error", ...error, client_id: JSON.parse(frame).client_id, ...answer }));
    } finally {
      clearTimeout(timer);
    }
  }

  read().catch(() => end({}));
  return {
    hears: true,
    send(frame) {
      posting += 1;
      posts = posts.then(() => !controller.signal.aborted && !isLeaving && post(frame)).catch(() => end({})).finally(() => (posting -= 1));
    },
    isSending: () => posting > 0,
    /** Begins no other POST; resolves once none is under way. */
    leave() {
      isLeaving = true;
      return posts;
    },
    close: () => controller.abort(),
  };
}

export class Tabcast extends EventTarget {
  #base;
  #path;
  #events;
  #query;
  #token;
  #openLink;
  #limits;

  #state = Object.freeze({ name: "idle" });
  #attempt = 0;
  #positions = []; // ids of the last ordered frames, the newest first: what comes after them is asked for
  #generation = 0; // a callback of an older connection finds another number, and does nothing
  #link = null;
  #isBlocked = false; // WebSockets do not get through here, event streams do
  #refusedToken = undefined;
  #notBefore = 0; // when the server wants to be asked again, for who comes back online before that
  #watching = null;
  #retryTimer = 0;
  #tokenTimer = 0;
  #silenceTimer = 0;
  #webSocketTimer = 0;
  #reopenTimer = 0;
  #joinTimer = 0;
  #stableTimer = 0;
  #pongTimer = 0;
  #ackTimer = 0;
  #retryAfterMs = null;
  #isRefused = false;
  #heardAt = 0;
  #typingSaid = { active: false, at: 0 };

  #outbox = new Map(); // client id → { text, room, sent, resolve, reject }, in the order of sending
  #outboxChars = 0;
  #rooms = new Map(); // name → what `join` makes

  /**
   * `url` is where the server is; in a page, by default, where the page is from. `query()` gives the parameters of the
   * address. `token(reason)` gives, now or later, a token, `null` for none needed, or `undefined` for "there is none, stop";
   * if it throws, it is asked again later. `reason` is "start", "reconnect", "expired" or "refused". `events: null` goes
   * without the fallback.
   */
  constructor({ url, path = "/ws", events = "/events", query = () => ({}), token = () => null, link = webSocketLink, limits = {} } = {}) {
    super();
    this.#base = new URL(url ?? globalThis.location?.href).href;
    this.#path = path;
    this.#events = events;
    this.#query = query;
    this.#token = token;
    this.#openLink = link;
    this.#limits = { ...LIMITS, ...limits };
  }

  /**
   * `{ name }` of idle, connecting, online (`transport`: "websocket" or "events"), waiting (`retryAt`, `code`), offline (the
   * browser knows of no network: nothing is tried until it does), unauthorized, or closed (`code`, `reason`).
   */
  get state() {
    return this.#state;
  }

  /** Connects, or, if it waits to do so, does it now. */
  connect() {
    if (this.#state.name === "online" || this.#state.name === "connecting") return;
    this.#open(this.#state.name === "idle" ? "start" : "reconnect");
  }

  /** Ends the connection and starts another, in the same rooms, for a changed identity. What is in the outbox is refused. */
  restart() {
    this.#finish(1000, "closed by this page", true);
    this.#attempt = 0;
    this.#positions = [];
    this.#isBlocked = false;
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

  /**
   * Joins a room, again after each reconnect. Resolves once broadcasts reach this tab; a refusal after that is an `error`
   * event with the `room`, which is tried again if it passes.
   */
  join(room) {
    const known = this.#rooms.get(room);
    if (known) return known.promise;
    if (this.#state.name === "closed") return Promise.reject(new TabcastError("closed", "Not connected."));
    const entry = { clientId: "", joined: false, wasJoined: false, refusals: 0 };
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    this.#rooms.set(room, entry);
    if (this.#state.name === "online") this.#sendJoin(room);
    return entry.promise;
  }

  leave(room) {
    if (!this.#rooms.has(room)) return;
    this.#forget(room);
    if (this.#state.name !== "online") return;
    if (this.#link.hears) this.#reopenSoon();
    else this.#transmit({ type: "leave", room });
    this.#flush();
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
    if (this.#pongTimer || (this.#link?.hears && this.#link.isSending?.())) return; // a POST has an end of its own
    if (!this.#transmit({ type: "ping" })) return;
    let charsBefore = 0; // on the way, perhaps in a buffer that `bufferedAmount` does not count
    for (const { sent, text } of this.#outbox.values()) if (sent) charsBefore += text.length;
    const { pongMs, uploadCharsPerSecondMin } = this.#limits;
    this.#pongTimer = setTimeout(() => this.#drop({ opened: true }), pongMs + (charsBefore * 1000) / uploadCharsPerSecondMin);
  }

  // ---- connection ----

  /** Heeds what the browser says about network and page, until it is closed. */
  #watch() {
    if (this.#watching) return;
    this.#watching = new AbortController();
    const { signal } = this.#watching;
    const { document } = globalThis;
    for (const type of ["online", "pageshow"]) globalThis.addEventListener?.(type, () => this.#wake(), { signal });
    globalThis.addEventListener?.("offline", () => this.#doze(), { signal });
    document?.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.#wake(), { signal });
  }

  #set(state) {
    this.#state = Object.freeze(state);
    this.dispatchEvent(new CustomEvent("state", { detail: this.#state }));
  }

  #wake() {
    const { name, ordered } = this.#state;
    if (name === "offline" && isOffline()) return;
    if (name === "offline") this.#isBlocked = false; // perhaps another network
    if (name === "offline" && this.#notBefore > Date.now()) this.#wait("reconnect", this.#notBefore - Date.now(), true);
    else if (name === "offline" || (name === "waiting" && !ordered)) this.#open("reconnect");
    else if (name === "online" && performance.now() - this.#heardAt > this.#limits.ackMs) this.check();
  }

  /** The browser has lost the network. What is open may still work, as to this machine: that is asked. */
  #doze() {
    const { name, ordered, retryAt, code } = this.#state;
    if (name === "waiting") this.#rest(ordered ? retryAt : 0, code);
    else if (name === "online") this.check();
  }

  #rest(notBefore, code) {
    clearTimeout(this.#retryTimer);
    this.#notBefore = notBefore;
    this.#set({ name: "offline", code });
  }

  /** Opens a link, with a token that is known from just before or a new one. */
  async #open(why, { events = this.#isBlocked, token } = {}) {
    const generation = ++this.#generation;
    clearTimeout(this.#retryTimer);
    this.#watch();
    this.#set({ name: "connecting" });
    if (generation !== this.#generation) return; // by a listener
    try {
      if (token === undefined) token = await this.#ask(why);
    } catch {
      return generation === this.#generation && this.#retry(why, CODE_LOST);
    }
    if (generation !== this.#generation) return;
    const isRefused = why === "refused" && token === this.#refusedToken;
    if (token === undefined || isRefused) return this.#set({ name: "unauthorized" });

    let opened = false;
    const current = (act) => (value) => generation === this.#generation && act(value);
    const lost = current((ending) => this.#lost({ ...ending, opened, events, token }));
    const handshake = setTimeout(current(() => opened || this.#drop({ opened, events, token })), this.#limits.handshakeMs);
    const named = [...this.#rooms.keys()];
    if (events) named.forEach((room, place) => (this.#rooms.get(room).clientId = `room-${place}`));
    try {
      this.#link = (events ? eventStreamLink : this.#openLink)({
        ...this.#target(token, events),
        after: this.#positions.join(","),
        open: current(() => {
          opened = true;
          clearTimeout(handshake);
          this.#opened(events, token, named);
        }),
        text: current((text) => {
          this.#heard();
          this.#receive(text);
        }),
        reply: current((text) => this.#receive(text)),
        alive: current(() => this.#heard()),
        close: (ending) => {
          clearTimeout(handshake);
          lost(ending);
        },
      });
    } catch {
      clearTimeout(handshake);
      lost({ code: CODE_LOST, reason: "", status: 401 }); // a token with characters that no header can carry
    }
  }

  /** A token, or a rejection if there is no answer now. */
  #ask(why) {
    return new Promise((resolve, reject) => {
      const timer = (this.#tokenTimer = setTimeout(reject, this.#limits.tokenMs));
      (async () => this.#token(why))().then(resolve, reject).finally(() => clearTimeout(timer));
    });
  }

  #target(token, events) {
    return { ...this.#limits, base: this.#base, path: events ? this.#events : this.#path, query: this.#query(), rooms: [...this.#rooms.keys()], token };
  }

  #opened(events, token, named) {
    const generation = this.#generation;
    this.#retryAfterMs = null;
    this.#refusedToken = undefined;
    this.#isBlocked = events;
    this.#typingSaid = { active: false, at: 0 };
    this.#stableTimer = setTimeout(() => (this.#attempt = 0), this.#limits.stableMs);
    this.#heard();
    this.#listen();
    this.#set({ name: "online", transport: events ? "events" : "websocket" });
    if (generation !== this.#generation) return; // by a listener
    if (events) this.#tryWebSocketLater(token);
    if (!events) this.#joinAll();
    else if (named.join("\n") !== [...this.#rooms.keys()].join("\n")) this.#reopenSoon(); // joined or left meanwhile
    this.#flush();
  }

  /** Opens a WebSocket beside the event stream, which is left only if that works. */
  #tryWebSocketLater(token) {
    const generation = this.#generation;
    this.#webSocketTimer = setTimeout(() => {
      let link = null;
      const done = (works) => {
        clearTimeout(timer);
        link?.close(1000);
        link = null;
        if (generation !== this.#generation) return;
        this.#isBlocked = !works;
        if (works) this.#reopen();
        else this.#tryWebSocketLater(token);
      };
      const timer = setTimeout(done, this.#limits.handshakeMs, false);
      try {
        link = this.#openLink({ ...this.#target(token, false), after: "", open: () => done(true), text() {}, close: () => done(false) });
      } catch {
        done(false);
      }
    }, this.#limits.webSocketRetryMs);
  }

  /** Leaves an event stream for another connection. A POST that it broke off could be given to the worker twice. */
  async #reopen() {
    const generation = this.#generation;
    await this.#link.leave?.();
    if (generation !== this.#generation) return;
    this.#link.close(1000);
    this.#generation += 1;
    this.#unlink();
    this.#open("reconnect");
  }

  #reopenSoon() {
    this.#reopenTimer ||= setTimeout(() => this.#reopen());
  }

  #heard() {
    this.#heardAt = performance.now();
    this.#answered();
  }

  #answered() {
    clearTimeout(this.#pongTimer);
    this.#pongTimer = 0;
  }

  /** Looks for silence. Whoever sees the server's own signs of life need not ask for one. */
  #listen() {
    const { silenceMs } = this.#limits;
    const most = silenceMs * (1 + Math.random() / 5);
    const look = () => {
      const left = most - (performance.now() - this.#heardAt);
      if (left <= 0 && this.#link.hears) return this.#drop({ opened: true, events: true });
      if (left <= 0) this.check();
      this.#silenceTimer = setTimeout(look, left > 0 ? left : most);
    };
    look();
  }

  /** The connection does not answer: as if it had been lost, without waiting for its close. */
  #drop(link) {
    this.#link?.close();
    this.#generation += 1;
    this.#lost({ ...link, code: CODE_LOST, reason: "no answer" });
  }

  #unlink() {
    this.#link = null;
    for (const timer of [this.#retryTimer, this.#tokenTimer, this.#stableTimer, this.#pongTimer, this.#ackTimer, this.#silenceTimer, this.#webSocketTimer, this.#reopenTimer, this.#joinTimer]) clearTimeout(timer);
    this.#pongTimer = this.#ackTimer = this.#reopenTimer = this.#joinTimer = 0;
    for (const entry of this.#outbox.values()) entry.sent = false;
    for (const entry of this.#rooms.values()) Object.assign(entry, { joined: false, clientId: "" });
  }

  #lost({ opened, events = false, code, reason, status = 0, retryAfterMs = null, token }) {
    this.#unlink();
    if (FINAL_CODES.has(code)) return this.#finish(code, reason);
    if (code === CODE_TOKEN_EXPIRED) return this.#attempt++ === 0 ? this.#open("expired") : this.#retry("expired", code);
    if (status === 401) {
      const isAgain = this.#refusedToken !== undefined;
      this.#refusedToken = token;
      return isAgain ? this.#retry("refused", code) : this.#open("refused");
    }
    if (status === 403) return this.#finish(403, "the server refuses this page or this token");
    // Nobody says why a handshake failed. The same over HTTP works if only WebSockets are blocked, and if not, says why.
    if (!opened && !events && this.#events !== null && !isOffline()) return this.#open("reconnect", { events: true, token });
    this.#isBlocked &&= opened;
    if (retryAfterMs !== null) {
      this.#retryAfterMs = retryAfterMs;
      this.#isRefused = true;
    }
    this.#retry("reconnect", code);
  }

  #pause(attempt) {
    const { backoffMs, backoffMaxMs } = this.#limits;
    return Math.random() * Math.min(backoffMaxMs, backoffMs * 2 ** attempt);
  }

  #retry(why, code) {
    const ordered = this.#retryAfterMs !== null;
    const pause = this.#pause(this.#attempt);
    // A node that drains tells each tab another time; a refusal is the same for all, who must not come back at once.
    const wait = ordered ? this.#retryAfterMs + (this.#isRefused ? pause : 0) : pause;
    this.#retryAfterMs = null;
    this.#isRefused = false;
    this.#attempt = Math.min(this.#attempt + 1, 16);
    if (isOffline()) this.#rest(ordered ? Date.now() + wait : 0, code);
    else this.#wait(why, wait, ordered, code);
  }

  /** `ordered`: the server named the moment, so that not all come at once. */
  #wait(why, ms, ordered, code) {
    this.#retryTimer = setTimeout(() => this.#open(why), ms);
    this.#set({ name: "waiting", retryAt: Date.now() + ms, ordered, code });
  }

  #finish(code, reason, isRestart = false) {
    this.#link?.close(1000);
    this.#generation += 1;
    this.#unlink();
    this.#watching?.abort();
    this.#watching = null;
    for (const { reject } of this.#outbox.values()) reject(new TabcastError("closed", "The connection ended before this was sent."));
    this.#outbox.clear();
    this.#outboxChars = 0;
    for (const [room, { wasJoined }] of this.#rooms) if (!wasJoined && !isRestart) this.#forget(room);
    this.#set({ name: "closed", code, reason }); // the last, as a listener may start it anew
  }

  // ---- frames ----

  #transmit(frame) {
    if (this.#state.name !== "online") return false;
    this.#link.send(JSON.stringify(frame));
    return true;
  }

  #sendJoin(room) {
    if (this.#link.hears) return this.#reopenSoon();
    const entry = this.#rooms.get(room);
    entry.clientId = randomId();
    this.#transmit({ type: "join", room, client_id: entry.clientId });
  }

  #forget(room, error = new TabcastError("closed", "It was given up before it was joined.")) {
    this.#rooms.get(room).reject(error);
    this.#rooms.delete(room);
  }

  #joinAll() {
    for (const [room, { clientId }] of this.#rooms) if (!clientId) this.#sendJoin(room);
  }

  #joinLater(refusals) {
    this.#joinTimer ||= setTimeout(() => {
      this.#joinTimer = 0;
      this.#joinAll();
    }, this.#pause(refusals));
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
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return;
    }
    if (!FRAME_TYPES.has(frame?.type)) return;
    if (frame.type === "message" || frame.type === "file") this.#positions = [frame.id, ...this.#positions].slice(0, this.#limits.positionsMax);
    if (frame.type === "pong") this.#answered();
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
    Object.assign(room, { joined: true, wasJoined: true, refusals: 0 });
    room.resolve();
    this.#flush();
  }

  /** True if someone who waits was told. What the server refuses because it shuts down waits for the next connection. */
  #refused(frame) {
    const { client_id: clientId, code, message } = frame;
    if (!clientId) return false;
    const error = new TabcastError(code, message);
    const [name, room] = this.#roomOf(clientId);
    if (code === "draining" && (room || this.#outbox.has(clientId))) return true;
    if (room?.wasJoined && ["rate_limited", "overloaded"].includes(code)) {
      room.clientId = "";
      this.#joinLater(room.refusals++);
    } else if (room) {
      this.#forget(name, error);
      this.#flush();
    }
    if (room) {
      frame.room = name;
      return !room.wasJoined;
    }
    const entry = this.#take(clientId);
    entry?.reject(error);
    return entry !== undefined;
  }
}
