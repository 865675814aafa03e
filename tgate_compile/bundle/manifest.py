"""The types of a bundle's `manifest.json`, from which its JSON schema, `manifest.schema.json`, is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)

from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.quantization import Scheme
from tgate_compile.methods.decisions import Rule
from tgate_compile.methods.method import Half, Kind, Part, Phase

#: Version 2 has graphs that are split by binding time, version 3 forecasts, version 4 frozen reference images and steps
#: that are decided at run time. Bundles are written in the lowest version that has what they need.
SCHEMA_VERSION = 4

MANIFEST_FILE = "manifest.json"
GRAPHS_FOLDER = "graphs"
#: In the folder of the graphs, because ONNX runtimes read external data from the model's own folder only.
WEIGHTS_FILE = "graphs/weights.bin"
COMPONENTS_FOLDER = "components"
COMPONENTS_WEIGHTS_FILE = "components/weights.bin"

#: The names of torch's dtypes, without `torch.`.
Dtype = Literal[
    "float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2",
    "bool", "uint8", "int8", "int32", "int64",
]  # fmt: skip
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Letter = Annotated[str, Field(pattern="^[A-Za-z]$")]
Count = Annotated[int, Field(ge=0, le=2**62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Measured = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: How often an argument changes, as in `passes/graphs.py`, which needs PyTorch.
Binding = Literal["prompt", "timestep", "latents"]
#: An argument of the denoiser that is not a tensor.
Constant = None | bool | int | float | str
#: A number or an expression, such as `4`, `2*b` or `16*h*w`.
Size = Count | Annotated[str, Field(pattern=r"^[a-z0-9_*+/() -]+$", max_length=200)]


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"must be one of {', '.join(FORMATS)}")
    return name


#: The format of the graphs' files.
GraphFormat = Annotated[str, AfterValidator(_known_format), WithJsonSchema({"enum": list(FORMATS), "type": "string"})]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Sparse(_Strict):
    """A part of a manifest whose optional keys, which versions 3 and 4 added, are left out if they say nothing."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = {name for name, field in type(self).model_fields.items() if not field.is_required()}
        values = serialized(self).items()
        return {name: value for name, value in values if name not in optional or (value and value != "whole")}


class TensorSpec(_Strict):
    """An input or output tensor of a graph."""

    name: Name
    dtype: Dtype
    shape: list[Size] = Field(description="Numbers, and expressions in the manifest's free sizes.")


class EarlyInput(TensorSpec):
    """A value that a prelude or a table returns under the same name."""

    graph: Name = Field(description="The prelude or the table.")


class CacheOutput(TensorSpec):
    """A value that later steps reuse."""

    kind: Kind
    site: Name = Field(description="The module whose output is cached.")
    merged: bool = Field(description="Whether it is the weighted mean of the guidance halves, with half the batch.")


class CacheInput(TensorSpec):
    """A value that an earlier step has cached."""

    kind: Kind
    site: Name


class PhaseSpec(_Sparse):
    """The kinds of values that a graph reuses and emits."""

    guided: bool = Field(description="Whether the batch has both guidance halves.")
    reuse: list[Kind] = Field(description="The kinds of cached values that are inputs.")
    emit: list[Kind] = Field(description="The kinds of cached values that are outputs, unmerged.")
    merge: list[Kind] = Field(description="The kinds of cached values that are outputs, merged over both halves.")
    decided: tuple[Kind, ...] = Field(default=(), description="The kinds that are reused or computed, as is decided.")
    part: Part = Field(default="whole", description="The part of a step that is decided at run time.")


class Deviation(_Strict):
    """The result of a comparison with PyTorch at one choice of the free sizes."""

    sizes: dict[Name, Count]
    relative: Measured = Field(description="The largest difference in any output, relative to its largest value.")


class Parity(_Strict):
    """The difference between a runtime's outputs and PyTorch's, on random inputs or on those of a calibration."""

    relative: Measured = Field(description="The largest of the differences in `measured`.")
    tolerance: Measured
    provider: Name = Field(description="The runtime, or its execution provider, that ran the graph.")
    measured: list[Deviation]


class Calibration(_Strict):
    """The generations in which the ranges of activations were measured."""

    prompts: list[str] = Field(description="Their prompts; if empty, those of the call that the bundle was made with.")
    steps: dict[Name, list[Count]] = Field(description="For each quantized graph, the step of each recorded call.")


class Quantization(_Strict):
    """The parts that are stored, or computed, in fewer bits than in the denoiser."""

    scheme: Scheme
    graphs: list[Name] = Field(description="The names of the quantized graphs.")
    keep: list[str] = Field(description="Name patterns of layers that are not quantized.")
    block: Count | None = Field(description="The number of 4-bit weights that share a scale; null if there are none.")
    calibration: Calibration | None = Field(
        description="Null if activations are not quantized, or their ranges are measured at run time."
    )


class Facts(_Strict):
    """The costs of a graph, at the sizes of the call that the bundle was made with."""

    nodes: Count = Field(description="The number of operators, as far as the format reveals it.")
    parameters: Count = Field(description="The number of elements in the parameters that the graph uses.")
    macs: Count = Field(description="Multiply-accumulate operations of one call in linear and convolution layers.")
    macs_total: Count = Field(description="The same, including the matrix products of attention.")


#: The parts of a graph that is split by binding time.
Stage = Literal["prelude", "table", "step"]


class Graph(_Strict):
    """A graph of the denoiser. ONNX files take their weights from the bundle's weights file."""

    file: Name
    entry: Name | None = Field(description="The graph's name in a file with several; null if the file has only one.")
    phase: PhaseSpec
    stage: Stage = Field(
        default="step",
        description="prelude: it runs once per generation; table: once per timestep; step: in each step of its phase.",
    )
    inputs: list[TensorSpec] = Field(description="The arguments of the denoiser that the graph uses.")
    early_inputs: list[EarlyInput] = Field(
        default_factory=list, description="The inputs that follow these: values of a prelude or a table."
    )
    cache_inputs: list[CacheInput] = Field(description="The inputs that follow these.")
    outputs: list[TensorSpec] = Field(description="The outputs of the denoiser, or the values of a prelude or a table.")
    cache_outputs: list[CacheOutput] = Field(description="The outputs that follow these.")
    parity: Parity | None = Field(description="Null if the graph could not be run where it was written.")
    facts: Facts


class Wire(_Strict):
    """An output of a graph that feeds an input of a graph in a later step."""

    graph: Name
    output: Name
    to_graph: Name
    to_input: Name


class FreeSize(_Strict):
    """A size that each call may choose."""

    least: Count
    most: Count
    example: Count = Field(description="The value in the call that the bundle was made with.")


class Pipeline(_Strict):
    """The pipeline that the bundle was made from."""

    class_name: Name
    diffusers: Name = Field(description="The version of diffusers.")
    vae_scale_factor: Count | None = Field(
        description="The number of pixels per latent along one side; null if the output is not an image."
    )


class Returns(_Strict):
    """The type that the denoiser returns."""

    class_name: Name | None = Field(description="An output class in the denoiser's module; null for a tuple.")
    fields: list[Name] = Field(description="The fields of that class, one for each output.")


class StateDifference(_Strict):
    """An attribute of some modules whose value differs from that in a new denoiser."""

    attribute: Name = Field(description="The attribute; `type` is the class of the module, null if it is missing.")
    value: JsonValue = Field(description="The value; null stands for a missing, false or empty one.")
    modules: Count = Field(description="The number of modules.")
    first: Annotated[str, Field(max_length=1000)] = Field(
        description="The first module in alphabetical order; empty for the denoiser itself."
    )
    digest: Sha256 = Field(description="The digest of the modules' sorted names, each followed by a newline.")


class DenoiserState(_Strict):
    """The state that determines the denoiser's output besides its class, configuration and weights."""

    baseline: Literal["config", "none"] = Field(
        description="config: the differences from a new denoiser of this class and configuration; none: everything."
    )
    differences: list[StateDifference]


class Denoiser(_Strict):
    """The model that the graphs were captured from."""

    component: Name = Field(description="The name of the denoiser in the pipeline.")
    class_name: Name
    config: dict[str, Any]
    weights_digest: Sha256 = Field(
        description="The digest of all parameters and buffers, defined in docs/reference/bundle.md."
    )
    state: DenoiserState | None = Field(
        default=None, description="LoRA scales, attention processors, FreeU, hooks and the like; null if not recorded."
    )
    arguments: list[Name] = Field(description="The tensors that the pipeline calls the denoiser with, used or not.")
    latents: Name = Field(description="The one of these that carries the latents.")
    bindings: dict[Name, Binding] = Field(
        default_factory=dict,
        description="How often each of these changes: with the prompt, with the timestep, or at every call, like the "
        "latents. Empty if no graph is split by binding time.",
    )
    constants: dict[Name, Constant] = Field(description="The other arguments, whose values are fixed in the graphs.")
    image_rows: tuple[Count, Count, Count] | None = Field(
        default=None,
        description="The dimension, start and stop of the image's rows in the latents; null if it has all.",
    )
    returns: Returns


class Family(_Strict):
    """How pipelines of this class pass the guidance halves to the denoiser."""

    order: list[Half] = Field(description="The order of the halves in a batch of both.")
    calls: list[Half] = Field(
        description="The order of the halves if each has its own call; empty if one call has both."
    )
    only: Half | None = Field(
        description="The only half that can continue after guidance has stopped; null for either."
    )
    interleaved: list[list[Name]] = Field(description="Arguments whose rows alternate between the halves.")
    repeated: list[list[Name]] = Field(description="Arguments with several rows for each row of the latents.")
    shared: list[list[Name]] = Field(description="Arguments that both halves share.")


_WEIGHTS: Any = Field(
    default_factory=dict,
    description="For each kind that is forecast, the weights with which its last values are added up, newest first. Of "
    "other kinds, the newest value is reused as it is. Kinds that are decided at run time have no weights here.",
)


_TAIL: Any = Field(default=None, description="What runs after a head if blocks are computed.")
_FINISH: Any = Field(default=None, description="What runs after a head if blocks are skipped.")


class PlannedPhase(_Sparse):
    """The phase of a step, with its letter and its graph."""

    letter: Letter = Field(description="The letter in strips; a capital under guidance.")
    graph: Name | None = Field(description="The graph that serves it; null if the bundle has none.")
    phase: PhaseSpec = Field(description="What to keep; the graph may emit more, which is ignored.")
    weights: dict[Kind, list[float]] = _WEIGHTS
    tail: Name | None = _TAIL
    finish: Name | None = _FINISH
    settled: list[Letter] = Field(default_factory=list, description="The letters if blocks are computed, or skipped.")


Rows = list[Annotated[str, Field(pattern="^[0-9a-zA-Z]*$")]]


class Plans(_Strict):
    """The schedule step by step, so that a runtime need not implement its rules.

    A row is the plan of a generation. Its digits (0-9, a-z, A-Z) give the position of each step's phase in `phases`.
    """

    phases: list[PlannedPhase]
    width: Literal[1, 2] = Field(default=1, description="The digits of a step; of two, the first counts 62.")
    guided: Rows = Field(description="Entry i is the plan for i + 1 steps that start with guidance.")
    unguided: Rows = Field(description="The same without guidance.")
    gates: list[Count | None] = Field(description="Entry i is the first step after the gate, for i + 1 steps.")
    gated_guided: Rows | None = Field(
        description="Entry i is the plan with the gate at i + 1; its first n steps are the plan for n steps. Null if "
        "the gate cannot be moved."
    )
    gated_unguided: Rows | None = Field(description="The same without guidance.")
    full_guided: Count = Field(description="The phase that computes everything under guidance, and emits nothing.")
    full_unguided: Count = Field(description="The same without guidance.")


class Method(_Strict):
    """The schedule, and what it caches."""

    schedule: dict[Name, Constant | dict[Name, Constant | list[float]]] = Field(
        description="All fields of tgate_compile.Schedule; further methods have an object each."
    )
    keep: Half = Field(description="The half that continues after guidance has stopped.")
    sites: list[Name] | None = Field(description="Name patterns of the attention modules to cache; null for all.")
    cache_dtype: Dtype | None = Field(description="The dtype of cached values; null for the model's own dtype.")
    plans: Plans | None = Field(
        default=None, description="Null if guidance ends by similarity, or the writer did not support plans yet."
    )
    forecasts: dict[Kind, Count] = Field(
        default_factory=dict,
        description="The order of the forecast for each kind of cached value that is not reused as it is.",
    )
    rule: Rule | None = Field(default=None, description="How steps are decided by their measures; null if none are.")


class Step(_Sparse):
    """A step of the example."""

    step: Count
    graph: Name
    phase: PhaseSpec = Field(description="What to keep; the graph may emit more, which is ignored.")
    weights: dict[Kind, list[float]] = _WEIGHTS
    tail: Name | None = _TAIL
    finish: Name | None = _FINISH


class Example(_Strict):
    """The steps of a generation."""

    guided: bool
    strip: str = Field(description="One character per step; docs/reference/schedules.md explains the letters.")
    steps: list[Step]


class Scheduler(_Strict):
    """The noise scheduler."""

    class_name: Name
    config: dict[str, Any]


class File(_Strict):
    """A file of the bundle."""

    size: Count
    sha256: Sha256


class Versions(_Strict):
    """The software that the bundle was made with."""

    tgate_compile: Name
    torch: Name
    runtime: Name = Field(description="The runtime of the graphs, such as `onnxruntime 1.31.1`.")


class Tokenizer(_Strict):
    """How a text is converted to token ids."""

    file: Name = Field(
        description="A tokenizer.json of the `tokenizers` library, with the truncation and padding below."
    )
    length: Count = Field(description="The number of tokens to which texts are truncated, or padded at the end.")
    pad_id: Count
    lower_case: bool = Field(description="Whether texts are first stripped and converted to lower case.")


class TextEncoder(_Strict):
    """An ONNX file that takes `input_ids` and, if it has this input, an `attention_mask`: 0 for padding, else 1."""

    component: Name = Field(description="The name of the text encoder in the pipeline.")
    class_name: Name
    file: Name
    inputs: list[TensorSpec]
    outputs: list[TensorSpec] = Field(description="`hidden_states`, and `pooled` if the pipeline uses it.")
    hidden_state: Literal[-1, -2] = Field(
        description="-1: the last hidden state, normalized; -2: the input of the last layer."
    )
    tokenizer: Tokenizer
    parity: Parity


class VaeDecoder(_Strict):
    """An ONNX file that decodes `latents / scaling_factor + shift_factor` to images."""

    class_name: Name
    file: Name
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    latent_channels: Count
    scale_factor: Annotated[int, Field(ge=1, description="The number of pixels per latent along one side.")]
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: float
    image_range: tuple[float, float] = Field(description="The values of black and white.")
    parity: Parity


#: The source of an argument of the denoiser; docs/reference/bundle.md describes them.
Source = Literal[
    "latents", "timestep", "hidden_states", "attention_mask", "pooled", "sizes", "resolution", "aspect_ratio"
]


class Components(_Strict):
    """The components that, with the denoiser's graphs, make up a text-to-image program."""

    weights: Name = Field(description="The file with the weights of all these components.")
    text_encoders: list[TextEncoder] = Field(
        min_length=1, description="Their hidden states are concatenated along the last dimension, in this order."
    )
    vae_decoder: VaeDecoder
    arguments: dict[Name, Source] = Field(description="The source of each argument of the denoiser.")
    negative: Literal["empty", "zeros"] = Field(
        description="What replaces a missing negative prompt: an empty text, or zeros for its encodings."
    )
    num_inference_steps: Count = Field(description="The default of a call, like those below.")
    guidance_scale: Measured = Field(description="Values up to 1 mean no guidance.")
    height: Count
    width: Count


class Manifest(_Strict):
    """The description of a bundle. Paths are relative to the manifest's folder, with forward slashes."""

    format: Literal["tgate_compile.bundle"]
    schema_version: Annotated[int, Field(ge=1)]
    pipeline: Pipeline
    denoiser: Denoiser
    family: Family
    method: Method
    scheduler: Scheduler
    graph_format: GraphFormat
    quantization: Quantization | None = Field(
        default=None, description="Null if everything is in the denoiser's own dtype."
    )
    sizes: dict[Name, FreeSize] = Field(description="The names in shapes: b prompts, latents of h by w, t text tokens.")
    graphs: dict[Name, Graph] = Field(min_length=1)
    wiring: list[Wire]
    example: Example
    weights: Name | None = Field(
        description="The file with the weights of all graphs; null if the graphs contain them."
    )
    components: Components | None = Field(description="Null if the bundle has the denoiser only.")
    versions: Versions
    files: dict[Name, File] = Field(description="Every file of the bundle except the manifest.")


def is_split(graphs: Mapping[str, Graph]) -> bool:
    """Return whether any of `graphs` is split by binding time."""
    return any(graph.stage != "step" for graph in graphs.values())


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a manifest."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}


def phase_spec(phase: Phase) -> PhaseSpec:
    """Return `phase` as plain data."""
    kinds = {name: sorted(getattr(phase, name)) for name in ("reuse", "emit", "merge")}
    return PhaseSpec(guided=phase.guided, **kinds, decided=tuple(sorted(phase.decided)), part=phase.part)


def phase_of(spec: PhaseSpec) -> Phase:
    """Return the phase that `spec` describes."""
    emit, merge, reuse, decided = (frozenset(kinds) for kinds in (spec.emit, spec.merge, spec.reuse, spec.decided))
    return Phase(spec.guided, emit=emit, merge=merge, reuse=reuse, decided=decided, part=spec.part)
