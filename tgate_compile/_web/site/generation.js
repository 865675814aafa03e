/** The generation of one image, step by step, so that the steps of two generations can alternate. */

import { Denoiser, graphsOf } from "./denoiser.js";
import { BundleError } from "./errors.js";
import { decoded } from "./images.js";
import { earlyGraphs } from "./manifest.js";
import { normalNoise } from "./noise.js";
import { gateOf, planOf, plainPlan, stripOf } from "./schedule.js";
import { makeScheduler } from "./schedulers.js";

/** The most runs, and the longest time, for warming up a newly opened graph: browsers compile it in the background. */
const WARM_UP_RUNS = 12, WARM_UP_SECONDS = 2;

/** A call of `BundlePipeline.generate`: call `begin`, then `step` for each of `steps`, then `finish`. */
export class Generation {
  /** The completed steps: `{step, steps, graph, letter, seconds}`. */
  done = [];
  #parts;
  #call;
  #guided;
  #gate;
  #plan;
  #graphs;
  #scheduler;
  #shape;
  #latents;
  #denoiser;
  #openSeconds = 0;
  #encodeSeconds = 0;
  #warmUpSeconds = 0;

  /** Check the call without loading anything. Throws BundleError if the bundle does not support it. */
  constructor(parts, call) {
    const { manifest } = parts, { components } = manifest, { method } = manifest;
    const { steps = components.num_inference_steps, guidanceScale = components.guidance_scale } = call;
    const { prompt, gateStep, seed = 0, plain = false } = call;
    if (typeof prompt !== "string") throw new BundleError(`prompt must be a string, but got ${JSON.stringify(prompt)}.`);
    this.#parts = parts;
    this.#call = { ...call, steps, guidanceScale };
    this.#guided = guidanceScale > 1;
    this.#scheduler = makeScheduler(manifest.scheduler, steps);
    this.#plan = plain ? plainPlan(method, steps, this.#guided) : planOf(method, steps, this.#guided, gateStep);
    this.#gate = plain ? steps : Math.min(gateStep ?? gateOf(method, steps), steps);
    const names = [...new Set(graphsOf(manifest, this.#plan).flat())];
    const early = names.flatMap((name) => earlyGraphs(manifest.graphs, name));
    this.#graphs = [...new Set([...early, ...names])].map((name) => manifest.graphs[name]);
    const { latent_channels: channels, scale_factor: scale } = components.vae_decoder;
    this.#shape = [1, channels, components.height / scale, components.width / scale];
    this.#latents = this.#noise(call.latents, seed).map((value) => value * this.#scheduler.initialSigma);
  }

  /** The number of steps. */
  get steps() {
    return this.#call.steps;
  }

  /** The manifest's descriptions of the graphs that the steps may run, with their preludes and tables. */
  get graphs() {
    return this.#graphs;
  }

  /** Encode the prompt, and load `graphs` and the decoder unless graphs are loaded one by one. */
  async begin(graphs = this.#graphs) {
    const { manifest, sessions, runtime, prompts, sequential } = this.#parts, { components } = manifest;
    this.#stage(sequential ? "loading the text encoder" : "loading the model");
    const always = sequential ? [] : [components.vae_decoder];
    this.#openSeconds += await sessions.open([...components.text_encoders, ...always], components.weights);
    if (!sequential) this.#openSeconds += await sessions.open(graphs, manifest.weights);
    const began = performance.now(), { prompt, negativePrompt = null, onCut } = this.#call;
    const cond = { ...(await prompts.encoded(prompt, onCut)), ...this.#sizes() };
    const conditions = { cond };
    if (this.#guided) conditions.uncond = { ...(await prompts.negative(negativePrompt, cond)), ...this.#sizes() };
    this.#encodeSeconds = (performance.now() - began) / 1000;
    this.#denoiser = new Denoiser(manifest, runtime, sessions, this.#plan, conditions);
  }

  /** Run the next step, after the preludes and tables of its graphs if these have not run yet. */
  async step() {
    const { manifest, sessions, sequential } = this.#parts, step = this.done.length;
    const timestep = this.#scheduler.timesteps[step], parts = this.#denoiser.missing(step, timestep);
    const graphs = this.#denoiser.graphs(step, step + 1);
    const input = () => this.#scheduler.modelInput(this.#latents, step);
    let seconds = 0;
    if (parts.length) {
      if (sequential) {
        this.#stage(`loading the prelude of step ${step}`);
        await sessions.keepOnly([]);
        this.#openSeconds += await sessions.open(parts, manifest.weights);
      }
      // With one graph at a time, all rows that the graphs will need.
      const serves = (_, other) => sequential && other > step && this.#denoiser.graphs(other, other + 1).some((one) => graphs.includes(one));
      const times = [timestep, ...this.#scheduler.timesteps.filter(serves)];
      const prepare = () => this.#denoiser.prepare(step, this.#latents, this.#shape, times);
      if (isFresh(sessions, parts)) {
        this.#warmUpSeconds += await timed(prepare); // the first run also compiles
        this.#denoiser.forget(step);
      }
      seconds += await timed(prepare);
    }
    if (sequential) {
      this.#stage(`loading the graph of step ${step}`);
      await sessions.keepOnly(this.#denoiser.graphs(step));
      this.#openSeconds += await sessions.open(graphs, manifest.weights);
    }
    if (isFresh(sessions, graphs)) {
      this.#stage("warming up");
      this.#warmUpSeconds += await timed(() => this.#warmUp(step, input(), timestep));
    }
    seconds += await timed(async () => {
      const prediction = await this.#denoiser.run(step, input(), this.#shape, timestep, this.#call.guidanceScale);
      this.#latents = this.#scheduler.step(prediction, step, this.#latents);
    });
    this.done.push({ step, steps: this.steps, ...this.#denoiser.ran(step), seconds });
    this.#call.onStep?.(this.done[step]);
  }

  /** Return the current image, `{pixels, width, height}`. The decoder must be open. */
  async image() {
    const { manifest, sessions, runtime } = this.#parts;
    return decoded(manifest.components.vae_decoder, sessions, runtime, this.#latents, this.#shape);
  }

  /** Return the image, and measurements of the generation. */
  async finish() {
    const { manifest, sessions, sequential } = this.#parts, { components } = manifest;
    this.#denoiser.release();
    if (sequential) {
      this.#stage("loading the decoder");
      await sessions.keepOnly([]);
      this.#openSeconds += await sessions.open([components.vae_decoder], components.weights);
    }
    const began = performance.now(), image = await this.image(), decodeSeconds = (performance.now() - began) / 1000;
    if (sequential) await sessions.keepOnly([]);
    return {
      ...image,
      done: this.done,
      seconds: this.done.reduce((sum, { seconds }) => sum + seconds, 0),
      strip: stripOf(this.done),
      gate: this.#gate,
      openSeconds: this.#openSeconds,
      warmUpSeconds: this.#warmUpSeconds,
      encodeSeconds: this.#encodeSeconds,
      decodeSeconds,
    };
  }

  async #warmUp(step, input, timestep) {
    const began = performance.now(), seconds = () => (performance.now() - began) / 1000;
    for (let run = 0; run < WARM_UP_RUNS && seconds() < WARM_UP_SECONDS; run++) {
      await this.#denoiser.warmUp(step, input, this.#shape, timestep);
    }
  }

  #stage(text) {
    this.#call.onStage?.(text);
  }

  #noise(given, seed) {
    const count = this.#shape.reduce((product, size) => product * size, 1);
    if (given === undefined || given === null) return normalNoise(seed, count);
    if (given.length !== count) throw new BundleError(`latents must be ${count} numbers of shape ${JSON.stringify(this.#shape)}, but got ${given.length}.`);
    return Float32Array.from(given);
  }

  /** Return the inputs of some denoisers for the image's size; `sizes` has the original size, crop offset and target size. */
  #sizes() {
    const { height, width } = this.#parts.manifest.components;
    const row = (...values) => ({ values: Float32Array.from(values), shape: [1, values.length] });
    return { sizes: row(height, width, 0, 0, height, width), resolution: row(height, width), aspect_ratio: row(height / width) };
  }
}

/** Return whether one of the open `graphs` has not run yet, and note that they all run now. */
function isFresh(sessions, graphs) {
  const opened = graphs.map((graph) => sessions.get(graph.file)), fresh = opened.some((session) => session.fresh);
  for (const session of opened) session.fresh = false;
  return fresh;
}

/** Call `work` and return the time that it takes, in seconds. */
async function timed(work) {
  const began = performance.now();
  await work();
  return (performance.now() - began) / 1000;
}
