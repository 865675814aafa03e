"""The map of all denoisers of the installed diffusers: what data flow finds in a tiny configuration of each.

`python -m tests.denoiser_map` captures every denoiser and writes `docs/results/denoisers.json`, from which
`python -m tests.denoisers_page` makes a table; names of classes limit it to these.

Tokens are distinguished by experiment. The captured graph runs with changed latents and with a changed text, while
every attention that involves latents returns its earlier value, so that no token depends on another. The rows of the
keys that have changed are then the image's or the text's. Text that reaches the denoiser as one vector is not changed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from tests.tiny_denoisers import FIRST_CALLS, first_call
from tgate_compile._errors import TGateError
from tgate_compile.engine.call import Call
from tgate_compile.engine.capture import capture
from tgate_compile.engine.halves import LATENTS_NAMES, is_time, named_leaves
from tgate_compile.engine.tracing import call_of
from tgate_compile.passes.attention_core import FUSED, PRODUCT_OPERANDS, AttentionCore, attention_cores
from tgate_compile.passes.find_sites import depends_on, innermost_call
from tgate_compile.passes.graphs import Captured

RESULT = Path(__file__).parent.parent / "docs" / "results" / "denoisers.json"

#: Why denoisers cannot be captured, where the error of torch.export does not tell.
REASONS = {
    "HiDreamImageTransformer2DModel": (
        "cannot be captured: the number of tokens that each of its experts computes depends on the latents, and a "
        "graph has fixed sizes"
    ),
    "WanAnimate2Transformer3DModel": (
        "cannot be captured: a first call fills a cache with its reference frames, and the other calls attend by "
        "flex_attention with masks that its code keeps"
    ),
}

_TEXT = re.compile(r"encoder_hidden_states|prompt|text|txt|caption|cap_feats|context|llm_features|^y$")
_NOT_TEXT = re.compile(r"mask|ids|image|img|audio|pooled|rotary|freqs|control|timestep|residual|indices|index")
Stream = Literal["image", "text", "both", "conditioning"]


def is_text(name: str, leaf: torch.Tensor) -> bool:
    """Return whether the input called `name` holds one vector for each token of a text."""
    return name == "input_ids" or (
        leaf.is_floating_point()
        and leaf.ndim >= 2
        and _TEXT.search(name) is not None
        and (_NOT_TEXT.search(name) is None or name == "image_embeds")
    )


class Frozen(torch.fx.Interpreter):
    """Runs a graph and keeps all values; the nodes of `given` have the values given for them."""

    def __init__(self, captured: Captured, given: Mapping[Node, torch.Tensor] | None = None) -> None:
        super().__init__(captured.program.graph_module)
        self._given = given or {}
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = self._given[n] if n in self._given else super().run_node(n)
        self.values[n] = value
        return value


def run(captured: Captured, leaves: Iterable[Any], given: Mapping[Node, torch.Tensor] | None = None) -> dict[Node, Any]:
    program, inputs = captured.program, iter(leaves)
    arguments = [
        next(inputs)
        if spec.kind is InputKind.USER_INPUT
        else program.state_dict.get(str(spec.target), program.constants.get(str(spec.target)))
        for spec in program.graph_signature.input_specs
    ]
    interpreter = Frozen(captured, given)
    with torch.no_grad():
        interpreter.run(*arguments)
    return interpreter.values


def changed(before: Any, after: Any) -> torch.Tensor | None:
    """Return where two values of a node differ; None if it is not a tensor."""
    if not torch.is_tensor(before) or before.shape != after.shape:
        return None
    return (before != after) & ~((before != before) & (after != after))


class Tokens:
    """The dependence of the values of a captured denoiser on the latents and on the text, token by token."""

    def __init__(self, captured: Captured, call: Call, names: Mapping[int, str]) -> None:
        self.graph = captured.program.graph
        arguments = [names.get(id(leaf), "") for leaf in call.leaves]
        latents = {
            i
            for i, (name, leaf) in enumerate(zip(arguments, call.leaves, strict=True))
            if torch.is_tensor(leaf) and captured.input_names[i] == captured.latents
        }
        main = call.leaves[next(iter(latents))]
        latents |= {
            i
            for i, (name, leaf) in enumerate(zip(arguments, call.leaves, strict=True))
            if torch.is_tensor(leaf)
            and (name == arguments[next(iter(latents))] or name in _LATENTS)
            and leaf.ndim >= main.ndim - 1
            and leaf.is_floating_point()
        }
        texts = {
            i
            for i, (name, leaf) in enumerate(zip(arguments, call.leaves, strict=True))
            if torch.is_tensor(leaf) and i not in latents and is_text(name, leaf)
        }
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        self.of_latents = depends_on(self.graph, [nodes[captured.input_names[i]] for i in latents])
        self.cores = list(attention_cores(self.graph))
        self.before = run(captured, call.leaves)
        frozen = {core.node: self.before[core.node] for core in self.cores if core.node in self.of_latents}
        self.by_latents = run(captured, _altered(call.leaves, latents), frozen)
        self.by_text = run(captured, _altered(call.leaves, texts), frozen)
        times = {
            i
            for i, (name, leaf) in enumerate(zip(arguments, call.leaves, strict=True))
            if torch.is_tensor(leaf) and is_time(name) and "indices" not in name
        }
        self.by_time = run(captured, _altered(call.leaves, times), frozen) if times else self.before
        self.texts = sorted({arguments[i] for i in texts})

    def rows(self, node: Node, dim: int, values: Mapping[Node, Any]) -> torch.Tensor:
        """Return which tokens along `dim` of the value of `node` differ in `values`."""
        where = changed(self.before[node], values[node])
        assert where is not None
        return where.movedim(dim, 0).flatten(1).any(1)

    def of(self, node: Node, dim: int = -2) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which tokens of `node` are the image's, and which are the text's."""
        image = self.rows(node, dim, self.by_latents)
        return image, self.rows(node, dim, self.by_text) & ~image

    def stream(self, node: Node) -> Stream | None:
        """Return the stream that the value of `node` belongs to; None if it is not a tensor."""
        image, text = (changed(self.before[node], values[node]) for values in (self.by_latents, self.by_text))
        if image is None or text is None:
            return None
        only_text = bool((text & ~image).any()) and image.ndim >= 3
        if bool(image.any()):
            # Modulation by a text pooled inside of the denoiser changes the image's tokens as well.
            return "both" if only_text and not bool((text & image).any()) else "image"
        return "text" if only_text else "conditioning"


_LATENTS = {*LATENTS_NAMES, "audio_hidden_states", "audio_latents"}


def _altered(leaves: Iterable[Any], positions: Collection[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [
        leaf
        if i not in positions
        else leaf + 0.5 * torch.rand(leaf.shape, generator=generator).to(leaf) + 0.1
        if leaf.is_floating_point()
        else leaf + 1
        for i, leaf in enumerate(leaves)
    ]


def attentions(captured: Captured, tokens: Tokens) -> list[dict[str, Any]]:
    """Return the attentions of each role and kind, with the modules that they are in."""
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = defaultdict(list)
    for core in tokens.cores:
        path = innermost_call(core.node)[1].removesuffix(".processor")
        facts = {"module": re.sub(r"\d+", "*", path), **facts_of(core, tokens)}
        groups[tuple(facts.items())].append(path)
    return [{**dict(facts), "count": len(paths)} for facts, paths in groups.items()]


def facts_of(core: AttentionCore, tokens: Tokens) -> dict[str, Any]:
    if core.is_linear:
        return {"role": "linear"}
    query_image, query_text = tokens.of(core.scores[0][0])
    key_image, key_text = tokens.of(core.value)
    asks = bool(query_image.any()), bool(query_text.any())
    gives = bool(key_image.any()), bool(key_text.any())
    if not any(gives):
        return {"role": "other"}
    if not asks[0]:
        return {"role": "of text" if asks[1] and not gives[0] else "other"}
    if gives == (True, False):
        return {"role": "self"}
    if gives == (False, True):
        return {"role": "cross"}
    image, text = key_image.nonzero().flatten(), key_text.nonzero().flatten()
    place = "first" if text.max() < image.min() else "last" if text.min() > image.max() else "between"
    facts = {
        "role": "joint" if asks[1] else "image to both",
        "text": place,
        "streams": "double" if _joins(core.value, len(key_image), tokens.before) else "single",
    }
    if core.node.target in FUSED and asks[1]:
        facts["causal"] = not _text_sees_image(core, tokens, key_image, query_text)
    if not asks[1] or facts.get("causal"):
        # Whether the text's values are the same in all steps, so that keeping them loses nothing.
        facts["constant"] = not bool((tokens.rows(core.value, -2, tokens.by_time) & key_text).any())
    return facts


def _joins(value: Node, length: int, values: Mapping[Node, Any]) -> bool:
    """Return whether `value` is a concatenation along its tokens that comes after any product with weights."""
    seen, queue = {value}, [value]
    for node in queue:  # grows during the loop
        if node.target is torch.ops.aten.cat.default:
            dim = node.args[1] if len(node.args) > 1 else 0
            parts = [values[part].shape[dim] for part in node.args[0]]
            if sum(parts) == length and max(parts) < length:
                return True
        if node.target in PRODUCT_OPERANDS or node.target is torch.ops.aten.linear.default:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return False


def _text_sees_image(core: AttentionCore, tokens: Tokens, image: torch.Tensor, text: torch.Tensor) -> bool:
    """Return whether the attention's result for text tokens changes with the values of image tokens."""
    values = [tokens.before[arg] if isinstance(arg, Node) else arg for arg in core.node.args]
    options = {k: tokens.before[v] if isinstance(v, Node) else v for k, v in core.node.kwargs.items()}
    other = values[2].clone()
    other[..., image, :] += 1.0
    results = [core.node.target(*values[:2], each, *values[3:], **options) for each in (values[2], other)]
    return bool((results[0] != results[1])[..., text, :].any())


def parameters(captured: Captured, tokens: Tokens) -> dict[str, Stream]:
    """Return the stream of each parameter, with a star for every number in its name."""
    found: dict[str, Counter[Stream]] = defaultdict(Counter)
    names = captured.program.graph_signature.inputs_to_parameters
    for node in tokens.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        queue = [node]
        for each in queue:  # grows during the loop
            for user in each.users:
                stream = tokens.stream(user) if user in tokens.before else None
                if stream == "conditioning" and all(source in queue for source in user.all_input_nodes):
                    queue.append(user)  # a transposed or converted weight
                elif stream is not None:
                    found[re.sub(r"\d+", "*", names[node.name])][stream] += 1
    return {name: max(streams, key=lambda stream: streams[stream]) for name, streams in found.items()}


def real_size(name: str, streams: Mapping[str, Stream]) -> dict[str, int] | None:
    """Return the number of parameters in each stream of the class's default configuration; None if it has none."""
    try:
        with torch.device("meta"):
            model = getattr(diffusers, name)()
    except Exception:  # the defaults do not describe a model
        return None
    sizes: Counter[str] = Counter()
    for path, parameter in model.named_parameters():
        sizes[streams.get(re.sub(r"\d+", "*", path), "conditioning")] += parameter.numel()
    return dict(sizes)


def frozen_text(denoiser: torch.nn.Module, call: Call) -> int | str:
    """Return how many keys and values of the text in joint attention can be cached, or why none can."""
    try:
        sites = capture(denoiser, denoiser.forward, call, ("cross",), required=False).sites
    except TGateError as error:
        return str(error).partition("\n")[0].partition(" What works")[0][:300]
    return sum(site.of_text for site in sites)


def row_of(name: str) -> dict[str, Any]:
    """Return the attentions and parameters of the denoiser class `name`."""
    try:
        denoiser, args, kwargs = first_call(name)
    except KeyError as missing:
        return {"error": f"no tiny configuration ({missing})"}
    with torch.no_grad():
        denoiser(*args, **kwargs)  # so that an error of the capture is not one of the configuration
    args, kwargs = Call.of(args, kwargs).arguments
    arguments = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
    call = call_of(denoiser, args, kwargs, arguments)
    args, kwargs = call.arguments
    arguments = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
    names = {id(leaf): argument for argument, leaf in named_leaves(arguments)}
    try:
        captured = capture(denoiser, denoiser.forward, call, (), required=False)
    except TGateError as error:
        return {"error": REASONS.get(name) or str(error).partition("\n")[0].partition("  ")[0][:300]}
    tokens = Tokens(captured, call, names)
    streams = parameters(captured, tokens)
    return {
        "frozen text": frozen_text(denoiser, call),
        "nodes": len(captured.program.graph.nodes),
        "text inputs": tokens.texts,
        "attentions": attentions(captured, tokens),
        "parameters": real_size(name, streams),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="denoiser classes; all without any")
    given = parser.parse_args().names
    warnings.simplefilter("ignore")
    known = json.loads(RESULT.read_text(encoding="utf-8"))["denoisers"] if RESULT.exists() else {}
    known = {name: row for name, row in known.items() if name in FIRST_CALLS}
    for name in given or sorted(FIRST_CALLS):
        began = time.perf_counter()
        known[name] = row_of(name)
        found = known[name].get("error") or Counter(a["role"] for a in known[name]["attentions"])
        sys.stderr.write(f"{name}: {str(found)[:200]}, {time.perf_counter() - began:.1f} s\n")
        result = {
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "denoisers": dict(sorted(known.items())),
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
