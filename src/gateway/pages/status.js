// The page of one node: what it tells once a second, for a person to read at a glance.

import { Spark } from "/chart.js";
import { $, bytesText, element, stored } from "/dom.js";
import { Feed, keptKey } from "/feed.js";

const STALE_MS = 3_000;
const KEPT_MAX = 200; // disconnects that this page remembers
const SAID_MS = 5_000; // what is read out comes no more often

const development = document.querySelector("meta[name=tabcast-mode]").content === "development";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

const number = (value) => (Number.isFinite(value) ? value : NaN);
const known = (value, words) => (Number.isFinite(value) ? words(value) : "–");
const count = (value) => known(value, (n) => (Math.abs(n) < 100_000 ? whole : short).format(n));
const rate = (value) => known(value, (n) => (n < 10 ? one : n < 100_000 ? whole : short).format(n));
const bytes = (value) => known(value, (n) => bytesText(Math.round(n)));
const percent = (value) => known(value, (n) => `${(n < 0.095 && n > 0 ? one : whole).format(n * 100)} %`);
const many = (value, noun, plural = `${noun}s`) => known(value, (n) => `${count(n)} ${n === 1 ? noun : plural}`);

function micros(value) {
  if (!Number.isFinite(value)) return ["–", ""];
  if (value < 1_000) return [whole.format(value), "µs"];
  if (value < 1_000_000) return [one.format(value / 1_000), "ms"];
  return [one.format(value / 1_000_000), "s"];
}

function span(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const steps = [[86_400, "d"], [3_600, "h"], [60, "min"]];
  const [size, unit] = steps.find(([least]) => seconds >= least) ?? [1, "s"];
  return `${size === 1 && seconds < 10 ? one.format(seconds) : whole.format(Math.floor(seconds / size))} ${unit}`;
}

const text = (node, words) => {
  if (node.textContent !== words) node.textContent = words;
};

// ---- tiles ----

class Tile {
  constructor(id, words) {
    const root = $(id);
    this.big = root.querySelector(".big b");
    this.unit = root.querySelector(".unit");
    this.more = root.querySelector(".more");
    this.bar = root.querySelector(".bar i");
    this.spark = new Spark(root.querySelector(".spark"), root.querySelector("h2").textContent, words);
  }

  show(now, value, [big, unit], more, share) {
    text(this.big, big);
    if (unit !== undefined) text(this.unit, unit);
    text(this.more, more);
    if (this.bar) fill(this.bar, share);
    this.spark.add(now, value);
  }
}

function fill(bar, share) {
  const shown = Math.max(0, Math.min(1, number(share) || 0));
  bar.style.transform = `scaleX(${shown})`;
  bar.dataset.level = shown >= 0.9 ? "bad" : shown >= 0.7 ? "warn" : "good";
}

const latencyWords = (value) => micros(value).join(" ");
const tiles = {
  sessions: new Tile("sessions", count),
  deliveries: new Tile("deliveries", (value) => `${rate(value)} a second`),
  latency: new Tile("latency", latencyWords),
  queued: new Tile("queued", bytes),
  process: new Tile("process", percent),
  ends: new Tile("ends", (value) => `${rate(value)} a second`),
};

function showTiles(frame) {
  const { sessions = {}, rates = {}, latency_micros: latency = {}, queues = {}, process = {} } = frame;
  const now = frame.timestamp;
  const parts = [`of ${count(sessions.max)}`, many(sessions.users, "user"), many(sessions.rooms, "room"), many(sessions.streams, "answer")];
  tiles.sessions.show(now, number(sessions.now), [count(sessions.now)], parts.join(" · "), sessions.now / sessions.max);
  tiles.deliveries.show(now, number(rates.deliveries), [rate(rates.deliveries)], `${rate(rates.publishes)} published · ${bytes(rates.written_bytes)}/s out`);
  const p99 = latency.p99 ?? NaN;
  tiles.latency.show(now, p99, micros(p99), latency.count > 0 ? `half within ${latencyWords(latency.p50 ?? NaN)}` : "nothing was written");
  const used = number(queues.budget_used_bytes ?? queues.bytes);
  const waiting = queues.frames > 0 ? `${bytes(queues.bytes)} in ${many(queues.frames, "frame")} wait` : "nothing waits";
  tiles.queued.show(now, used, bytes(used).split(" "), `of ${bytes(queues.budget_bytes)} · ${waiting}`, used / queues.budget_bytes);
  const files = `${count(process.open_files ?? NaN)} of ${count(process.open_files_max ?? NaN)} files`;
  tiles.process.show(now, number(process.cpu_share), [percent(process.cpu_share).replace(" %", ""), "% of a core"], `${bytes(process.resident_bytes)} of memory · ${files}`);
  tiles.ends.show(now, number(rates.ended), [rate(rates.ended)], `${rate(rates.handshakes)} asked · ${rate(rates.refused)} refused a second`);
}

// ---- panels ----

function showHealth(frame) {
  const { ready, draining, reason } = frame.health ?? {};
  $("health").dataset.level = ready ? "good" : "bad";
  text($("health-word"), ready ? "Ready" : draining ? "Shutting down" : "Not ready");
  const facts = [`up ${span(frame.uptime_seconds)}`, `version ${frame.version}`, ...(development ? ["development mode: no keys"] : [])];
  text($("health-more"), [reason && !draining ? reason : null, ...facts].filter(Boolean).join(" · "));
  text($("node"), String(frame.node ?? ""));
  document.title = `${ready ? "" : "(!) "}${frame.node} · tabcast`;
}

function showShards(shards = []) {
  const list = $("shards");
  list.classList.toggle("many", shards.length > 12);
  while (list.children.length > shards.length) list.lastChild.remove();
  while (list.children.length < shards.length) {
    const bar = element("div", { className: "bar", ariaHidden: "true" }, element("i"));
    list.append(element("li", {}, element("span", { textContent: String(list.children.length) }), bar, element("b"), element("small")));
  }
  shards.forEach((shard, place) => {
    const [, bar, busy, more] = list.children[place].children;
    fill(bar.firstChild, shard.busy_share);
    text(busy, percent(shard.busy_share));
    text(more, `${many(shard.sessions, "connection")}${shard.queue_bytes > 0 ? ` · ${bytes(shard.queue_bytes)} queued` : ""}`);
  });
}

/** A list of names and values: rows stay, words change. */
function showFacts(list, facts) {
  while (list.children.length > facts.length) list.lastChild.remove();
  while (list.children.length < facts.length) list.append(element("div", {}, element("dt"), element("dd")));
  facts.forEach(([name, value], place) => {
    text(list.children[place].children[0], name);
    text(list.children[place].children[1], value);
  });
}

function showRedis(redis) {
  const level = redis ? (redis.healthy ? "good" : "bad") : "unknown";
  $("redis").dataset.level = level;
  text($("redis-word"), redis ? (redis.healthy ? "Healthy" : "Not healthy") : "Not used");
  const facts = redis
    ? [["Round trip", latencyWords(redis.canary_micros)], ["Nodes alive", count(redis.nodes)], ["Waiting for it", bytes(redis.spool_bytes)]]
    : [["This node is on its own", ""]];
  showFacts($("redis-facts"), redis?.reason ? [["Why", redis.reason], ...facts] : facts);
}

const REFUSED = {
  tabs: "the node was full",
  tabs_of_user: "the user had all tabs it may have",
  tabs_of_address: "the address had all tabs it may have",
  handshakes: "too many asked at once",
  handshakes_of_address: "the address asked too often",
  connections_of_address: "the address had too many connections",
  unauthorized: "no token, or a bad one",
  forbidden: "from a page that may not connect",
  bad_request: "not a valid request",
  draining: "the node was shutting down",
};

function showRefusals(refusals = {}) {
  const rows = Object.entries(refusals).sort(([, a], [, b]) => b - a).map(([name, total]) => [REFUSED[name] ?? name.replaceAll("_", " "), count(total)]);
  showFacts($("refusals"), rows.length ? rows : [["Everybody was let in", ""]]);
}

function showUsers(users = []) {
  const body = $("users");
  $("users-none").hidden = users.length > 0;
  while (body.children.length > users.length) body.lastChild.remove();
  while (body.children.length < users.length) {
    const name = element("button", { type: "button", className: "user" }, element("bdi"));
    name.onclick = () => filterBy(name.textContent);
    body.append(element("tr", {}, element("th", { scope: "row" }, name), element("td"), element("td"), element("td")));
  }
  users.forEach((user, place) => {
    const [name, tabs, frames, waiting] = body.children[place].children;
    text(name.querySelector("bdi"), String(user.user_id));
    name.firstChild.title = `Why was ${user.user_id} cut?`;
    text(tabs, count(user.tabs));
    text(frames, count(user.queue_frames));
    text(waiting, user.queue_bytes > 0 ? bytes(user.queue_bytes) : "–");
  });
}

// ---- disconnects ----

const REASON = {
  "connection lost": "Connection lost",
  "protocol error": "Broke the protocol",
  "unsupported data": "Sent binary data",
  "invalid payload": "Sent broken text",
  "policy violation": "Sent too much, or too much that was wrong",
  "message too big": "Sent too large a message",
  "internal error": "A fault of the gateway",
  "service restart": "The node shut down",
  "over budget": "Cut: the node was out of memory for queues",
  "token expired": "Token expired",
  "slow consumer": "Cut: too slow",
  "heartbeat timeout": "Gone silent",
  kicked: "Ended by an operator",
};
const CUT = ["over budget", "slow consumer", "policy violation", "message too big", "kicked", "internal error"];

const rows = new Map(); // by session, the newest first in the page

function endedRow(ended) {
  const at = new Date(ended.at * 1000);
  const time = element("time", { dateTime: at.toISOString(), textContent: at.toLocaleTimeString([], { hour12: false }), title: at.toLocaleString() });
  const user = element("bdi", { className: "whose", textContent: String(ended.user_id ?? "(nobody’s)") });
  const why = element("b", { className: "why", textContent: REASON[ended.reason] ?? String(ended.reason) });
  const detail = element("p", { className: "detail", textContent: `${String(ended.detail ?? "")}.`, dir: "auto" });
  const facts = [`code ${ended.code}`, ended.retryable ? "comes back by itself" : "does not come back by itself", { websocket: "WebSocket", events: "event stream", answer: "answer of /v1" }[ended.wire] ?? String(ended.wire)];
  if (Number.isFinite(ended.connected_seconds)) facts.unshift(`was connected ${span(ended.connected_seconds)}`);
  const line = element("p", { className: "first" }, time, user, why);
  const row = element("li", { dataset: { kind: CUT.includes(ended.reason) ? "cut" : "left" } }, line, detail, element("p", { className: "facts-line", textContent: facts.join(" · ") }));
  row.user = String(ended.user_id ?? "");
  row.at = ended.at;
  return row;
}

let isFirstFrame = true;

function showEnded(all = []) {
  const list = $("ended");
  const added = [];
  for (const ended of [...all].reverse()) {
    const name = `${ended.session} ${ended.at}`;
    if (rows.has(name)) continue;
    const row = endedRow(ended);
    rows.set(name, row);
    // Mostly it is the newest, and goes first.
    const after = [...list.children].find((other) => other.at <= row.at) ?? null;
    list.insertBefore(row, after);
    added.push(ended);
  }
  for (const [name, row] of rows) {
    if (rows.size <= KEPT_MAX) break;
    row.remove();
    rows.delete(name);
  }
  if (added.length > 0 || isFirstFrame) filter();
  const cut = added.filter(({ reason }) => CUT.includes(reason));
  if (!isFirstFrame && cut.length > 0) {
    const last = cut.at(-1);
    say(cut.length === 1 ? `${last.user_id}: ${REASON[last.reason]}` : `${cut.length} were cut, the last ${last.user_id}`);
  }
  isFirstFrame = false;
}

function filter() {
  const wanted = $("filter").value.trim().toLowerCase();
  let shown = 0;
  for (const row of $("ended").children) {
    row.hidden = !row.user.toLowerCase().includes(wanted);
    shown += row.hidden ? 0 : 1;
  }
  const nothing = rows.size === 0 ? "Nobody was disconnected yet but by their own wish." : "";
  text($("found"), !wanted ? nothing : shown ? `${many(shown, "disconnect")} of a user with “${wanted}” in its id.` : `Nothing is known of “${wanted}”: the node remembers the last disconnects, and this page the last ${KEPT_MAX} that it saw.`);
  $("found").hidden = !$("found").textContent;
}

function filterBy(user) {
  $("filter").value = user;
  filter();
  $("filter").scrollIntoView({ block: "center" });
  $("filter").focus();
}

// ---- state ----

let saidAt = 0;
function say(words) {
  if (Date.now() - saidAt < SAID_MS) return;
  saidAt = Date.now();
  text($("live"), words);
}

let newsAt = 0;
let connection = "idle";

function state(name, words) {
  connection = name;
  $("status").dataset.state = name;
  text($("status-text"), words);
}

function watchSilence() {
  const silent = Date.now() - newsAt;
  const isStale = newsAt > 0 && silent > STALE_MS;
  $("board").classList.toggle("stale", isStale);
  if (isStale && (connection === "online" || connection === "stale")) state("stale", `No news for ${Math.floor(silent / 1000)} s`);
}

function show(frame) {
  newsAt = Date.now();
  if (connection !== "online") say("Connected");
  state("online", "Live");
  showHealth(frame);
  showTiles(frame);
  showShards(frame.shards);
  showRedis(frame.redis);
  showRefusals(frame.refusals);
  showUsers(frame.top_users);
  showEnded(frame.ended);
  watchSilence();
}

// ---- the key ----

let asking = null; // one dialog at a time

function askKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = $("ask");
    const input = $("ask-value");
    $("ask-why").textContent = why;
    input.value = "";
    let answer;
    dialog.querySelector("form").onsubmit = () => (answer = input.value.trim());
    $("ask-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      asking = null;
      resolve(answer || null);
    };
    dialog.showModal();
    input.focus();
  });
  return asking.then((key) => (key ? stored(sessionStorage, "tabcast-key", key) : null));
}

async function keyFor(status, reason, before) {
  // Without keys there is none that would help: the reason is what the page is opened from.
  if (development) {
    state("closed", reason);
    return null;
  }
  stored(sessionStorage, "tabcast-key", null);
  const why = !before ? "What a node does is shown to its operators. The key stays in this tab until you close it."
    : status === 403 ? "That key is not an operator’s. Paste one of operator_keys."
    : "The server does not know that key. Paste another one.";
  const key = await askKey(why);
  if (!key) state("unauthorized", "No key");
  return key;
}

const feed = new Feed({ state, frame: show, key: keyFor }, development ? null : keptKey());
$("key").hidden = development;
$("key").onclick = async () => {
  const key = await askKey("Another key of operator_keys. It stays in this tab until you close it.");
  if (key) feed.again(key);
};
$("filter").oninput = filter;
setInterval(watchSilence, 500);
addEventListener("online", () => feed.again());
feed.run();
