"""Run bundles as text-to-image programs with numpy and ONNX Runtime, without torch, diffusers or transformers.

pipe = tgate_compile.runtime.BundlePipeline("my-bundle")
image = pipe("a large red circle on a blue background", seed=0)
"""

from tgate_compile.runtime._pipeline import BundlePipeline as BundlePipeline
from tgate_compile.runtime._pipeline import Step as Step
