"""Custom denoisers, each written in a different way.

Each passes the value of a cross-attention through an `nn.Identity` called `tap`: it leaves no trace in a graph, and
a reference can hook it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

DIM, HEADS, TOKENS, TEXT = 16, 4, 6, 5


def heads(x: Tensor) -> Tensor:
    """[batch, tokens, dim] -> [batch, heads, tokens, dim / heads]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[batch, heads, tokens, dim / heads] -> [batch, tokens, dim]."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projections around `mix`, in which the subclasses differ."""

    def __init__(self, key_dim: int = DIM) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.key, self.value = nn.Linear(DIM, key_dim), nn.Linear(DIM, key_dim)
        self.tap = nn.Identity()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.tap(self.out(self.mix(self.query(x), self.key(context), self.value(context))))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


class Einsum(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, -1)) for x in (q, k, v))  # [batch, tokens, heads, dim]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


class KeysFirst(Attention):
    """Attention whose scores have the keys in their rows."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = heads(k) @ heads(q).mT / 2  # [batch, heads, text tokens, tokens]
        return joined(scores.softmax(-2).mT @ heads(v))


class Baddbmm(Attention):
    """Attention with batch and heads in one dimension, and a bias on the scores."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (heads(x).flatten(0, 1) for x in (q, k, v))
        bias = q.new_zeros(1, 1, k.shape[1]).index_fill(2, torch.tensor([0]), -2.0)
        scores = torch.baddbmm(bias.expand(q.shape[0], q.shape[1], -1), q, k.transpose(1, 2), beta=1, alpha=0.5)
        return joined(torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS)))


class MultiQuery(Attention):
    """Attention whose heads share keys and values; the last text token is masked, and the softmax written out."""

    def __init__(self) -> None:
        super().__init__(DIM // HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = heads(q) @ k[:, None].transpose(-1, -2) / 2
        allowed = torch.arange(k.shape[1]) < k.shape[1] - 1
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return joined(weights / weights.sum(-1, keepdim=True) @ v[:, None])


class Linear(Attention):
    """Linear attention without a softmax: the queries multiply the product of keys and values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(F.elu(heads(q)).add(1) @ (F.elu(heads(k)).add(1).transpose(-1, -2) @ heads(v)) / k.shape[1])


class InAModule(Attention):
    """Attention whose core is a module without weights."""

    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tap = nn.Identity()

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.tap(F.scaled_dot_product_attention(q, k, v))

    def __init__(self) -> None:
        super().__init__()
        self.core = self.Core()
        self.tap = None  # type: ignore[assignment]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.out(joined(self.core(heads(self.query(x)), heads(self.key(context)), heads(self.value(context)))))


class Native(nn.Module):
    """`torch.nn.MultiheadAttention` with the last text token masked."""

    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.batch_first, self.need_weights = batch_first, need_weights
        self.tap = nn.Identity()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        padding = (torch.arange(context.shape[1]) == context.shape[1] - 1).expand(len(context), -1)
        given = [x, context, context] if self.batch_first else [y.transpose(0, 1) for y in (x, context, context)]
        if context is x:
            given, padding = [given[0]] * 3, None  # type: ignore[assignment]
        out, _ = self.attention(*given, key_padding_mask=padding, need_weights=self.need_weights)
        return self.tap(out if self.batch_first else out.transpose(0, 1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(joined(F.scaled_dot_product_attention(q, k, v)))


class Denoiser(nn.Module):
    """Self-attention, cross-attention and a layer in each of two blocks; `make` builds a cross-attention."""

    def __init__(self, make: Callable[[], nn.Module] = Attention) -> None:
        super().__init__()
        self.own = nn.ModuleList(SelfAttention() for _ in range(2))
        self.cross = nn.ModuleList(make() for _ in range(2))
        self.feed = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.time = nn.Linear(1, DIM)

    def start(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.time(t.float().reshape(-1, 1, 1) / 1000)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Any:
        x = self.start(x, t)
        for own, cross, feed in zip(self.own, self.cross, self.feed, strict=True):
            x = x + own(x)
            x = x + cross(x, context)
            x = x + feed(x).tanh()
        return x


class WithResidual(Denoiser):
    """Attentions that add their own residual connection, each in a different order."""

    class First(Attention):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return x + super().forward(x, context)

    class Last(Attention):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return (super().forward(x, context) + x) / 1.5

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.ModuleList([self.First(), self.Last()])

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        x = self.start(x, t)
        for own, cross in zip(self.own, self.cross, strict=True):
            x = cross(x + own(x), context)
        return x


class GatedInside(Denoiser):
    """Attention that multiplies its result by a gate computed from the timestep, which must stay live."""

    class Gated(Attention):
        def forward(self, x: Tensor, context: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, context) * gate

    def __init__(self) -> None:
        super().__init__(self.Gated)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        gate = self.time(t.float().reshape(-1, 1, 1) / 100)
        for own, cross in zip(self.own, self.cross, strict=True):
            x = x + own(x)
            x = x + cross(x, context, gate)
        return x


class Inline(nn.Module):
    """Blocks with self-attention and two cross-attentions inline in one forward; the context is a dict."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(
                {f"{name}_{part}": nn.Linear(DIM, DIM) for name in ("own", "text", "image") for part in "qkvo"}
            )
            self.scale = nn.Parameter(torch.full((DIM,), 0.7))
            self.taps = nn.ModuleList(nn.Identity() for _ in range(2))

        def attend(self, name: str, x: Tensor, context: Tensor) -> Tensor:
            q, k, v, o = (self.layers[f"{name}_{part}"] for part in "qkvo")
            return o(joined(F.scaled_dot_product_attention(heads(q(x)), heads(k(context)), heads(v(context)))))

        def forward(self, x: Tensor, context: dict[str, Tensor], gate: Tensor) -> Tensor:
            x = x + self.attend("own", x, x)
            x = x + gate * self.taps[0](self.attend("text", x, context["text"]))
            return x + self.taps[1](self.scale * self.attend("image", x, context["image"]))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.time = nn.Linear(1, DIM)

    def forward(self, x: Tensor, t: Tensor, context: dict[str, Tensor]) -> tuple[Tensor]:
        gate = self.time(t.float().reshape(-1, 1, 1) / 1000)
        for block in self.blocks:
            x = block(x, context, gate)
        return (x,)


class Functional(Denoiser):
    """`F.multi_head_attention_forward` on the block's own parameters."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projections = nn.Parameter(torch.randn(3 * DIM, DIM) / 4)
            self.out = nn.Parameter(torch.randn(DIM, DIM) / 4)
            self.tap = nn.Identity()

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            q, k = x.transpose(0, 1), context.transpose(0, 1)
            mixed, _ = F.multi_head_attention_forward(
                q, k, k, DIM, HEADS, self.projections, None, None, None, False, 0.0, self.out, None, training=False,
                need_weights=False,
            )  # fmt: skip
            return x + self.tap(mixed.transpose(0, 1))

    def __init__(self) -> None:
        super().__init__(self.Block)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        x = self.start(x, t)
        for own, cross in zip(self.own, self.cross, strict=True):
            x = cross(x + own(x), context)
        return x


class DecoderLayers(nn.Module):
    """`torch.nn.TransformerDecoderLayer`, which contains self-attention, cross-attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(DIM, HEADS, 2 * DIM, batch_first=True, norm_first=norm) for norm in (True, False)
        )
        self.text = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True)
        for layer in self.layers:
            layer.dropout2 = nn.Identity()  # type: ignore[assignment]  # serves as the tap
        self.time = nn.Linear(1, DIM)

    def forward(self, *, context: list[Tensor], timesteps: Tensor, noisy: Tensor) -> dict[str, Tensor]:
        (text,) = context
        x, text = noisy + self.time(timesteps.float().reshape(-1, 1, 1) / 1000), self.text(text)
        for layer in self.layers:
            x = layer(x, text)
        return {"prediction": x}


class Unsigned(Denoiser):
    """A denoiser whose `forward` does not name its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"out": [super().forward(args[0], args[1], **kwargs)]}


class TextFirst(Denoiser):
    """The latents come last, and have as many tokens as the text; the timestep has another name; the result is an
    object."""

    @dataclass
    class Output(BaseOutput):
        eps: Tensor

    def forward(self, prompt: Tensor, noise_level: Tensor, image: Tensor) -> Any:  # type: ignore[override]
        return self.Output(eps=super().forward(image, noise_level, prompt))


class WithoutTime(Denoiser):
    """Ignores the timestep."""

    def forward(self, z: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z, torch.zeros(()), context)


class TimedText(Denoiser):
    """Computes keys and values from the text and the timestep together."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, t, context + self.time(t.float().reshape(-1, 1, 1) / 500))


class Shared(Denoiser):
    """Has one cross-attention, which both blocks call."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.ModuleList([Attention()])
        self.taps = nn.ModuleList(nn.Identity() for _ in range(2))
        self.cross[0].tap = None  # type: ignore[assignment]

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        x = self.start(x, t)
        for own, tap in zip(self.own, self.taps, strict=True):
            x = x + own(x)
            attention = self.cross[0]
            mixed = attention.mix(attention.query(x), attention.key(context), attention.value(context))
            x = x + tap(attention.out(mixed))
        return x


class TwoModalities(nn.Module):
    """Two latents with separate tokens, each attending to the other: cross-attentions that must not be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio = Attention(), Attention()
        self.to_audio, self.to_video = Attention(), Attention()
        self.to_audio.tap = self.to_video.tap = None  # type: ignore[assignment]
        self.time = nn.Linear(1, DIM)

    def between(self, attention: Attention, x: Tensor, y: Tensor) -> Tensor:
        return attention.out(attention.mix(attention.query(x), attention.key(y), attention.value(y)))

    def forward(self, video: Tensor, audio: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        time = self.time(t.float().reshape(-1, 1, 1) / 1000)
        video, audio = video + time, audio + time
        video, audio = video + self.video(video, text), audio + self.audio(audio, text)
        return (
            video + self.between(self.to_audio, video, audio),
            audio + self.between(self.to_video, audio, video),
        )


class Convolutional(nn.Module):
    """An image model on [batch, channels, height, width], with inline projections by 1 x 1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = nn.Conv2d(DIM, DIM, 3, padding=1), nn.Conv2d(DIM, DIM, 3, padding=1)
        self.query, self.out = nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.key_value = nn.Linear(DIM, 2 * DIM)
        self.time = nn.Linear(1, DIM)
        self.tap = nn.Identity()

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        x = (self.into(x) + self.time(t.float().reshape(1, 1) / 1000)[:, :, None, None]).relu()
        key, value = self.key_value(context).chunk(2, dim=-1)
        query = self.query(x).flatten(2)  # [batch, channels, pixels]
        weights = torch.softmax(torch.einsum("bcn,bmc->bnm", query, key), dim=-1)
        mixed = torch.einsum("bnm,bmc->bcn", weights, value).unflatten(2, x.shape[2:])
        return self.out_of(x + self.tap(self.out(mixed)))


@dataclass(frozen=True)
class Case:
    """A denoiser, how to call it, and the names of its sites.

    Attributes:
        build: makes the denoiser.
        sites: the expected sites, in graph order.
        predict: calls it on [batch, tokens, dim] latents, a timestep and [batch, text tokens, dim] text.
    """

    build: Callable[[], nn.Module]
    sites: tuple[str, ...] = ("cross.0", "cross.1")
    predict: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] = lambda model, x, t, text: model(x, t, text)


def _two(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return torch.cat(model(x[:, :4], x[:, 4:], t, text), dim=1)


def _image(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return model(x.mT.unflatten(2, (2, 3)), t, text).flatten(2).mT


CASES: dict[str, Case] = {
    "fused": Case(Denoiser),
    "einsum": Case(lambda: Denoiser(Einsum)),
    "keys in rows": Case(lambda: Denoiser(KeysFirst)),
    "baddbmm": Case(lambda: Denoiser(Baddbmm)),
    "multi-query, softmax written out": Case(lambda: Denoiser(MultiQuery)),
    "linear": Case(lambda: Denoiser(Linear)),
    "core in a module": Case(lambda: Denoiser(InAModule), ("cross.0.core", "cross.1.core")),
    **{
        f"MultiheadAttention, batch_first={first}, need_weights={weights}": Case(
            lambda first=first, weights=weights: Denoiser(lambda: Native(batch_first=first, need_weights=weights)),
            ("cross.0.attention", "cross.1.attention"),
        )
        for first in (True, False)
        for weights in (True, False)
    },
    "TransformerDecoderLayer, latents by keyword": Case(
        DecoderLayers,
        ("layers.0.multihead_attn", "layers.1.multihead_attn"),
        lambda model, x, t, text: model(context=[text], timesteps=t.expand(len(x)), noisy=x)["prediction"],
    ),
    "multi_head_attention_forward": Case(Functional),
    "residual inside": Case(WithResidual),
    "gate inside": Case(GatedInside),
    "inline, context as a dict": Case(
        Inline,
        ("blocks.0#2", "blocks.0#3", "blocks.1#2", "blocks.1#3"),
        lambda model, x, t, text: model(x, t, {"text": text, "image": text[:, :3] * 2})[0],
    ),
    "no signature": Case(Unsigned, predict=lambda model, x, t, text: model(x, t, context=text)["out"][0]),
    "latents last, a dataclass": Case(
        TextFirst, predict=lambda model, x, t, text: model(torch.cat([text, text[:, :1]], 1), t, x).eps
    ),
    "no timestep": Case(WithoutTime, predict=lambda model, x, t, text: model(context=text, z=x)),
    "text and timestep": Case(TimedText),
    "shared": Case(Shared, ("attention", "attention#2")),
    "two modalities": Case(TwoModalities, ("video", "audio"), _two),
    "image": Case(Convolutional, ("attention",), _image),
}
