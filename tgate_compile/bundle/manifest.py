"""What a bundle's `manifest.json` says, as types; its JSON schema, `manifest.schema.json`, is made from these."""

from __future__ import annotations

import ctypes
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema

from tgate_compile._runtimes import FORMATS
from tgate_compile.bundle.quantization import Scheme
from tgate_compile.methods.method import Half, Kind, Phase

SCHEMA_VERSION = 1

MANIFEST_FILE = "manifest.json"
GRAPHS_FOLDER = "graphs"
#: Beside the graphs: ONNX runtimes read external data from the model's own folder only.
WEIGHTS_FILE = "graphs/weights.bin"
COMPONENTS_FOLDER = "components"
COMPONENTS_WEIGHTS_FILE = "components/weights.bin"

#: Names of torch's dtypes, without `torch.`.
Dtype = Literal[
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "bool",
    "uint8",
    "int8",
    "int32",
    "int64",
]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Measured = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: An argument of the denoiser that is no tensor.
Constant = None | bool | int | float | str
#: `4`, `2*b`, `16*h*w`.
Size = Count | Annotated[str, Field(pattern=r"^[a-z0-9_*+/() -]+$", max_length=200)]


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"must be one of {', '.join(FORMATS)}")
    return name


#: What the graphs are files of.
GraphFormat = Annotated[str, AfterValidator(_known_format), WithJsonSchema({"enum": list(FORMATS), "type": "string"})]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TensorSpec(_Strict):
    """A tensor that goes into a graph or comes out of it."""

    name: Name
    dtype: Dtype
    shape: list[Size] = Field(description="Numbers, and expressions of the manifest's free sizes.")


class CacheOutput(TensorSpec):
    """A value that later steps reuse."""

    kind: Kind
    site: Name = Field(description="The module whose output it is.")
    merged: bool = Field(description="It is the weighted mean of the guidance halves, with half the batch.")


class CacheInput(TensorSpec):
    """A value that an earlier step has handed on."""

    kind: Kind
    site: Name


class PhaseSpec(_Strict):
    """What a graph's steps do."""

    guided: bool = Field(description="Its batch has both guidance halves.")
    reuse: list[Kind] = Field(description="Kinds of value that are inputs.")
    emit: list[Kind] = Field(description="Kinds of value that are outputs, as they are.")
    merge: list[Kind] = Field(description="Kinds of value that are outputs, merged over the guidance halves.")


class Deviation(_Strict):
    """What was found for one choice of the free sizes."""

    sizes: dict[Name, Count]
    relative: Measured = Field(description="Largest difference of any output, relative to its largest value.")


class Parity(_Strict):
    """How far a runtime's outputs were from PyTorch's on random inputs, or on those of a calibration."""

    relative: Measured = Field(description="The largest of those below.")
    tolerance: Measured
    provider: Name = Field(description="What ran it.")
    measured: list[Deviation]


class Calibration(_Strict):
    """What values were measured on."""

    prompts: list[str] = Field(description="Of the generations; empty: those of the call that the bundle is made with.")
    steps: dict[Name, list[Count]] = Field(description="For each quantized graph, the step of each call of it.")


class Quantization(_Strict):
    """What is stored, or computed, in fewer bits than in the denoiser."""

    scheme: Scheme
    graphs: list[Name] = Field(description="Those that are quantized.")
    keep: list[str] = Field(description="Patterns of layers that are not.")
    block: Count | None = Field(description="Weights that share a scale, in 4 bits; None: there are none.")
    calibration: Calibration | None = Field(description="None: values are not quantized, or measured as they come.")


class Facts(_Strict):
    """What a graph costs, at the sizes of the call that the bundle was made with."""

    nodes: Count = Field(description="Operators of the graph, as far as its format tells.")
    parameters: Count = Field(description="Elements of the parameters that it uses.")
    macs: Count = Field(description="Multiply-accumulates of one call in linear and convolution layers.")
    macs_total: Count = Field(description="The same with attention's own products.")


class Graph(_Strict):
    """One graph. ONNX files take their weights from the bundle's weights file."""

    file: Name
    entry: Name | None = Field(description="What it is called in a file of several; None: the file has no other.")
    phase: PhaseSpec
    inputs: list[TensorSpec] = Field(description="Arguments of the denoiser, those that the graph uses.")
    cache_inputs: list[CacheInput] = Field(description="Inputs that follow these.")
    outputs: list[TensorSpec] = Field(description="What the denoiser returns.")
    cache_outputs: list[CacheOutput] = Field(description="Outputs that follow these.")
    parity: Parity | None = Field(description="None: it could not be run where it was written.")
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
    example: Count = Field(description="Of the call that the bundle was made with.")


class Pipeline(_Strict):
    """The pipeline that the bundle was made from."""

    class_name: Name
    diffusers: Name = Field(description="The version of diffusers.")
    vae_scale_factor: Count | None = Field(description="Pixels of an image for one of its latents; None: no images.")


class Returns(_Strict):
    """What the denoiser's outputs are put into."""

    class_name: Name | None = Field(description="An output class of diffusers, beside the denoiser's; None: a tuple.")
    fields: list[Name] = Field(description="The fields of that class, one for each output.")


class StateDifference(_Strict):
    """An attribute of some modules with a value that a new denoiser does not have there."""

    attribute: Name = Field(description="Its name; `type`: the class of the module, null where the module is missing.")
    value: JsonValue = Field(description="Null: nothing, false, or empty.")
    modules: Count = Field(description="In how many modules.")
    first: Annotated[str, Field(max_length=1000)] = Field(description="The first by name; empty: the denoiser itself.")
    digest: Sha256 = Field(description="Over the modules' names, sorted, each followed by a newline.")


class DenoiserState(_Strict):
    """What the denoiser computes beyond its class, configuration and weights: docs/reference/bundle.md says more."""

    baseline: Literal["config", "none"] = Field(
        description="config: what a new denoiser of this class and configuration does not have; none: everything."
    )
    differences: list[StateDifference]


class Denoiser(_Strict):
    """The model that the graphs are made of."""

    component: Name = Field(description="The pipeline's name for it.")
    class_name: Name
    config: dict[str, Any]
    weights_digest: Sha256 = Field(description="Of all parameters and buffers: docs/reference/bundle.md says how.")
    state: DenoiserState | None = Field(
        default=None, description="LoRA scales, attention processors, FreeU, hooks and the like; None: not recorded."
    )
    arguments: list[Name] = Field(description="The tensors that the pipeline calls it with, used or not.")
    latents: Name = Field(description="The one of these that carries the latents.")
    constants: dict[Name, Constant] = Field(description="Its other arguments, which the graphs are made for.")
    returns: Returns


class Family(_Strict):
    """What is specific to the pipeline's class: how the guidance halves come."""

    order: list[Half] = Field(description="The halves' order in a batch of both.")
    calls: list[Half] = Field(description="Each half has a call of its own, in this order; empty: one call has both.")
    only: Half | None = Field(description="The one half that can go on once guidance has stopped; None: either.")
    interleaved: list[list[Name]] = Field(description="Arguments whose rows alternate between the halves.")
    repeated: list[list[Name]] = Field(description="Arguments with several rows for each of the latents'.")
    shared: list[list[Name]] = Field(description="Arguments that both halves share.")


class PlannedPhase(_Strict):
    """What a step does."""

    letter: Annotated[str, Field(pattern="^[A-Za-z]$", description="In strips; a capital one under guidance.")]
    graph: Name | None = Field(description="The graph that serves it; None: the bundle has none.")
    phase: PhaseSpec = Field(description="Of what the graph hands on, only what is said here is kept.")


Rows = list[Annotated[str, Field(pattern="^[0-9a-z]*$")]]


class Plans(_Strict):
    """The schedule, step by step, so that no runtime has to know its rules.

    A row is the plan of a generation: a digit in base 36 for each step, the position of its phase in `phases`.
    """

    phases: list[PlannedPhase]
    guided: Rows = Field(description="Entry i: the plan for i + 1 steps, with guidance on to begin with.")
    unguided: Rows = Field(description="The same with guidance off.")
    gates: list[Count | None] = Field(description="Entry i: the first step after the gate, for i + 1 steps.")
    gated_guided: Rows | None = Field(
        description="Entry i: the plan if the gate is at i + 1; its first n digits are the plan for n steps. None: the "
        "gate cannot be moved."
    )
    gated_unguided: Rows | None = Field(description="The same with guidance off.")
    full_guided: Count = Field(description="The phase that computes everything under guidance, and hands nothing on.")
    full_unguided: Count = Field(description="The same without guidance.")


class Method(_Strict):
    """When what is cached."""

    schedule: dict[Name, Constant | dict[Name, Constant]] = Field(
        description="All fields of tgate_compile.Schedule; of further methods, an object each."
    )
    keep: Half = Field(description="The half that goes on once guidance has stopped.")
    sites: list[Name] | None = Field(description="Patterns of the attentions that are cached; None: all.")
    cache_dtype: Dtype | None = Field(description="What values are cached in; None: the model's own dtype.")
    plans: Plans | None = Field(
        default=None, description="None: written before there were any, or guidance ends by similarity."
    )


class Step(_Strict):
    """One step of the example."""

    step: Count
    graph: Name
    phase: PhaseSpec = Field(description="Of what the graph hands on, only what is said here is kept.")


class Example(_Strict):
    """A generation's steps."""

    guided: bool
    strip: str = Field(description="One character a step; docs/reference/schedules.md has the letters.")
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
    """What the bundle was made with."""

    tgate_compile: Name
    torch: Name
    runtime: Name = Field(description="Of what the graphs are for: `onnxruntime 1.31.1`.")


class Tokenizer(_Strict):
    """What makes numbers of a text."""

    file: Name = Field(description="A tokenizer.json of the `tokenizers` library, which cuts and pads as is said here.")
    length: Count = Field(description="Tokens of every text: a longer one is cut, a shorter one padded at its end.")
    pad_id: Count
    lower_case: bool = Field(description="Texts are stripped and put into lower case first.")


class TextEncoder(_Strict):
    """An ONNX file that takes `input_ids` and, where it has one, an `attention_mask`: 0 for padding, else 1."""

    component: Name = Field(description="The pipeline's name for it.")
    class_name: Name
    file: Name
    inputs: list[TensorSpec]
    outputs: list[TensorSpec] = Field(description="`hidden_states`, and `pooled` from one that has it.")
    hidden_state: Literal[-1, -2] = Field(description="-1: the last one, normed; -2: the one before the last layer.")
    tokenizer: Tokenizer
    parity: Parity


class VaeDecoder(_Strict):
    """An ONNX file that makes images of `latents / scaling_factor + shift_factor`."""

    class_name: Name
    file: Name
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    latent_channels: Count
    scale_factor: Annotated[int, Field(ge=1, description="Pixels of an image for one of its latents.")]
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: float
    image_range: tuple[float, float] = Field(description="What black and white are.")
    parity: Parity


#: Where an argument of the denoiser comes from: docs/reference/bundle.md has them all.
Source = Literal[
    "latents", "timestep", "hidden_states", "attention_mask", "pooled", "sizes", "resolution", "aspect_ratio"
]


class Components(_Strict):
    """What makes a text-to-image program of the denoiser's graphs."""

    weights: Name = Field(description="The file with the weights of all of these.")
    text_encoders: list[TextEncoder] = Field(
        min_length=1, description="Their hidden states are joined along the last dimension, in this order."
    )
    vae_decoder: VaeDecoder
    arguments: dict[Name, Source] = Field(description="What each argument of the denoiser is.")
    negative: Literal["empty", "zeros"] = Field(
        description="What stands for a negative prompt that is not given: an empty text, or zeros for its encodings."
    )
    num_inference_steps: Count = Field(description="If a call does not say; the same below.")
    guidance_scale: Measured = Field(description="Up to 1: no guidance.")
    height: Count
    width: Count


class Manifest(_Strict):
    """All that a runtime needs to know. Paths are relative to the manifest's folder, with forward slashes."""

    format: Literal["tgate_compile.bundle"]
    schema_version: Annotated[int, Field(ge=1)]
    pipeline: Pipeline
    denoiser: Denoiser
    family: Family
    method: Method
    scheduler: Scheduler
    graph_format: GraphFormat
    quantization: Quantization | None = Field(default=None, description="None: all is in the denoiser's own dtype.")
    sizes: dict[Name, FreeSize] = Field(description="The names in shapes: b prompts, latents of so many h and w.")
    graphs: dict[Name, Graph] = Field(min_length=1)
    wiring: list[Wire]
    example: Example
    weights: Name | None = Field(description="The file with all graphs' weights; None: the graphs have them.")
    components: Components | None = Field(description="None: the denoiser alone.")
    versions: Versions
    files: dict[Name, File] = Field(description="Every file of the bundle but the manifest.")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a manifest."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}


def phase_spec(phase: Phase) -> PhaseSpec:
    """`phase` as plain data."""
    return PhaseSpec(guided=phase.guided, reuse=sorted(phase.reuse), emit=sorted(phase.emit), merge=sorted(phase.merge))


def phase_of(spec: PhaseSpec) -> Phase:
    """And back."""
    return Phase(spec.guided, emit=frozenset(spec.emit), merge=frozenset(spec.merge), reuse=frozenset(spec.reuse))


logger = logging.getLogger(__name__)

MSG_ALTERNATES = (
    "With this schedule a generation of %d steps opens a graph %d times if there is one open at a time "
    "(sequential=True), which takes longer than a step. A schedule that changes once, as T-GATE v1, has no such cost."
)


def openings(graphs: Sequence[str]) -> int:
    """How often a graph is opened in steps that run these, if only the last one stays open."""
    return len(graphs[:1]) + sum(one != other for one, other in pairwise(graphs))


def warn_of_alternation(manifest: Manifest) -> None:
    """Log a warning if the schedule comes back to a graph that it has left."""
    steps = [step.graph for step in manifest.example.steps]
    if openings(steps) > len(set(steps)):
        logger.warning(MSG_ALTERNATES, len(steps), openings(steps))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without diffusers' own notes, which tell where the model lies on this machine."""
    return {str(name): _plain(value) for name, value in config.items() if not str(name).startswith("_")}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity: "inf", "-inf", "nan"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    tolist = getattr(value, "tolist", None)  # numpy's arrays and numbers
    return _plain(tolist()) if tolist is not None else str(value)


def return_freed_memory() -> None:
    """Give what is free back to the system. glibc keeps it for later otherwise, and the next graph is large, too."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
