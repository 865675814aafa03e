"""Write a bundle: graphs, weights, parity, manifest; all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from tgate_compile._bundle import manifest as m
from tgate_compile._bundle.describe_graph import describe_graph, phase_spec
from tgate_compile._bundle.files import file_of
from tgate_compile._bundle.folder import written_folder
from tgate_compile._bundle.graph_file import write_graph
from tgate_compile._bundle.parity import measure_parity
from tgate_compile._bundle.plain_data import plain_config
from tgate_compile._bundle.planned_graphs import PlannedGraph, planned_graphs
from tgate_compile._bundle.returns import returns_of
from tgate_compile._bundle.weights_digest import dtype_name, weights_digest
from tgate_compile._bundle.weights_file import WeightsFile
from tgate_compile._bundle.wiring import wiring_of
from tgate_compile._errors import BundleError, UnsupportedModelError
from tgate_compile._generation import Plan, strip_of
from tgate_compile._hook import DenoiserHook
from tgate_compile._schedule import Phase
from tgate_compile._version import __version__
from tgate_compile.exports.to_onnx import OPSET

MSG_RETURNS = "The denoiser {model} returns {given}; a bundle can say a tuple, or one of diffusers' output classes."
MSG_CONSTANT = "The denoiser {model} is called with {name}={given!r}, which a manifest cannot say."
MSG_INVALID = "The {graph} graph is no valid ONNX model ({problem}). Nothing has been written. Please report this."

#: Told what is being done, one line a stage.
Progress = Callable[[str], None]


def write_bundle(
    pipe: DiffusionPipeline,
    component: str,
    hook: DenoiserHook,
    plan: Plan,
    folder: Path,
    *,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Write the graphs of `plan` to `folder`; `hook` is that of the denoiser `component` of the optimized `pipe`.

    Raises:
        BundleError: it cannot be written, or a graph is not what it must be. `folder` is then as it was.
        UnsupportedModelError: the denoiser takes or returns what no bundle can say.
    """
    graphs = planned_graphs(hook, plan)
    denoiser = _denoiser(component, hook, next(iter(graphs.values())), progress)
    with written_folder(folder, overwrite=overwrite) as temporary:
        described = _write_graphs(list(graphs.values()), temporary, progress)
        names = {phase: planned.name for phase, planned in graphs.items()}
        manifest = m.Manifest(
            format="tgate_compile.bundle",
            schema_version=m.SCHEMA_VERSION,
            pipeline=m.Pipeline(
                class_name=type(pipe).__name__,
                diffusers=diffusers.__version__,
                vae_scale_factor=getattr(pipe, "vae_scale_factor", None),
            ),
            denoiser=denoiser,
            family=_family(hook),
            method=_method(hook),
            scheduler=m.Scheduler(
                class_name=type(pipe.scheduler).__name__, config=plain_config(dict(pipe.scheduler.config))
            ),
            graphs=described,
            wiring=wiring_of(described),
            example=_example(plan, names),
            weights=m.WEIGHTS_FILE,
            versions=_versions(),
            files=_files(temporary, progress),
        )
        (temporary / m.MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _write_graphs(graphs: list[PlannedGraph], folder: Path, progress: Progress) -> dict[str, m.Graph]:
    (folder / m.GRAPHS_FOLDER).mkdir()
    described = {}
    with (folder / m.WEIGHTS_FILE).open("xb") as file:
        weights = WeightsFile(file)
        for planned in graphs:
            progress(f"Converting the {planned.name} graph")
            path = f"{m.GRAPHS_FOLDER}/{planned.name}.onnx"
            nodes = write_graph(planned, folder / path, weights)
            described[planned.name] = describe_graph(planned, path, nodes)
    for planned in graphs:
        progress(f"Checking the {planned.name} graph against PyTorch")
        graph = described[planned.name]
        _check_model(planned.name, folder / graph.file)
        parity = measure_parity(planned, graph, folder / graph.file)
        described[planned.name] = graph.model_copy(update={"parity": parity})
    return described


def _check_model(name: str, path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(MSG_INVALID.format(graph=name, problem=str(error).splitlines()[0])) from error


def _denoiser(component: str, hook: DenoiserHook, planned: PlannedGraph, progress: Progress) -> m.Denoiser:
    model = type(hook.denoiser).__name__
    returns = returns_of(planned.captured.out_spec)
    if returns is None:
        raise UnsupportedModelError(MSG_RETURNS.format(model=model, given=planned.captured.out_spec))
    constants = {name: value for name, value in planned.arguments.items() if not torch.is_tensor(value)}
    for name, value in constants.items():
        if type(value) not in (bool, int, float, str, type(None)):
            raise UnsupportedModelError(MSG_CONSTANT.format(model=model, name=name, given=value))
    progress("Hashing the weights")
    return m.Denoiser(
        component=component,
        class_name=model,
        config=plain_config(getattr(hook.denoiser, "config", {})),
        weights_digest=weights_digest(hook.denoiser),
        arguments=[name for name, value in planned.arguments.items() if torch.is_tensor(value)],
        latents=planned.latents,
        constants=constants,  # type: ignore[arg-type]
        returns=returns,
    )


def _family(hook: DenoiserHook) -> m.Family:
    family = hook.config.family

    def lists(paths: tuple[tuple[str, ...], ...]) -> list[list[str]]:
        return [list(path) for path in paths]

    return m.Family(
        order=list(family.order),
        calls=list(family.calls),
        only=family.only,
        interleaved=lists(family.interleaved),
        repeated=lists(family.repeated),
        shared=lists(family.shared),
    )


def _method(hook: DenoiserHook) -> m.Method:
    config = hook.config
    return m.Method(
        schedule=asdict(config.schedule),
        keep=config.schedule.kept,
        sites=None if config.sites is None else list(config.sites),
        cache_dtype=None if config.cache_dtype is None else dtype_name(config.cache_dtype),  # type: ignore[arg-type]
    )


def _example(plan: Plan, names: Mapping[Phase, str]) -> m.Example:
    return m.Example(
        guided=plan.steps[0][1].guided,
        strip=strip_of(plan.steps),
        steps=[
            m.Step(step=step, graph=names[graph], phase=phase_spec(phase))
            for (step, phase), (graph, _) in zip(plan.steps, plan.graphs, strict=True)
        ],
    )


def _versions() -> m.Versions:
    import onnx
    import onnxruntime

    return m.Versions(
        tgate_compile=__version__,
        torch=torch.__version__,
        onnx=onnx.__version__,
        onnxruntime=onnxruntime.__version__,
        opset=OPSET,
    )


def _files(folder: Path, progress: Progress) -> dict[str, m.File]:
    progress("Hashing the files")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_of(path) for path in paths}
