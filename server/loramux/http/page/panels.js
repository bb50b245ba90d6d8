// The batch, the adapters, their comings and goings, the queue and the guesses.

import { $, bytes, count, el, fill, percent, plural, say, seconds, svg, tr } from "./dom.js";

const PHASES = ["schedule", "forward", "sample", "commit"];
const REASONS = {
  loading: "its adapter, which is on its way",
  frames: "free frames",
  share: "frames of its tenant's share",
  seats: "a seat in the batch",
  turn: "its turn",
};
const WINDOW_S = 120;
const TINTS = 4;

const together = (names) => names.join(" + ");

/** Which tint a row's adapters get: 0 is the base's. */
class Tints {
  constructor(base) {
    this.known = new Map([[base, 0]]);
  }
  of(name) {
    if (!this.known.has(name)) this.known.set(name, 1 + ((this.known.size - 1) % TINTS));
    return this.known.get(name);
  }
}

export function drawBatch(state, step) {
  const { batch, model } = state;
  const tints = new Tints(model);
  const named = batch.map((row) => together(row.adapters));
  const kinds = new Set(named);
  const more = state.running > batch.length ? `, ${batch.length} shown` : "";
  say("batch-line", batch.length ? `${plural(state.running, "row")} wearing ${plural(kinds.size, "different list")} of adapters${more}` : "The rows of one step, whatever they wear.");
  const order = batch.map((row, at) => ({ row, name: named[at] })).sort((a, b) => a.name.localeCompare(b.name));
  const worn = new Map();
  for (const { row, name } of order) {
    const sum = worn.get(name) ?? { rows: 0, tokens: 0 };
    worn.set(name, { rows: sum.rows + 1, tokens: sum.tokens + row.tokens });
  }
  const strip = [...worn].filter(([, sum]) => sum.tokens).map(([name, { rows, tokens }]) =>
    el("span", { class: `tint${tints.of(name)}`, style: { flexGrow: String(tokens) }, title: `${name}: ${plural(rows, "row")}, ${plural(tokens, "token")}` }, rows > 1 ? `${name} × ${rows}` : name),
  );
  $("strip").replaceChildren(...strip);
  fill(
    "batch-table",
    order.map(({ row, name }) =>
      tr(
        el("span", { class: "wears" }, el("i", { class: `dot tint${tints.of(name)}` }), name, row.tenant ? el("small", {}, row.tenant) : null),
        { n: row.guesses ? `${row.tokens - row.guesses} + ${row.guesses}` : count(row.tokens) },
        { n: count(row.context) },
        { n: percent(row.accepted, row.drafted) },
        { n: seconds(row.age_s) },
      ),
    ),
    state.prompts ? "Nobody is asking. Try a prompt below." : "Nobody is asking.",
  );
  drawPhases(step);
}

function drawPhases(step) {
  const known = step?.phases.forward ? PHASES.map((name) => [name, step.phases[name] ?? 0]) : [];
  const sum = known.reduce((all, [, value]) => all + value, 0);
  $("phases").replaceChildren(
    ...known.map(([name, value]) => el("span", { class: name, style: { flexGrow: String(sum ? value / sum : 0) } })),
  );
  $("phases-list").replaceChildren(
    ...PHASES.map((name, at) =>
      el("div", {}, el("dt", {}, el("i", { class: `swatch ${name}` }), name), el("dd", {}, known.length ? seconds(known[at][1]) : "–")),
    ),
  );
}

const PLACES = { leased: "in use", warm: "warm", loading: "on its way", host: "host memory", disk: "disk" };

export function drawAdapters(state) {
  const { rows, registered, in_pool: pool, in_host: host, host_bytes: hostBytes } = state.adapters;
  const parts = [`${count(pool)} in the pool`];
  if (host) parts.push(`${count(host)} in host memory (${bytes(hostBytes)})`);
  parts.push(`${count(registered)} on disk`);
  say("adapters-line", parts.join(" · "));
  fill(
    "adapters-table",
    rows.map((row) => {
      const place = row.state || row.tier;
      const name = el("span", { class: "wears" }, row.name, row.pinned ? el("em", { class: "tag" }, "pinned") : null, row.tenant ? el("small", {}, row.tenant) : null);
      return tr(
        name,
        el("span", { class: "wears" }, el("i", { class: `swatch ${place}` }), PLACES[place]),
        { n: row.rank ?? "–" },
        { n: bytes(row.num_bytes) },
        { n: count(row.num_frames) },
        { n: row.in_flight ? count(row.in_flight) : "–" },
        { n: row.idle_s === null ? "–" : seconds(row.idle_s) },
        { n: row.tokens ? count(row.tokens) : "–" },
      );
    }),
    registered ? "None was asked for yet: they come into the pool when they are." : "No adapter is registered. Upload one below.",
  );
}

export function drawEvents(state) {
  const { events } = state;
  const node = $("timeline");
  const loads = events.filter((event) => event.kind === "load").length;
  node.setAttribute("viewBox", "0 0 240 56");
  node.setAttribute("preserveAspectRatio", "none");
  node.setAttribute("aria-label", `Last ${plural(events.length, "event")}: ${plural(loads, "load")}, ${plural(events.length - loads, "eviction")}`);
  const marks = events.filter((event) => event.age_s < WINDOW_S).map((event) => {
    const x = (240 * (1 - event.age_s / WINDOW_S)).toFixed(1);
    const tall = Math.min(24, 7 + 3 * Math.log2(1 + event.num_frames));
    const load = event.kind === "load";
    return svg("line", { class: event.kind, x1: x, x2: x, y1: load ? 27 : 29, y2: load ? 27 - tall : 29 + tall, "vector-effect": "non-scaling-stroke" });
  });
  node.replaceChildren(svg("line", { class: "axis", x1: 0, x2: 240, y1: 28, y2: 28, "vector-effect": "non-scaling-stroke" }), ...marks);
  const lines = events.slice(0, 8).map((event) => {
    const load = event.kind === "load";
    return el(
      "li",
      { class: event.kind },
      el("b", {}, event.name),
      ` ${load ? `in, ${bytes(event.num_bytes)} in ${seconds(event.seconds)}` : `out, ${plural(event.num_frames, "frame")} free again`}`,
      el("small", {}, `${seconds(event.age_s)} ago`),
    );
  });
  $("events").replaceChildren(...(lines.length ? lines : [el("li", { class: "none" }, "No adapter has come or gone yet.")]));
}

export function drawQueue(state) {
  const { queue, waiting } = state;
  const shown = queue.reduce((sum, line) => sum + line.num, 0);
  say("queue-line", waiting ? `${plural(waiting, "request")} waiting${shown < waiting ? `, ${count(shown)} shown` : ""}; the least served adapter goes first.` : "The least served adapter goes first.");
  fill(
    "queue-table",
    queue.map((line) => {
      const reasons = Object.entries(line.reasons).sort((a, b) => b[1] - a[1]);
      const chips = reasons.map(([why, num]) => el("span", { class: "tag" }, `${REASONS[why] ?? why}${reasons.length > 1 ? ` (${count(num)})` : ""}`));
      return tr(together(line.adapters), { n: count(line.num) }, { n: seconds(line.oldest_s) }, el("span", { class: "tags" }, ...chips));
    }),
    "Nobody waits.",
  );
}

export function drawGuesses(state) {
  const all = state.acceptance.filter((line) => line.adapter === null);
  const each = state.acceptance.filter((line) => line.adapter !== null);
  const most = Math.max(1, ...all.map((line) => line.drafted));
  const meters = all.sort((a, b) => b.drafted - a.drafted).map((line) =>
    el(
      "div",
      { class: "meter" },
      el("b", {}, line.drafter),
      el("span", { class: "track", "aria-hidden": "true" }, el("i", { class: "drafted", style: { width: `${(100 * line.drafted) / most}%` } }), el("i", { class: "accepted", style: { width: `${(100 * line.accepted) / most}%` } })),
      el("span", { class: "n" }, `${count(line.accepted)} of ${count(line.drafted)} right, ${percent(line.accepted, line.drafted)}; ${line.steps ? (line.accepted / line.steps).toFixed(1) : "0"} tokens saved a try`),
    ),
  );
  const drafters = state.info?.drafters ?? [];
  const none = drafters.length ? `Nothing was guessed yet. Ready to: ${drafters.join(", ")}.` : "This server does not guess ahead.";
  $("drafters").replaceChildren(...(meters.length ? meters : [el("p", { class: "none" }, none)]));
  $("guesses-by").hidden = each.length === 0;
  fill(
    "guesses-table",
    each.sort((a, b) => b.drafted - a.drafted).map((line) => tr(line.adapter, line.drafter, { n: count(line.drafted) }, { n: count(line.accepted) }, { n: percent(line.accepted, line.drafted) })),
    "Nothing was guessed yet.",
  );
}
