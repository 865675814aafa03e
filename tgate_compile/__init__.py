"""tgate_compile: speed up text-conditioned diffusion pipelines by rewriting the denoiser's graph.

pipe = tgate_compile.optimize(pipe, gate_step=10)
image = pipe("a red fox in snow", num_inference_steps=25).images[0]

Names are imported when they are first used, so that modules without PyTorch (`tgate_compile.runtime`) load quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tgate_compile._demo import DEMO_VARIANTS as DEMO_VARIANTS
    from tgate_compile._demo import DemoVariant as DemoVariant
    from tgate_compile._demo.pipeline import load_demo_pipeline as load_demo_pipeline
    from tgate_compile._errors import BackendError as BackendError
    from tgate_compile._errors import BundleError as BundleError
    from tgate_compile._errors import CaptureError as CaptureError
    from tgate_compile._errors import ConcurrentGenerationError as ConcurrentGenerationError
    from tgate_compile._errors import ConfigurationError as ConfigurationError
    from tgate_compile._errors import TGateError as TGateError
    from tgate_compile._errors import UnsupportedCallError as UnsupportedCallError
    from tgate_compile._errors import UnsupportedModelError as UnsupportedModelError
    from tgate_compile._errors import VerificationError as VerificationError
    from tgate_compile._optimize import optimize as optimize
    from tgate_compile._optimize import restore as restore
    from tgate_compile.bundle.export import export as export
    from tgate_compile.bundle.load import load as load
    from tgate_compile.engine.purity import pure as pure
    from tgate_compile.methods.adaptive_guidance import AdaptiveGuidance as AdaptiveGuidance
    from tgate_compile.methods.block_cache import BlockCache as BlockCache
    from tgate_compile.methods.db_cache import DBCache as DBCache
    from tgate_compile.methods.deepcache import DeepCache as DeepCache
    from tgate_compile.methods.delta_dit import DeltaDiT as DeltaDiT
    from tgate_compile.methods.faster_cache import FasterCache as FasterCache
    from tgate_compile.methods.first_block_cache import FirstBlockCache as FirstBlockCache
    from tgate_compile.methods.fora import Fora as Fora
    from tgate_compile.methods.frozen_text import FrozenReferences as FrozenReferences
    from tgate_compile.methods.frozen_text import FrozenText as FrozenText
    from tgate_compile.methods.mag_cache import MagCache as MagCache
    from tgate_compile.methods.method import Method as Method
    from tgate_compile.methods.method import Phase as Phase
    from tgate_compile.methods.pab import PAB as PAB
    from tgate_compile.methods.schedule import Schedule as Schedule
    from tgate_compile.methods.schedule_file import load_schedule as load_schedule
    from tgate_compile.methods.schedule_file import save_schedule as save_schedule
    from tgate_compile.methods.tea_cache import TeaCache as TeaCache
    from tgate_compile.methods.tgate import TGate as TGate
    from tgate_compile.pipeline.describe import Description as Description
    from tgate_compile.pipeline.describe import VariantDescription as VariantDescription
    from tgate_compile.pipeline.describe import describe as describe
    from tgate_compile.pipeline.optimized import OwnLoop as OwnLoop
    from tgate_compile.pipeline.optimized import generation as generation
    from tgate_compile.study.analysis.result import Analysis as Analysis
    from tgate_compile.study.analysis.run import analyze as analyze
    from tgate_compile.study.evaluation.evaluate import evaluate as evaluate
    from tgate_compile.study.evaluation.result import Evaluation as Evaluation
    from tgate_compile.study.evaluation.result import EvaluationRow as EvaluationRow
    from tgate_compile.study.figures import strip_picture as strip_picture
    from tgate_compile.study.tuning.calibrate import calibrate_mag_cache as calibrate_mag_cache
    from tgate_compile.study.tuning.calibrate import calibrate_tea_cache as calibrate_tea_cache
    from tgate_compile.study.tuning.result import Tuning as Tuning
    from tgate_compile.study.tuning.result import TuningRow as TuningRow
    from tgate_compile.study.tuning.search import tune as tune

#: The module that defines each public name.
_HOMES = {
    "load_demo_pipeline": "_demo.pipeline",
    "DEMO_VARIANTS": "_demo",
    "DemoVariant": "_demo",
    "BackendError": "_errors",
    "BundleError": "_errors",
    "CaptureError": "_errors",
    "ConcurrentGenerationError": "_errors",
    "ConfigurationError": "_errors",
    "TGateError": "_errors",
    "UnsupportedCallError": "_errors",
    "UnsupportedModelError": "_errors",
    "VerificationError": "_errors",
    "optimize": "_optimize",
    "restore": "_optimize",
    "export": "bundle.export",
    "load": "bundle.load",
    "pure": "engine.purity",
    "TGate": "methods.tgate",
    "DeepCache": "methods.deepcache",
    "AdaptiveGuidance": "methods.adaptive_guidance",
    "FrozenReferences": "methods.frozen_text",
    "FrozenText": "methods.frozen_text",
    "PAB": "methods.pab",
    "FasterCache": "methods.faster_cache",
    "Fora": "methods.fora",
    "DeltaDiT": "methods.delta_dit",
    "BlockCache": "methods.block_cache",
    "MagCache": "methods.mag_cache",
    "FirstBlockCache": "methods.first_block_cache",
    "DBCache": "methods.db_cache",
    "TeaCache": "methods.tea_cache",
    "Method": "methods.method",
    "Phase": "methods.method",
    "Schedule": "methods.schedule",
    "load_schedule": "methods.schedule_file",
    "save_schedule": "methods.schedule_file",
    "describe": "pipeline.describe",
    "Description": "pipeline.describe",
    "VariantDescription": "pipeline.describe",
    "generation": "pipeline.optimized",
    "OwnLoop": "pipeline.optimized",
    "Analysis": "study.analysis.result",
    "analyze": "study.analysis.run",
    "evaluate": "study.evaluation.evaluate",
    "Evaluation": "study.evaluation.result",
    "EvaluationRow": "study.evaluation.result",
    "strip_picture": "study.figures",
    "Tuning": "study.tuning.result",
    "TuningRow": "study.tuning.result",
    "tune": "study.tuning.search",
    "calibrate_mag_cache": "study.tuning.calibrate",
    "calibrate_tea_cache": "study.tuning.calibrate",
}

_SUBPACKAGES = ("exports", "methods", "passes", "runtime")

__all__ = [
    "load_demo_pipeline",
    "DEMO_VARIANTS",
    "DemoVariant",
    "describe",
    "Description",
    "VariantDescription",
    "BackendError",
    "BundleError",
    "CaptureError",
    "ConcurrentGenerationError",
    "ConfigurationError",
    "TGateError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "VerificationError",
    "export",
    "load",
    "optimize",
    "restore",
    "generation",
    "OwnLoop",
    "pure",
    "TGate",
    "DeepCache",
    "AdaptiveGuidance",
    "FrozenReferences",
    "FrozenText",
    "PAB",
    "FasterCache",
    "Fora",
    "DeltaDiT",
    "BlockCache",
    "MagCache",
    "FirstBlockCache",
    "DBCache",
    "TeaCache",
    "Method",
    "Schedule",
    "Phase",
    "load_schedule",
    "save_schedule",
    "strip_picture",
    "tune",
    "Tuning",
    "TuningRow",
    "calibrate_mag_cache",
    "calibrate_tea_cache",
    "analyze",
    "Analysis",
    "evaluate",
    "Evaluation",
    "EvaluationRow",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
