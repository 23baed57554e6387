// The panels (see panels.js) about committed rounds and the configuration; the report has them too.

import { $, either, figure, largest, make, mark, moment, percent, say, size, span, table, unit, whole } from "./dom.js";
import { FIRST, chart, matrix, metrics, newest, stacks, wording } from "./chart.js";

/** The phases between two commits, in the coordinator's order. */
const PHASES = ["waiting", "training", "transfer", "aggregation", "checkpoint"];
const label = (phase) => (phase === "transfer" ? "transfer and other" : phase);
/** Up to this staleness, the histogram has a bar for every value, even if it is empty. */
const MOST_BARS = 60;

/** Whether this page is a report. */
export const frozen = (board) => board.run?.source === "history";

const total = (rounds, value) => rounds.reduce((sum, round) => sum + (value(round) ?? 0), 0);
const committed = (board) => board.rounds.filter((round) => round.committed_at !== undefined);
/** How long a round took, from the previous commit to its own. */
const seconds = (round) => round.phases && Object.values(round.phases).reduce((sum, value) => sum + value, 0);

// --- figures -------------------------------------------------------------------------------------

/** The best known metric besides the loss. */
const leading = (curves) => metrics(curves).find((name) => !["loss", "training loss", "epsilon"].includes(name));

/** The tiles with the run's key figures: [name, text, tone]; `people` is the tile about workers. */
export function reached(board, people) {
  const { curves, rejected } = board;
  const tile = (name) => name in curves && [name, wording(name)(newest(curves, name))];
  const lead = leading(curves);
  const { late } = board.people; // a page lacks the details of old rounds
  return [
    lead && tile(lead),
    tile("loss"),
    tile("epsilon"),
    people,
    frozen(board) && ["updates", whole(board.totals.updates)],
    frozen(board) && ["time", span(board.totals.seconds)],
    late > 0 && ["late", whole(late), "odd"],
    ["rejected", whole(rejected.total), rejected.total > 0 ? "bad" : null],
  ].filter(Boolean);
}

let drawn = {}; // what the chart shows: the state of the run changes much more often

function curves(board) {
  const { curves, run } = board;
  if (drawn.curves === curves && drawn.rounds === run.rounds) return;
  drawn = { curves, rounds: run.rounds };
  if (either("chart", curves.rounds.length > 0)) chart($("chart"), curves, run.rounds);
}
curves.of = ["curves", "run"];

// --- rounds --------------------------------------------------------------------------------------

function rounds(board) {
  const shown = committed(board).reverse();
  const known = metrics(board.curves);
  const others = known.filter((name) => !FIRST.includes(name));
  const column = (name, of, more = {}) => ({ name, of, n: true, ...more });
  const report = frozen(board)
    ? [
        column("committed", (round) => moment(round.committed_at), { n: false }),
        column("examples", (round) => whole(round.num_examples)),
        column("training loss", (round) => figure(round.train_loss)),
        ...others.map((name) => column(name, (round) => wording(name)(round.metrics?.[name]))),
        column("received", (round) => (round.bytes ? size(round.bytes) : "–")),
        column("late", (round) => round.late || "–"),
        column("rejected", (round) => round.rejected || "–"),
      ]
    : [];
  const columns = [
    column("round", (round) => round.round),
    known.includes("accuracy") && column("accuracy", (round) => percent(round.metrics?.accuracy)),
    column("loss", (round) => figure(round.loss)),
    column("updates", (round) => whole(round.updates), { title: (round) => participants(board, round) }),
    ...report,
    column("took", (round) => span(seconds(round)), { title: () => "from the previous commit to this one" }),
    { name: "where the time went", wide: true, fill: (cell, round) => shares(cell, round.phases ?? {}) },
  ].filter(Boolean);
  for (const node of document.querySelectorAll("[data-rounds]")) {
    say(node, shown.at(-1)?.round > 1 ? `last ${whole(shown.length)} rounds` : ""); // a page has no details of older ones
  }
  either("history", shown.length > 0);
  table($("history"), columns, shown, (round) => round.round);
}
rounds.of = ["rounds", "curves", "unlisted"];

function participants(board, { participants }) {
  return [...participants, board.unlisted > 0 && "…"].filter(Boolean).join(", ");
}

/** Draw a bar whose parts are each phase's share of the round's time. */
function shares(cell, phases) {
  const known = PHASES.filter((name) => phases[name] > 0);
  const sum = known.reduce((before, name) => before + phases[name], 0);
  const words = known.map((name) => `${label(name)} ${span(phases[name])}`).join(", ");
  const bar = make("div", { class: "steps", role: "img", "aria-label": words || "unknown", title: words });
  for (const name of known) {
    const piece = make("i", { "data-part": name });
    piece.style.setProperty("flex-grow", Math.max(0.004, phases[name] / sum));
    bar.append(piece);
  }
  cell.replaceChildren(bar);
}

function legend(id, pieces) {
  $(id).replaceChildren(...pieces.map(([part, words]) => make("span", {}, make("i", { "data-part": part }), words)));
}

function time(board) {
  const timed = committed(board).filter((round) => round.phases);
  mark($("time-legend"), "hidden", timed.length > 0 ? null : "");
  if (!either("time", timed.length > 0)) return;
  const all = total(timed, seconds) || 1;
  const of = (name) => total(timed, (round) => round.phases[name]);
  const bars = timed.map((round) => ({ label: round.round, parts: round.phases }));
  legend("time-legend", PHASES.map((name) => [name, `${label(name)} ${span(of(name))} (${percent(of(name) / all)})`]));
  stacks($("time"), { title: "Seconds of each phase by round", axis: "round", bars, names: PHASES, words: span, unit, height: 180 });
}
time.of = ["rounds"];

// --- participation -------------------------------------------------------------------------------

function participation(board) {
  const shown = committed(board);
  const names = [...new Set(shown.flatMap((one) => [...one.participants, ...one.asked, ...one.came_late]))].sort();
  mark($("participation-legend"), "hidden", names.length > 0 ? null : "");
  if (!either("participation", names.length > 0)) return;
  const examples = shown.map((one) => new Map(one.participants.map((name, place) => [name, one.examples[place]])));
  const asked = shown.map((one) => new Set(one.asked));
  const late = shown.map((one) => new Set(one.came_late));
  const later = board.staleness !== null; // whether an answer can count in a later round
  const most = largest(examples.flatMap((one) => [...one.values()]), 1);
  const cell = (name, place) => {
    const count = examples[place].get(name);
    if (count !== undefined) {
      return { kind: "counted", text: whole(count), words: `counted, ${whole(count)} examples`, strength: (count ?? 0) / most };
    }
    if (late[place].has(name)) return { kind: "late", text: "late", words: "arrived late" };
    if (!asked[place].has(name)) return { kind: "absent", words: "was not asked" };
    return later ? { kind: "working", words: "was at work" } : { kind: "missing", words: "did not answer" };
  };
  const rows = names.map((name) => {
    const cells = shown.map((one, place) => {
      const { words, ...look } = cell(name, place);
      return { strength: 0, ...look, title: `${name}, round ${one.round}: ${words}` };
    });
    return { name, cells, end: `${cells.filter((each) => each.kind === "counted").length} of ${shown.length}` };
  });
  legend("participation-legend", [
    ["counted", "counted (stronger: more examples)"],
    ["late", "late"],
    later ? ["working", "at work, not counted in this round"] : ["missing", "asked, no answer counted"],
    ["absent", "not asked"],
  ]);
  say($("participation-note"), board.unlisted > 0 ? `${whole(board.unlisted)} more workers are not shown.` : "");
  const columns = shown.map((one) => one.round);
  matrix($("participation"), { title: "Who was counted in which round", columns, rows, newest: !frozen(board) });
}
participation.of = ["rounds", "staleness", "unlisted"];

function staleness(board) {
  const { staleness } = board;
  mark($("staleness").closest("section"), "hidden", staleness ? null : "");
  if (!staleness) return;
  const oldest = Math.max(...Object.keys(staleness.counts).map(Number));
  const versions = oldest < MOST_BARS ? [...Array(oldest + 1).keys()] : Object.keys(staleness.counts);
  const bars = versions.map((label) => ({ label: String(label), parts: { updates: staleness.counts[label] ?? 0 } }));
  const lost = staleness.lost === null ? "" : `; ${percent(staleness.lost)} of the weight lost to the discount`;
  say($("staleness-words"), `updates by number of versions behind${lost}`);
  stacks($("staleness"), { title: "Updates by staleness", axis: "versions", bars, names: ["updates"], words: whole, height: 110 });
}
staleness.of = ["staleness"];

// --- late and rejected ---------------------------------------------------------------------------

function refusals(board) {
  const shown = committed(board);
  const any = shown.some((round) => round.late || round.rejected);
  mark($("refusals"), "hidden", any ? null : "");
  legend("refusals-legend", any ? [["late", "late"], ["rejected", "rejected"]] : []);
  if (!any) return;
  const bars = shown.map((round) => ({ label: round.round, parts: { late: round.late, rejected: round.rejected } }));
  const title = "Late updates and rejected messages, by the round that was open when they arrived";
  stacks($("refusals"), { title, axis: "round", bars, names: ["late", "rejected"], words: whole, height: 70 });
}
refusals.of = ["rounds"];

// --- configuration -------------------------------------------------------------------------------

function configuration(board) {
  const all = board.configurations;
  mark($("configuration").closest("section"), "hidden", all.length ? null : "");
  if (!all.length) return;
  const flats = all.map((one) => flat(one));
  const kept = ([name]) => name !== "from round" && name !== "since";
  const settings = Object.entries(flats.at(-1)).filter(kept);
  $("configuration").replaceChildren(
    ...settings.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
  );
  const changes = flats.slice(1).flatMap((after, index) => {
    const before = flats[index];
    const names = Object.keys({ ...before, ...after }).filter((name) => kept([name]) && before[name] !== after[name]);
    return names.sort().map((name) => ({ round: after["from round"], name, was: before[name], now: after[name] }));
  });
  mark($("changes").closest("table"), "hidden", changes.length ? null : "");
  const columns = [
    { name: "changed from round", n: true, of: (one) => one.round },
    { name: "setting", of: (one) => one.name },
    { name: "was", of: (one) => one.was ?? "–" },
    { name: "became", of: (one) => one.now ?? "–" },
  ];
  table($("changes"), columns, changes, (one) => `${one.round} ${one.name}`);
}
configuration.of = ["configurations"];

/** What the report calls the settings whose names in run.json are not those of their options. */
const SETTINGS = new Map([
  ["wait", "wait workers"],
  ["selection", "select"],
  ["least", "fewest updates"],
  ["patience", "heartbeats missed until gone"],
  ["stall", "report a stalled worker after"],
  ["resend", "send work again after"],
  ["hearing", "pause deadlines after silence of"],
  ["stopping monitor", "monitor"],
  ["stopping target", "target"],
  ["stopping patience", "patience"],
  ["stopping time budget", "time budget"],
]);

/** Flatten a configuration to {setting name: formatted value}. */
function flat(tree, above = "") {
  const leaves = {};
  for (const [key, value] of Object.entries(tree)) {
    const path = `${above}${key}`.replace(/_s$/, "").replaceAll("_", " ");
    const name = SETTINGS.get(path) ?? path.replace(/^versions /, "version of ");
    if (key === "quorum" && value && typeof value === "object") {
      leaves.quorum = value.number ? whole(value.number) : value.fraction === 1 ? "all" : `${percent(value.fraction)} of those asked`;
    } else if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
      Object.assign(leaves, flat(value, key === "rules" || key === "plan" ? "" : `${path} `));
    } else if (key.endsWith("_s") && typeof value === "number") {
      leaves[name] = span(value);
    } else {
      leaves[name] = words(value);
    }
  }
  return leaves;
}

function words(value) {
  if (value === null || value === "" || (typeof value === "object" && !Object.keys(value).length)) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return Array.isArray(value) ? value.map(words).join(", ") : String(value);
}

function checkpoints(board) {
  mark($("checkpoints").closest("section"), "hidden", null);
  const { length } = board.checkpoints;
  say($("checkpoints-count"), length < board.totals.checkpoints ? `last ${whole(length)} of ${whole(board.totals.checkpoints)}` : "");
  const columns = [
    { name: "file", of: (one) => one.file },
    { name: "size", n: true, of: (one) => size(one.size_bytes) },
    { name: "SHA-256", code: true, of: (one) => one.sha256 },
  ];
  table($("checkpoints"), columns, board.checkpoints, (one) => one.file);
}
checkpoints.of = ["checkpoints"];

export const results = [curves, rounds, time, participation, staleness, refusals, configuration, checkpoints];
