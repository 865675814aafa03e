"""Every pipeline class of the installed diffusers, and the tables of docs/reference/denoisers.md that list them.

`python -m tests.denoisers_page` regenerates the tables; the text around them is written by hand.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils import DummyObject

from tests.denoiser_cases import CASES, SIBLINGS
from tgate_compile.engine.families import DENOISER_NAMES, FAMILIES, Family, refusal
from tgate_compile.engine.unsupported import (
    JOINT_ATTENTION,
    MODULAR,
    MODULAR_REFUSED,
    NOT_DENOISING,
    REFUSED,
    REFUSED_BASES,
    REFUSED_DENOISERS,
)

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "denoisers.md"

#: Classes that are run in `test_pipelines.py`, and by which test.
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
TESTED = IN_TEST_PIPELINES.keys() | IN_TEST_DENOISERS | IN_TEST_MORE

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
    """The pipeline classes of the installed diffusers by name, exported or not."""
    return _subclasses(DiffusionPipeline, "diffusers.pipelines")


@functools.cache
def modular_classes() -> Mapping[str, type]:
    return _subclasses(ModularPipeline, "diffusers.modular_pipelines")


@functools.cache
def unavailable() -> frozenset[str]:
    """Names of classes that need a package that is not installed; diffusers replaces them with dummies."""
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
    """Return the lists that contain `pipeline`: tested, recognized, refused, not denoising. It should be one."""
    name = pipeline.__name__
    by_denoiser = [d for d in denoisers_of(pipeline) if d in JOINT_ATTENTION or d in REFUSED_DENOISERS]
    return [
        *(["tested" if name in TESTED else "recognized"] if name in FAMILIES else []),
        *(["refused"] if by_denoiser or refusal(pipeline) is not None else []),
        *(["not denoising"] if name in NOT_DENOISING else []),
    ]


# The tables.


def guidance(family: Family) -> str:
    """Describe how the guidance halves reach the denoiser."""
    if family.unguided:
        return "no halves"
    if family.calls:
        return f"two calls, {' then '.join(family.calls)}"
    per_frame = "the text and the residuals" if len(family.repeated) > 1 else "the text"
    return "".join(
        (
            f"one call, [{'; '.join(family.order)}]",
            f", {per_frame} once per frame" if family.repeated else "",
            ", the sizes alternating" if family.interleaved else "",
        )
    )


def continues(family: Family) -> str:
    """Describe which guidance half the denoiser computes after the gate."""
    return "the only one" if family.unguided else family.only or "uncond or cond"


def gated_table() -> str:
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in sorted(FAMILIES.keys() & pipeline_classes().keys()):
        # The last one if there are several: `UNetMotionModel`, which is made from the other.
        denoiser = denoisers_of(pipeline_classes()[name])[-1]
        rows[denoiser, guidance(FAMILIES[name]), continues(FAMILIES[name])].append(name)
    header = ("denoiser", "what is cached", "how guidance arrives", "continues", "tested", "recognized")
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
    return _table(("why", "pipelines, or their base class"), rows)


def joint_table() -> str:
    by_denoiser: dict[str, list[str]] = {name: [] for name in sorted(JOINT_ATTENTION)}
    for name, cls in sorted(pipeline_classes().items()):
        for denoiser in set(denoisers_of(cls)) & JOINT_ATTENTION:
            by_denoiser[denoiser].append(name)
    for name, denoiser in MODULAR_REFUSED.items():
        if denoiser in JOINT_ATTENTION:
            by_denoiser[denoiser].append(name)
    return _table(("denoiser", "pipelines"), [(f"`{name}`", _names(of)) for name, of in by_denoiser.items()])


def not_denoising_table() -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, what in NOT_DENOISING.items():
        by_reason[what].append(name)
    return _table(("what it is", "pipelines"), [(what, _names(names)) for what, names in by_reason.items()])


def modular_table() -> str:
    by_status: dict[str, list[str]] = defaultdict(list)
    for name, like in MODULAR.items():
        by_status[f"the denoiser of `{like}`"].append(name)
    for name, denoiser in MODULAR_REFUSED.items():
        if denoiser not in JOINT_ATTENTION:
            reason = REFUSED_DENOISERS[denoiser].partition(". What works")[0]
            by_status[f"refused, `{denoiser}`: {reason}"].append(name)
    return _table(("denoiser", "modular pipelines"), [(what, _names(names)) for what, names in by_status.items()])


TABLES = {
    "gated": gated_table,
    "refused": refused_table,
    "joint attention": joint_table,
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
    return ", ".join(f"`{name}`" for name in names)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(regenerated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
