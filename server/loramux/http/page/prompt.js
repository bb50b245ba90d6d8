// One prompt to several models at once, their answers side by side as they come.

import { $, count, el, plural, say, seconds } from "./dom.js";
import { headers, refusal } from "./feed.js";

const MOST = 5;
const MOST_SHOWN = 24;

export class Asking {
  constructor() {
    this.base = "";
    this.names = [];
    this.chosen = null;
    this.running = null;
    this.asked = false;
    $("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    $("ask-stop").addEventListener("click", () => this.running?.abort());
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask-form").requestSubmit();
    });
  }

  /** The models this key may ask; silent when it may ask none, asking itself will say why. */
  async refresh() {
    try {
      const answer = await fetch("v1/models", { headers: headers() });
      if (!answer.ok) return;
      const { data } = await answer.json();
      this.base = data[0].id;
      this.names = data.slice(1).map((card) => card.id);
      this.list();
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // the server is away: the feed says so
    }
  }

  state(state) {
    if (state.prompts && state.not_ready.length === 0 && this.names.length === 0 && state.adapters.by_status.ready && !this.asked) {
      this.asked = true;
      this.refresh();
    }
  }

  list() {
    const names = [this.base, ...this.names];
    this.chosen = (this.chosen ?? names.slice(0, 4)).filter((name) => names.includes(name));
    const shown = [...new Set([this.base, ...this.chosen, ...this.names])].slice(0, MOST_SHOWN);
    const boxes = shown.map((name) => {
      const box = el("input", { type: "checkbox", value: name, checked: this.chosen.includes(name) });
      box.addEventListener("change", () => this.choose(name, box.checked));
      return el("label", { class: "chip" }, box, el("span", {}, name));
    });
    const rest = names.length - shown.length;
    if (rest > 0) boxes.push(this.another(rest));
    $("models").replaceChildren(...boxes);
  }

  another(rest) {
    const field = el("input", { type: "text", class: "another", "aria-label": "Another adapter by name", placeholder: `one of ${count(rest)} more`, autocomplete: "off", spellcheck: false });
    field.addEventListener("change", () => {
      const name = field.value.trim();
      if (!this.names.includes(name)) return say("ask-problem", `There is no adapter ${name}.`);
      this.choose(name, true);
      this.list();
    });
    return field;
  }

  choose(name, on) {
    this.chosen = this.chosen.filter((one) => one !== name);
    if (on) this.chosen.push(name);
    say("ask-problem", this.chosen.length > MOST ? `Choose ${MOST} at most: a browser opens no more connections.` : "");
  }

  async ask() {
    const models = this.chosen ?? [];
    const prompt = $("prompt").value;
    if (!models.length) return say("ask-problem", "Choose who answers.");
    if (models.length > MOST) return;
    if (!prompt.trim()) return say("ask-problem", "Write a prompt first.");
    say("ask-problem", "");
    this.running?.abort();
    const running = (this.running = new AbortController());
    $("ask-stop").disabled = false;
    const cards = models.map((name) => new Card(name));
    $("answers").replaceChildren(...cards.map((card) => card.node));
    await Promise.all(cards.map((card) => card.run(question(card.name, prompt), running.signal)));
    if (this.running === running) $("ask-stop").disabled = true;
  }
}

function question(model, prompt) {
  const chat = $("mode").value === "chat";
  return {
    path: chat ? "v1/chat/completions" : "v1/completions",
    body: {
      model,
      ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: $("max-tokens").valueAsNumber,
      temperature: $("temperature").valueAsNumber,
      seed: $("seed").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    },
  };
}

/** One model's answer. */
class Card {
  constructor(name) {
    this.name = name;
    this.text = el("p", { class: "text" });
    this.foot = el("p", { class: "foot" }, "waiting");
    this.node = el("article", { class: "answer", "aria-busy": "true" }, el("h3", {}, name), this.text, this.foot);
  }

  async run({ path, body }, signal) {
    const began = performance.now();
    let first = 0;
    try {
      const answer = await fetch(path, {
        method: "POST",
        headers: headers({ "content-type": "application/json" }),
        body: JSON.stringify(body),
        signal,
      });
      if (!answer.ok) throw new Error(refusal(answer.status, await answer.text()).message);
      for await (const event of events(answer.body)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices?.[0];
        const piece = choice?.text ?? choice?.delta?.content ?? "";
        if (piece) {
          this.text.append(first ? piece : piece.trimStart());
          first ||= performance.now();
          say(this.foot, "writing");
        }
        if (event.usage) this.usage(event.usage, (first - began) / 1000, (performance.now() - first) / 1000);
      }
    } catch (error) {
      this.node.classList.add(error.name === "AbortError" ? "stopped" : "failed");
      say(this.foot, error.name === "AbortError" ? "stopped" : error.message);
    }
    this.node.setAttribute("aria-busy", "false");
  }

  usage(usage, wait, wrote) {
    const num = usage.completion_tokens;
    const parts = [plural(num, "token")];
    if (wait > 0) parts.push(`first after ${seconds(wait)}`); // an answer may have no text
    if (wait > 0 && num > 1 && wrote > 0) parts.push(`${count((num - 1) / wrote)} a second`);
    const guessed = usage.details?.speculation;
    if (guessed?.drafted) parts.push(`${guessed.accepted} of ${guessed.drafted} guesses right`);
    say(this.foot, parts.join(" · "));
  }
}

/** Server-sent events of a body, parsed; ends at [DONE]. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
