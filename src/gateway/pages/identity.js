// Who the person is: a name in development mode, the owner of a token elsewhere.

import { $, bytesOf, stored } from "/dom.js";
import { randomId } from "/tabcast.js";

export const page = new URL(location.href);
export const tokenMode = document.querySelector("meta[name=tabcast-mode]").content === "token";

function claims(token) {
  try {
    const part = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    return JSON.parse(new TextDecoder().decode(bytesOf(part)));
  } catch {
    return {};
  }
}

export const me = { id: "", name: "", token: null };

export function become(id, name = id) {
  me.id = id;
  me.name = name;
  $("who-name").textContent = name || "signed in";
  $("who").setAttribute("aria-label", tokenMode ? `${name || "Signed in"}, use another token` : `You are ${name}, change the name`);
}

function takeToken(token) {
  me.token = token;
  stored(sessionStorage, "tabcast-token", token);
  const { sub = "", name } = token ? claims(token) : {};
  become(String(sub), String(name ?? sub));
}

export function identify() {
  if (!tokenMode) {
    const kept = stored(localStorage, "tabcast-user") || stored(localStorage, "tabcast-user", `guest-${randomId().slice(0, 4)}`);
    return become(page.searchParams.get("user") || kept);
  }
  const given = new URLSearchParams(page.hash.slice(1)).get("token");
  if (page.hash.includes("token=")) history.replaceState(null, "", page.pathname + page.search);
  takeToken(given || stored(sessionStorage, "tabcast-token"));
}

let asking = null; // one dialog at a time

function ask({ title, why, label, value = "", secret = false, maxLength = 4096 }) {
  asking ??= new Promise((resolve) => {
    const dialog = $("ask");
    const input = $("ask-value");
    $("ask-title").textContent = title;
    $("ask-why").textContent = why;
    $("ask-label").textContent = label;
    Object.assign(input, { value, maxLength, type: secret ? "password" : "text" });
    let answer;
    dialog.querySelector("form").onsubmit = () => (answer = input.value.trim());
    $("ask-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      asking = null;
      resolve(answer || undefined);
    };
    dialog.showModal();
    input.select();
  });
  return asking;
}

const TOKEN_WHY = {
  expired: "The session has ended. Paste a new token to go on.",
  refused: "The server did not accept the token. Paste another one.",
};

export async function token(reason) {
  if (!tokenMode) return null;
  const fine = reason === "start" || reason === "reconnect";
  if (fine && me.token) return me.token;
  if (fine && (await fetch("/ws", { cache: "no-store" }).then(({ status }) => status !== 401, () => true))) return null; // a cookie will do
  takeToken(null);
  const given = await ask({ title: "Sign in", why: TOKEN_WHY[reason] ?? "This chat needs a token.", label: "Token", secret: true });
  if (given) takeToken(given);
  return given;
}

// Asks for another name or token; true if there is one now.
export async function changeIdentity() {
  if (tokenMode) {
    const given = await ask({ title: "Use another token", why: "It stays in this tab until you close it.", label: "Token", secret: true });
    if (!given) return false;
    takeToken(given);
  } else {
    const name = await ask({ title: "Your name", why: "All tabs with the same name share one conversation.", label: "Name", value: me.id, maxLength: 64 });
    if (!name || name === me.id) return false;
    if (page.searchParams.has("user")) {
      page.searchParams.set("user", name);
      history.replaceState(null, "", page.href);
    } else stored(localStorage, "tabcast-user", name);
    become(name);
  }
  return true;
}
