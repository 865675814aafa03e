"""Unusual pipelines: Kandinsky 3 and AudioLDM 2 against hooks; pipelines of several stages are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DDPMWuerstchenScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel
from torch import Tensor

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.denoiser_reference import OneCall, played
from tests.tiny_pipelines import seeded
from tgate_compile import UnsupportedModelError

GATE = 2


def kandinsky_3() -> Any:
    unet = seeded(
        lambda: diffusers.Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=4,
            encoder_hid_dim=8,
        )
    )
    return diffusers.Kandinsky3Pipeline(
        tokenizer=None, text_encoder=None, unet=unet, scheduler=DDPMScheduler(clip_sample=False), movq=None
    )


def run_kandinsky_3(pipe: Any, **call: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        attention_mask=mask,
        negative_attention_mask=mask.flip(0),
        height=64,
        width=64,
        num_inference_steps=5,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        **call,
    )[0]


@pytest.mark.heavy
def test_kandinsky_3() -> None:
    """All of its attentions are declared as cross-attentions: also self-attention of the latents, and the pooling of
    the text into the time embedding, which is still computed after the gate."""
    plain, gated = kandinsky_3(), tgate_compile.optimize(kandinsky_3(), GATE, backend="eager")
    halved = ("sample", "encoder_hidden_states", "encoder_attention_mask")
    result = run_kandinsky_3(gated)
    sites = tgate_compile.describe(gated).sites
    by_hand = [
        name
        for name, module in plain.unet.named_modules()
        if hasattr(module, "to_k") and module.to_k.in_features == 4 and name != "add_time_condition.attention"
    ]
    assert sorted(sites) == sorted(by_hand)
    with played(OneCall(plain.unet, GATE, halved=halved), plain.unet, sites):
        expected = run_kandinsky_3(plain)
    assert_same(result, expected)
    assert_differ(expected, run_kandinsky_3(plain))
    assert torch.equal(run_kandinsky_3(gated, gate_step=99), run_kandinsky_3(plain))


class Audio(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """AudioLDM 2's loop without its text encoders and vocoder: two texts, each with its own cross-attentions."""

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, guidance_scale: float = 3.5) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        self.scheduler.set_timesteps(5)
        x = torch.randn(1, 4, 8, 8, generator=generator)
        generated, text = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
        mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
        for t in self.scheduler.timesteps:
            uncond, cond = self.unet(
                torch.cat([x, x]),
                t,
                encoder_hidden_states=generated,
                encoder_hidden_states_1=text,
                encoder_attention_mask_1=mask,
                return_dict=False,
            )[0].chunk(2)
            x = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
        return x


def audioldm_2() -> Audio:
    unet = seeded(
        lambda: diffusers.AudioLDM2UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            cross_attention_dim=((8,), (8, 8)),
        )
    )
    return Audio(unet, DDIMScheduler())


def test_audioldm_2() -> None:
    plain, gated = audioldm_2(), tgate_compile.optimize(audioldm_2(), GATE, backend="eager")
    halved = ("sample", "encoder_hidden_states", "encoder_hidden_states_1", "encoder_attention_mask_1")
    result = gated()
    sites = [name for name, _ in plain.unet.named_modules() if name.endswith("attn2")]
    assert sorted(tgate_compile.describe(gated).sites) == sorted(sites)
    with played(OneCall(plain.unet, GATE, halved=halved), plain.unet, sites):
        expected = plain()
    assert_same(result, expected)
    assert_differ(expected, plain())
    assert torch.equal(gated(gate_step=99), plain())


def bare(pipeline: str, **components: Any) -> Any:
    """Return a pipeline with only these components."""
    made = getattr(diffusers, pipeline)
    parameters = inspect.signature(made.__init__).parameters.items()
    needed = [name for name, parameter in parameters if parameter.default is inspect.Parameter.empty]
    return made(**{**dict.fromkeys(needed[1:]), **components})


def stable_cascade(*, self_attn: bool = True) -> Any:
    return diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16,),
        num_attention_heads=(2,),
        down_num_layers_per_block=(1,),
        up_num_layers_per_block=(1,),
        down_blocks_repeat_mappers=(1,),
        up_blocks_repeat_mappers=(1,),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        clip_seq=2,
        dropout=(0.0,),
        self_attn=self_attn,
        switch_level=(False,),
        timestep_conditioning_type=("sca",),
    )


def prior() -> Any:
    return diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8, num_embeddings=3
    )


def added_keys(**options: Any) -> UNet2DConditionModel:
    """Return a UNet whose attentions have keys of the text as well as of the latents."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=8,
        encoder_hid_dim=8,
        resnet_time_scale_shift="scale_shift",
        **options,
    )


def unidiffuser() -> Any:
    return UniDiffuserModel(
        text_dim=8,
        clip_img_dim=8,
        num_text_tokens=3,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
    )


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8
    )


JOINT: dict[str, Callable[[], Any]] = {
    "StableCascadePriorPipeline": lambda: bare(
        "StableCascadePriorPipeline", prior=stable_cascade(), scheduler=DDPMWuerstchenScheduler()
    ),
    "StableCascadeDecoderPipeline": lambda: bare(
        "StableCascadeDecoderPipeline", decoder=stable_cascade(), scheduler=DDPMWuerstchenScheduler()
    ),
    "KandinskyV22PriorPipeline": lambda: bare("KandinskyV22PriorPipeline", prior=prior(), scheduler=DDIMScheduler()),
    "ShapEPipeline": lambda: bare("ShapEPipeline", prior=prior(), scheduler=diffusers.HeunDiscreteScheduler()),
    "KandinskyV22Pipeline": lambda: bare(
        "KandinskyV22Pipeline",
        unet=added_keys(encoder_hid_dim_type="image_proj", addition_embed_type="image"),
        scheduler=DDPMScheduler(),
        movq=diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4),
    ),
    "IFPipeline": lambda: bare(
        "IFPipeline",
        unet=added_keys(addition_embed_type="text", addition_embed_type_num_heads=2),
        scheduler=DDPMScheduler(),
        requires_safety_checker=False,
    ),
    "DiTPipeline": lambda: bare("DiTPipeline", transformer=dit(), scheduler=DDPMScheduler()),
}


@pytest.mark.parametrize("name", JOINT)
def test_without_cross_attention_is_refused_at_once(name: str) -> None:
    pipe = JOINT[name]()
    with pytest.raises(UnsupportedModelError, match=r"no cross-attention .*What works instead"):
        tgate_compile.optimize(pipe, GATE, backend="eager")
    tgate_compile.optimize(pipe, None, guidance_step=2, backend="eager")  # needs no cross-attentions


def test_cross_attentions_that_claim_not_to_be() -> None:
    """In Stable Cascade's blocks that attend only to the text, cross-attentions have `is_cross_attention=False`."""
    pipe = Audio(seeded(lambda: stable_cascade(self_attn=False)), DDPMWuerstchenScheduler())
    tgate_compile.optimize(pipe, GATE, backend="eager")
