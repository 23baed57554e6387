// SVG charts over rounds, as wide as their container: curves, stacked bars and a matrix.

import { draw, figure, largest, make, mark, percent, say } from "./dom.js";

const LEFT = 58;
const RIGHT = 14;
const TOP = 20;
const BOTTOM = 8;
const AXIS = 20;
const TALL = 128; // height of a panel if there are one or two
const LOW = 96; // height of a panel if there are more
const DOTS = 40; // a curve with more points is drawn without dots
const MOST_DRAWN = 1e300; // differences of larger values may overflow

const painted = new WeakMap(); // by node: the last paint, and the width it was called with

/** Call paint(width) now and whenever the node's width changes. */
function fit(node, paint) {
  if (!painted.has(node)) new ResizeObserver(() => fit(node, painted.get(node).paint)).observe(node);
  const before = painted.get(node);
  const width = Math.floor(node.clientWidth);
  painted.set(node, { paint, width });
  if (width >= 80 && !(before?.paint === paint && before.width === width)) paint(width);
}

function picture(width, height, label) {
  return draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

/** Return at most `most` ticks from low to high, in steps of 1, 2 or 5 times a power of ten. */
function ticks(low, high, most) {
  const range = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(range / most));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => range / each <= most);
  const first = Math.ceil(low / step - 1e-9);
  // Counted by an index, because a large number plus 1 may be the same number. The + 0 prevents -0.
  const values = Array.from({ length: most + 1 }, (_, index) => (first + index) * step + 0);
  return [...new Set(values)].filter((value) => value <= high + step * 1e-9);
}

/** Draw the grid lines of a vertical scale at round numbers of the unit, labelled with their values. */
function scale(svg, low, high, y, width, words, most = 4, unit = 1) {
  for (const value of ticks(low / unit, high / unit, most).map((each) => each * unit)) {
    svg.append(draw("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: "grid" }));
    svg.append(draw("text", { x: LEFT - 7, y: y(value) + 3.5, class: "tick end" }, words(value)));
  }
}

/** A number that fits beside the axis: 0.05, 20000, but 6e+5 and 2e-7. */
function plain(value) {
  const rounded = Number(value.toPrecision(6));
  const [words, power] = [String(rounded), rounded.toExponential()];
  return power.length < words.length ? power : words;
}

/** A name of at most so many characters. */
function shortened(name, most) {
  const letters = [...name]; // characters, of which an emoji is one
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : name;
}

// --- curves --------------------------------------------------------------------------------------

/** Curves that share the panel of another metric. */
const BESIDE = { "training loss": "loss" };
/** The best known metrics, best known first; the others are the user's own. */
export const FIRST = ["accuracy", "loss", "training loss", "epsilon"];

/** Every metric that has a value, in the order of FIRST, then the others. */
export function metrics(curves) {
  const rest = Object.keys(curves).filter((name) => name !== "rounds" && !FIRST.includes(name));
  return [...FIRST, ...rest].filter((name) => curves[name]?.some((value) => value !== null));
}

/** Whether a metric is an accuracy, on the workers' held-out data or in the coordinator's own test. */
const isAccuracy = (name) => /(^|\/)accuracy$/.test(name);

/** Return the function that formats the values of a metric. */
export function wording(name) {
  return isAccuracy(name) ? percent : figure;
}

/** The newest value of a metric; undefined if there is none. */
export function newest(curves, name) {
  return curves[name]?.findLast((value) => value !== null);
}

/** The last round on the axis: the planned one, unless that leaves less than a quarter of the width to the curve. */
function horizon(planned, first, newest) {
  let width = 20;
  while (width < 2 * (newest - first)) width *= 2;
  return Math.max(Math.min(planned, first + width), newest, first + 1);
}

let pointed = null; // the round whose values are shown

/** Draw one panel per metric over a common axis of rounds; the pointer or the arrow keys show a round's values. */
export function chart(node, curves, rounds) {
  const names = metrics(curves);
  const panels = names.filter((name) => !names.includes(BESIDE[name]));
  const each = panels.length > 2 ? LOW : TALL;
  fit(node, (width) => {
    const height = panels.length * each + AXIS;
    const first = curves.rounds[0]; // not 1 if the page has forgotten the first rounds
    const last = horizon(rounds ?? 0, first, curves.rounds.at(-1));
    const x = (round) => LEFT + ((width - LEFT - RIGHT) * (round - first)) / (last - first);
    const values = names.map((name) => `${name} ${wording(name)(newest(curves, name))}`);
    const svg = picture(width, height, `After round ${curves.rounds.at(-1)}: ${values.join(", ")}`);
    panels.forEach((name, index) => {
      const beside = names.filter((other) => BESIDE[other] === name);
      panel(svg, [name, ...beside], curves, x, index * each, width, each);
    });
    for (const round of ticks(first, last, Math.max(2, Math.min(last - first, Math.floor(width / 60))))) {
      const inside = Math.min(x(round), width - 3.5 * String(round).length);
      if (Number.isInteger(round)) svg.append(draw("text", { x: inside, y: height - 5, class: "tick middle" }, round));
    }
    svg.append(draw("text", { x: 2, y: height - 5, class: "tick" }, "round"));
    const line = draw("line", { y1: TOP, y2: height - AXIS - BOTTOM, class: "cross", visibility: "hidden" });
    svg.append(line);
    const tip = node.querySelector(".tip") ?? make("div", { class: "tip", role: "status" });
    node.replaceChildren(svg, tip);
    const show = (index) => {
      pointed = curves.rounds[index] ?? null;
      point(node, curves, names, x, tip, line, index);
    };
    const nearest = (at) => closest(curves.rounds, (round) => Math.abs(x(round) - at));
    node.onpointermove = ({ clientX }) => show(nearest(clientX - node.getBoundingClientRect().left));
    node.onpointerdown = node.onpointermove;
    node.onpointerleave = ({ pointerType }) => pointerType === "touch" || show(-1); // a finger is lifted to look
    node.onblur = () => show(-1);
    node.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const last = curves.rounds.length - 1;
      show(pointed === null ? last : Math.max(0, Math.min(curves.rounds.indexOf(pointed) + step, last)));
      event.preventDefault();
    };
    show(curves.rounds.indexOf(pointed));
  });
}

function panel(svg, names, curves, x, top, width, tall) {
  const bounded = (value) => Math.max(-MOST_DRAWN, Math.min(value, MOST_DRAWN));
  const values = names.flatMap((name) => curves[name]).filter((value) => value !== null).map(bounded);
  const is_share = isAccuracy(names[0]) && values.every((value) => value >= 0 && value <= 1);
  const low = is_share ? 0 : -largest(values.map((value) => -value), 0);
  const most = largest(values, low);
  const high = is_share ? 1 : most + (most - low || Math.abs(low) || 1) * 0.06;
  const base = top + tall - BOTTOM;
  const y = (value) => base - ((base - top - TOP) * (bounded(value) - low)) / (high - low);
  let from = LEFT;
  for (const name of names) {
    const words = shortened(name, Math.floor((width - RIGHT - from) / 7.5));
    svg.append(draw("text", { x: from, y: top + 12, class: "title", "data-metric": name }, words));
    from += 16 + 7 * name.length;
  }
  scale(svg, low, high, y, width, is_share ? (value) => `${Math.round(100 * value)} %` : plain);
  for (const name of names) curve(svg, name, curves, x, y, base);
}

function curve(svg, name, curves, x, y, base) {
  const points = curves.rounds
    .map((round, index) => [x(round), curves[name][index]])
    .filter(([, value]) => value !== null)
    .map(([at, value]) => [at, y(value)]);
  const path = points.map(([at, value]) => `${at.toFixed(1)},${value.toFixed(1)}`).join(" L");
  if (points.length > 1) {
    const area = `M${points[0][0].toFixed(1)},${base} L${path} L${points.at(-1)[0].toFixed(1)},${base} Z`;
    if (!(name in BESIDE)) svg.append(draw("path", { d: area, class: "area", "data-metric": name }));
    svg.append(draw("path", { d: `M${path}`, class: "curve", "data-metric": name }));
  }
  const dots = points.length <= DOTS ? points : points.slice(-1);
  for (const [at, value] of dots) {
    svg.append(draw("circle", { cx: at, cy: value, r: 3, class: "dot", "data-metric": name }));
  }
}

/** The index of the item with the smallest distance. */
function closest(items, distance) {
  return items.reduce((best, item, index) => (distance(item) < distance(items[best]) ? index : best), 0);
}

/** Show the values of the round at an index; hide them if the index is -1. */
function point(node, curves, names, x, tip, line, index) {
  mark(tip, "data-shown", index < 0 ? null : "");
  mark(line, "visibility", index < 0 ? "hidden" : "visible");
  if (index < 0) return say(tip, "");
  const values = names.map((name) => `${name} ${wording(name)(curves[name][index])}`);
  say(tip, [`round ${curves.rounds[index]}`, ...values].join("\n"));
  const place = x(curves.rounds[index]);
  mark(line, "x1", place);
  mark(line, "x2", place);
  const room = node.clientWidth - tip.offsetWidth - 4;
  tip.style.setProperty("left", `${Math.max(0, Math.min(place + 12, room))}px`);
}

// --- bars ----------------------------------------------------------------------------------------

/**
 * Draw one stacked bar per label.
 * bars: [{label, parts: {name: value}}]; names: the parts, bottom first; words(value) formats; unit(high) is
 * what the vertical scale counts in.
 */
export function stacks(node, { title, axis, bars, names, words, height, unit = () => 1 }) {
  fit(node, (width) => {
    const all = (name) => bars.reduce((sum, bar) => sum + (bar.parts[name] ?? 0), 0);
    const svg = picture(width, height + AXIS, `${title}: ${names.map((name) => `${name} ${words(all(name))}`).join(", ")}`);
    const sums = bars.map((bar) => names.reduce((sum, name) => sum + (bar.parts[name] ?? 0), 0));
    const high = largest(sums, 0) * 1.04 || 1;
    const y = (value) => height - ((height - 8) * value) / high;
    const pitch = (width - LEFT - RIGHT) / bars.length;
    const thick = Math.min(48, Math.max(1, pitch * 0.72));
    const named = Math.ceil(bars.length / Math.max(2, Math.floor(width / 60)));
    scale(svg, 0, high, y, width, words, Math.max(2, Math.floor(height / 45)), unit(high));
    bars.forEach((bar, index) => {
      const middle = LEFT + pitch * (index + 0.5);
      let below = 0;
      for (const name of names.filter((each) => bar.parts[each] > 0)) {
        const value = bar.parts[name];
        const box = { x: middle - thick / 2, width: thick, y: y(below + value), height: y(below) - y(below + value) };
        const part = draw("rect", { ...box, class: "part", "data-part": name });
        part.append(draw("title", {}, `${axis} ${bar.label}: ${name} ${words(value)}`));
        svg.append(part);
        below += value;
      }
      if (index % named === 0) svg.append(draw("text", { x: middle, y: height + AXIS - 5, class: "tick middle" }, bar.label));
    });
    svg.append(draw("text", { x: 2, y: height + AXIS - 5, class: "tick" }, axis));
    node.replaceChildren(svg);
  });
}

// --- matrix --------------------------------------------------------------------------------------

/**
 * Draw a matrix of coloured cells, one row per name and one column per label.
 * rows: [{name, end, cells: [{kind, text, title, strength}]}]; end is the text after the row.
 * If the matrix is too wide, it starts at its right end if `newest` is true, and stays where it is scrolled to.
 */
export function matrix(node, { title, columns, rows, newest }) {
  const HIGH = 26;
  const names = rows.map((row) => shortened(row.name, 22));
  const label = `${title}: ${rows.map((row) => `${row.name} ${row.end}`).join(", ")}`;
  const left = 12 + 7 * Math.max(...names.map((name) => name.length), 4);
  const right = 12 + 7 * Math.max(...rows.map((row) => row.end.length), 0);
  fit(node, (width) => {
    const pitch = Math.max(4, Math.min(56, (width - left - right) / columns.length));
    const gap = pitch > 14 ? 3 : 1;
    const view = node.parentElement;
    const atEnd = newest && (!node.firstChild || view.scrollLeft + view.clientWidth >= view.scrollWidth - 1);
    const height = HIGH * rows.length + AXIS;
    const svg = picture(Math.max(width, left + pitch * columns.length + right), height, label);
    rows.forEach((row, index) => {
      const top = HIGH * index;
      const middle = top + HIGH / 2 + 4;
      const name = draw("text", { x: left - 8, y: middle, class: "label end" }, names[index]);
      name.append(draw("title", {}, row.name));
      svg.append(name);
      row.cells.forEach((cell, place) => {
        const x = left + pitch * place;
        const box = { x: x + gap / 2, y: top + 1.5, width: pitch - gap, height: HIGH - 3, rx: Math.min(4, pitch / 5) };
        const drawn = draw("rect", { ...box, class: "cell", "data-part": cell.kind });
        drawn.style.setProperty("--strength", cell.strength);
        drawn.append(draw("title", {}, cell.title));
        svg.append(drawn);
        if (cell.text && cell.text.length * 7 < pitch - gap) {
          svg.append(draw("text", { x: x + pitch / 2, y: middle, class: "inside middle" }, cell.text));
        }
      });
      svg.append(draw("text", { x: left + pitch * columns.length + 8, y: middle, class: "tick" }, row.end));
    });
    const named = Math.ceil((columns.length > 99 ? 32 : 24) / pitch);
    columns.forEach((label, place) => {
      if (place % named) return;
      svg.append(draw("text", { x: left + pitch * (place + 0.5), y: height - 5, class: "tick middle" }, label));
    });
    node.replaceChildren(svg);
    if (atEnd) view.scrollLeft = view.scrollWidth;
    for (const name of svg.querySelectorAll(".label")) {
      if (name.getComputedTextLength() > left - 10) {
        mark(name, "textLength", left - 10);
        mark(name, "lengthAdjust", "spacingAndGlyphs");
      }
    }
  });
}
