"""The runtime's numpy schedulers match those of diffusers up to rounding."""

from __future__ import annotations

from itertools import product
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tgate_compile import ConfigurationError
from tgate_compile.bundle.denoiser_state import plain_config
from tgate_compile.bundle.manifest import Scheduler as Spec
from tgate_compile.runtime._pipeline import Scheduler, make_scheduler

STEPS = (1, 2, 7, 14, 15, 25)
SHAPE = (2, 4, 8, 8)
LATENT_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    LATENT_DIFFUSION,
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{}, {"clip_sample": False, "set_alpha_to_one": False}, {"clip_sample_range": 0.5}],
    "EulerDiscreteScheduler": [
        {},
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
        {"final_sigmas_type": "sigma_min"},
    ],
    "DPMSolverMultistepScheduler": [
        {},
        {"use_karras_sigmas": True},
        {"euler_at_final": True},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"lambda_min_clipped": -5.1},
        {"solver_order": 1},
        {"solver_type": "bh2"},
    ],
    "PNDMScheduler": [
        {"skip_prk_steps": True},
        {"skip_prk_steps": True, "set_alpha_to_one": True},
        {},
        {"set_alpha_to_one": True},
    ],
}


def ours(reference: Any, steps: int, name: str | None = None) -> Scheduler:
    spec = Spec(class_name=type(reference).__name__, config=plain_config(dict(reference.config)))
    return make_scheduler(spec, name, steps)


def difference(reference: Any, scheduler: Scheduler, steps: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest relative difference in a loop of both with random predictions."""
    reference.set_timesteps(steps)
    if hasattr(reference, "set_begin_index"):
        reference.set_begin_index(0)  # otherwise diffusers takes the second of two equal timesteps
    np.testing.assert_allclose(scheduler.timesteps, reference.timesteps.numpy(), rtol=0, atol=1e-3)
    assert scheduler.timesteps.dtype == reference.timesteps.numpy().dtype
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator, dtype=dtype)
    expected, latents = noise * reference.init_noise_sigma, noise.numpy() * np.float32(scheduler.initial_sigma)
    worst = 0.0
    for step, timestep in enumerate(reference.timesteps):
        seen, own = reference.scale_model_input(expected, timestep), scheduler.model_input(latents, step)
        prediction = torch.randn(SHAPE, generator=generator, dtype=dtype)
        expected = reference.step(prediction, timestep, expected).prev_sample
        latents = scheduler.step(prediction.numpy(), step, latents)
        assert latents.dtype == noise.numpy().dtype
        for one, other in ((own, seen), (latents, expected)):
            worst = max(worst, float(np.abs(one - other.numpy()).max() / other.abs().max()))
    return worst


# Betas and options act apart, so by default not every option meets every kind of betas.
@pytest.mark.parametrize("all_pairs", [False, pytest.param(True, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_as_in_diffusers(name: str, spacing: str, prediction_type: str, all_pairs: bool) -> None:
    is_pndm = name == "PNDMScheduler"
    for betas, options, offset in product(BETAS, OPTIONS[name], (0, 1)):
        if not (all_pairs or betas is LATENT_DIFFUSION or options is OPTIONS[name][0]):
            continue
        config = {"timestep_spacing": spacing, "prediction_type": prediction_type, "steps_offset": offset}
        for steps in STEPS:
            if is_pndm and (prediction_type == "sample" or (steps < 4 and not options.get("skip_prk_steps"))):
                continue  # refused, see below
            reference = getattr(diffusers, name)(**config, **betas, **options)
            if is_pndm:  # its first steps lose too many digits to compare in float32
                reference.alphas_cumprod = reference.alphas_cumprod.double()
                reference.final_alpha_cumprod = reference.final_alpha_cumprod.double()
            dtype = torch.float64 if is_pndm else torch.float32
            worst = difference(reference, ours(reference, steps), steps, dtype)
            assert worst < 1e-5, (betas, options, offset, steps)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "PNDMScheduler"])  # without zero terminal SNR
def test_zero_terminal_snr(name: str) -> None:
    """Sigmas reach 4096, which makes diffusers' own rounding that much larger."""
    config = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for steps in STEPS:
        reference = getattr(diffusers, name)(**config, **LATENT_DIFFUSION)
        assert difference(reference, ours(reference, steps), steps) < 1e-3


def test_another_than_the_bundles_own() -> None:
    """Like diffusers' `from_config`."""
    own = diffusers.EulerDiscreteScheduler(**LATENT_DIFFUSION, timestep_spacing="leading", steps_offset=1)
    others = {"ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler", "pndm": "PNDMScheduler"}
    for name, other in others.items():
        reference = getattr(diffusers, other)(**{**LATENT_DIFFUSION, "timestep_spacing": "leading", "steps_offset": 1})
        assert difference(reference, ours(own, 7, name), 7) < 1e-5


def test_unsupported_options() -> None:
    with pytest.raises(ConfigurationError, match=r"LCMScheduler.*DDIMScheduler, EulerDiscreteScheduler"):
        ours(diffusers.LCMScheduler(), 4)
    with pytest.raises(ConfigurationError, match=r"solver_order=3.*1 and 2.*ddim, euler, dpm"):
        ours(diffusers.DPMSolverMultistepScheduler(solver_order=3), 4)
    with pytest.raises(ConfigurationError, match="thresholding=True"):
        ours(diffusers.DDIMScheduler(thresholding=True), 4)
    with pytest.raises(ConfigurationError, match=r"'ddim', 'euler', 'dpm\+\+', 'pndm'.*'heun'"):
        ours(diffusers.DDIMScheduler(), 4, "heun")
    for steps in (0, 1001, 2.5, True):
        with pytest.raises(ConfigurationError, match="from 1 to 1000"):
            ours(diffusers.DDIMScheduler(), steps)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"starts at timestep 1000.*up to 999"):
        ours(diffusers.DDIMScheduler(steps_offset=1), 1000)
    with pytest.raises(ConfigurationError, match=r"Runge-Kutta.*4 steps or more.*is 3.*skip_prk_steps=True"):
        ours(diffusers.PNDMScheduler(), 3)
    with pytest.raises(ConfigurationError, match=r"prediction_type='sample'.*'epsilon' and 'v_prediction'"):
        ours(diffusers.PNDMScheduler(prediction_type="sample"), 5)
    with pytest.raises(ConfigurationError, match=r"starts at timestep 1000.*up to 999"):
        ours(diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), 1000)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 0.5, "num_train_timesteps": 500}])
def test_flow_matching(options: dict[str, Any]) -> None:
    reference = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    # It has no initial sigma and leaves the latents as they are: its pipelines do not ask for either.
    reference.init_noise_sigma, reference.scale_model_input = 1.0, lambda sample, timestep: sample
    for steps in STEPS:
        assert difference(reference, ours(reference, steps), steps) < 1e-5


def test_flow_matching_is_neither_replaced_nor_approximated() -> None:
    with pytest.raises(ConfigurationError, match=r"scheduler='ddim'.*flow matching"):
        ours(diffusers.FlowMatchEulerDiscreteScheduler(), 4, "ddim")
    with pytest.raises(ConfigurationError, match="use_dynamic_shifting=True"):
        ours(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


@pytest.mark.parametrize(("skip", "calls"), [(True, 8), (False, 16)])
def test_calls_of_pndm_beyond_its_steps(skip: bool, calls: int) -> None:
    scheduler = ours(diffusers.PNDMScheduler(skip_prk_steps=skip), 7)
    assert (len(scheduler.timesteps), scheduler.warm_up) == (calls, calls - 7)
