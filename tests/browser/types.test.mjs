// The types of the browser's module, by the compiler: what is right is taken, and what is wrong is not.

import assert from "node:assert/strict";
import path from "node:path";
import { it } from "node:test";
import { fileURLToPath } from "node:url";
import ts from "typescript";

const PAGES = fileURLToPath(new URL("../../src/gateway/pages/", import.meta.url));

/** The errors of a file that stands beside the module: `line: message`. */
function errorsOf(source) {
  const file = path.join(PAGES, "user.ts");
  const options = { strict: true, noEmit: true, target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext, moduleResolution: ts.ModuleResolutionKind.Bundler, lib: ["lib.es2022.d.ts", "lib.dom.d.ts"], types: [], skipLibCheck: false };
  const host = ts.createCompilerHost(options);
  const { getSourceFile, fileExists } = host;
  host.getSourceFile = (name, version) => (name === file ? ts.createSourceFile(name, source, version) : getSourceFile(name, version));
  host.fileExists = (name) => name === file || fileExists(name);
  const program = ts.createProgram([file], options, host);
  return ts.getPreEmitDiagnostics(program).map((found) => {
    const message = ts.flattenDiagnosticMessageText(found.messageText, " ");
    if (!found.file) return message;
    const { line } = ts.getLineAndCharacterOfPosition(found.file, found.start);
    return `${path.basename(found.file.fileName)}:${line + 1}: ${message}`;
  });
}

const HEAD = `import { Tabcast, TabcastError, randomId, webSocketLink } from "./tabcast.js";
import type { ErrorCode, Frame, State } from "./tabcast.js";
const client = new Tabcast({ url: "https://chat.example", token: async (reason) => (reason === "refused" ? undefined : "t"), limits: { silenceMs: 1 } });
`;

it("takes what is right", () => {
  const right = `${HEAD}
client.addEventListener("message", (e) => { const text: string = e.detail.text; const label: string | undefined = e.detail.buttons?.[0]?.label; void [text, label]; });
client.addEventListener("file", ({ detail }) => { const size: number = detail.size; void size; });
client.addEventListener("edit", ({ detail }) => detail.id.length);
client.addEventListener("typing", ({ detail }) => { const active: boolean = detail.active; void active; });
client.addEventListener("end", ({ detail }) => detail.reason === "timeout");
client.addEventListener("hello", ({ detail }) => detail.limits.message_bytes_max + detail.session.length);
client.addEventListener("error", ({ detail }) => { const code: ErrorCode = detail.code; void code; });
client.addEventListener("gap", ({ detail }) => detail.reason === "room_not_kept");
client.addEventListener("draining", ({ detail }) => detail.retry_after_ms + 1, { once: true });
client.addEventListener("state", ({ detail }) => show(detail));
client.removeEventListener("state", ({ detail }) => show(detail));
const target: EventTarget = client;
function show(state: State): string {
  switch (state.name) {
    case "online": return state.transport;
    case "waiting": return String(state.retryAt - Date.now());
    case "closed": return state.reason + state.code;
    default: return state.name;
  }
}
function take(frame: Frame): string { return frame.type === "message" ? frame.text : frame.type === "pong" ? String(frame.client_id) : ""; }
async function use() {
  const { id } = await client.send({ type: "message", text: "x", room: "r", attachments: [{ filename: "f", data: "" }] });
  await client.send({ type: "button", message_id: id ?? randomId(), custom_id: "y" }).catch((error: TabcastError) => error.code === "rate_limited");
  await client.join("r");
  client.leave("r"); client.typing(true, "r"); client.check(); client.restart(); client.close(); client.connect();
}
void [use, take, target, new Tabcast(), new Tabcast({ events: null, link: (options) => webSocketLink({ ...options, path: "/other" }) })];
`;
  assert.deepEqual(errorsOf(right), []);
});

it("refuses what is wrong, line by line", () => {
  const wrong = [
    `client.addEventListener("message", (e) => e.detail.txt);`,
    `client.addEventListener("mesage", (e) => e.detail);`,
    `client.addEventListener("file", (e) => { const n: string = e.detail.size; void n; });`,
    `client.send({ type: "massage", text: "x" });`,
    `client.send({ type: "message" });`,
    `client.send({ type: "button", message_id: 1, custom_id: "x" });`,
    `client.state.retryAt;`,
    `if (client.state.name === "connected") client.close();`,
    `client.state = { name: "idle" };`,
    `new Tabcast({ limits: { silenceSeconds: 1 } });`,
    `new Tabcast({ token: () => 5 });`,
    `const code: ErrorCode = "no_such_code"; void code;`,
    `client.send({ type: "message", text: "x" }).then(({ id }) => id.length);`,
  ];
  const errors = errorsOf(`${HEAD}${wrong.join("\n")}\n`);
  const first = HEAD.split("\n").length;
  for (const [place, line] of wrong.entries()) assert.ok(errors.some((error) => error.startsWith(`user.ts:${first + place}: `)), `taken: ${line}\n${errors.join("\n")}`);
  assert.ok(errors.every((error) => /^user\.ts:/.test(error)), errors.join("\n"));
});
