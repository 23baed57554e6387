// Helpers that touch the DOM only where something changed, and number formatting.

export const $ = (id) => document.getElementById(id);

/** Show a panel's content, or its text for being empty; return whether there is content. */
export function either(id, there) {
  mark($(id), "hidden", there ? null : "");
  mark($(`${id}-empty`), "hidden", there ? "" : null);
  return there;
}

/** Make an element: make("td", {class: "number"}, "7"). Strings are inserted as text, never as HTML. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Make an SVG element. */
export function draw(tag, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

/** Set a node's text, if it differs. */
export function say(node, text) {
  const content = String(text ?? "");
  if (node.textContent !== content) node.textContent = content;
}

/** Set an attribute, if it differs; null, undefined and false remove it. */
export function mark(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/**
 * Give a node one child per item and reuse the children of items that stay.
 * create(item) makes a child, update(child, item) fills it, key(item) identifies the item.
 */
export function keyed(parent, items, key, create, update) {
  const before = new Map();
  for (const node of parent.children) before.set(node.dataset.key, node);
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let node = before.get(name);
    before.delete(name);
    if (!node) {
      node = create(item);
      node.dataset.key = name;
    }
    if (node === next) next = next.nextElementSibling;
    else parent.insertBefore(node, next);
    update(node, item);
  }
  for (const node of before.values()) node.remove();
}

/**
 * Fill a table, head and body. A column is {name, of(item) -> text}. Optional: n marks numbers,
 * wide and code set the style, fill(cell, item) draws the cell, title(item) is its tooltip.
 */
export function table(body, columns, items, key) {
  const kinds = ({ n, wide, code }) => [n && "n", wide && "wide", code && "code"].filter(Boolean).join(" ");
  const head = columns.map((column) => make("th", { scope: "col", class: kinds(column) }, column.name));
  const row = body.closest("table").tHead.rows[0];
  if (row.textContent !== head.map((cell) => cell.textContent).join("")) {
    row.replaceChildren(...head);
    body.replaceChildren();
  }
  keyed(
    body,
    items,
    key,
    () => {
      const cells = columns.map((column, place) =>
        make(place ? "td" : "th", { class: kinds(column), ...(place ? {} : { scope: "row" }) }),
      );
      return make("tr", {}, ...cells);
    },
    (line, item) => {
      columns.forEach((column, place) => {
        const cell = line.children[place];
        if (column.fill) column.fill(cell, item);
        else say(cell, column.of(item));
        if (column.title) mark(cell, "title", column.title(item));
      });
    },
  );
}

/** The largest number, but at least `least`. Math.max(...numbers) fails if there are about 100,000 or more. */
export function largest(numbers, least) {
  return numbers.reduce((most, number) => Math.max(most, number), least);
}

// --- formatting ----------------------------------------------------------------------------------

const WHOLE = new Intl.NumberFormat("en");

/** 12345 -> 12,345; no number -> –. */
export function whole(value) {
  return typeof value === "number" ? WHOLE.format(value) : "–";
}

/** A loss or another metric with about four significant digits, or two if it is tiny. */
export function figure(value) {
  if (typeof value !== "number") return "–";
  if (Math.abs(value) >= 100000) return value.toExponential(2);
  if (value !== 0 && Math.abs(value) < 0.001) return String(Number(value.toPrecision(2))); // 0.00009 beside 0.058, but 9e-7
  return value.toFixed(Math.abs(value) >= 100 ? 1 : Math.abs(value) >= 10 ? 2 : 3);
}

/** 0.9134 -> 91.3 %. */
export function percent(value) {
  return typeof value === "number" ? `${(100 * value).toFixed(1)} %` : "–";
}

/** A duration in a suitable unit. */
export function span(seconds) {
  if (typeof seconds !== "number") return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${(1e6 * seconds).toFixed(0)} µs`;
  if (seconds < 1) return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 10 && !Number.isInteger(seconds)) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  const [unit, less, names] = seconds < 7200 ? [60, 1, ["min", "s"]] : [3600, 60, ["h", "min"]];
  const rest = Math.floor((seconds % unit) / less);
  return `${Math.floor(seconds / unit)} ${names[0]}${rest ? ` ${rest} ${names[1]}` : ""}`;
}

/** The unit that `span` writes such a duration in, in seconds. */
export function unit(seconds) {
  return seconds < 120 ? 1 : seconds < 7200 ? 60 : 3600;
}

/** How long ago something was. */
export function ago(seconds) {
  return seconds < 1.5 ? "now" : `${span(Math.round(seconds))} ago`;
}

/** A number of bytes in a suitable unit. */
export function size(bytes) {
  if (typeof bytes !== "number") return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? bytes : bytes.toFixed(1)} ${units[unit]}`;
}

const DAY = new Intl.DateTimeFormat("en", { month: "short", day: "numeric" });

/** The local time of day, after the date unless that is the date of `now`. */
export function clock(seconds, now) {
  if (typeof seconds !== "number") return "–";
  const at = new Date(1000 * seconds);
  const isToday = at.toDateString() === new Date(1000 * now).toDateString();
  return `${isToday ? "" : `${DAY.format(at)}, `}${at.toTimeString().slice(0, 8)}`;
}

/** The local time zone: UTC+02:00. */
export function zone() {
  const [, sign, hours, minutes] = /([+-])(..)(..)/.exec(new Date().toTimeString());
  return `UTC${sign}${hours}:${minutes}`;
}

/** A period in UTC, to the minute. */
export function period(from, to) {
  const [first, last] = [moment(from), moment(to)];
  const sameDay = first.slice(0, 10) === last.slice(0, 10);
  return `${first.slice(0, 16)} to ${last.slice(sameDay ? 11 : 0, 16)} UTC`;
}

/** Date and time in UTC. */
export function moment(seconds) {
  if (typeof seconds !== "number") return "–";
  return `${new Date(1000 * seconds).toISOString().slice(0, 19).replace("T", " ")} UTC`;
}
