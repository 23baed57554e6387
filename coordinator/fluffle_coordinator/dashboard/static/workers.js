// The panel of the workers (see panels.js): a table that remains usable with thousands of rows.

import { $, ago, either, figure, keyed, make, mark, say, size, span, whole } from "./dom.js";
import { frozen } from "./results.js";

/** The number of rows shown at first, and added with each press of the button. */
const STEP = 25;
const ABSENT = new Set(["left", "gone", "refused"]);

/** Whether the run has ended; then silent workers and queues without consumers are normal. */
export const over = (board) => board.run?.phase === "ended" || frozen(board);

const isHere = (worker) => !ABSENT.has(worker.state);

/** How many workers are connected, or took part in a run that has ended: [label, number]. */
export function people(board) {
  return over(board) ? ["took part", board.people.counted] : ["connected", board.people.connected];
}

let limit = STEP;
let latest = null; // the last board and time, for redrawing after a change of the search or order

/** Draw the first workers whose names match the search, in the chosen order. */
export function workers(board, now) {
  latest = { board, now };
  const [label, count] = people(board);
  const listed = board.workers.length;
  const part = board.people.known > listed ? `, ${whole(listed)} of ${whole(board.people.known)} listed` : "";
  say($("workers-count"), listed ? `${whole(count)} ${label}${part}` : "");
  mark($("workers-finder"), "hidden", board.workers.length > STEP ? null : "");
  const wanted = $("workers-name").value.trim().toLowerCase();
  const matching = board.workers.filter((worker) => worker.name.toLowerCase().includes(wanted));
  say($("workers-empty"), board.workers.length ? "No name matches." : "No worker has connected yet.");
  either("workers", matching.length > 0);
  const order = $("workers-order").value;
  if (order !== "name") matching.sort((one, other) => (other[order] ?? -1) - (one[order] ?? -1));
  const left = Math.max(0, matching.length - limit);
  mark($("workers-more"), "hidden", left > 0 ? null : "");
  say($("workers-more"), `Show ${whole(Math.min(STEP, left))} more of ${whole(left)}`);
  keyed(
    $("workers"),
    matching.slice(0, limit),
    (worker) => worker.name,
    () => {
      const bar = make("div", { class: "bar" }, make("progress", { max: 1, value: 0 }), make("span"));
      return make(
        "tr",
        {},
        make("th", { scope: "row" }),
        make("td", { class: "live" }, make("span", { class: "chip" })),
        make("td", { class: "live wide" }, bar),
        make("td", { class: "live n", "data-label": "loss" }),
        ...["examples", "counted", "late", "rejected", "training", "sent"].map((name) =>
          make("td", { class: "n", "data-label": name }),
        ),
        make("td", { class: "live n", "data-label": "seen" }),
      );
    },
    (row, worker) => {
      const [name, doing, progressing, loss, examples, counted, late, refused, training, sent] = row.children;
      const state = over(board) && isHere(worker) ? "done" : worker.state;
      say(name, worker.name);
      mark(row, "data-absent", isHere(worker) || frozen(board) ? null : "");
      say(doing.firstChild, state);
      mark(doing.firstChild, "data-state", state);
      progress(progressing.firstChild, state === "done" ? { name: worker.name } : worker);
      say(loss, figure(worker.loss));
      say(examples, whole(worker.num_examples));
      say(counted, whole(worker.counted));
      showCount(late, worker.late);
      showCount(refused, worker.rejected);
      say(training, span(worker.train_s));
      say(sent, worker.bytes ? size(worker.bytes) : "–");
    },
  );
  seen(board, now);
}
workers.of = ["workers", "people", "run"];

function progress(bar, worker) {
  const [gauge, words] = bar.children;
  const steps = worker.steps > 0;
  mark(bar, "data-idle", steps ? null : "");
  mark(gauge, "hidden", !steps && worker.why ? "" : null);
  gauge.max = steps ? worker.steps : 1;
  gauge.value = steps ? worker.step : 0;
  mark(gauge, "aria-label", `local progress of ${worker.name}`);
  const idle = worker.why || (worker.round ? `round ${worker.round}` : "");
  say(words, steps ? `${worker.step}/${worker.steps}` : idle);
}

function showCount(cell, count) {
  say(cell, whole(count));
  mark(cell, "data-tone", count > 0 ? "odd" : "none");
}

/** Show how long ago each worker was last heard. */
export function seen(board, now) {
  const byName = new Map(board.workers.map((worker) => [worker.name, worker]));
  for (const row of $("workers").children) {
    const worker = byName.get(row.dataset.key);
    if (!worker) continue;
    const cell = row.lastElementChild;
    const age = worker.last_seen === null ? null : Math.max(0, now - worker.last_seen);
    say(cell, age === null ? "–" : ago(age));
    const silent =
      !over(board) && age !== null && age > 3 * (worker.heartbeat_s ?? 10) && isHere(worker);
    mark(cell, "data-tone", silent ? "bad" : null);
  }
}

function redraw() {
  if (latest) workers(latest.board, latest.now);
}
addEventListener("beforeprint", () => {
  const onScreen = limit;
  limit = Infinity; // paper has no button for more
  redraw();
  limit = onScreen;
});
addEventListener("afterprint", redraw);
$("workers-name").addEventListener("input", redraw);
$("workers-order").addEventListener("change", redraw);
$("workers-more").addEventListener("click", () => {
  limit += STEP;
  redraw();
});
