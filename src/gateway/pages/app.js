// The chat page. Whatever comes from outside becomes text nodes and DOM properties, never markup.

import { $, bytesOf, bytesText, element, icon, plainName } from "/dom.js";
import { become, changeIdentity, identify, me, page, token, tokenMode } from "/identity.js";
import { Tabcast, randomId } from "/tabcast.js";

const ITEMS_MAX = 1000; // messages kept in the page
const FILE_BYTES_MAX = 64 << 20; // decoded files kept in memory, all together
const ATTACHMENTS_MAX = 8; // of one message, as the server allows
const PINNED_PX = 48; // this close to the end counts as at the end
const TOGETHER_MS = 5 * 60_000; // messages of one sender within this are drawn as one group
const RASTER = new Set(["image/png", "image/jpeg", "image/gif", "image/webp", "image/avif"]);
const STYLES = new Set(["primary", "secondary", "success", "danger", "link", "premium"]);

const log = $("log");
const scroller = $("scroll");
const field = $("text");
const room = page.searchParams.get("room") || null;
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });

// ---- the conversation ----

const items = new Map(); // message id → item
const gone = new Set(); // ids that were there once, so that a late edit does not bring them back
const order = []; // items from the oldest on
const unsent = new Set(); // own items without an id
const parked = []; // echoes of own messages that came before their ack
let limits = {};
let fileBytes = 0;
let pinned = true;
let unread = 0;
let replyTo = null;
let bot = "star"; // who files and late edits are from: their frames do not say

function toEnd() {
  pinned = true;
  unread = 0;
  scroller.scrollTop = scroller.scrollHeight;
  drawPill();
}

function drawPill() {
  $("pill").hidden = pinned || unread === 0;
  $("pill-text").textContent = unread === 1 ? "New message" : `${unread} new messages`;
}

let lastTop = 0;
scroller.addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = scroller;
  if (scrollHeight - scrollTop - clientHeight < PINNED_PX) pinned = true;
  else if (scrollTop < lastTop) pinned = false; // only a person scrolls up; growth alone does not unpin
  lastTop = scrollTop;
  if (pinned) unread = 0;
  drawPill();
});
// Whatever grows (an edit, a picture that has loaded, the keyboard): at the end stays at the end.
const growth = new ResizeObserver(() => pinned && toEnd());
growth.observe(log);
growth.observe(scroller);

let unseen = 0; // arrived while this tab was hidden

function drawTitle() {
  document.title = `${unseen ? `(${unseen}) ` : ""}${room ? `${room} · ` : ""}tabcast`;
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) unseen = 0;
  drawTitle();
});

/** Says a text to screen readers, once it has stopped changing. */
const spoken = new Map();
function speak(key, text, wait = 1200) {
  clearTimeout(spoken.get(key));
  const timer = setTimeout(() => {
    spoken.delete(key);
    $("live").replaceChildren(element("span", { textContent: text.slice(0, 600) }));
  }, wait);
  spoken.set(key, timer);
}

function follows(item, previous) {
  return previous !== undefined && previous.sender === item.sender && !item.quote && item.at - previous.at < TOGETHER_MS;
}

function excerpt(item) {
  return item.text.data.trim().slice(0, 120) || item.filename || "a message";
}

function quoteOf(id) {
  const quoted = items.get(id);
  const quote = element("button", { type: "button", className: "quote", dir: "auto", textContent: quoted ? excerpt(quoted) : "an earlier message" });
  quote.onclick = () => {
    const target = items.get(id);
    if (!target) return;
    target.node.scrollIntoView({ block: "center" });
    target.node.classList.remove("found");
    void target.node.offsetWidth; // starts the animation again
    target.node.classList.add("found");
  };
  return quote;
}

/** Draws a message at the end. `text` is one text node for the item's whole life: edits change its data. */
function add({ id = null, sender, own, text = "", at = Date.now(), reply = null, parts = [], filename = "" }) {
  const item = { id, sender, own, at, filename, text: document.createTextNode(text), urls: [], bytes: 0 };
  item.quote = reply ? quoteOf(reply) : null;
  item.under = element("div", { className: "under" });
  const bubble = element("div", { className: "bubble", dir: "auto" }, item.text);
  bubble.hidden = text === "" && (filename !== "" || parts.length > 0);
  const from = element("div", { className: "from" }, element("bdi", { textContent: sender }));
  item.node = element("li", { className: own ? "item own" : "item" }, own ? null : from, item.quote, bubble, ...parts, item.under);
  item.node.classList.toggle("follows", follows(item, order.at(-1)));
  order.push(item);
  log.append(item.node);
  if (id) settle(item, id);
  while (order.length > ITEMS_MAX) discard(order[0]);
  $("empty").hidden = true;
  if (own) toEnd();
  else arrived(item);
  return item;
}

/** The item has its id: it can be edited and answered. */
function settle(item, id) {
  item.id = id;
  items.set(id, item);
  item.node.dataset.id = id;
  const when = new Date(item.at);
  const reply = element("button", { type: "button", className: "act reply", ariaLabel: "Reply", title: "Reply", onclick: () => startReply(item) }, icon("reply"));
  item.under.replaceChildren(element("time", { dateTime: when.toISOString(), textContent: clock.format(when), title: when.toLocaleString() }), reply);
}

function arrived(item) {
  speak(item.id, `${item.sender}: ${excerpt(item)}`);
  if (document.hidden) {
    unseen += 1;
    drawTitle();
  }
  if (pinned) return toEnd();
  unread += 1;
  drawPill();
}

function release(item) {
  for (const url of item.urls.splice(0)) URL.revokeObjectURL(url);
  fileBytes -= item.bytes;
  item.bytes = 0;
}

function discard(item) {
  release(item);
  item.node.remove();
  order.splice(order.indexOf(item), 1);
  unsent.delete(item);
  if (!item.id || items.get(item.id) !== item) return;
  items.delete(item.id);
  gone.add(item.id);
  if (gone.size > ITEMS_MAX) gone.delete(gone.values().next().value);
}

function clear() {
  for (const item of [...order]) discard(item);
  parked.length = 0;
  log.replaceChildren();
  $("empty").hidden = false;
  startReply(null);
}

function notice(text) {
  log.append(element("li", { className: "notice", textContent: text }));
  $("empty").hidden = true;
  if (pinned) toEnd();
}

let toastTimer = 0;
function toast(text) {
  const box = $("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 8000);
}

// ---- buttons ----

function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function button(messageId, spec) {
  const style = STYLES.has(spec.style) ? spec.style : "secondary";
  const label = [spec.emoji ? element("span", { textContent: String(spec.emoji) }) : null, spec.label ? element("bdi", { textContent: String(spec.label) }) : null];
  const className = `choice ${style}`;
  if (style === "link" || (spec.url && !spec.custom_id)) {
    const href = spec.disabled ? null : webAddress(spec.url);
    if (href) return element("a", { className, href, target: "_blank", rel: "noopener noreferrer", title: href }, ...label, icon("out"));
    return element("button", { className, type: "button", disabled: true }, ...label);
  }
  const node = element("button", { className, type: "button", disabled: spec.disabled === true }, ...label);
  if (!spec.label) node.setAttribute("aria-label", String(spec.emoji || spec.custom_id || "button"));
  node.onclick = () => press(node, messageId, spec.custom_id);
  return node;
}

async function press(node, messageId, customId) {
  if (node.ariaBusy === "true") return;
  node.ariaBusy = "true";
  try {
    await client.send({ type: "button", message_id: messageId, custom_id: customId, ...(room && { room }) });
    for (const other of node.parentNode.children) other.classList.toggle("chosen", other === node);
  } catch (error) {
    toast(`The button did not work: ${error.message}`);
  }
  node.ariaBusy = null;
}

// ---- files ----

function fileParts(item, { filename, mimetype, bytes }) {
  const name = plainName(filename);
  const type = String(mimetype).split(";")[0].trim().toLowerCase();
  const keep = (blobType) => {
    const url = URL.createObjectURL(new Blob([bytes], { type: blobType }));
    item.urls.push(url);
    return url;
  };
  item.bytes += bytes.length;
  // Only what a browser draws and never runs is shown; the rest is a download without a type of its own.
  const link = element(
    "a",
    { className: "file", href: keep("application/octet-stream"), download: name },
    icon("file"),
    element("span", {}, element("b", {}, element("bdi", { textContent: name })), element("small", { textContent: `${bytesText(bytes.length)} · download` })),
  );
  if (!RASTER.has(type)) return [link];
  const image = element("img", { src: keep(type), alt: name });
  const picture = element("button", { type: "button", className: "picture", ariaLabel: `Open image ${name}`, onclick: () => view(image.src, name) }, image);
  const caption = element("div", { className: "caption" }, element("bdi", { textContent: `${name} · ${bytesText(bytes.length)}` }));
  image.onerror = () => {
    picture.replaceWith(link);
    caption.remove();
  };
  return [picture, caption];
}

function addFiles(item, files) {
  for (const file of files) item.under.before(...fileParts(item, file));
  fileBytes += item.bytes;
  for (const old of order) {
    if (fileBytes <= FILE_BYTES_MAX) break;
    if (old === item || old.bytes === 0) continue;
    release(old);
    for (const part of old.node.querySelectorAll(".picture, .file, .caption")) part.remove();
    old.under.before(element("div", { className: "caption", textContent: "This file is no longer kept in the page." }));
  }
}

function view(src, name) {
  Object.assign($("viewer-image"), { src, alt: name });
  $("viewer").showModal();
}
$("viewer").onclick = (event) => event.target.id !== "viewer-image" && $("viewer").close();

// ---- what comes in ----

let typingTimer = 0;
function drawTyping(active) {
  $("typing").classList.toggle("on", active);
  clearTimeout(typingTimer);
  if (active) typingTimer = setTimeout(drawTyping, 120_000, false); // its end may have been lost
}

const seconds = (timestamp) => (Number.isFinite(timestamp) ? timestamp * 1000 : Date.now());

function showMessage(frame) {
  if (frame.sender !== me.id && (!room || frame.buttons)) bot = frame.sender;
  const reply = typeof frame.reply_to === "string" ? frame.reply_to : null;
  const item = add({ id: frame.id, sender: frame.sender, own: frame.sender === me.id, text: String(frame.text), at: seconds(frame.timestamp), reply });
  if (!Array.isArray(frame.buttons) || frame.buttons.length === 0) return;
  const group = element("div", { className: "buttons", role: "group", ariaLabel: "Choices" }, ...frame.buttons.map((spec) => button(frame.id, spec ?? {})));
  item.under.before(group);
  if (pinned) toEnd();
}

function onMessage(frame) {
  if (items.has(frame.id) || gone.has(frame.id)) return; // an echo whose ack came first, or a replay
  const waits = [...unsent].some((item) => item.state === "sending" && item.frame.text === frame.text);
  if (frame.sender === me.id && waits) parked.push(frame);
  else showMessage(frame);
}

/** Echoes that came before an ack: once nothing waits for one, those that are left came from another tab. */
function unpark() {
  for (const frame of parked.splice(0)) onMessage(frame);
}

function onFile(frame) {
  if (items.has(frame.id)) return;
  const item = add({ id: frame.id, sender: bot, own: false, at: seconds(frame.timestamp), filename: plainName(frame.filename) });
  try {
    addFiles(item, [{ filename: frame.filename, mimetype: frame.mimetype, bytes: bytesOf(frame.data) }]);
  } catch {
    item.under.before(element("div", { className: "caption", textContent: `${plainName(frame.filename)} could not be read.` }));
  }
}

function onEdit({ id, text, timestamp }) {
  if (gone.has(id)) return;
  const item = items.get(id);
  if (!item) return showMessage({ id, text, sender: bot, timestamp }); // this tab came after the message did
  const next = String(text);
  if (next.startsWith(item.text.data)) item.text.appendData(next.slice(item.text.length)); // a selection survives
  else item.text.data = next;
  item.text.parentNode.hidden = next === "" && item.filename !== "";
  if (!item.own) speak(id, `${item.sender}: ${next}`);
}

// ---- what goes out ----

function drawOutgoing(item, state, problem = "") {
  item.state = state;
  item.node.classList.toggle("pending", state !== "sent" && state !== "failed");
  item.node.classList.toggle("failed", state === "failed");
  if (state === "sent") return;
  const retry = element("button", { type: "button", className: "act retry", textContent: "Try again", onclick: () => post(item) });
  const words = state === "sending" ? "Sending…" : "Waiting for the connection…";
  if (state === "failed") item.under.replaceChildren(element("span", { className: "problem", textContent: `Not sent: ${problem}` }), retry);
  else item.under.replaceChildren(element("span", { textContent: words }));
}

async function post(item) {
  unsent.add(item);
  drawOutgoing(item, client.state.name === "online" ? "sending" : "waiting");
  try {
    const { id } = await client.send(item.frame);
    unsent.delete(item);
    if (!order.includes(item)) return; // the conversation was cleared meanwhile
    if (items.has(id)) discard(items.get(id)); // its echo, shown while the ack was lost
    gone.delete(id);
    item.frame = null;
    drawOutgoing(item, "sent");
    settle(item, id ?? randomId());
  } catch (error) {
    unsent.delete(item);
    drawOutgoing(item, "failed", error.message);
  }
  unpark();
  if (pinned) toEnd();
}

const chosen = []; // { filename, mimetype, bytes }, what goes with the next message

async function attach(files) {
  for (const file of files) {
    const most = limits.attachment_bytes_max ?? 1 << 20;
    if (chosen.length >= ATTACHMENTS_MAX) toast(`At most ${ATTACHMENTS_MAX} files go with one message.`);
    else if (file.size > most) toast(`${plainName(file.name)} is too large: ${bytesText(file.size)}; at most ${bytesText(most)} are allowed.`);
    else chosen.push({ filename: file.name || "pasted", mimetype: file.type || "application/octet-stream", bytes: new Uint8Array(await file.arrayBuffer()) });
  }
  drawChosen();
  field.focus();
}

function drawChosen() {
  const chips = chosen.map((file) => {
    const drop = element("button", { type: "button", className: "icon", ariaLabel: `Remove ${plainName(file.filename)}` }, icon("close"));
    drop.onclick = () => {
      chosen.splice(chosen.indexOf(file), 1);
      drawChosen();
      field.focus();
    };
    return element("li", {}, element("bdi", { textContent: plainName(file.filename) }), drop);
  });
  $("attached").replaceChildren(...chips);
  $("attached").hidden = chosen.length === 0;
  drawComposer();
}

const base64 = (bytes) =>
  new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(new Blob([bytes]));
  });

async function submit() {
  const text = field.value;
  if (text.trim() === "" && chosen.length === 0) return;
  const reply = replyTo?.id ?? null;
  const files = chosen.splice(0);
  field.value = "";
  drawChosen();
  startReply(null);
  const item = add({ sender: me.id, own: true, text, reply, filename: files[0]?.filename ?? "" });
  if (files.length > 0) addFiles(item, files);
  drawOutgoing(item, "waiting");
  const attachments = await Promise.all(files.map(async ({ filename, mimetype, bytes }) => ({ filename, mimetype, data: bytes.length ? await base64(bytes) : "" })));
  item.frame = { type: "message", text, ...(reply && { reply_to: reply }), ...(room && { room }), client_id: randomId(), ...(files.length && { attachments }) };
  const size = new TextEncoder().encode(JSON.stringify(item.frame)).length;
  const most = limits.message_bytes_max ?? Infinity;
  client.typing(false, room);
  if (size <= most) post(item);
  else drawOutgoing(item, "failed", `it is too large (${bytesText(size)}; at most ${bytesText(most)} are allowed).`);
}

function startReply(item) {
  replyTo = item;
  $("reply").hidden = item === null;
  if (item === null) return;
  $("reply-text").textContent = excerpt(item);
  field.focus();
}

function drawComposer() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  $("send").disabled = field.value.trim() === "" && chosen.length === 0;
}

const byTouch = matchMedia("(pointer: coarse)");
let idleTimer = 0;
field.addEventListener("input", () => {
  drawComposer();
  clearTimeout(idleTimer);
  client.typing(field.value !== "", room);
  idleTimer = setTimeout(() => client.typing(false, room), 5000);
});
field.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && replyTo) startReply(null);
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || byTouch.matches) return;
  event.preventDefault();
  submit();
});
field.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  attach(event.clipboardData.files);
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
  field.focus();
});
$("attach").onclick = () => $("files").click();
$("files").onchange = () => attach([...$("files").files]).then(() => ($("files").value = ""));
$("reply-cancel").onclick = () => startReply(null);
$("pill").onclick = toEnd;
$("who").onclick = async () => {
  const before = me.id;
  if (!(await changeIdentity())) return;
  if (me.id !== before) clear();
  client.restart();
};

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => event.relatedTarget === null && ($("drop").hidden = true));
addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!carriesFiles(event)) return;
  event.preventDefault();
  attach(event.dataTransfer.files);
});

// ---- the connection ----

const ENDINGS = {
  403: "Not allowed",
  1000: "Disconnected",
  1009: "Message too large",
  4010: "Ended by the operator",
};
let countdown = 0;

function drawStatus(state) {
  const wait = Math.max(1, Math.ceil((state.retryAt - Date.now()) / 1000));
  const words = {
    idle: "Starting",
    connecting: "Connecting…",
    online: state.transport === "events" ? "Online, without WebSocket" : "Online",
    waiting: `Reconnecting in ${wait} s`,
    offline: "Offline",
    unauthorized: "Signed out",
    closed: ENDINGS[state.code] ?? "Disconnected",
  };
  $("status").dataset.state = state.name;
  $("status").title = state.reason ?? (state.transport === "events" ? "Something on the way lets no WebSocket through: slower, but nothing is missing." : "");
  $("status-text").textContent = words[state.name];
  $("connect").hidden = !["waiting", "offline", "unauthorized", "closed"].includes(state.name);
  $("connect").textContent = { waiting: "Retry now", offline: "Retry now", unauthorized: "Sign in" }[state.name] ?? "Reconnect";
}

function onState({ detail: state }) {
  clearInterval(countdown);
  if (state.name === "waiting") countdown = setInterval(drawStatus, 500, state);
  drawStatus(state);
  if (state.name !== "connecting") speak("state", $("status-text").textContent, 300);
  if (state.name !== "online") {
    drawTyping(false);
    $("room").classList.remove("joined");
  }
  for (const item of unsent) drawOutgoing(item, state.name === "online" ? "sending" : "waiting");
  unpark();
}

const client = new Tabcast({
  query: () => (tokenMode ? { hello: "1" } : { user: me.id, name: me.name, hello: "1" }),
  token,
  limits: { tokenMs: 24 * 3_600_000 }, // a person is asked
});
const handlers = {
  state: onState,
  message: ({ detail }) => onMessage(detail),
  file: ({ detail }) => onFile(detail),
  edit: ({ detail }) => onEdit(detail),
  typing: ({ detail }) => drawTyping(detail.active === true),
  hello: ({ detail }) => (limits = detail.limits ?? {}),
  error: ({ detail }) => toast(String(detail.message)),
  gap: () => notice("Some messages may be missing here."),
};
for (const [type, handler] of Object.entries(handlers)) client.addEventListener(type, handler);

$("connect").onclick = () => client.connect();
addEventListener("storage", ({ key, newValue }) => {
  if (tokenMode || key !== "tabcast-user" || !newValue || page.searchParams.has("user") || newValue === me.id) return;
  become(newValue);
  clear();
  client.restart();
});

identify();
drawTitle();
drawComposer();
if (room) {
  $("room").hidden = false;
  $("room").textContent = `# ${room}`;
  field.placeholder = `Message to ${room}`;
  client.join(room).then(
    () => $("room").classList.add("joined"),
    (error) => notice(`The room could not be joined: ${error.message}`),
  );
}
client.connect();
if (!byTouch.matches) field.focus();
