// Brings the state to the panels, and says so when there is none.

import { $, count, say, seconds } from "./dom.js";
import { Feed, key, setKey } from "./feed.js";
import { FrameMap } from "./map.js";
import { drawAdapters, drawBatch, drawEvents, drawGuesses, drawQueue } from "./panels.js";
import { Asking } from "./prompt.js";
import { Sparkline } from "./sparkline.js";
import { Uploading } from "./upload.js";

const REASONS = {
  engine_starting: "the engine is starting",
  engine_failed: "the engine failed and was given up",
  adapters_starting: "adapters are being prepared",
  draining: "shutting down",
};

const map = new FrameMap();
const sparks = Object.fromEntries(["rate", "running", "waiting", "free", "step"].map((name) => [name, new Sparkline($(`s-${name}`))]));
const asking = new Asking();
const uploading = new Uploading(() => asking.refresh());
let before = null;

const feed = new Feed({ state: draw, refused, away });

function pill(kind, text) {
  $("status").dataset.kind = kind;
  say("status", text);
}

function draw(state) {
  const now = performance.now() / 1000;
  document.body.classList.remove("stale");
  $("away").hidden = true;
  const reasons = state.not_ready.map((reason) => REASONS[reason] ?? reason);
  pill(reasons.length ? "wait" : "good", reasons.join(", ") || "ready");
  say("model", state.model);
  say("device", state.info ? `${state.info.dtype}, ${state.info.device}` : "");
  say("version", state.version);
  place(state.prompts);
  const step = since(state, now);
  figures(state, step);
  map.update(state.frames, state.pool);
  const { per_cell: each, total } = state.frames;
  const size = state.info ? ` of ${Math.round(state.info.frame_bytes / 1024)} KiB` : "";
  say("pool-line", `One arena for KV cache and adapters: ${count(total)} frames${size}. A square is ${each > 1 ? `${each} frames` : "a frame"}.`);
  drawBatch(state, step);
  drawAdapters(state);
  drawEvents(state);
  drawQueue(state);
  drawGuesses(state);
  asking.state(state);
  before = { at: now, totals: state.totals };
}

/** What happened since the last look; null when that cannot be said. */
function since(state, now) {
  const { totals } = state;
  if (!before || totals.generation_tokens < before.totals.generation_tokens) return null;
  const steps = totals.steps - before.totals.steps;
  const took = now - before.at;
  if (steps <= 0 || took <= 0) return { rate: 0, step: 0, phases: {} };
  const phases = {};
  for (const [name, sum] of Object.entries(totals.phase_s)) phases[name] = (sum - (before.totals.phase_s[name] ?? 0)) / steps;
  return {
    rate: (totals.generation_tokens - before.totals.generation_tokens) / took,
    step: Object.values(phases).reduce((all, value) => all + value, 0),
    phases,
  };
}

function figures(state, step) {
  const free = state.pool.free + state.pool.prefix + state.pool.adapter_warm;
  const busy = step && step.rate > 0;
  const shown = {
    rate: [step ? step.rate : 0, step ? count(step.rate) : "–"],
    running: [state.running, count(state.running)],
    waiting: [state.waiting, count(state.waiting)],
    free: [free, `${count(free)}`],
    step: [busy ? step.step : 0, busy ? seconds(step.step) : "–"],
  };
  for (const [name, [value, text]] of Object.entries(shown)) {
    say(`f-${name}`, text);
    sparks[name].add(value);
  }
}

function place(prompts) {
  for (const id of ["ask", "upload", "nav-ask", "nav-upload"]) $(id).hidden = !prompts;
  $("elsewhere").hidden = prompts;
}

function openKey(open) {
  const opens = open && $("key").hidden;
  $("key").hidden = !open;
  $("key-open").setAttribute("aria-expanded", String(open));
  if (opens) $("key-field").focus();
}

function refused(status, message) {
  document.body.classList.add("stale");
  pill("wait", "a key is needed");
  say("key-why", status === 401 && !key() ? "This server has API keys. Its state takes one with the scope admin; it stays in this tab and is gone when the tab closes." : `${message}.`);
  openKey(true);
}

function away(wait) {
  document.body.classList.add("stale");
  pill("bad", "no answer");
  say("away-text", `The server does not answer. What is shown is old; next try in ${Math.round(wait)} s.`);
  $("away").hidden = false;
  before = null;
}

$("away-now").addEventListener("click", () => feed.look());
$("key-open").addEventListener("click", () => openKey($("key").hidden));
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key-field").value.trim());
  $("key-field").value = "";
  openKey(false);
  feed.look();
  asking.refresh();
});
$("key-forget").addEventListener("click", () => {
  setKey("");
  openKey(false);
  feed.look();
});

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

function theme() {
  $("theme").setAttribute("aria-pressed", String(isDark()));
  map.paint();
}

$("theme").addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("loramux.theme", next);
  } catch {
    // storage is off: it lasts as long as the page
  }
  theme();
});
dark.addEventListener("change", theme);
$("map-table").closest("details").addEventListener("toggle", () => feed.look());
theme();
asking.refresh();
feed.look();
