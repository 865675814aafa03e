/** How large WebAssembly's memory is. ONNX Runtime keeps its own to itself, so it is seen as it is made. */

let memory = null;

/** Call it before ONNX Runtime is loaded. */
export function watchHeap() {
  WebAssembly.Memory = new Proxy(WebAssembly.Memory, {
    construct(kind, args) {
      memory = Reflect.construct(kind, args);
      return memory;
    },
  });
}

/** In bytes; null before there is one. It grows and never shrinks, so this is also the most that it ever was. */
export function heapBytes() {
  return memory && memory.buffer.byteLength;
}
