"""Weights for engines that have none inside, or that can change them: from the ONNX files beside them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tgate_compile._errors import BackendError
from tgate_compile.exports.tensorrt_log import tensorrt_log
from tgate_compile.exports.to_tensorrt import parser_errors

MSG_FAILED = "{package} could not put weights into the engine of the {graph} graph ({problem})."
MSG_FIXED = (
    "The weights of the denoiser have been changed, and the engine of the {graph} graph cannot follow. Export the "
    'bundle with format_options={{"refit": True}}, or restore(pipe) and optimize(pipe, ...) the changed model.'
)


def onnx_beside(engine: Path) -> Path:
    """The ONNX file that says which weights go where, if the file `engine` has none inside."""
    return engine.with_suffix(".onnx")


def is_stripped(package: str, engine: Any) -> bool:
    """Whether the engine has no weights inside."""
    stat = importlib.import_module(package).EngineStat.STRIPPED_WEIGHTS_SIZE
    return bool(engine.get_engine_stat(stat) > 0)


def refit(package: str, engine: Any, model: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Put `weights` into `engine`, by the names of the initializers of the ONNX file `model`.

    Those that are not given are taken from the weights file beside it. Nothing of the engine may be running.

    Raises:
        BackendError: the engine has its weights inside, once and for all, or TensorRT does not take these.
    """
    if not engine.refittable or not model.exists():
        raise BackendError(MSG_FIXED.format(graph=model.stem))
    trt = importlib.import_module(package)
    log = tensorrt_log(package)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    names = _weight_names(model)
    # Which must live as long as the refitter.
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items() if name in names}
    done = parser.load_model_proto(model.read_bytes(), str(model))
    done = done and all(parser.load_initializer(name, t.data_ptr(), t.nbytes) for name, t in held.items())
    if not (done and parser.refit_model_proto() and refitter.refit_cuda_engine()):
        problem = parser_errors(parser) or log.last_problem
        raise BackendError(MSG_FAILED.format(package=package, graph=model.stem, problem=problem))


def _weight_names(model: Path) -> set[str]:
    import onnx

    graph = onnx.load_model(model, load_external_data=False).graph
    return {tensor.name for tensor in graph.initializer}
