"""Every pipeline class of the installed diffusers, and the tables of docs/reference/denoisers.md that list them.

`python -m tests.denoisers_page` regenerates the tables; the text around them is written by hand.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils import DummyObject

from tests.denoiser_cases import CASES, SIBLINGS
from tests.tiny_joint_siblings import EVERY
from tgate_compile.engine.families import DENOISER_NAMES, FAMILIES, Family, refusal
from tgate_compile.engine.unsupported import (
    JOINT_ATTENTION,
    MODULAR,
    MODULAR_REFUSED,
    NOT_DENOISING,
    REFUSED,
    REFUSED_BASES,
    REFUSED_DENOISERS,
    UNCACHED_DENOISERS,
)

#: The results of `denoiser_map.py`.
MAP = Path(__file__).parent.parent / "docs" / "results" / "denoisers.json"
PAGE = Path(__file__).parent.parent / "docs" / "reference" / "denoisers.md"

#: Classes that run in `test_pipelines.py`, and the test that runs them.
IN_TEST_PIPELINES: Mapping[str, str] = {
    "LatentConsistencyModelPipeline": "test_lcm_with_embedded_guidance",
    "PixArtAlphaPipeline": "test_pixart",
    "PixArtSigmaPipeline": "test_pixart",
    "StableDiffusionControlNetPipeline": "test_controlnet",
    "StableDiffusionImg2ImgPipeline": "test_img2img",
    "StableDiffusionInpaintPipeline": "test_inpaint",
    "StableDiffusionPipeline": "test_stable_diffusion",
    "StableDiffusionXLImg2ImgPipeline": "test_sdxl_img2img",
    "StableDiffusionXLInpaintPipeline": "test_sdxl_inpaint",
    "StableDiffusionXLPipeline": "test_sdxl",
}
IN_TEST_DENOISERS = {name.split(",")[0] for name in (*CASES, *SIBLINGS)}
#: The same for `test_more_pipelines.py` and `test_halves.py`.
IN_TEST_MORE = {"Kandinsky3Pipeline", "SemanticStableDiffusionPipeline"}
#: The same for `test_joint_guidance.py`.
IN_TEST_JOINT = set(EVERY)
#: Why some classes are not tested.
UNTESTED: Mapping[str, str] = {
    "EasyAnimateControlPipeline": "its own call fails, with an argument that its `encode_prompt` does not take",
}
TESTED = IN_TEST_PIPELINES.keys() | IN_TEST_DENOISERS | IN_TEST_MORE | IN_TEST_JOINT
#: Denoisers whose cross-attentions are not cached.
GUIDANCE_ONLY = JOINT_ATTENTION | UNCACHED_DENOISERS.keys()

#: The cached attentions of each denoiser; the others have an `attn2` in every transformer block.
CACHED: Mapping[str, str] = {
    "AudioLDM2UNet2DConditionModel": "each cross-attention to one of its two texts",
    "CosmosTransformer3DModel": "`attn2` of every block, before its gate",
    "HunyuanDiT2DModel": "`attn2` of every block",
    "Kandinsky3UNet": "the attention to the text in every cross-attention block",
    "Kandinsky5Transformer3DModel": "`cross_attention` of every visual block",
    "LatteTransformer3DModel": "`attn2` of every spatial block",
    "LongCatAudioDiTTransformer": "`cross_attn` of every block",
    "LuminaNextDiT2DModel": "`attn2` of every layer, before its gate",
    "SanaTransformer2DModel": "`attn2` of every block; `attn1` is linear attention",
    "StableAudio3DiTModel": "`cross_attn` of every block",
    "UNetControlNetXSModel": "`attn2` of every block, of the UNet and of its control part",
    "UNetMotionModel": "`attn2` of every block, but none of the motion modules",
    "UNetSpatioTemporalConditionModel": "`attn2` of every spatial and every temporal block",
    "WanVACETransformer3DModel": "`attn2` of every block, and of every VACE block",
}


# The walk.


@functools.cache
def pipeline_classes() -> Mapping[str, type]:
    """Return the pipeline classes of the installed diffusers by name, exported or not."""
    return _subclasses(DiffusionPipeline, "diffusers.pipelines")


@functools.cache
def modular_classes() -> Mapping[str, type]:
    return _subclasses(ModularPipeline, "diffusers.modular_pipelines")


@functools.cache
def unavailable() -> frozenset[str]:
    """Return the names of classes that need a package that is not installed; diffusers replaces them with dummies.

    A class whose own module can be imported all the same is in `pipeline_classes` as well.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return frozenset(name for name in dir(diffusers) if isinstance(getattr(diffusers, name, None), DummyObject))


def _subclasses(base: type, package: str) -> Mapping[str, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations that importing old pipelines raises
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue  # a package is missing: `unavailable` has the classes of this module
        for name in dir(diffusers):
            getattr(diffusers, name, None)  # imports the remaining ones
    return {cls.__name__: cls for cls in _all_subclasses(base) if cls.__module__.partition(".")[0] == "diffusers"}


def _all_subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _all_subclasses(subclass)


def denoisers_of(pipeline: type) -> tuple[str, ...]:
    """Return the model classes that the constructor of `pipeline` names for its denoiser."""
    parameters = inspect.signature(pipeline).parameters.values()
    annotations = [str(getattr(p.annotation, "__name__", p.annotation)) for p in parameters if _is_denoiser(p.name)]
    names = (name for annotation in annotations for name in re.findall(r"[A-Za-z]\w+", annotation))
    return tuple(dict.fromkeys(name for name in names if name[0].isupper() and name not in ("None", "Union")))


def _is_denoiser(parameter: str) -> bool:
    return any(parameter == name or parameter.startswith(f"{name}_") for name in DENOISER_NAMES)


def lists_of(pipeline: type) -> list[str]:
    """Return the lists that contain `pipeline`: tested, recognized, refused, not denoising. There should be one."""
    name = pipeline.__name__
    by_denoiser = [d for d in denoisers_of(pipeline) if d in REFUSED_DENOISERS]
    return [
        *(["tested" if name in TESTED else "recognized"] if name in FAMILIES else []),
        *(["refused"] if by_denoiser or refusal(pipeline) is not None else []),
        *(["not denoising"] if name in NOT_DENOISING else []),
    ]


# The tables.


def guidance(family: Family) -> str:
    """Describe the denoiser calls that compute the guidance halves."""
    if family.unguided:
        return "one call, no halves"
    if family.calls:
        calls = f"two calls, {' then '.join(family.calls)}"
        if family.guiders:
            return f"{calls}, by a guider"
        return f"{calls}, with a negative prompt and `{family.scale}`" if family.negative else calls
    if family.further:
        return f"one call, [{'; '.join(family.order)}], and further calls"
    if family.listed:
        return f"one call, a list of [{'; '.join(family.order)}]"
    per_frame = "the text and the residuals" if len(family.repeated) > 1 else "the text"
    return "".join(
        (
            f"one call, [{'; '.join(family.order)}]",
            f", {per_frame} repeated for each frame" if family.repeated else "",
            ", sizes alternating" if family.interleaved else "",
        )
    )


def continues(family: Family) -> str:
    """Describe which guidance half the denoiser computes after the gate."""
    return "the only one" if family.unguided else family.only or "uncond or cond"


def gated_table() -> str:
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in sorted(FAMILIES.keys() & pipeline_classes().keys()):
        if GUIDANCE_ONLY & set(denoisers_of(pipeline_classes()[name])):
            continue
        # The last one if there are several: `UNetMotionModel`, which is made from the other.
        denoiser = denoisers_of(pipeline_classes()[name])[-1]
        rows[denoiser, guidance(FAMILIES[name]), continues(FAMILIES[name])].append(name)
    header = ("denoiser", "cached", "denoiser calls", "half that continues", "tested", "recognized")
    body = [
        (
            f"`{denoiser}`",
            CACHED.get(denoiser, "`attn2` of every block"),
            arrives,
            half,
            _names(n for n in names if n in TESTED),
            _names(n for n in names if n not in TESTED),
        )
        for (denoiser, arrives, half), names in sorted(rows.items(), key=lambda row: (row[0][0].lower(), row[0]))
    ]
    return _table(header, body)


def refused_table() -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in {**REFUSED, **REFUSED_BASES}.items():
        by_reason[reason.partition(". What works")[0]].append(name)
    rows = [(reason, _names(names)) for reason, names in by_reason.items()]
    return _table(("reason", "pipelines, or their base class"), rows)


def joint_table() -> str:
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, cls in sorted(pipeline_classes().items()):
        for denoiser in set(denoisers_of(cls)) & GUIDANCE_ONLY:
            if name in FAMILIES:
                rows[denoiser, guidance(FAMILIES[name])].append(name)
    found = json.loads(MAP.read_text(encoding="utf-8"))["denoisers"]
    body = [
        (
            f"`{denoiser}`",
            "frozen" if _is_frozen(found.get(denoiser, NOT_MAPPED)) else "computed",
            arrives,
            _names(n for n in names if n in TESTED),
            _names(n for n in names if n not in TESTED),
        )
        for (denoiser, arrives), names in sorted(rows.items(), key=lambda row: (row[0][0].lower(), row[0]))
    ]
    return _table(("denoiser", "text after the gate", "denoiser calls", "tested", "recognized"), body)


@functools.cache
def denoiser_classes() -> frozenset[str]:
    """Return the names of all denoiser classes that ordinary or modular pipelines use."""
    named = {name for cls in pipeline_classes().values() for name in denoisers_of(cls)}
    return frozenset(named | set(MODULAR_REFUSED.values())) - {"OnnxRuntimeModel"}


def map_table() -> str:
    found = json.loads(MAP.read_text(encoding="utf-8"))["denoisers"]
    body = [
        (
            f"`{name}`",
            *_found(found.get(name, NOT_MAPPED)),
            _arrivals(name),
            status_of(name, found.get(name, NOT_MAPPED)),
        )
        for name in sorted(denoiser_classes(), key=str.lower)
    ]
    return _table(("denoiser", "attentions", "parameters (10⁹)", "denoiser calls", "status"), body)


NOT_MAPPED: Mapping[str, Any] = {"error": "no tiny configuration could be made"}


def status_of(name: str, row: Mapping[str, Any]) -> str:
    """Return whether a denoiser can be gated or its text frozen, or only its guidance ended, or why none of these."""
    families = [FAMILIES[n] for n, cls in pipeline_classes().items() if n in FAMILIES and name in denoisers_of(cls)]
    roles = {attention["role"] for attention in row.get("attentions", [])}
    reasons = {
        NOT_DENOISING.get(n) or REFUSED.get(n) for n, cls in pipeline_classes().items() if name in denoisers_of(cls)
    }
    reason = REFUSED_DENOISERS.get(name) or next((each for each in sorted(filter(None, reasons))), None)
    if families and name not in GUIDANCE_ONLY:
        return "gated"
    if families:
        return "frozen" if _is_frozen(row) else "guidance only"
    if reason is not None:
        return reason.partition(". What works")[0]
    if roles & {"joint", "image to both"} or name in JOINT_ATTENTION:
        return "guidance only; used only by modular pipelines"
    return "not used by any pipeline"


def _is_frozen(row: Mapping[str, Any]) -> bool:
    """Return whether the keys and values of the text in joint attention can be cached."""
    found = row.get("frozen text", 0)
    return isinstance(found, int) and found > 0


def _arrivals(name: str) -> str:
    kinds = {
        guidance(FAMILIES[n]) for n, cls in pipeline_classes().items() if n in FAMILIES and name in denoisers_of(cls)
    }
    return "; ".join(sorted(kinds)) or "-"


def _found(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the attentions of a denoiser and its parameters, in words."""
    if "error" in row:
        reason = _shortened(row["error"].partition("torch.export (")[2].partition(" (")[0].partition(". ")[0])
        return (f"cannot be captured: {reason}" if reason else row["error"]), "-"
    kinds = Counter[str]()
    for attention in row["attentions"]:
        kinds[_kind(attention)] += attention["count"]
    attentions = "; ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    sizes = row["parameters"]
    if not sizes:
        return attentions, "-"
    shown = {"image": "image", "text": "text", "both": "both", "conditioning": "conditioning"}
    parts = [f"{shown[stream]} {sizes[stream] / 1e9:.2f}" for stream in shown if sizes.get(stream, 0) >= 5e6]
    return attentions, ", ".join(parts) or f"{sum(sizes.values()) / 1e9:.2f}"


def _shortened(reason: str) -> str:
    """Return the beginning of an error message, without the parenthesis that closes it."""
    reason = reason.strip()
    if reason.count(")") > reason.count("("):
        reason = reason.removesuffix(")").rstrip(".")
    return reason if len(reason) <= 100 else f"{reason[:100]}..."


def _kind(attention: Mapping[str, Any]) -> str:
    role = str(attention["role"])
    if role not in ("joint", "image to both"):
        return "text-only" if role == "of text" else role
    kind = f"joint ({attention['streams']} stream, text {attention['text']}"
    if role == "image to both":
        kind += ", text not updated"
    if attention.get("causal"):
        kind += ", causal"
    if attention.get("constant"):
        kind += ", text constant"
    return kind + ")"


def not_denoising_table() -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in NOT_DENOISING.items():
        by_reason[reason].append(name)
    return _table(("reason", "pipelines"), [(reason, _names(names)) for reason, names in by_reason.items()])


def modular_table() -> str:
    by_status: dict[str, list[str]] = defaultdict(list)
    for name, like in MODULAR.items():
        by_status[f"gated like `{like}`, which has the same denoiser"].append(name)
    for name, denoiser in MODULAR_REFUSED.items():
        if denoiser in JOINT_ATTENTION:
            by_status["guidance only: joint attention"].append(name)
        else:
            reason = {**REFUSED_DENOISERS, **UNCACHED_DENOISERS}[denoiser].partition(". What works")[0]
            by_status[f"refused, `{denoiser}`: {reason}"].append(name)
    return _table(("status", "modular pipelines"), [(status, _names(names)) for status, names in by_status.items()])


TABLES = {
    "gated": gated_table,
    "refused": refused_table,
    "joint attention": joint_table,
    "map": map_table,
    "not denoising": not_denoising_table,
    "modular": modular_table,
}


def regenerated(page: str) -> str:
    """Return `page` with its tables regenerated."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return page


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`{_remark(name)}" for name in names)


def _remark(name: str) -> str:
    if name in UNTESTED:
        return f" ({UNTESTED[name]})"
    return f" (with {EVERY[name].needs})" if name in EVERY and EVERY[name].needs else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(regenerated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
