/** The worker that runs the pipeline, so that the page stays responsive; `engine.js` communicates with it. */

import { BundlePipeline } from "./pipeline.js";

let pipe = null;
/** Sends an event of the current call to the page; a pipeline also loads files in later calls. */
let send = null;

const METHODS = {
  async open({ bundle, ...settings }) {
    pipe = await BundlePipeline.open(bundle, { ...settings, onBytes: (count) => send("bytes", count) });
    return { threads: pipe.threads };
  },
  generate: (call) => pipe.generate(withCallbacks(call, 0)),
  compare: (calls) => pipe.compare(calls.map(withCallbacks)),
};

/** Return a call with callbacks that send events to the page, with the position of the call as `turn`. */
function withCallbacks(call, turn) {
  return {
    ...call,
    onStep: (step) => send("step", { ...step, turn }),
    onPreview: call.preview ? (image) => send("preview", { ...image, turn }) : undefined,
    onStage: (text) => send("stage", text),
    onCut: (tokens) => send("cut", tokens),
  };
}

self.addEventListener("message", async ({ data: { id, method, argument } }) => {
  send = (event, detail) => self.postMessage({ id, event, detail });
  try {
    self.postMessage({ id, result: await METHODS[method](argument) });
  } catch (error) {
    self.postMessage({ id, error: { name: error.name, message: error.message ?? String(error) } });
  }
});
