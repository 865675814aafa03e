"""Read and verify a manifest, without trusting it: its sizes, its files, and the wiring between its graphs."""

from __future__ import annotations

import ast
import hashlib
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tgate_compile._errors import BundleError, ConfigurationError
from tgate_compile.bundle.manifest import (
    COMPONENTS_FOLDER,
    COMPONENTS_WEIGHTS_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    CacheOutput,
    EarlyInput,
    File,
    Graph,
    Manifest,
    Stage,
    TensorSpec,
    Wire,
)
from tgate_compile.methods.schedule_file import read_schedule

#: A number, or an expression of names and numbers with + - * // and parentheses.
Size = int | str

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
#: An expression such as `8*h`, from which the value of h can be computed.
_MULTIPLE = re.compile(r"(?:([1-9][0-9]{0,17})\*)?([a-z][a-z0-9_]*)")

MAX_LENGTH = 200


def size_at(size: Size, values: Mapping[str, int]) -> int:
    """Return the value of `size`, given the values of its names.

    Raises:
        ValueError: `size` is not a valid expression, or has a name that is not in `values`.
    """
    if isinstance(size, int):
        return size
    if len(size) > MAX_LENGTH:
        raise ValueError(f"{size[:20]!r}... is too long for a size")
    try:
        return _evaluate(ast.parse(size, mode="eval").body, values)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{size!r} is not a valid size") from error


def shape_at(shape: Sequence[Size], values: Mapping[str, int]) -> tuple[int, ...]:
    """Return the value of each size in `shape`, given the values of its names.

    Raises:
        ValueError: as `size_at`.
    """
    return tuple(size_at(size, values) for size in shape)


def solve(expected: Sequence[Sequence[Size]], given: Sequence[Sequence[int]]) -> dict[str, int] | None:
    """Return the values of all names for which the shapes `expected` equal `given`, or None if there are none.

    Each name must occur somewhere as a plain multiple, such as `8*h`; the latents' shape contains all of them.
    """
    if len(expected) != len(given) or any(len(a) != len(b) for a, b in zip(expected, given, strict=False)):
        return None
    pairs = [pair for a, b in zip(expected, given, strict=True) for pair in zip(a, b, strict=True)]
    values: dict[str, int] = {}
    for size, number in pairs:
        multiple = _MULTIPLE.fullmatch(size) if isinstance(size, str) else None
        if multiple is not None:
            value, rest = divmod(number, int(multiple[1] or 1))
            if rest or value < 1 or values.setdefault(multiple[2], value) != value:
                return None
    try:
        return values if all(size_at(size, values) == number for size, number in pairs) else None
    except ValueError:
        return None


def names_in(shape: Sequence[Size]) -> set[str]:
    """Return the names in the sizes of `shape`."""
    return {name for size in shape if isinstance(size, str) for name in re.findall(r"[a-z][a-z0-9_]*", size)}


def solvable_names(shapes: Sequence[Sequence[Size]]) -> set[str]:
    """Return the names whose values `solve` finds from tensors of these shapes."""
    sizes = [size for shape in shapes for size in shape if isinstance(size, str)]
    return {multiple[2] for size in sizes if (multiple := _MULTIPLE.fullmatch(size)) is not None}


def nearest_multiples(size: int, multiple: int) -> str:
    """Return the multiples of `multiple` on both sides of `size`, such as `480 and 512`."""
    below = size // multiple * multiple
    return f"{below} and {below + multiple}" if below else f"{multiple}"


def wrong_pixels(
    expected: Sequence[Size], given: Sequence[int], pixels: int | None, limits: Mapping[str, tuple[int, int]]
) -> str:
    """Return what is wrong with the height and width, in pixels, of images with the latents' shape `given`.

    Args:
        expected: the latents' shape in a graph.
        given: the latents' shape in a call.
        pixels: the number of pixels per latent along one side, or None if the latents are not those of an image.
        limits: the smallest and the largest value of each name.

    Returns:
        A phrase; empty if nothing is wrong.
    """
    if pixels is None or len(expected) != len(given) or len(given) < 4:
        return ""
    found = (_wrong(size, number, pixels, limits) for size, number in zip(expected[-2:], given[-2:], strict=True))
    return ", and ".join(
        f"{name} must be {wrong}" for name, wrong in zip(("height", "width"), found, strict=True) if wrong
    )


def _wrong(size: Size, given: int, pixels: int, limits: Mapping[str, tuple[int, int]]) -> str:
    multiple = _MULTIPLE.fullmatch(size) if isinstance(size, str) else None
    if isinstance(size, int):
        return "" if given == size else f"{size * pixels} pixels, not {given * pixels}"
    if multiple is None:
        return ""
    unit = int(multiple[1] or 1)
    least, most = (unit * pixels * limit for limit in limits[multiple[2]])
    if given % unit:
        nearest = nearest_multiples(given * pixels, unit * pixels)
        return f"a multiple of {unit * pixels} pixels, not {given * pixels} (the nearest are {nearest})"
    return "" if least <= given * pixels <= most else f"from {least} to {most} pixels, not {given * pixels}"


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, values)
    raise ValueError(f"{ast.unparse(node)[:MAX_LENGTH]!r} is not a valid size, or has a name without a value")


_CHUNK = 1 << 20


def file_of(path: Path) -> File:
    """Return the size and the hash of the file at `path`."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return File(size=size, sha256=digest.hexdigest())


def wiring_of(graphs: Mapping[str, Graph]) -> list[Wire]:
    """Return a wire from each cache output to each cache input of the same kind, site, shape and dtype.

    If an input has several producers, the steps decide: its value comes from the last one that ran and kept it.
    """
    return [
        Wire(graph=name, output=output.name, to_graph=to_name, to_input=to_input.name)
        for name, graph in graphs.items()
        for output in graph.cache_outputs
        for to_name, to_graph in graphs.items()
        for to_input in to_graph.cache_inputs
        if (output.kind, output.site, output.shape, output.dtype)
        == (to_input.kind, to_input.site, to_input.shape, to_input.dtype)
    ]


def check_wiring(manifest: Manifest, path: Path) -> None:
    """Raise BundleError if a wire or a step of the manifest at `path` refers to something that does not exist."""
    possible = wiring_of(manifest.graphs)
    for wire in manifest.wiring:
        if wire not in possible:
            shown = f"{wire.graph}.{wire.output} to {wire.to_graph}.{wire.to_input}"
            raise BundleError(
                f"The manifest {path} has a wire from {shown}, but one of its ends does not exist, or the two ends "
                "differ in shape or dtype."
            )
    for step in manifest.example.steps:
        for name in (step.graph, step.tail, step.finish):
            if name is not None and name not in manifest.graphs:
                raise BundleError(
                    f"The example in the manifest {path} uses a graph {name!r}, which the manifest does not have."
                )


#: A typical manifest has a few kilobytes per graph.
MAX_MANIFEST_BYTES = 50_000_000

MSG_INVALID = "The manifest {path} is not valid: {where}: {problem}."
MSG_LINK = (
    "{path} is a link, but a bundle consists of plain files and folders only. The bundle has been changed since it was "
    "written."
)
MSG_UNREADABLE = "{path} cannot be read: {reason}."


class _Header(BaseModel):
    """The part of a manifest that all versions have."""

    model_config = ConfigDict(strict=True)
    schema_version: int = 0


def read_manifest(root: Path, *, hashes: bool = True) -> Manifest:
    """Return the manifest in `root`, after checking the paths, sizes and hashes of all files that it names.

    Args:
        root: the folder of the bundle.
        hashes: whether to check hashes. Without this the check takes no time, but does not notice changes that keep a
            file's size.

    Raises:
        BundleError: the manifest or a file is not valid; the message says why.
    """
    try:
        manifest = _manifest(root)
        _check_files(root, manifest, hashes=hashes)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise BundleError(MSG_UNREADABLE.format(path=root, reason=error)) from error
    return manifest


def _manifest(root: Path) -> Manifest:
    path = root / MANIFEST_FILE
    if path.is_symlink():
        raise BundleError(MSG_LINK.format(path=path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise BundleError(f"{root} is not a bundle: its {MANIFEST_FILE} cannot be opened ({reason}).") from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is not a manifest: it has more than {MAX_MANIFEST_BYTES} bytes.")
    try:
        version = _Header.model_validate_json(raw).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"The manifest {path} has schema version {version}, but this tgate_compile reads versions up to "
                f"{SCHEMA_VERSION} only. Install a newer tgate_compile."
            )
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise BundleError(_invalid(path, error)) from error
    try:
        read_schedule(manifest.method.schedule, f"The manifest {path}: method.schedule")
    except ConfigurationError as error:
        raise BundleError(str(error)) from error
    for used in (manifest.weights, *(graph.file for graph in manifest.graphs.values()), *_component_files(manifest)):
        # A Core ML package is a folder; the manifest lists the files in it.
        is_folder = manifest.graph_format == "coreml" and any(name.startswith(f"{used}/") for name in manifest.files)
        if used is not None and used not in manifest.files and not is_folder:
            raise BundleError(f"The manifest {path} uses the file {used!r}, but does not list it in `files`.")
    if manifest.weights not in (WEIGHTS_FILE, None) or (
        manifest.graph_format in ("onnx", "openvino") and manifest.weights is None
    ):
        raise BundleError(MSG_INVALID.format(path=path, where="weights", problem=f"expected {WEIGHTS_FILE!r}"))
    steps = [graph for graph in manifest.graphs.values() if graph.stage == "step"]
    returns = manifest.denoiser.returns
    whole = [graph for graph in steps if graph.phase.part != "head"]
    if returns.class_name and any(len(graph.outputs) != len(returns.fields) for graph in whole):
        problem = "there must be one field per output"
        raise BundleError(MSG_INVALID.format(path=path, where="denoiser.returns", problem=problem))
    _check_decisions(manifest, path)
    quantized = [] if manifest.quantization is None else manifest.quantization.graphs
    if not set(quantized) <= set(manifest.graphs):
        problem = f"unknown graphs in {quantized}"[:200]
        raise BundleError(MSG_INVALID.format(path=path, where="quantization.graphs", problem=problem))
    _check_stages(manifest, path)
    _check_sizes(manifest, path)
    _check_components(manifest, path)
    check_wiring(manifest, path)
    return manifest


def _check_decisions(manifest: Manifest, path: Path) -> None:
    """Check that heads return a measure, and that steps that are decided at run time have a rule and all graphs."""
    graphs, plans = manifest.graphs, manifest.method.plans
    problems = [
        f"{name[:200]!r} is a head, but does not return one measure with shape [1]" for name, graph in graphs.items()
        if graph.phase.part == "head" and graph.stage == "step" and [spec.shape for spec in graph.outputs] != [[1]]
    ]  # fmt: skip
    decided = [each for each in (plans.phases if plans is not None else ()) if each.phase.decided]
    if decided and manifest.method.rule is None:
        problems.append("steps are decided at run time, but there is no rule")
    parts = [(each.graph, each.tail, each.finish) for each in decided]
    if any(name is not None and (name not in graphs or None in names) for names in parts for name in names):
        problems.append("a step that is decided at run time lacks a head, a tail or a finish")
    if any(len(each.settled) != 2 for each in decided):
        problems.append("a step that is decided at run time lacks its letters")
    if problems:
        raise BundleError(MSG_INVALID.format(path=path, where="method or graphs", problem=problems[0]))


#: The stages in the order in which they run.
STAGES: tuple[Stage, ...] = get_args(Stage)


def early_graphs(graphs: Mapping[str, Graph], name: str) -> list[str]:
    """Return the names of the prelude and the table of the graph `name`, if it has them, in this order."""
    direct = {spec.graph for spec in graphs[name].early_inputs}
    both = direct | {spec.graph for each in direct for spec in graphs[each].early_inputs}
    return sorted(both, key=lambda each: STAGES.index(graphs[each].stage))


def _check_stages(manifest: Manifest, path: Path) -> None:
    """Check that each value of a prelude or a table is made by an earlier graph, from values that change less often."""
    graphs, bindings = manifest.graphs, manifest.denoiser.bindings
    if not set(bindings) <= set(manifest.denoiser.arguments):
        problem = "there are names that are not arguments of the denoiser"
        raise BundleError(MSG_INVALID.format(path=path, where="denoiser.bindings", problem=problem))
    for name, graph in graphs.items():
        problems = [_problem_with(spec, graph, graphs.get(spec.graph)) for spec in graph.early_inputs]
        if graph.stage != "step":
            problems += [
                f"{spec.name!r} may change more often than a {graph.stage} runs" for spec in graph.inputs
                if spec.name not in bindings or (graph.stage, bindings[spec.name]) == ("prelude", "timestep")
            ]  # fmt: skip
            problems += ["a part before the step has no caches"] if graph.cache_inputs or graph.cache_outputs else []
        found = next(filter(None, problems), None)
        if found is not None:
            raise BundleError(MSG_INVALID.format(path=path, where=name[:200], problem=found[:300]))
    for name in graphs:
        stages = [graphs[each].stage for each in early_graphs(graphs, name)]
        if len(set(stages)) < len(stages):
            problem = "it takes values of several preludes or tables"
            raise BundleError(MSG_INVALID.format(path=path, where=name[:200], problem=problem))
    plans = manifest.method.plans
    planned = [phase.graph for phase in plans.phases if phase.graph is not None] if plans is not None else []
    shown = [name for step in manifest.example.steps for name in (step.graph, step.tail, step.finish)]
    for used in (*planned, *shown):
        if used in graphs and graphs[used].stage != "step":
            problem = f"{used[:200]!r} is not the graph of a step"
            raise BundleError(MSG_INVALID.format(path=path, where="method.plans or example", problem=problem))


def _problem_with(spec: EarlyInput, graph: Graph, maker: Graph | None) -> str | None:
    """Return what is wrong with an early input of `graph`, which `maker` returns; None if nothing is."""
    if maker is None or STAGES.index(maker.stage) >= STAGES.index(graph.stage) or maker.phase != graph.phase:
        return f"{spec.graph!r} is not a prelude or a table of it"
    made = [(output.name, output.dtype, output.shape) for output in maker.outputs]
    return None if (spec.name, spec.dtype, spec.shape) in made else f"{spec.graph!r} returns no such {spec.name!r}"


def _component_files(manifest: Manifest) -> list[str]:
    components = manifest.components
    if components is None:
        return []
    encoders = [file for encoder in components.text_encoders for file in (encoder.file, encoder.tokenizer.file)]
    return [components.weights, *encoders, components.vae_decoder.file]


def _check_components(manifest: Manifest, path: Path) -> None:
    """Check that the components' files are in one folder and that every argument of the denoiser has a source."""
    components = manifest.components
    if components is None:
        return
    outside = [name for name in _component_files(manifest) if str(PurePosixPath(name).parent) != COMPONENTS_FOLDER]
    if outside or components.weights != COMPONENTS_WEIGHTS_FILE:
        problem = f"all files must be in the folder {COMPONENTS_FOLDER!r}, the weights in {COMPONENTS_WEIGHTS_FILE!r}"
        raise BundleError(MSG_INVALID.format(path=path, where="components", problem=problem))
    if set(components.arguments) != set(manifest.denoiser.arguments):
        problem = "the arguments are not those of the denoiser"
        raise BundleError(MSG_INVALID.format(path=path, where="components.arguments", problem=problem))
    made = {"latents", "timestep", "sizes", "resolution", "aspect_ratio"}
    for encoder in components.text_encoders:
        inputs, outputs = ({spec.name for spec in specs} for specs in (encoder.inputs, encoder.outputs))
        if not (
            inputs <= {"input_ids", "attention_mask"} and {"hidden_states"} <= outputs <= {"hidden_states", "pooled"}
        ):
            problem = f"unexpected inputs {sorted(inputs)} or outputs {sorted(outputs)}"
            raise BundleError(MSG_INVALID.format(path=path, where=encoder.component, problem=problem))
        made |= outputs | (inputs & {"attention_mask"})
    missing = set(components.arguments.values()) - made
    if missing:
        raise BundleError(
            MSG_INVALID.format(path=path, where="components.arguments", problem=f"nothing provides {sorted(missing)}")
        )


def _check_sizes(manifest: Manifest, path: Path) -> None:
    """Check that the manifest defines every free size that occurs in a shape."""
    example = {name: size.example for name, size in manifest.sizes.items()}
    for graph in manifest.graphs.values():
        for spec in (*inputs_of(graph), *outputs_of(graph)):
            try:
                fits = all(size >= 0 for size in shape_at(spec.shape, example))
            except ValueError:
                fits = False
            if not fits:
                raise BundleError(MSG_INVALID.format(path=path, where=spec.name[:200], problem=f"shape {spec.shape}"))


def _invalid(path: Path, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200] or "the whole file"
    return MSG_INVALID.format(path=path, where=where, problem=first["msg"])


def _check_files(root: Path, manifest: Manifest, *, hashes: bool) -> None:
    for name in manifest.files:
        _check_path(name, root / MANIFEST_FILE)
    found: set[str] = set()
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                raise BundleError(MSG_LINK.format(path=path))
        found.update(Path(parent, name).relative_to(root).as_posix() for name in files)
    named = {MANIFEST_FILE, *manifest.files}
    if named - found:
        raise BundleError(
            f"The bundle {root} is not complete: its manifest lists {_listed(named - found)}, which it does not have."
        )
    if found - named:
        raise BundleError(f"The bundle {root} contains {_listed(found - named)}, which its manifest does not list.")
    for name, expected in manifest.files.items():
        path = root / name
        size = path.stat().st_size
        if size != expected.size:
            raise BundleError(
                f"{path} has {size} bytes, but the manifest says {expected.size}. The copy is not complete, or it has "
                "been changed."
            )
    for name, expected in manifest.files.items() if hashes else ():
        if file_of(root / name) != expected:
            raise BundleError(f"{root / name} has been changed: its SHA-256 is not the one in the manifest.")


def _check_path(name: str, manifest: Path) -> None:
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and not any(part in ("..", "/") or set(part) & set("\\:\0") for part in parts)
    if not plain or name == MANIFEST_FILE:
        raise BundleError(
            f"The manifest {manifest} names the file {name!r}. The files of a bundle must be in its folder, and their "
            "names must be relative to it, with forward slashes."
        )


def _listed(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


class HasShape(Protocol):
    """A tensor of any library."""

    @property
    def shape(self) -> Sequence[int]:
        """The sizes of the tensor's dimensions."""
        ...


def inputs_of(graph: Graph) -> list[TensorSpec]:
    """Return all inputs of `graph`, caches last."""
    return [*graph.inputs, *graph.early_inputs, *graph.cache_inputs]


def outputs_of(graph: Graph) -> list[TensorSpec | CacheOutput]:
    """Return all outputs of `graph`, caches last."""
    return [*graph.outputs, *graph.cache_outputs]


def sizes_for(graph: Graph, inputs: Sequence[HasShape]) -> Mapping[str, int] | None:
    """Return the free sizes of `graph` for `inputs`, with or without caches; None if it does not accept the shapes."""
    specs = inputs_of(graph)[: len(inputs)]
    return solve([spec.shape for spec in specs], [tuple(tensor.shape) for tensor in inputs])


def output_shapes(graph: Graph, inputs: Sequence[HasShape]) -> list[tuple[int, ...]]:
    """Return the shapes of all outputs for inputs of valid shapes."""
    sizes = sizes_for(graph, inputs)
    assert sizes is not None, "the store has checked the call"
    return [shape_at(spec.shape, sizes) for spec in outputs_of(graph)]
