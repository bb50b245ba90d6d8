// The only way this page makes elements: text is text, whatever it says.

/** An element with `props` set on it and `children` (nodes or text) in it. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") made.className = value;
    else if (name === "style") Object.assign(made.style, value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** The same for drawings. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const $ = (id) => document.getElementById(id);

/** Set text only when it changed, so that screen readers and selections are left alone. */
export function say(id, text) {
  const node = typeof id === "string" ? $(id) : id;
  if (node.textContent !== text) node.textContent = text;
}

/** Put rows into a table; without any, one cell that says `empty`. */
export function fill(id, rows, empty) {
  const table = $(id);
  const columns = table.tHead.rows[0].cells.length;
  const nothing = () => el("tr", { class: "empty" }, el("td", { colSpan: columns }, empty));
  table.tBodies[0].replaceChildren(...(rows.length ? rows : [nothing()]));
  table.classList.toggle("bare", rows.length === 0);
}

/** A table row; a cell is text, a node, or {n: number text}. */
export function tr(...cells) {
  return el(
    "tr",
    {},
    ...cells.map((cell, at) => {
      const number = cell !== null && typeof cell === "object" && "n" in cell;
      const inside = number ? cell.n : cell;
      if (at === 0) return el("th", { scope: "row" }, inside);
      return el("td", { class: number ? "n" : "" }, inside);
    }),
  );
}

export const count = (value) => Math.round(value).toLocaleString("en-US");

export function bytes(value) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (value < 1024) return `${value < 10 && unit !== "B" ? value.toFixed(1) : Math.round(value)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} GiB`;
}

export function seconds(value) {
  if (value < 0.0095) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.95) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

export const plural = (num, one, many = `${one}s`) => `${count(num)} ${num === 1 ? one : many}`;
