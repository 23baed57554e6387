// Curves over rounds, one panel a metric over one axis of rounds, drawn as SVG.

import { draw, figure, make, mark, percent, say } from "./dom.js";

const HEIGHT = 128;
const LEFT = 46;
const RIGHT = 14;
const TOP = 20;
const BOTTOM = 8;
const AXIS = 20;

let shown = null; // {node, curves, rounds, x, panels}: what is drawn now, for the pointer

/** Draw the curves into a node, as wide as it is; and again whenever its width changes. */
export function chart(node, curves, rounds) {
  if (!shown || shown.node !== node) {
    shown = { node, curves, rounds };
    new ResizeObserver(() => paint()).observe(node);
    node.addEventListener("pointermove", (event) => point(event.clientX));
    node.addEventListener("pointerleave", () => point(null));
  }
  shown.curves = curves;
  shown.rounds = rounds;
  paint();
}

/** Every metric that is told: accuracy and the loss first. */
function metrics(curves) {
  const rest = Object.keys(curves).filter((name) => !["rounds", "loss", "accuracy"].includes(name));
  return ["accuracy", "loss", ...rest].filter((name) => curves[name]?.some((value) => value !== null));
}

/** What is drawn: accuracy and the loss, or what is told instead. The pointer finds the others. */
function drawn(curves) {
  return metrics(curves).slice(0, 2);
}

function words(name) {
  return name === "accuracy" ? percent : figure;
}

/** Steps of 1, 2 or 5 times a power of ten: at most `most` of them from low to high. */
export function ticks(low, high, most) {
  const range = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(range / most));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => range / each <= most);
  const found = [];
  for (let count = Math.ceil(low / step - 1e-9); count * step <= high + step * 1e-9; count += 1) found.push(count * step);
  return found;
}

function scale(name, values) {
  const told = values.filter((value) => value !== null);
  let low = Math.min(...told);
  let high = Math.max(...told);
  if (name === "accuracy") [low, high] = [0, 1];
  else if (low >= 0) low = 0;
  if (high === low) high = low + 1;
  if (name !== "accuracy") high += (high - low) * 0.06;
  return { low, high };
}

function paint() {
  const { node, curves, rounds } = shown;
  const width = Math.floor(node.clientWidth);
  if (width < 80) return;
  const names = drawn(curves);
  const height = names.length * HEIGHT + AXIS;
  const last = Math.max(rounds ?? 0, curves.rounds.at(-1), 2);
  const x = (round) => LEFT + ((width - LEFT - RIGHT) * (round - 1)) / (last - 1);
  const told = names.map((name) => `${name} ${words(name)(curves[name].findLast((value) => value !== null))}`);
  const svg = draw("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `After round ${curves.rounds.at(-1)}: ${told.join(", ")}`,
  });
  shown.x = x;
  shown.panels = names.map((name, index) => panel(svg, name, curves, x, index * HEIGHT, width));
  for (const round of ticks(1, last, Math.max(2, Math.min(last - 1, Math.floor(width / 60))))) {
    if (!Number.isInteger(round)) continue;
    svg.append(draw("text", { x: x(round), y: height - 5, class: "tick middle" }, round));
  }
  svg.append(draw("text", { x: 2, y: height - 5, class: "tick" }, "round"));
  shown.line = draw("line", { y1: TOP, y2: names.length * HEIGHT - BOTTOM, class: "cross", visibility: "hidden" });
  svg.append(shown.line);
  shown.tip ??= make("div", { class: "tip", hidden: "" });
  node.replaceChildren(svg, shown.tip);
}

function panel(svg, name, curves, x, top, width) {
  const { low, high } = scale(name, curves[name]);
  const base = top + HEIGHT - BOTTOM;
  const y = (value) => base - ((base - top - TOP) * (value - low)) / (high - low);
  svg.append(draw("text", { x: LEFT, y: top + 12, class: "title", "data-metric": name }, name));
  for (const value of ticks(low, high, 4)) {
    svg.append(draw("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: "grid" }));
    const text = name === "accuracy" ? `${Math.round(100 * value)} %` : String(Number(value.toPrecision(6)));
    svg.append(draw("text", { x: LEFT - 7, y: y(value) + 3.5, class: "tick end" }, text));
  }
  const points = curves.rounds
    .map((round, index) => [x(round), curves[name][index]])
    .filter(([, value]) => value !== null)
    .map(([at, value]) => [at, y(value)]);
  const path = points.map(([at, value]) => `${at.toFixed(1)},${value.toFixed(1)}`).join(" L");
  if (points.length > 1) {
    const area = `M${points[0][0].toFixed(1)},${base} L${path} L${points.at(-1)[0].toFixed(1)},${base} Z`;
    svg.append(draw("path", { d: area, class: "area", "data-metric": name }));
    svg.append(draw("path", { d: `M${path}`, class: "curve", "data-metric": name }));
  }
  const dots = points.length <= 40 ? points : points.slice(-1);
  for (const [at, value] of dots) {
    svg.append(draw("circle", { cx: at, cy: value, r: 3, class: "dot", "data-metric": name }));
  }
  return { name, y };
}

/** Show what was told of the round nearest to the pointer. */
function point(clientX) {
  const { node, curves, x, tip, line } = shown;
  if (!tip) return;
  if (clientX === null || !curves.rounds.length) {
    mark(tip, "hidden", "");
    mark(line, "visibility", "hidden");
    return;
  }
  const at = clientX - node.getBoundingClientRect().left;
  const distance = (index) => Math.abs(x(curves.rounds[index]) - at);
  const nearest = curves.rounds.reduce((best, _, index) => (distance(index) < distance(best) ? index : best), 0);
  const told = metrics(curves).map((name) => `${name} ${words(name)(curves[name][nearest])}`);
  say(tip, [`round ${curves.rounds[nearest]}`, ...told].join("\n"));
  mark(tip, "hidden", null);
  const place = x(curves.rounds[nearest]);
  mark(line, "x1", place);
  mark(line, "x2", place);
  mark(line, "visibility", "visible");
  const room = node.clientWidth - tip.offsetWidth - 4;
  tip.style.setProperty("left", `${Math.max(0, Math.min(place + 12, room))}px`);
}
