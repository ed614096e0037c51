// Small tools of the page: nodes without markup, texts and bytes.

export const $ = (id) => document.getElementById(id);

export function element(tag, props = {}, ...children) {
  const { dataset, ...rest } = props;
  const node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, dataset);
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// A name must not turn "exe.gpj" around, nor reach into another folder.
export const plainName = (name) => String(name ?? "").replace(/[\p{Cc}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu, "").replace(/[/\\]/g, "_") || "file";

export function bytesText(count) {
  const steps = [[1 << 30, "GiB"], [1 << 20, "MiB"], [1 << 10, "KiB"]];
  const [size, unit] = steps.find(([least]) => count >= least) ?? [1, "bytes"];
  return `${(count / size).toFixed(size === 1 || count / size >= 100 ? 0 : 1)} ${unit}`;
}

export function stored(storage, key, value) {
  try {
    if (value === undefined) return storage.getItem(key);
    if (value === null) storage.removeItem(key);
    else storage.setItem(key, value);
  } catch {
    // Storage may be switched off; the page then forgets at reload.
  }
  return value ?? null;
}

export function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  return Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
}
