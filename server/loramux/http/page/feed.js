// Asks /admin/state once a second; not while nobody looks, and less often while nobody answers.

const EVERY_MS = 1000;
const PATIENCE_MS = 10000;
const LONGEST_MS = 30000;
const STORED = "loramux.key";

export function key() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return held;
  }
}

let held = "";

export function setKey(value) {
  held = value;
  try {
    if (value) sessionStorage.setItem(STORED, value);
    else sessionStorage.removeItem(STORED);
  } catch {
    // storage is off: the key lives as long as the page
  }
}

/** Headers of every request: the key, when there is one. */
export function headers(more = {}) {
  return key() ? { ...more, authorization: `Bearer ${key()}` } : more;
}

/** The error of an answer that is none of a success; a proxy may have said it, in HTML. */
export function refusal(status, text) {
  try {
    const { error } = JSON.parse(text);
    if (error) return error;
  } catch {
    // not ours
  }
  return { message: `The answer was ${status}, and not from loramux: something in between refused.` };
}

/** Calls `on.state(state)`, `on.refused(status, message)` and `on.away(seconds)`. */
export class Feed {
  constructor(on) {
    this.on = on;
    this.failures = 0;
    this.timer = undefined;
    this.asking = false;
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Ask now, if anybody looks. */
  look() {
    clearTimeout(this.timer);
    if (document.hidden || this.asking) return;
    this.ask();
  }

  async ask() {
    this.asking = true;
    const { state, refusal } = await question();
    this.asking = false;
    if (refusal) return this.on.refused(refusal.status, refusal.message); // a new key starts it again
    this.failures = state ? 0 : this.failures + 1;
    const wait = state ? EVERY_MS : Math.min(LONGEST_MS, EVERY_MS * 2 ** (this.failures - 1));
    if (!document.hidden) this.timer = setTimeout(() => this.look(), wait);
    if (state) this.on.state(state);
    else this.on.away(wait / 1000);
  }
}

/** {state}, {refusal: {status, message}}, or {} when there is no answer that means anything. */
async function question() {
  try {
    const answer = await fetch("admin/state", {
      headers: headers(),
      cache: "no-store",
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (answer.ok) return { state: await answer.json() };
    if (answer.status === 401 || answer.status === 403) {
      const { error } = await answer.json();
      return { refusal: { status: answer.status, message: error.message } };
    }
  } catch {
    // nobody there, or something in between that does not speak JSON
  }
  return {};
}
