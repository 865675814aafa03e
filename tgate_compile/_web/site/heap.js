/** Measure WebAssembly's memory. ONNX Runtime does not expose its memory, so it is recorded when it is created. */

let memory = null;

/** Record the memory that is created from now on; call this before ONNX Runtime is loaded. */
export function watchHeap() {
  WebAssembly.Memory = new Proxy(WebAssembly.Memory, {
    construct(kind, args) {
      memory = Reflect.construct(kind, args);
      return memory;
    },
  });
}

/** Return the size in bytes, or null if there is no memory yet. It never shrinks, so this is also its maximum. */
export function heapBytes() {
  return memory && memory.buffer.byteLength;
}
