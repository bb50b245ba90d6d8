// The last two minutes of one number.

import { svg } from "./dom.js";

const MOST = 120;
const WIDTH = 120;
const HEIGHT = 28;

export class Sparkline {
  constructor(node) {
    this.values = [];
    this.node = node;
    node.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    node.setAttribute("preserveAspectRatio", "none");
    node.setAttribute("aria-hidden", "true");
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line", "vector-effect": "non-scaling-stroke" });
    node.replaceChildren(this.area, this.line);
  }

  add(value) {
    this.values.push(value);
    if (this.values.length > MOST) this.values.shift();
    const top = Math.max(...this.values, 1e-9);
    const first = MOST - this.values.length;
    const at = (v, i) => `${(((first + i) * WIDTH) / (MOST - 1)).toFixed(1)},${(HEIGHT - 2 - (v / top) * (HEIGHT - 5)).toFixed(1)}`;
    const points = this.values.map(at).join("L");
    const start = ((first * WIDTH) / (MOST - 1)).toFixed(1);
    this.line.setAttribute("d", `M${points}`);
    this.area.setAttribute("d", `M${start},${HEIGHT}L${points}L${WIDTH},${HEIGHT}Z`);
  }
}
