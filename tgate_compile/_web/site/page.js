/** The page: passes calls to a worker, and shows progress and results. */

import { chartOf, medianOf, milliseconds } from "./chart.js";
import { graphsOf } from "./denoiser.js";
import { Engine } from "./engine.js";
import { fetched } from "./files.js";
import { psnr } from "./images.js";
import { cacheBytes, readManifest } from "./manifest.js";
import { canUseThreads, defaultThreads } from "./runtime.js";
import { gateOf, hasMovableGate, mostSteps, planOf, stripOf } from "./schedule.js";

/** The kinds of cached values in words. */
const KINDS = {
  cross: "cross-attention", self: "self-attention", temporal: "temporal attention", deep: "deep part", ff: "feed-forward",
  blocks: "blocks", rear: "rear blocks", reference: "reference images",
};
const NOT_ISOLATED =
  "This server does not send the headers that enable threads (Cross-Origin-Opener-Policy and " +
  "Cross-Origin-Embedder-Policy), so WebAssembly uses only one.";
/** Images up to this height and width are scaled without smoothing. */
const SMALL = 256;

/** The ids of the two figures, in the order of the calls. */
const RUNS = ["plain", "gated"];

const get = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
let manifest = null, engine = null, running = null;
/** The state that is shown: the completed steps of both runs. */
let shown = { steps: 25, gate: 10, plain: [], gated: [] };
let received = 0;
/** The number of tokens that a prompt was truncated to; null if it was not. */
let cut = null;

start();

async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  get("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  try {
    manifest = await readManifest(new URL("bundle/manifest.json", document.baseURI));
    graphsOf(manifest, currentPlan()); // throws if the bundle's own call cannot be run
  } catch (error) {
    showError(error);
    return;
  }
  fillForm();
  showFacts();
  get("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) engine?.close();
    else running = run().finally(() => (running = null));
  });
  for (const id of ["gate", "steps", "guidance"]) get(id).addEventListener("input", showPlan);
  new ResizeObserver(() => showChart()).observe(get("chart"));
  get("go").disabled = false;
  get("settings").addEventListener("toggle", offerGpu, { once: true });
  const { prompts } = await fetch("site.json").then((response) => response.json()).catch(() => ({ prompts: [] }));
  showIdeas(prompts);
}

// The form.

function fillForm() {
  const { components, method } = manifest;
  get("steps").value = components.num_inference_steps;
  get("guidance").value = components.guidance_scale;
  get("gate").max = components.num_inference_steps;
  get("gate").value = gateOf(method, components.num_inference_steps);
  if (!hasGate()) {
    document.title = get("title").textContent = "Cached steps in your browser";
    get("lede").textContent =
      "One prompt and the same noise give two images, computed on this device: one with all steps in full, and one whose " +
      "steps reuse values of earlier steps, as the schedule of the bundle says.";
    get("method").textContent = "With the schedule";
  }
  get("savings").hidden = !hasGate();
  get("gate").hidden = get("gate-label").hidden = !hasMovableGate(method);
  get("steps").max = Math.min(get("steps").max || Infinity, mostSteps(method));
  const most = canUseThreads() ? Math.min(8, navigator.hardwareConcurrency || 1) : 1;
  for (let count = 1; count <= most; count++) get("threads").add(new Option(count, count, false, count === defaultThreads()));
  get("threads").disabled = most === 1;
  if (query.has("latents")) get("seed").disabled = true;
  for (const frame of document.querySelectorAll(".frame")) frame.style.setProperty("--ratio", `${components.width} / ${components.height}`);
  for (const canvas of document.querySelectorAll("canvas")) canvas.classList.add("empty");
  showPlan();
}

/** Enable WebGPU if there is an adapter. Called only when the settings are opened: the request may wake up a GPU. */
async function offerGpu() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  get("provider").options[1].disabled = !adapter;
}

function showIdeas(prompts) {
  const ideas = prompts.map((prompt) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => (get("prompt").value = prompt));
    item.append(button);
    return item;
  });
  get("ideas").replaceChildren(...ideas);
  get("ideas").hidden = !ideas.length;
  get("prompt").value ||= prompts[0] ?? "";
}

function callOf() {
  const number = (id) => get(id).valueAsNumber, { schedule } = manifest.method, steps = number("steps");
  return {
    prompt: get("prompt").value,
    negativePrompt: get("negative").value || null,
    steps,
    guidanceScale: number("guidance"),
    seed: number("seed"),
    gateStep: schedule.gate_step === null ? undefined : Math.min(Math.max(number("gate"), 1), steps),
  };
}

function settings() {
  return {
    bundle: "bundle/",
    runtime: "runtime/",
    provider: get("provider").value,
    threads: Number(get("threads").value),
    sequential: get("sequential").checked,
  };
}

function hasGate() {
  return manifest.method.schedule.gate_step !== null;
}

/** Return the words for the image that is not computed in full. */
function optimized() {
  return hasGate() ? "with T-GATE" : "with the schedule";
}

function currentPlan() {
  const { components, method } = manifest;
  const form = get("steps").value ? callOf() : { steps: components.num_inference_steps, guidanceScale: components.guidance_scale };
  return planOf(method, form.steps, form.guidanceScale > 1, form.gateStep);
}

function showPlan() {
  if (!get("steps").validity.valid) return;
  const { steps } = callOf();
  get("gate").max = steps;
  if (get("gate").valueAsNumber < 1) get("gate").value = 1; // the slider starts at 0 to align with the strip
  get("gate-shown").textContent = get("gate").value;
  get("steps-shown").textContent = steps;
  const letters = stripOf(currentPlan());
  showStrip(get("plan"), letters);
  if (!running && !shown.plain.length) showLegend(letters);
}

// A run.

async function run() {
  const call = callOf(), chosen = settings();
  showError(null);
  setRunning(true);
  try {
    if (query.has("latents")) call.latents = new Float32Array((await fetched(new URL(query.get("latents"), document.baseURI))).buffer);
    await opened(chosen);
    cut = null;
    shown = { steps: call.steps, gate: call.steps, plain: [], gated: [] };
    showChart();
    const calls = [{ ...call, gateStep: undefined, plain: true }, call].map((one) => ({ ...one, preview: !chosen.sequential }));
    const [plain, gated] = await compared(calls, chosen.sequential);
    shown.gate = gated.gate;
    showResult("plain", plain);
    showResult("gated", gated, plain);
    showChart();
    showNumbers();
    await showMemory(gated);
    get("status").textContent = doneText(plain, gated) + (cut === null ? "" : ` The prompt was truncated to the ${cut} tokens that the model supports.`);
  } catch (error) {
    engine?.close();
    engine = null;
    if (error.name === "AbortError") get("status").textContent = "Stopped.";
    else showError(error);
  }
  setRunning(false);
}

/** Ensure that the worker has these settings, and else start a new one: threads and memory cannot be changed later. */
async function opened(chosen) {
  const key = JSON.stringify(chosen);
  if (engine?.key === key) return;
  engine?.close();
  engine = Object.assign(new Engine(), { key });
  received = 0;
  get("status").textContent = "Loading ONNX Runtime";
  await engine.open(chosen, { bytes: onBytes });
}

async function compared(calls, sequential) {
  const figures = RUNS.map(get), { steps, guidanceScale } = calls[0];
  const strips = [(guidanceScale > 1 ? "F" : "f").repeat(steps), stripOf(currentPlan())];
  figures.forEach((figure, turn) => {
    figure.querySelector(".time").textContent = "\u2013";
    figure.querySelector(".details").textContent = "";
    showStrip(figure.querySelector(".strip"), strips[turn], 0);
  });
  const report = (text) => (get("status").textContent = text);
  return engine.compare(calls, {
    bytes: onBytes,
    stage: (text) => report(`${text[0].toUpperCase()}${text.slice(1)}${received ? `, ${bytesText(received)} so far` : ""}`),
    cut: (tokens) => (cut = tokens),
    step: ({ turn, ...step }) => {
      const done = shown[RUNS[turn]];
      done.push(step);
      strips[turn] = strips[turn].slice(0, step.step) + step.letter + strips[turn].slice(step.step + 1);
      figures[turn].querySelector(".time").textContent = secondsText(sumOf(done));
      showStrip(figures[turn].querySelector(".strip"), strips[turn], done.length);
      report(`Step ${done.length} of ${steps}${sequential ? `, ${turn ? optimized() : "in full"}` : ""}`);
      get("progress").value = (shown.plain.length + shown.gated.length) / (2 * steps);
      showChart();
    },
    preview: ({ turn, ...image }) => paint(figures[turn], image, "Preview of an unfinished image"),
  });
}

function onBytes(count) {
  received += count;
}

function setRunning(on) {
  const go = get("go");
  go.textContent = on ? "Stop" : "Generate";
  go.classList.toggle("stop", on);
  get("progress").hidden = !on;
  get("progress").value = 0;
  get("results").setAttribute("aria-busy", String(on));
}

// The results.

function showResult(name, result, plain = null) {
  const figure = get(name), time = figure.querySelector(".time");
  paint(figure, result, `${get("prompt").value}, ${figure.querySelector("h2").textContent.toLowerCase()}`);
  showStrip(figure.querySelector(".strip"), result.strip);
  time.textContent = secondsText(result.seconds);
  const details = [];
  if (plain) {
    const faster = document.createElement("small");
    faster.textContent = fasterText(plain.seconds / result.seconds);
    time.append(faster);
    const likeness = psnr(result.pixels, plain.pixels);
    details.push(likeness === Infinity ? "the same image" : `${likeness.toFixed(1)} dB PSNR to the other`);
  }
  if (result.openSeconds) details.push(`loading ${secondsText(result.openSeconds)}`);
  if (result.warmUpSeconds) details.push(`warming up ${secondsText(result.warmUpSeconds)}`);
  details.push(`prompt ${secondsText(result.encodeSeconds)}`, `decoding ${secondsText(result.decodeSeconds)}`);
  figure.querySelector(".details").textContent = details.join(" \u00b7 ");
}

function paint(figure, { pixels, width, height }, words) {
  const canvas = figure.querySelector("canvas");
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  canvas.classList.toggle("hard", Math.max(width, height) <= SMALL);
  canvas.classList.remove("empty");
  canvas.setAttribute("aria-label", words);
}

/** Show a strip of `letters`, of which the first `done` steps are completed. */
function showStrip(element, letters, done = letters.length) {
  element.replaceChildren(
    ...Array.from(letters, (letter, i) => {
      const cell = document.createElement("i");
      cell.className = `s-${letter.toLowerCase()}${letter === letter.toLowerCase() ? " half" : ""}${i < done ? "" : " todo"}`;
      return cell;
    }),
  );
  element.setAttribute("aria-label", `Steps: ${letters}`);
}

function showChart() {
  const width = Math.round(get("chart").clientWidth);
  if (!width) return;
  const chart = chartOf({ ...shown, width }), words = chartWords();
  chart.setAttribute("aria-label", `Time of each step. ${words}`);
  get("chart").replaceChildren(chart);
  get("chart-words").textContent = words;
  if (shown.gated.length) showLegend(shown.gated.map(({ letter }) => letter).join(""));
}

function chartWords() {
  if (!shown.plain.length) return "The chart will have two bars for each step.";
  const medians = [`in full ${milliseconds(medianOf(shown.plain.map(({ seconds }) => seconds)))}`];
  for (const graph of new Set(shown.gated.map((step) => step.graph))) {
    const times = shown.gated.filter((step) => step.graph === graph).map(({ seconds }) => seconds);
    medians.push(`${graph} ${milliseconds(medianOf(times))}`);
  }
  return `Medians: ${medians[0]}${medians.length > 1 ? `; ${optimized()}: ${medians.slice(1).join(", ")}` : ""}.`;
}

function showLegend(letters) {
  const items = [["plain", "all steps in full"], ...[...new Set(letters)].map((letter) => [letter, wordsOf(letter)])];
  get("legend").replaceChildren(
    ...items.map(([letter, words]) => {
      const item = document.createElement("li"), strip = document.createElement("span"), cell = document.createElement("i");
      strip.className = "strip";
      cell.className = `s-${letter.toLowerCase()}${letter.length === 1 && letter === letter.toLowerCase() ? " half" : ""}`;
      strip.append(cell);
      item.append(strip, words);
      return item;
    }),
  );
}

/** Return what the steps with a letter do. */
function wordsOf(letter) {
  const { phases } = manifest.method.plans, isOf = (planned) => planned.letter === letter || planned.settled?.includes(letter);
  const { phase, settled = [], letter: own } = phases.find(isOf), words = [];
  const reuse = settled[1] === letter ? [...phase.reuse, ...phase.decided] : phase.reuse;
  const listed = (kinds) => kinds.map((kind) => KINDS[kind]).join(" and ");
  if (reuse.length) words.push(`${listed(reuse)} reused`);
  if (settled.length && own === letter) words.push(`${listed(phase.decided)} computed or skipped`);
  if (!words.length) words.push("computed in full");
  if (!phase.guided) words.push("no guidance");
  else if (!reuse.length) words.push("with guidance");
  return words.join(", ");
}

function showNumbers() {
  const table = get("numbers").querySelector("table");
  const rowOf = (kind, cells) => {
    const row = document.createElement("tr");
    cells.forEach((text, i) => {
      const cell = document.createElement(i === 0 || kind === "th" ? "th" : "td");
      if (i === 0 || kind === "th") cell.scope = kind === "th" ? "col" : "row";
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  };
  table.tHead.replaceChildren(rowOf("th", ["step", "in full / ms", `${optimized()} / ms`, "graph"]));
  table.tBodies[0].replaceChildren(
    ...shown.plain.map(({ seconds }, i) => {
      const { seconds: other, graph } = shown.gated[i];
      return rowOf("td", [String(i), (seconds * 1e3).toFixed(1), (other * 1e3).toFixed(1), graph]);
    }),
  );
  get("numbers").hidden = false;
}

async function showMemory({ heapBytes }) {
  const rows = [
    ["downloaded, including ONNX Runtime", received],
    ["WebAssembly memory, maximum", heapBytes],
    ["caches, kept from step to step", cacheBytes(manifest)],
  ];
  if (performance.memory) rows.push(["JavaScript heap of the page", performance.memory.usedJSHeapSize]);
  const show = () =>
    get("memory").replaceChildren(
      ...rows.map(([name, bytes]) => {
        const row = document.createElement("div"), term = document.createElement("dt"), value = document.createElement("dd");
        term.textContent = name;
        value.textContent = bytesText(bytes);
        row.append(term, value);
        return row;
      }),
    );
  show();
  // The browser answers after its next garbage collection, which may take a while.
  performance.measureUserAgentSpecificMemory?.().then(({ bytes }) => {
    rows.push(["page and worker, as measured by the browser", bytes]);
    show();
  }, () => {});
}

function showFacts() {
  const { graphs, denoiser, pipeline, components, files, versions, scheduler } = manifest;
  const size = Object.values(files).reduce((sum, file) => sum + file.size, 0);
  const sizes = Object.entries(graphs).map(([name, { facts }]) => {
    const macs = (facts.macs_total / 1e9).toFixed(2), parameters = `${name} with ${(facts.parameters / 1e6).toFixed(2)} M parameters`;
    return Number(macs) ? `${parameters} and ${macs} G multiply-accumulates` : parameters;
  });
  get("facts").textContent =
    `${pipeline.class_name}, ${denoiser.class_name}, ${components.width} by ${components.height} pixels, ${scheduler.class_name}, ` +
    `${bytesText(size)} in total. Graphs: ${sizes.join("; ")}. The model runs in your browser, and no data is sent to a server.`;
  get("machine").textContent =
    `${navigator.hardwareConcurrency ?? "an unknown number of"} cores, ${browserName()}, tgate_compile ${versions.tgate_compile}.` +
    (canUseThreads() ? "" : ` ${NOT_ISOLATED}`);
}

function showError(error) {
  get("error").hidden = error === null;
  get("error").textContent = error?.message ?? "";
  if (error) get("status").textContent = "";
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  get("theme").textContent = dark ? "Light" : "Dark";
  get("theme").setAttribute("aria-pressed", String(dark));
}

// Formatting.

function sumOf(steps) {
  return steps.reduce((sum, { seconds }) => sum + seconds, 0);
}

function doneText(plain, gated) {
  return `Done: ${secondsText(plain.seconds)} in full, ${secondsText(gated.seconds)} ${optimized()}, ${fasterText(plain.seconds / gated.seconds)}, on ${gated.threads} ${gated.threads === 1 ? "thread" : "threads"}.`;
}

function fasterText(ratio) {
  return ratio >= 1 ? `${ratio.toFixed(2)} times as fast` : `slower: ${ratio.toFixed(2)} times as fast`;
}

function secondsText(seconds) {
  return seconds < 1 ? milliseconds(seconds) : `${seconds.toFixed(2)} s`;
}

function bytesText(bytes) {
  if (bytes === null) return "unknown";
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(0)} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

function browserName() {
  const brand = navigator.userAgentData?.brands.find(({ brand: name }) => !/not.a.brand/i.test(name.replaceAll(/[^\w]/g, ".")));
  const found = navigator.userAgent.match(/(Firefox|Edg|Chrome|Version)\/[\d.]+/);
  return brand ? `${brand.brand} ${brand.version}` : (found?.[0].replace("Version", "Safari").replace("/", " ") ?? "an unknown browser");
}
