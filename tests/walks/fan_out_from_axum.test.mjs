// From an axum app to fan-out in ten lines: a crate of its own that uses tabcast as an embedder would, by its path and
// without its default features. First the app as it was, then with the lines that are marked here.

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { copyFileSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import net from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { after, before, describe, it } from "node:test";
import { until } from "../browser/harness.mjs";

const root = fileURLToPath(new URL("../..", import.meta.url));
const LINES_MAX = 10;

const MANIFEST = `[package]
name = "shop"
version = "0.1.0"
edition = "2024"

[dependencies]
axum = "0.8"
tokio = { version = "1", features = ["full"] }
+tabcast = { path = ${JSON.stringify(root)}, default-features = false, features = ["driver"] }
`;

// A line that begins with + is one that fan-out adds.
const APP = `use axum::extract::Request;
use axum::{Router, routing::get};
+use axum::{extract::Path, response::IntoResponse, routing::{any, post}};
+use tabcast::{driver::embed::Tabs, engine::{Engine, EngineSettings}, fanout::session::Identity, id::{ChannelId, UserId}};
+use tabcast::platform::adapter::{BotIdentity, Outlet, PlatformAdapter};
+use tabcast::platform::webchat::WebChat;

/// The app's own idea of who asks.
fn customer(request: &Request) -> String {
    request.headers().get("x-customer").and_then(|name| name.to_str().ok()).unwrap_or("guest").to_owned()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let router = Router::new().route("/", get(|request: Request| async move { format!("Hello, {}!", customer(&request)) }));
+    let engine = Engine::new(EngineSettings::default());
+    let tabs = Tabs::start(&engine, |_, _| async {})?;
+    let bot = std::sync::Arc::new(WebChat::new(engine.into(), BotIdentity::default()));
+    let router = router.route("/ws", any(async move |mut request: Request| {
+        let user = UserId::parse(&customer(&request)).expect("a name");
+        tabs.websocket(&mut request, Identity::new(user, tabs.engine().now())).into_response()
+    }));
+    let router = router.route("/notify/{user}", post(async move |Path(user): Path<String>, text: String| {
+        bot.send(&ChannelId::parse(&user).expect("a name"), &text).await.expect("room for it").to_string()
+    }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, router).await?)
}
`;

const added = (text) => text.split("\n").filter((line) => /^\+(?!use )/.test(line));
const asItWas = (text) => text.split("\n").filter((line) => !line.startsWith("+")).join("\n");
const withFanOut = (text) => text.replaceAll(/^\+/gm, "");

describe("from an axum app to fan-out", { concurrency: 1 }, () => {
  let folder;
  let app;

  before(() => {
    folder = mkdtempSync(path.join(tmpdir(), "tabcast-walk-"));
    mkdirSync(path.join(folder, "src"));
    // The versions that the other tests have built: nothing is fetched that is not there.
    copyFileSync(path.join(root, "Cargo.lock"), path.join(folder, "Cargo.lock"));
  });
  after(() => {
    app?.kill("SIGKILL");
    rmSync(folder, { recursive: true, force: true });
  });

  async function start(manifest, main) {
    app?.kill("SIGKILL");
    writeFileSync(path.join(folder, "Cargo.toml"), manifest);
    writeFileSync(path.join(folder, "src/main.rs"), main);
    const target = path.join(process.env.CARGO_TARGET_DIR ?? path.join(root, "target"), "walks");
    const built = spawnSync("cargo", ["build", "--quiet"], { cwd: folder, env: { ...process.env, CARGO_TARGET_DIR: target }, encoding: "utf8" });
    assert.equal(built.status, 0, built.stderr);
    app = spawn(path.join(target, "debug/shop"), { stdio: ["ignore", "pipe", "inherit"] });
    let output = "";
    app.stdout.on("data", (chunk) => (output += chunk));
    return (await until("the app listens", () => output.match(/http:\/\/(\S+)\n/)))[1];
  }

  it("the app is an axum app", { timeout: 900_000 }, async () => {
    const address = await start(asItWas(MANIFEST), asItWas(APP));
    const page = await fetch(`http://${address}/`, { headers: { "x-customer": "ann" } });
    assert.equal(await page.text(), "Hello, ann!");
    assert.equal((await fetch(`http://${address}/ws`)).status, 404);
  });

  it("with ten lines more what is posted reaches all tabs of a user, and nobody else's", { timeout: 900_000 }, async () => {
    assert.ok(added(APP).length <= LINES_MAX, `${added(APP).length} lines`);
    assert.ok(added(APP).every((line) => line.length <= 120));
    const address = await start(withFanOut(MANIFEST), withFanOut(APP));
    assert.equal(await (await fetch(`http://${address}/`)).text(), "Hello, guest!", "the app goes on as it was");
    const tabs = await Promise.all(["ann", "ann", "ben"].map((user) => open(address, user)));
    const id = await (await fetch(`http://${address}/notify/ann`, { method: "POST", body: "Your order is on its way." })).text();
    assert.match(id, /^[0-9a-f-]{36}$/);
    for (const tab of tabs.slice(0, 2)) {
      await until("the message", () => tab.received.includes(`"id":"${id}","text":"Your order is on its way."`));
    }
    await (await fetch(`http://${address}/notify/ben`, { method: "POST", body: "For ben." })).text();
    await until("the other's message", () => tabs[2].received.includes("For ben."));
    assert.ok(!tabs[2].received.includes("order") && !tabs[0].received.includes("For ben."));
    for (const tab of tabs) tab.destroy();
  });
});

/** A WebSocket with the header that the app knows people by, which a browser's own cannot send. */
async function open(address, customer) {
  const [host, port] = address.split(":");
  const socket = net.connect(Number(port), host);
  socket.received = "";
  socket.on("data", (chunk) => (socket.received += chunk.toString("latin1")));
  await once(socket, "connect");
  const head = ["GET /ws HTTP/1.1", `Host: ${address}`, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", `X-Customer: ${customer}`];
  socket.write(`${head.join("\r\n")}\r\n\r\n`);
  await until("the handshake", () => socket.received.startsWith("HTTP/1.1 101 "));
  return socket;
}
