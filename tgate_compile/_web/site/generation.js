/** One generation of one image, step by step, so that two can take turns. */

import { Denoiser, graphsOf } from "./denoiser.js";
import { BundleError } from "./errors.js";
import { decoded } from "./images.js";
import { normalNoise } from "./noise.js";
import { gateOf, planOf, plainPlan, stripOf } from "./schedule.js";
import { makeScheduler } from "./schedulers.js";

/** A graph that has just been opened runs up to so often, and so long, before it is timed: browsers compile it meanwhile. */
const WARM_UP_RUNS = 12, WARM_UP_SECONDS = 2;

/** The call of `BundlePipeline.generate` on the pipeline's parts; `begin`, as many `step`s as there are, `finish`. */
export class Generation {
  /** What each step was: `{step, steps, graph, letter, seconds}`. */
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

  /** Throws BundleError for a call that the bundle is not made for; nothing is loaded for that. */
  constructor(parts, call) {
    const { manifest } = parts, { components } = manifest, { method } = manifest;
    const { steps = components.num_inference_steps, guidanceScale = components.guidance_scale } = call;
    const { prompt, gateStep, seed = 0, plain = false } = call;
    if (typeof prompt !== "string") throw new BundleError(`prompt must be a text, but got ${JSON.stringify(prompt)}.`);
    this.#parts = parts;
    this.#call = { ...call, steps, guidanceScale };
    this.#guided = guidanceScale > 1;
    this.#scheduler = makeScheduler(manifest.scheduler, steps);
    this.#plan = plain ? plainPlan(method, steps, this.#guided) : planOf(method, steps, this.#guided, gateStep);
    this.#gate = plain ? steps : Math.min(gateStep ?? gateOf(method, steps), steps);
    this.#graphs = graphsOf(manifest, this.#plan).map(([, graph]) => graph);
    const { latent_channels: channels, scale_factor: scale } = components.vae_decoder;
    this.#shape = [1, channels, components.height / scale, components.width / scale];
    this.#latents = this.#noise(call.latents, seed).map((value) => value * this.#scheduler.initialSigma);
  }

  /** How many there are. */
  get steps() {
    return this.#call.steps;
  }

  /** What the steps run, as the manifest describes it. */
  get graphs() {
    return this.#graphs;
  }

  /** Load what is needed first, `graphs` where they are not loaded one by one, and read the prompt. */
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

  /** Make the next step. */
  async step() {
    const { manifest, sessions, sequential } = this.#parts, step = this.done.length, graph = this.#graphs[step];
    if (sequential) {
      this.#stage(`loading the graph of step ${step}`);
      await sessions.keepOnly(this.#graphs.slice(step));
      this.#openSeconds += await sessions.open([graph], manifest.weights);
    }
    const session = sessions.get(graph.file);
    if (session.fresh) this.#warmUpSeconds += await this.#warmUp(step);
    session.fresh = false;
    const began = performance.now();
    this.#latents = this.#scheduler.step(await this.#prediction(step), step, this.#latents);
    const seconds = (performance.now() - began) / 1000;
    this.done.push({ step, steps: this.steps, graph: this.#denoiser.graphName(step), letter: this.#plan[step].letter, seconds });
    this.#call.onStep?.(this.done[step]);
  }

  /** What there is so far: `{pixels, width, height}`. The decoder is open unless graphs are loaded one by one. */
  async image() {
    const { manifest, sessions, runtime } = this.#parts;
    return decoded(manifest.components.vae_decoder, sessions, runtime, this.#latents, this.#shape);
  }

  /** The image, and how it was made. */
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

  #prediction(step) {
    const { timesteps } = this.#scheduler, input = this.#scheduler.modelInput(this.#latents, step);
    return this.#denoiser.run(step, input, this.#shape, timesteps[step], this.#call.guidanceScale);
  }

  async #warmUp(step) {
    this.#stage("warming up");
    const began = performance.now(), seconds = () => (performance.now() - began) / 1000;
    for (let run = 0; run < WARM_UP_RUNS && seconds() < WARM_UP_SECONDS; run++) await this.#prediction(step);
    return seconds();
  }

  #stage(text) {
    this.#call.onStage?.(text);
  }

  #noise(given, seed) {
    const count = this.#shape.reduce((product, size) => product * size, 1);
    if (given === undefined || given === null) return normalNoise(seed, count);
    if (given.length !== count) throw new BundleError(`latents must be ${count} numbers, ${JSON.stringify(this.#shape)}, but got ${given.length}.`);
    return Float32Array.from(given);
  }

  /** What some denoisers are told of the image's size: of the original, where it was cut, of the target. */
  #sizes() {
    const { height, width } = this.#parts.manifest.components;
    const row = (...values) => ({ values: Float32Array.from(values), shape: [1, values.length] });
    return { sizes: row(height, width, 0, 0, height, width), resolution: row(height, width), aspect_ratio: row(height / width) };
  }
}
