// An adapter's way in, and what the import had to say about it.

import { $, bytes, count, el, plural } from "./dom.js";
import { headers, refusal } from "./feed.js";

const WAIT_S = 60;
const LOOK_AGAIN_MS = 1000;

export class Uploading {
  constructor(onReady) {
    this.onReady = onReady;
    $("upload-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.upload();
    });
    $("upload-weights").addEventListener("change", () => suggest($("upload-weights").files[0]));
  }

  async upload() {
    const form = new FormData();
    form.append("name", $("upload-name").value.trim());
    form.append("config", $("upload-config").files[0]);
    form.append("weights", $("upload-weights").files[0]);
    const dry = $("upload-dry").checked;
    const query = new URLSearchParams({ wait: WAIT_S, ...(dry ? { validate_only: "true" } : {}) });
    const newest = $("upload-next").checked ? await generation(form.get("name")) : 0;
    if (newest) query.set("expected_generation", newest);
    $("upload-go").disabled = true;
    $("upload-progress").hidden = false;
    $("verdict").replaceChildren(el("p", { class: "none" }, "On its way."));
    try {
      const { status, text } = await send(`v1/adapters?${query}`, form);
      if (status >= 400) this.refused(refusal(status, text));
      else await this.settled(JSON.parse(text), dry);
    } catch (error) {
      if (error.name !== "Error") throw error;
      this.refused({ message: error.message });
    } finally {
      $("upload-go").disabled = false;
      $("upload-progress").hidden = true;
    }
  }

  /** Validation may take longer than the upload waited. */
  async settled(view, dry) {
    while (view.status === "validating" && !dry) {
      $("verdict").replaceChildren(el("p", { class: "none" }, "Received, and being checked."));
      await new Promise((done) => setTimeout(done, LOOK_AGAIN_MS));
      const answer = await show(view.name);
      if (!answer) throw broken();
      if (!answer.ok) return this.refused(refusal(answer.status, await answer.text()));
      view = await answer.json();
    }
    if (view.error) return this.refused(view.error);
    this.accepted(view, dry);
    if (!dry) this.onReady();
  }

  refused(error) {
    const problems = error.problems ?? [];
    const title = problems.length ? `Refused, for ${plural(problems.length, "reason")}` : "Refused";
    $("verdict").replaceChildren(
      el("h3", { class: "bad" }, title),
      el("p", {}, error.message),
      el("ol", { class: "offenders" }, ...problems.map((problem) => el("li", {}, problem))),
    );
  }

  accepted(view, dry) {
    const { report } = view;
    const facts = [
      ["Rank", count(view.rank)],
      ["Size", bytes(view.num_bytes)],
      ["Frames", count(view.num_frames)],
      ["Tensors", count(report.tensors ?? 0)],
      ["Changes", [...(report.modules ?? [])].join(", ") || "–"],
      ["Layers", layers(report.layers ?? [])],
      ["Stored as", report.dtype ?? "–"],
    ];
    const share = report.cost?.percent_of_base?.["1"];
    if (share !== undefined) facts.push(["Costs a lone row", `${share} % of what the base reads`]);
    const warnings = report.warnings ?? [];
    $("verdict").replaceChildren(
      el("h3", { class: "good" }, dry ? "It would work as trained" : `${view.name}@${view.generation} is ready`),
      el("dl", { class: "facts" }, ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      el("ul", { class: "offenders" }, ...warnings.map((warning) => el("li", {}, warning))),
    );
  }
}

const broken = () => new Error("The connection broke before there was an answer.");

/** What the server has under a name; null when it does not answer. */
const show = (name) => fetch(`v1/adapters/${encodeURIComponent(name)}`, { headers: headers() }).catch(() => null);

/** With progress, which fetch does not tell. */
function send(path, form) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => {
      $("upload-progress").value = event.total ? event.loaded / event.total : 0;
    });
    request.addEventListener("load", () => done({ status: request.status, text: request.responseText }));
    request.addEventListener("error", () => failed(broken()));
    request.send(form);
  });
}

/** The generation that a name means now; 0 when it means nothing. */
async function generation(name) {
  const answer = await show(name);
  return answer?.ok ? (await answer.json()).generation : 0;
}

function layers(found) {
  if (!found.length) return "–";
  const whole = found.at(-1) - found[0] + 1 === found.length;
  return whole && found.length > 2 ? `${found[0]}–${found.at(-1)}` : found.join(", ");
}

function suggest(file) {
  const name = $("upload-name");
  const stem = file?.name.replace(/\.safetensors$/, "") ?? "";
  if (!name.value && stem && stem !== "adapter_model") name.value = stem.replace(/[^A-Za-z0-9._-]/g, "-");
}
