// The page: keeps the board that the server sends, and redraws the panels whose sections changed.
// A report is the same page with its snapshot embedded; it opens no connection.

import { $, mark, moment, say, span } from "./dom.js";
import { panels, tick } from "./panels.js";

const SILENT_MS = 35000; // the server sends something at least every 10 s
const AGAIN_MS = 2000;

const board = {};
const snapshot = $("snapshot"); // only a report has one
let stream = null;
let heardAt = Date.now();
let lostAt = null;
let offsetS = 0; // the server's clock minus ours
const stale = new Set(); // the sections that have changed since their panels were drawn

/** The server's time, in seconds since 1970. */
function now() {
  return Date.now() / 1000 + offsetS;
}

// --- listening -----------------------------------------------------------------------------------

function listen() {
  stream?.close();
  stream = new EventSource("events");
  stream.onmessage = (message) => heard(JSON.parse(message.data));
  stream.addEventListener("alive", (message) => heard({ now: Number(message.data) }));
  stream.onerror = () => {
    lostAt ??= Date.now();
    link();
    // The browser reconnects by itself, except after a response that is not an event stream.
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN_MS);
  };
}

function heard(news) {
  heardAt = Date.now();
  lostAt = null;
  Object.assign(board, news);
  if (news.now) offsetS = news.now - Date.now() / 1000;
  for (const name of Object.keys(news)) stale.add(name);
  repaint();
  link();
}

/** Redraw the panels whose sections changed. Nobody sees those of a hidden tab, except its title. */
function repaint() {
  const isHidden = document.hidden && !snapshot;
  for (const paint of isHidden ? panels.slice(0, 1) : panels) {
    if (!paint.of.some((name) => stale.has(name)) || !paint.of.every((name) => name in board)) continue;
    try {
      paint(board, now());
    } catch (fault) {
      reportError(fault); // on the console; the other panels are drawn
    }
  }
  if (!isHidden) stale.clear();
}
document.addEventListener("visibilitychange", repaint);

/** Show the state of the connections between this page, the coordinator and the broker. */
function link() {
  const pill = $("link");
  let state = "good";
  let words = "live";
  let since = "";
  if (snapshot) {
    state = "frozen";
    words = `report of ${moment(board.now).slice(0, 10)}`;
  } else if (lostAt !== null) {
    const ended = board.run?.phase === "ended" && board.run.source === "coordinator";
    state = ended ? "wait" : "bad";
    words = ended
      ? "the run has ended and its coordinator is gone; waiting for another coordinator"
      : `connection lost, retrying; check that 'fluffle ${board.run?.source === "journal" ? "dashboard" : "coordinator"}' still runs`;
    if (!ended) since = `(${span(Math.round((Date.now() - lostAt) / 1000))})`;
  } else if (!board.run) {
    state = "wait";
    words = "connecting";
  } else if (!board.run.linked) {
    state = board.run.phase === "ended" ? "wait" : "bad";
    words = board.run.link;
  }
  mark(pill, "data-state", state);
  mark(document.body, "data-lost", lostAt !== null ? "" : null);
  say($("link-words"), words);
  say($("link-since"), since); // outside of what screen readers announce
}

function watch() {
  if (Date.now() - heardAt > SILENT_MS && stream.readyState === EventSource.OPEN) {
    lostAt ??= heardAt;
    listen();
    heardAt = Date.now();
  }
  link();
  if (lostAt === null) tick(board, now());
}

// --- light and dark ------------------------------------------------------------------------------

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("fluffle-theme", root.dataset.theme);
  } catch {
    // Without storage, the choice lasts until the page is reloaded.
  }
});

if (snapshot) {
  heard(JSON.parse(snapshot.textContent));
} else {
  listen();
  setInterval(watch, 1000);
}
