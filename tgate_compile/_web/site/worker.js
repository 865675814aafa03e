/** The pipeline in a thread of its own, so that the page stays alive: `engine.js` talks to it. */

import { BundlePipeline } from "./pipeline.js";

let pipe = null;
/** Tells the page of an event, for the call that is under way; a pipeline loads files in later calls, too. */
let tell = null;

const METHODS = {
  async open({ bundle, ...settings }) {
    pipe = await BundlePipeline.open(bundle, { ...settings, onBytes: (count) => tell("bytes", count) });
    return { threads: pipe.threads };
  },
  generate: (call) => pipe.generate(heard(call, 0)),
  compare: (calls) => pipe.compare(calls.map(heard)),
};

/** A call with functions that tell the page, and which of the calls it is. */
function heard(call, turn) {
  return {
    ...call,
    onStep: (step) => tell("step", { ...step, turn }),
    onPreview: call.preview ? (image) => tell("preview", { ...image, turn }) : undefined,
    onStage: (text) => tell("stage", text),
    onCut: (tokens) => tell("cut", tokens),
  };
}

self.addEventListener("message", async ({ data: { id, method, argument } }) => {
  tell = (event, detail) => self.postMessage({ id, event, detail });
  try {
    self.postMessage({ id, result: await METHODS[method](argument) });
  } catch (error) {
    self.postMessage({ id, error: { name: error.name, message: error.message ?? String(error) } });
  }
});
