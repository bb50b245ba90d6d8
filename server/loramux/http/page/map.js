// The pool, a square a frame: hue says KV or adapter, strength says in use or kept for later.

import { $, count, el, fill, percent, say, tr } from "./dom.js";

export const USES = [
  { id: "free", name: "free" },
  { id: "kv", name: "KV in use" },
  { id: "prefix", name: "KV kept for later" },
  { id: "leased", name: "adapters in use" },
  { id: "warm", name: "adapters kept warm" },
  { id: "loading", name: "adapters on their way in" },
];
const TALL = 280;

const decode = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));

export class FrameMap {
  constructor() {
    this.canvas = $("map");
    this.told = $("map-told");
    this.frames = null;
    this.only = -1;
    this.over = -1;
    this.buttons = USES.map((use, at) => {
      const number = el("b");
      const button = el("button", { type: "button", "aria-pressed": "false" }, el("i", { class: `swatch ${use.id}` }), `${use.name} `, number);
      button.addEventListener("click", () => this.show(at));
      return { button, number };
    });
    $("legend").replaceChildren(...this.buttons.map(({ button }) => button));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.hover(-1));
    new ResizeObserver(() => this.paint()).observe(this.canvas);
  }

  show(use) {
    this.only = this.only === use ? -1 : use;
    this.buttons.forEach(({ button }, at) => button.setAttribute("aria-pressed", String(at === this.only)));
    this.paint();
  }

  update(frames, pool) {
    this.frames = { ...frames, cells: decode(frames.cells), held: decode(frames.held) };
    this.paint();
    const numbers = [pool.free, pool.kv, pool.prefix, pool.adapter_leased, pool.adapter_warm, pool.loading];
    this.buttons.forEach(({ number }, at) => say(number, count(numbers[at])));
    const shares = USES.map((use, at) => [use.name, numbers[at]]).filter(([, num]) => num);
    const label = shares.map(([name, num]) => `${name} ${percent(num, pool.total)}`).join(", ");
    this.canvas.setAttribute("aria-label", `Map of ${count(frames.total)} frames: ${label || "nothing yet"}`);
    this.table(numbers, pool.total);
    this.hover(this.over);
  }

  /** By use, and below by who holds most; a cell of a coarse map counts for all its frames. */
  table(numbers, total) {
    if (!$("map-table").closest("details").open) return;
    const { cells, held, holders, per_cell: each } = this.frames;
    const tally = new Map();
    cells.forEach((use, at) => {
      if (held[at]) tally.set(`${held[at]} ${use}`, (tally.get(`${held[at]} ${use}`) ?? 0) + each);
    });
    const about = each > 1 ? "about " : "";
    const whose = [...tally].sort((a, b) => b[1] - a[1]).slice(0, 40).map(([key, num]) => {
      const [holder, use] = key.split(" ").map(Number);
      return tr(USES[use].name, holderName(holders[holder - 1]), { n: about + count(num) }, { n: percent(num, total) });
    });
    const uses = USES.map((use, at) => tr(use.name, "all", { n: count(numbers[at]) }, { n: percent(numbers[at], total) }));
    fill("map-table", [...uses, ...whose], "The engine has not drawn its pool yet.");
  }

  layout() {
    const num = this.frames?.cells.length ?? 0;
    const width = this.canvas.clientWidth;
    if (!num || !width) return null;
    const size = Math.floor(Math.min(24, Math.max(4, Math.sqrt((width * TALL) / num))));
    const columns = Math.floor(width / size);
    return { size, columns, rows: Math.ceil(num / columns), gap: size > 4 ? 1 : 0 };
  }

  paint() {
    const grid = this.layout();
    if (!grid) return;
    const { size, columns, rows, gap } = grid;
    const { cells, held } = this.frames;
    const scale = window.devicePixelRatio || 1;
    const height = rows * size;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(this.canvas.clientWidth * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    // A canvas does not know what light-dark() stands for; a computed colour says it.
    const colours = USES.map((use) => {
      this.canvas.style.color = `var(--${use.id})`;
      return getComputedStyle(this.canvas).color;
    });
    const mine = this.over >= 0 ? held[this.over] : 0;
    cells.forEach((use, at) => {
      const dim = (this.only >= 0 && use !== this.only) || (mine && held[at] !== mine);
      context.globalAlpha = dim ? 0.16 : 1;
      context.fillStyle = colours[use];
      context.fillRect((at % columns) * size, Math.floor(at / columns) * size, size - gap, size - gap);
    });
  }

  point(event) {
    const grid = this.layout();
    if (!grid) return;
    const column = Math.floor(event.offsetX / grid.size);
    const at = Math.floor(event.offsetY / grid.size) * grid.columns + column;
    this.hover(column < grid.columns && at < this.frames.cells.length ? at : -1);
  }

  hover(at) {
    const before = this.over >= 0 ? this.frames.held[this.over] : 0;
    this.over = at < (this.frames?.cells.length ?? 0) ? at : -1;
    if (this.over < 0) {
      say(this.told, "\u00a0");
    } else {
      const { cells, held, holders, per_cell: each, total } = this.frames;
      const first = at * each;
      const last = Math.min(total, first + each) - 1;
      const place = last > first ? `frames ${first}–${last}, mostly` : `frame ${first}:`;
      const whose = held[at] ? `, ${holderName(holders[held[at] - 1])}` : "";
      say(this.told, `${place} ${USES[cells[at]].name}${whose}`);
    }
    if (this.frames && before !== (this.over >= 0 ? this.frames.held[this.over] : 0)) this.paint();
  }
}

function holderName(holder) {
  if (holder.adapter) return holder.adapter;
  return holder.tenant ? `requests of tenant ${holder.tenant}` : "requests";
}
