"""tgate_compile: make text-conditioned diffusion cheap to serve, by rewriting the denoiser's graph.

pipe = tgate_compile.optimize(pipe, gate_step=10)
image = pipe("a red fox in snow", num_inference_steps=25).images[0]
"""

from tgate_compile._demo.pipeline import load_demo_pipeline as load_demo_pipeline
from tgate_compile._describe import describe as describe
from tgate_compile._errors import BackendError as BackendError
from tgate_compile._errors import BundleError as BundleError
from tgate_compile._errors import CaptureError as CaptureError
from tgate_compile._errors import ConcurrentGenerationError as ConcurrentGenerationError
from tgate_compile._errors import ConfigurationError as ConfigurationError
from tgate_compile._errors import TGateError as TGateError
from tgate_compile._errors import UnsupportedModelError as UnsupportedModelError
from tgate_compile._errors import VerificationError as VerificationError
from tgate_compile._export import export as export
from tgate_compile._load import load as load
from tgate_compile._optimize import optimize as optimize
from tgate_compile._optimize import restore as restore
from tgate_compile._optimized import generation as generation
from tgate_compile._schedule import Schedule as Schedule
from tgate_compile._schedule_file import load_schedule as load_schedule
from tgate_compile._schedule_file import save_schedule as save_schedule
from tgate_compile._strip_picture import strip_picture as strip_picture
from tgate_compile._tune import tune as tune
from tgate_compile._tuning.result import Tuning as Tuning
from tgate_compile._version import __version__ as __version__
