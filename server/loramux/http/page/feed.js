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
    let wait = EVERY_MS;
    try {
      const answer = await fetch("admin/state", {
        headers: headers(),
        cache: "no-store",
        signal: AbortSignal.timeout(PATIENCE_MS),
      });
      if (answer.ok) {
        const state = await answer.json();
        this.failures = 0;
        this.on.state(state);
      } else if (answer.status === 401 || answer.status === 403) {
        const { error } = await answer.json();
        this.failures = 0;
        this.asking = false;
        this.on.refused(answer.status, error.message);
        return; // a new key starts it again
      } else {
        throw new Error(`the server answered ${answer.status}`);
      }
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof DOMException || error instanceof Error)) throw error;
      this.failures += 1;
      wait = Math.min(LONGEST_MS, EVERY_MS * 2 ** (this.failures - 1));
      this.on.away(wait / 1000);
    }
    this.asking = false;
    if (!document.hidden) this.timer = setTimeout(() => this.look(), wait);
  }
}
