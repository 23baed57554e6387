// The page: listens to the coordinator, keeps what it said, and draws what changed of it.
// A report is the same page with everything in it already: then there is nobody to listen to.

import { $, mark, moment, say, span } from "./dom.js";
import { panels, tick } from "./panels.js";

const SILENT_MS = 35000; // the server speaks every 10 s at least
const AGAIN_MS = 2000;

const board = {};
const snapshot = $("snapshot"); // what a report is of; a live page has none
let stream = null;
let heardAt = Date.now();
let lostAt = null;
let offsetS = 0; // the server's clock minus ours

/** The server's time, in seconds since 1970. */
function now() {
  return Date.now() / 1000 + offsetS;
}

// --- listening -----------------------------------------------------------------------------------

function listen() {
  stream?.close();
  stream = new EventSource("events");
  stream.onmessage = (message) => heard(JSON.parse(message.data));
  stream.addEventListener("alive", () => heard({}));
  stream.onerror = () => {
    lostAt ??= Date.now();
    link();
    // The browser tries again by itself, unless it was told something else than "come in".
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN_MS);
  };
}

function heard(news) {
  heardAt = Date.now();
  lostAt = null;
  Object.assign(board, news);
  if (news.now) offsetS = news.now - Date.now() / 1000;
  for (const paint of panels) {
    const isNew = paint.of.some((name) => name in news);
    if (isNew && paint.of.every((name) => name in board)) paint(board, now());
  }
  link();
}

/** Say how it stands between this page, the coordinator and the broker. */
function link() {
  const pill = $("link");
  let state = "good";
  let words = "live";
  if (snapshot) {
    state = "frozen";
    words = `report of ${moment(board.now).slice(0, 10)}`;
  } else if (lostAt !== null) {
    const ended = board.run?.phase === "ended" && board.run.source === "coordinator";
    state = ended ? "wait" : "bad";
    words = ended
      ? "the run is over, its coordinator has left; listening for another"
      : `lost, trying again (${span(Math.round((Date.now() - lostAt) / 1000))})`;
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
}

function watch() {
  if (Date.now() - heardAt > SILENT_MS && stream.readyState === EventSource.OPEN) {
    lostAt ??= Date.now();
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
    // It lasts as long as the page, then.
  }
});

if (snapshot) {
  heard(JSON.parse(snapshot.textContent));
} else {
  listen();
  setInterval(watch, 1000);
}
