// One function per panel. Each gets the whole board, and `of` lists the sections that it draws.

import { $, clock, either, keyed, make, mark, moment, period, say, size, span, whole, zone } from "./dom.js";
import { frozen, reached, results } from "./results.js";
import { over, people, seen, workers } from "./workers.js";

const QUEUES = ["updates", "presence", "journal", "rejected", "unrouted", "inbox", "outbox"];
const SOURCES = {
  coordinator: "Read-only. Source: the coordinator itself.",
  journal: "Read-only. Sources: the journal, the workers' heartbeats and RabbitMQ's management API.",
};

// --- the state of the run ------------------------------------------------------------------------

function run(board) {
  const { run } = board;
  document.title = `${run.federation}: ${run.words}`;
  say($("federation"), run.federation);
  const first = frozen(board) && board.totals.opened_at;
  const when = first ? ` · ${period(first, board.rounds.at(-1).committed_at)}` : "";
  say($("run"), run.run ? `run ${run.run}${when}` : "");
  mark($("phase"), "aria-live", run.phase === "ended" ? "polite" : "off"); // updates would interrupt a screen reader
  say($("phase"), run.words);
  mark($("phase"), "data-phase", run.outcome ?? run.phase);
  const bar = $("rounds-bar");
  bar.max = run.rounds ?? Math.max(1, run.committed);
  bar.value = Math.min(run.committed, bar.max);
  const planned = run.rounds ? ` of ${run.rounds}` : "";
  say($("rounds-words"), `${run.committed}${planned} round${(run.rounds ?? run.committed) === 1 ? "" : "s"}`);
  say($("source"), SOURCES[run.source] ?? `Written by fluffle ${run.version}, ${moment(board.now)}.`);
}
run.of = ["run"];

function tiles(board) {
  const [label, count] = people(board);
  const shown = reached(board, [label === "connected" ? "workers" : label, whole(count)]);
  keyed(
    $("tiles"),
    shown,
    ([name]) => name,
    () => make("div", {}, make("dt"), make("dd")),
    (tile, [name, words, tone]) => {
      say(tile.firstChild, name);
      say(tile.lastChild, words);
      mark(tile, "data-tone", tone);
    },
  );
}
tiles.of = ["run", "people", "curves", "rejected"];

// --- the open round ------------------------------------------------------------------------------

function open(board, now) {
  const { open } = board;
  say($("open-title"), open ? `Round ${open.round}` : over(board) ? "No open round" : "The open round");
  if (!either("open", open !== null)) {
    const ended = board.run.outcome === "interrupted" ? "The run was interrupted." : "The run has ended.";
    const evaluating = board.run.phase === "evaluating";
    say($("open-empty"), over(board) ? ended : evaluating ? "All rounds are done." : "No round is open.");
    return;
  }
  const reached = open.updates >= open.needed;
  say($("quorum-words"), `${open.updates} of ${open.needed} updates`);
  mark($("quorum-words"), "data-tone", reached ? "good" : null);
  const slots = $("slots");
  mark(slots, "aria-label", `${open.updates} of ${open.needed} updates are in`);
  const most = Math.min(Math.max(open.needed, open.updates), 60);
  keyed(
    slots,
    Array.from({ length: most }, (_, slot) => slot),
    (slot) => slot,
    () => make("i"),
    (node, slot) => mark(node, "data-in", slot < (most * open.updates) / Math.max(open.needed, open.updates, 1) ? "" : null),
  );
  // Those that the round waits for come first, and of these, those that cannot answer any more.
  const missing = open.missing.toSorted((one, other) => other.hopeless - one.hopeless);
  const answers = [
    ...missing.map((one) => ({ ...one, in: false })),
    ...open.answered.map((one) => ({ ...one, in: true })),
  ];
  keyed(
    $("answers"),
    answers,
    (one) => one.key ?? one.worker, // an asynchronous round can count a worker more than once
    () => make("li", {}, make("i", { "aria-hidden": "true" }), make("b"), make("span")),
    (row, one) => {
      mark(row, "data-state", one.in ? "in" : one.hopeless ? "bad" : "out");
      say(row.children[1], one.worker);
      const details = one.in
        ? [
            `${whole(one.num_examples)} examples`,
            `after ${span(one.after_s)}`,
            one.bytes && size(one.bytes),
            one.staleness && `${one.staleness} versions behind`,
          ]
        : [one.doing];
      say(row.children[2], details.filter(Boolean).join(" · "));
    },
  );
  deadline(board, now);
}
open.of = ["open", "run"];

function deadline(board, now) {
  const { open } = board;
  if (!open) return;
  const left = open.deadline_at === null ? null : open.deadline_at - now;
  const times = [];
  if (open.opened_at !== null) times.push(`open for ${span(Math.max(0, Math.round(now - open.opened_at)))}`);
  if (left !== null) {
    const closes = open.updates >= open.needed ? "closes" : "deadline";
    times.push(left > 0 ? `${closes} in ${span(Math.round(left))}` : `${closes} now`);
  }
  say($("deadline"), times.join(", "));
  mark($("deadline"), "data-tone", left !== null && left < 30 && open.updates < open.needed ? "bad" : null);
}

// --- queues --------------------------------------------------------------------------------------

function queues(board) {
  const { note } = board.queues;
  const prefix = `${board.run.federation}.`;
  const kind = (queue) => {
    const place = QUEUES.indexOf(queue.name.replace(prefix, "").split(".")[0]);
    return place < 0 ? QUEUES.length : place;
  };
  const figures = board.queues.figures.toSorted((one, other) => kind(one) - kind(other));
  keyed(
    $("queues"),
    figures,
    (queue) => queue.name,
    () => make("tr", {}, make("th", { scope: "row" }), ...Array.from({ length: 4 }, () => make("td", { class: "n" }))),
    (row, queue) => {
      const [name, ready, unacked, consumers, bytes] = row.children;
      say(name, queue.name.startsWith(prefix) ? queue.name.slice(prefix.length) : queue.name);
      mark(name, "title", queue.purpose);
      say(ready, whole(queue.ready));
      say(unacked, whole(queue.unacknowledged));
      say(consumers, whole(queue.consumers));
      say(bytes, size(queue.size_bytes));
      mark(row, "data-still", !queue.ready && !queue.unacknowledged ? "" : null);
      const unread = !over(board) && /^(inbox\.|updates|presence)/.test(name.textContent) && queue.consumers === 0;
      mark(consumers, "data-tone", unread ? "bad" : null);
      mark(consumers, "title", unread ? "this queue has no consumer" : null);
    },
  );
  const words = figures.length ? note : note ?? "This federation has no queues yet.";
  say($("queues-note"), words ?? "");
  mark($("queues-note"), "hidden", words ? null : "");
}
queues.of = ["queues", "run"];

// --- the journal, and rejected messages ----------------------------------------------------------

function journal(board, now) {
  say($("journal-zone"), either("journal", board.journal.length > 0) ? `times in ${zone()}` : "");
  keyed(
    $("journal"),
    board.journal.toReversed(),
    (line) => line.id,
    () => make("li", {}, make("time"), make("span")),
    (row, line) => {
      mark(row, "data-tone", line.tone);
      say(row.firstChild, clock(line.time, now));
      mark(row.firstChild, "title", moment(line.time));
      say(row.lastChild, line.text);
    },
  );
}
journal.of = ["journal"];

function rejected(board, now) {
  const { latest, causes, total } = board.rejected;
  const counts = Object.entries(causes).map(([cause, count]) => `${count} ${cause}`);
  if (total > latest.length) counts.push(`${total - latest.length} more are not listed`);
  say($("rejected-count"), counts.join(", "));
  either("rejected", latest.length > 0);
  keyed(
    $("rejected"),
    latest.toReversed(),
    (line) => line.id,
    () => make("li", { "data-tone": "bad" }, make("time"), make("span", { class: "chip" }), make("span")),
    (row, line) => {
      say(row.children[0], frozen(board) ? `in round ${line.during}` : clock(line.time, now));
      say(row.children[1], line.cause);
      const origin = [line.kind, line.worker && `from ${line.worker}`, line.round && `round ${line.round}`];
      const prefix = origin.filter(Boolean).join(", ");
      say(row.children[2], prefix ? `${prefix}: ${line.reason}` : line.reason);
    },
  );
}
rejected.of = ["rejected"];

// -------------------------------------------------------------------------------------------------

export const panels = [run, tiles, open, workers, queues, journal, rejected, ...results];

/** Update what changes with time alone: ages and countdowns. */
export function tick(board, now) {
  if (!board.workers) return;
  deadline(board, now);
  seen(board, now);
}
