// Five minutes of one number, as a line: SVG without a library, drawn anew once a second.

const SECONDS = 300;
const HEIGHT = 100;
const GAP_SECONDS = 5; // a longer silence is a gap in the line

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** The line's parts and the area under them, for points `[seconds, value]` of which the last are the newest. */
export function outline(points, now, most) {
  const x = (at) => (SECONDS - (now - at)).toFixed(1);
  const y = (value) => (HEIGHT - (HEIGHT - 6) * (most > 0 ? value / most : 0) - 3).toFixed(1);
  let line = "";
  let area = "";
  let begin = 0;
  points.forEach(([at, value], place) => {
    const isFirst = place === 0 || at - points[place - 1][0] > GAP_SECONDS;
    if (isFirst) begin = at;
    const isLast = place === points.length - 1 || points[place + 1][0] - at > GAP_SECONDS;
    line += `${isFirst ? "M" : "L"}${x(at)} ${y(value)}`;
    area += isFirst ? `M${x(at)} ${HEIGHT}L${x(at)} ${y(value)}` : `L${x(at)} ${y(value)}`;
    if (isLast) area += `L${x(at)} ${HEIGHT}Z`;
    if (isLast && begin === at) line += "h.1";
  });
  return { line, area };
}

export class Spark {
  #points = [];
  #now = 0;
  #asked = null;
  #line = svg("path", { class: "line" });
  #area = svg("path", { class: "area" });

  constructor(place, name, words) {
    this.name = name;
    this.words = words;
    this.root = svg("svg", { viewBox: `0 0 ${SECONDS} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, this.#area, this.#line);
    place.append(this.root);
  }

  /** A value that is not known is left out; what seems to come later than now is of a clock that was set back. */
  add(now, value) {
    this.#now = now;
    this.#points = this.#points.filter(([at]) => at >= now - SECONDS && at < now);
    if (Number.isFinite(value)) this.#points.push([now, value]);
    // A page that nobody looks at draws nothing.
    this.#asked ??= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    this.#asked = null;
    const values = this.#points.map(([, known]) => known);
    const most = Math.max(0, ...values);
    const { line, area } = outline(this.#points, this.#now, most);
    this.#line.setAttribute("d", line);
    this.#area.setAttribute("d", area);
    const range = values.length ? `from ${this.words(Math.min(...values))} to ${this.words(most)}` : "not known yet";
    this.root.setAttribute("aria-label", `${this.name} in the last five minutes: ${range}`);
  }
}
