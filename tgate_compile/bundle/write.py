"""Write a bundle, completely or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline

from tgate_compile import __version__
from tgate_compile._errors import BundleError, UnsupportedModelError
from tgate_compile.bundle import manifest as m
from tgate_compile.bundle.calibration import Quantizing, calibrate
from tgate_compile.bundle.component_recipes import ComponentsRequest, binding_in_bundle, check_arguments
from tgate_compile.bundle.denoiser_state import as_recorded, plain_config, state_of_denoiser
from tgate_compile.bundle.formats import (
    GraphFormat,
    Progress,
    QuantizingFormat,
    WrittenGraph,
    components_functions,
    format_called,
)
from tgate_compile.bundle.manifest import MANIFEST_FILE, is_split, phase_spec
from tgate_compile.bundle.parity import measure_parity
from tgate_compile.bundle.plan import (
    PlannedGraph,
    choose_sizes,
    describe_graph,
    example_sizes,
    returns_of,
)
from tgate_compile.bundle.plan_rows import plans_of
from tgate_compile.bundle.quantization import Quantization
from tgate_compile.bundle.read_manifest import file_of, wiring_of
from tgate_compile.bundle.weights import dtype_name, weights_digest
from tgate_compile.engine.capture import LARGEST, SYMBOLS, FreeSize
from tgate_compile.methods.method import Phase
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.schedule_file import schedule_data
from tgate_compile.pipeline.decisions import strip_of
from tgate_compile.pipeline.hook import GatedDenoiser
from tgate_compile.pipeline.progress import Plan


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise BundleError unless a bundle can be written to `folder`, as far as this can be checked beforehand."""
    if not folder.parent.is_dir():
        raise BundleError(f"{folder} cannot be written: {folder.parent} is not a folder.")
    if os.path.lexists(folder):
        if not overwrite:
            raise BundleError(
                f"{folder} already exists. Choose another folder, or pass overwrite=True to replace the bundle in it."
            )
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if folder.is_symlink() or not (is_empty or (folder / MANIFEST_FILE).is_file()):
            raise BundleError(
                f"{folder} exists and is not replaced because it is not a bundle: it has no {MANIFEST_FILE}."
            )


@contextmanager
def written_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new temporary folder, which is renamed to `folder` at the end of the context, or removed after an error.

    An existing bundle is removed only when the new one is complete. A process that is killed leaves at most a hidden
    folder, `.NAME.HEX.tmp`, or the old bundle as `.NAME.HEX.old`.

    Raises:
        BundleError: `folder` exists and must not be replaced, or it cannot be written.
    """
    check_target(folder, overwrite=overwrite)
    mark = uuid.uuid4().hex
    temporary = folder.with_name(f".{folder.name}.{mark}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        check_target(folder, overwrite=overwrite)
        _move(temporary, folder, folder.with_name(f".{folder.name}.{mark}.old"))
    except OSError as error:
        raise BundleError(
            f"The bundle {folder} cannot be written: {error.strerror or error}. Nothing has been written."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flush all files to disk, so that a folder with the final name is always complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move(temporary: Path, folder: Path, old: Path) -> None:
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def write_bundle(
    pipe: DiffusionPipeline,
    component: str,
    hook: GatedDenoiser,
    plan: Plan,
    folder: Path,
    *,
    graph_format: str,
    options: Mapping[str, object],
    free: Collection[FreeSize] | None,
    split: bool,
    components: ComponentsRequest | None,
    quantization: Quantization | None,
    call: Mapping[str, Any],
    overwrite: bool,
    progress: Progress,
) -> None:
    """Write the graphs of `plan` to `folder`.

    `hook` belongs to the denoiser `component` of the optimized `pipe`, `plan` was made for `call`, and `components`
    describes the components to write in addition to the denoiser. The other arguments are those of `export`.

    Raises:
        CaptureError: the denoiser's code depends on a size in `free`.
        BundleError: the bundle cannot be written, or a graph is not correct. `folder` is then unchanged.
        UnsupportedModelError: the denoiser takes or returns values that a manifest cannot represent.
    """
    graphs = choose_sizes(hook, plan, free, split=split)
    parts = [part for planned in graphs.values() for part in planned.parts]
    denoiser = _denoiser(component, hook, next(iter(graphs.values())), progress)
    if components is not None:
        check_arguments(pipe, components.recipe, denoiser.arguments)
    quantizing = _quantizing(pipe, hook, plan, call, quantization, progress)
    with written_folder(folder, overwrite=overwrite) as temporary:
        functions = format_called(graph_format)
        written = _written(parts, temporary, functions, options, quantizing, progress)
        described = _described(parts, written, temporary, functions, quantizing, progress)
        names = {phase: planned.name for phase, planned in graphs.items()}
        others = None
        if components is not None:
            latents = next(iter(graphs.values())).arguments[denoiser.latents]
            assert isinstance(latents, torch.Tensor)
            others = components_functions().write_components(
                pipe, components, denoiser.arguments, latents.shape, len(plan.steps), temporary, progress
            )
        manifest = m.Manifest(
            format="tgate_compile.bundle",
            schema_version=schema_version_of(hook.config.schedule, described, denoiser),
            pipeline=m.Pipeline(
                class_name=type(pipe).__name__,
                diffusers=diffusers.__version__,
                vae_scale_factor=getattr(pipe, "vae_scale_factor", None),
            ),
            denoiser=denoiser,
            family=_family(hook),
            method=_method(hook, names),
            scheduler=m.Scheduler(
                class_name=type(pipe.scheduler).__name__, config=plain_config(dict(pipe.scheduler.config))
            ),
            graph_format=graph_format,
            quantization=_quantization(quantizing, parts, written),
            sizes=_sizes(next(iter(graphs.values())), written.values()),
            graphs=described,
            wiring=wiring_of(described),
            example=_example(hook, plan, names),
            weights=m.WEIGHTS_FILE if (temporary / m.WEIGHTS_FILE).exists() else None,
            components=others,
            versions=m.Versions(
                tgate_compile=__version__,
                torch=torch.__version__,
                runtime=functions.runtime_version(),
            ),
            files=_files(temporary, progress),
        )
        (temporary / m.MANIFEST_FILE).write_text(as_json(manifest), encoding="utf-8")


def schema_version_of(schedule: Schedule, graphs: Mapping[str, m.Graph], denoiser: m.Denoiser) -> int:
    """Return the lowest schema version that has what a bundle of these graphs needs."""
    if schedule.rule is not None or denoiser.image_rows is not None:
        return 4
    return 3 if schedule.forecasts else 2 if is_split(graphs) else 1


#: By schema version, the keys that earlier versions do not have.
_SINCE: Mapping[int, Mapping[str, Any]] = {
    2: {"denoiser": {"bindings": True}, "graphs": {"__all__": {"stage", "early_inputs"}}},
    3: {
        "method": {"forecasts": True, "plans": {"width": True, "phases": {"__all__": {"weights"}}}},
    },
    4: {"denoiser": {"image_rows": True}, "method": {"rule": True}},
}


def as_json(manifest: m.Manifest) -> str:
    """Return the text of a manifest file, with the keys of its schema version only."""
    left_out: dict[str, Any] = {}
    for since, keys in _SINCE.items():
        for part, names in keys.items() if manifest.schema_version < since else ():
            left_out[part] = {**left_out.get(part, {}), **names}
    return manifest.model_dump_json(indent=1, exclude=left_out) + "\n"


def _quantizing(
    pipe: DiffusionPipeline,
    hook: GatedDenoiser,
    plan: Plan,
    call: Mapping[str, Any],
    quantization: Quantization | None,
    progress: Progress,
) -> Quantizing | None:
    """Return the quantization for the format to write, after the generations that its calibration needs."""
    if quantization is None:
        return None
    if not quantization.calibrated:
        return Quantizing(quantization, None)
    progress("Generating images to measure the ranges of activations")
    prompts, most = quantization.calibration_prompts, quantization.calibration_steps
    return Quantizing(quantization, calibrate(pipe, hook, plan, call, prompts, most))


def _written(
    graphs: list[PlannedGraph],
    folder: Path,
    functions: GraphFormat,
    options: Mapping[str, object],
    quantizing: Quantizing | None,
    progress: Progress,
) -> dict[str, WrittenGraph]:
    if quantizing is None:
        return functions.write_graphs(graphs, folder, options, progress)
    return cast(QuantizingFormat, functions).write_quantized(graphs, folder, options, quantizing, progress)


def _quantization(
    quantizing: Quantizing | None, graphs: Collection[PlannedGraph], written: Mapping[str, WrittenGraph]
) -> m.Quantization | None:
    if quantizing is None:
        return None
    quantization, calibration = quantizing.quantization, quantizing.calibration
    quantized = [planned for planned in graphs if written[planned.name].quantized]
    measured = None
    if calibration is not None:
        steps = {planned.name: calibration.steps_of(planned) for planned in quantized}
        measured = m.Calibration(prompts=list(calibration.prompts), steps=steps)
    return m.Quantization(
        scheme=quantization.scheme,
        graphs=[planned.name for planned in quantized],
        keep=list(quantization.skip),
        block=quantization.block if quantization.scheme == "int4" else None,
        calibration=measured,
    )


def _described(
    graphs: list[PlannedGraph],
    written: Mapping[str, WrittenGraph],
    folder: Path,
    functions: GraphFormat,
    quantizing: Quantizing | None,
    progress: Progress,
) -> dict[str, m.Graph]:
    described = {}
    for planned in graphs:
        result = written[planned.name]
        graph = describe_graph(planned, result.file, result.entry, result.nodes)
        if result.checked_on is not None:
            progress(f"Checking the {planned.name} graph against PyTorch")
            real = None
            if quantizing is not None and quantizing.calibration is not None:
                real = quantizing.calibration.inputs_of(planned)
            device = torch.device(result.checked_on)
            parity = measure_parity(
                planned, graph, functions, folder, device, result.limits, quantized=result.quantized, real=real
            )
            graph = graph.model_copy(update={"parity": parity})
        described[planned.name] = graph
    return described


def _sizes(planned: PlannedGraph, written: Collection[WrittenGraph]) -> dict[str, m.FreeSize]:
    """Return the ranges of the free sizes that all graphs support."""
    largest = {SYMBOLS[name]: most for name, most in LARGEST.items()}
    sizes = {}
    for name, example in example_sizes(planned).items():
        limits = [(1, largest[name]), *(graph.limits[name] for graph in written if name in graph.limits)]
        least, most = max(least for least, _ in limits), min(most for _, most in limits)
        sizes[name] = m.FreeSize(least=least, most=most, example=example)
    return sizes


def _denoiser(component: str, hook: GatedDenoiser, planned: PlannedGraph, progress: Progress) -> m.Denoiser:
    model = type(hook.denoiser).__name__
    returns = returns_of(planned.captured.out_spec)
    if returns is None:
        raise UnsupportedModelError(
            f"The denoiser {model} returns {planned.captured.out_spec}, but a bundle supports only a tuple or an "
            "output class of diffusers."
        )
    constants = {name: value for name, value in planned.arguments.items() if not torch.is_tensor(value)}
    for name, value in constants.items():
        if type(value) not in (bool, int, float, str, type(None)):
            raise UnsupportedModelError(
                f"The denoiser {model} is called with {name}={value!r}, which a manifest cannot represent: other "
                "arguments than tensors must be None, bool, int, float or str."
            )
    progress("Hashing the weights")
    arguments = [name for name, value in planned.arguments.items() if torch.is_tensor(value)]
    return m.Denoiser(
        component=component,
        class_name=model,
        config=plain_config(getattr(hook.denoiser, "config", {})),
        weights_digest=weights_digest(hook.denoiser),
        state=as_recorded(state_of_denoiser(hook.denoiser, forward=hook.own_forward)),
        arguments=arguments,
        latents=planned.latents,
        bindings={name: binding_in_bundle(name) for name in arguments},
        constants=constants,  # type: ignore[arg-type]
        image_rows=planned.image,
        returns=returns,
    )


def _family(hook: GatedDenoiser) -> m.Family:
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


def _method(hook: GatedDenoiser, names: Mapping[Phase, str]) -> m.Method:
    config = hook.config
    return m.Method(
        schedule=schedule_data(config.schedule),
        keep=config.schedule.kept,
        sites=None if config.sites is None else list(config.sites),
        cache_dtype=None if config.cache_dtype is None else dtype_name(config.cache_dtype),  # type: ignore[arg-type]
        plans=plans_of(config.schedule, names),
        forecasts=dict(config.schedule.forecasts),
        rule=config.schedule.rule,
    )


def _example(hook: GatedDenoiser, plan: Plan, names: Mapping[Phase, str]) -> m.Example:
    guided = plan.steps[0][1].guided
    weights = hook.config.schedule.forecast_weights(len(plan.steps), guided=guided)
    parts = ("graph", "tail", "finish")
    return m.Example(
        guided=guided,
        strip=strip_of(plan.steps),
        steps=[
            m.Step(
                step=step,
                phase=phase_spec(phase),
                weights={kind: list(of_kind) for kind, of_kind in weights[step].items()},
                **{part: names[graph] for part, (graph, _) in zip(parts, graphs, strict=False)},
            )
            for (step, phase), graphs in zip(plan.steps, plan.graphs, strict=True)
        ],
    )


def _files(folder: Path, progress: Progress) -> dict[str, m.File]:
    progress("Hashing the files")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_of(path) for path in paths}
