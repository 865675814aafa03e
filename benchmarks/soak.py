"""Run a long random sequence of mixed calls, and compare each one with a fresh pipeline.

    python -m benchmarks.soak --calls 2000 --seed 0 --out benchmarks/results/soak.json

Several tiny pipelines live for the whole run, as in a server: Stable Diffusion, image-to-image on the same UNet, SDXL,
PixArt, a custom loop, and a pipeline whose batches cannot be gated and run plain. Each call draws its size, batch,
prompt length, steps, gate, scheduler, LoRA, FreeU and guidance at random, and may have a callback that calls the
denoiser, raises, or interrupts. Two calls may run in two threads, and pipelines are restored and optimized again.

The expected result of a call is computed by a fresh plain pipeline in the same state. If the call is gated, the
pipeline uses the forward hooks of `tests/hook_reference.py`, which share no code with tgate_compile. Ungated results
must be bitwise equal; gated ones may differ by 1e-5 of the largest value. The first larger difference ends the run and
prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import tgate_compile
from tests.hook_reference import hook_reference
from tests.own_loops import NO_TEXT, TEXTS, Looping
from tests.tiny_pipelines import (
    PROMPTS,
    TEXT_DIM,
    VELOCITY,
    add_lora,
    image,
    image_embeds,
    load_ip_adapter,
    pixart,
    pixart_prompt,
    run,
    sdxl,
    stable_diffusion,
)

TOLERANCE = 1e-5
NEVER = 1000
#: Denoiser calls per step, and number of initial calls that do not belong to a step.
SCHEDULERS: dict[str, tuple[int, int]] = {
    "DDIMScheduler": (1, 0),
    "EulerDiscreteScheduler": (1, 0),
    "DPMSolverMultistepScheduler": (1, 0),
    "HeunDiscreteScheduler": (2, 0),
    "PNDMScheduler": (1, 1),
}
EVENTS = ("", "", "", "", "preview", "raise", "interrupt", "threads", "again")
#: The probability that a drawn "again" event takes place, because it rebuilds all graphs.
AGAIN = 0.15
#: Pipelines with callbacks. Previews do not work if the denoiser needs more than latents, timestep and text.
CALLBACKS = {
    "preview": ("unet", "img2img"),
    "raise": ("unet", "img2img", "sdxl", "ip"),
    "interrupt": ("unet", "img2img", "sdxl", "ip"),
}


@dataclass(frozen=True)
class Step:
    """A call, and the state of the pipeline during the call.

    Attributes:
        actor: name of the pipeline.
        gate: gate step of the call; `NEVER` for an ungated call.
        width: width of the image in pixels.
        images: number of images per call.
        steps: number of inference steps.
        tokens: number of tokens of prompt embeddings; 0 passes text instead.
        guidance: guidance scale.
        scheduler: class of the scheduler.
        adapter: name of the active LoRA; "" for none.
        scale: scale of the LoRA.
        freeu: whether FreeU is on.
        ip_scale: scale of the IP-Adapter, if the pipeline has one.
        event: what happens during the call; see `EVENTS`.
        at: step at which the event happens.
        seed: seed of the noise.
    """

    actor: str
    gate: int = NEVER
    width: int = 16
    images: int = 1
    steps: int = 4
    tokens: int = 0
    guidance: float = 5.0
    scheduler: str = "DDIMScheduler"
    adapter: str = ""
    scale: float = 1.0
    freeu: bool = False
    ip_scale: float = 0.0
    event: str = ""
    at: int = 1
    seed: int = 0


class BrokenError(Exception):
    """The error that a callback raises."""


class Composed(Looping):
    """A loop with three predictions for each image, which cannot be gated."""

    def guided(self, latents: torch.Tensor, timestep: Any, scale: float) -> torch.Tensor:
        texts = torch.cat([NO_TEXT, TEXTS[:2]])
        rows = self.denoised(latents.repeat(3, 1, 1, 1), timestep, texts)
        return rows[:1] + scale * sum(row - rows[:1] for row in rows[1:, None]) / 2


def build(actor: str) -> Any:
    """Return a plain pipeline, always with the same weights."""
    if actor == "sdxl":
        pipe = sdxl(scheduler=diffusers.DDIMScheduler(**VELOCITY))
        pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer_2)
    elif actor == "pixart":
        return pixart()
    elif actor == "composed":
        return Composed(stable_diffusion(layout="least").unet, diffusers.DDIMScheduler(**VELOCITY))
    else:
        name = "StableDiffusionImg2ImgPipeline" if actor == "img2img" else "StableDiffusionPipeline"
        pipe = stable_diffusion(name, layout="least")
    # A tokenizer keeps padding as state, so each thread needs a separate one.
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    if actor == "ip":
        load_ip_adapter(pipe)
    elif actor in ("unet", "img2img", "own"):
        add_lora(pipe.unet, "a", 1)
        add_lora(pipe.unet, "b", 2)
    return pipe


def put_in_state(pipe: Any, step: Step) -> None:
    """Set scheduler, LoRA, FreeU and IP-Adapter of the pipeline."""
    if step.actor in ("unet", "img2img", "own"):
        if step.adapter:
            pipe.unet.enable_adapters()
            pipe.unet.set_adapters([step.adapter], [step.scale])
        else:
            pipe.unet.disable_adapters()
        if step.freeu:
            pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        else:
            pipe.unet.disable_freeu()
    if step.actor == "ip":
        pipe.set_ip_adapter_scale(step.ip_scale)
    if step.actor not in ("composed", "pixart"):
        more = {"skip_prk_steps": True} if step.scheduler == "PNDMScheduler" else {}
        pipe.scheduler = getattr(diffusers, step.scheduler)(**VELOCITY, **more)


def prompt_of(step: Step) -> dict[str, Any]:
    """Return the prompt arguments of the call."""
    if step.actor == "pixart":
        call = pixart_prompt(step.images, step.tokens or 6)
        return {**call, "width": step.width}
    if not step.tokens:
        return {"prompt": PROMPTS[: step.images]}
    generator = torch.Generator().manual_seed(step.tokens)
    dim = 2 * TEXT_DIM if step.actor == "sdxl" else TEXT_DIM
    call = {
        name: torch.randn(step.images, step.tokens, dim, generator=generator)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    if step.actor == "sdxl":
        call["pooled_prompt_embeds"] = torch.randn(step.images, TEXT_DIM, generator=generator)
        call["negative_pooled_prompt_embeds"] = torch.randn(step.images, TEXT_DIM, generator=generator)
    return call


def callback_of(step: Step, denoiser: Any) -> dict[str, Any]:
    """Return the callback argument; the callback calls `denoiser` for a preview, raises, or interrupts."""
    if step.event not in ("preview", "raise", "interrupt") or step.actor not in CALLBACKS[step.event]:
        return {}

    def act(pipe: Any, at: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if at != step.at:
            return tensors
        if step.event == "raise":
            raise BrokenError
        if step.event == "interrupt":
            pipe._interrupt = True
            return tensors
        latents = tensors["latents"]
        text = torch.ones(len(latents), 5, TEXT_DIM)
        with torch.no_grad():
            preview = denoiser(latents, torch.tensor(10), encoder_hidden_states=text).sample
        return {"latents": latents + 0.05 * preview}

    return {"callback_on_step_end": act}


def call(pipe: Any, step: Step, denoiser: Any, **more: Any) -> torch.Tensor:
    """Run `pipe` and return its latents."""
    if step.actor == "composed":
        result = pipe(num_inference_steps=step.steps, generator=torch.Generator().manual_seed(step.seed), **more)
        return result.clone()
    if step.actor == "own":
        return own_loop(pipe, step, **more)
    arguments: dict[str, Any] = {**prompt_of(step), **callback_of(step, denoiser), **more}
    arguments |= {"guidance_scale": step.guidance, "steps": step.steps, "seed": step.seed}
    if step.actor == "img2img":
        arguments |= {"image": image(step.images, step.width), "strength": 0.8}
    elif step.actor != "pixart":
        arguments |= {"height": 16, "width": step.width}
    if step.actor == "ip":
        arguments["ip_adapter_image_embeds"] = image_embeds(pipe, step.images)
    result: torch.Tensor = run(pipe, **arguments)
    return result.clone()


def own_loop(pipe: Any, step: Step, gate_step: int | None = None) -> torch.Tensor:
    """Run a custom denoising loop, with `generation` if the pipeline is optimized; return the latents."""
    guided = step.guidance > 1
    if gate_step is not None:
        with tgate_compile.generation(pipe, guidance=guided, gate_step=gate_step):
            return own_loop(pipe, step)
    texts = torch.cat([NO_TEXT.expand(step.images, -1, -1), TEXTS[: step.images]])
    current = torch.randn(step.images, 4, 8, step.width // 2, generator=torch.Generator().manual_seed(step.seed))
    pipe.scheduler.set_timesteps(step.steps)
    current = current * pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            scaled = pipe.scheduler.scale_model_input(current, timestep)
            if guided:
                both = pipe.unet(torch.cat([scaled] * 2), timestep, encoder_hidden_states=texts).sample
                uncond, cond = both.chunk(2)
                prediction = uncond + step.guidance * (cond - uncond)
            else:
                prediction = pipe.unet(scaled, timestep, encoder_hidden_states=texts[step.images :]).sample
            current = pipe.scheduler.step(prediction, timestep, current).prev_sample
    return current


def expected_of(step: Step) -> torch.Tensor:
    """Return the result of a fresh plain pipeline, with T-GATE implemented by hooks if the call is gated."""
    pipe, other = build(step.actor), build(step.actor)
    for each in (pipe, other):
        put_in_state(each, step)
    denoiser = getattr(other, "unet", None)
    if step.gate == NEVER or step.actor == "composed":
        return call(pipe, step, denoiser)
    calls_per_step, warmup_calls = SCHEDULERS[step.scheduler]
    options = {"calls_per_step": calls_per_step, "warmup_calls": warmup_calls, "guided": step.guidance > 1}
    with hook_reference(pipe, step.gate, interleaved=step.actor == "sdxl", **options):
        return call(pipe, step, denoiser)


class Soak:
    """The pipelines of the run, and counts of what has been done with them.

    Args:
        seed: seed of the sequence.
        short: draw from fewer states and sizes, so that most calls can reuse existing graphs.
    """

    def __init__(self, seed: int, *, short: bool = False) -> None:
        self.random = random.Random(seed)
        self.short = short
        self.done: Counter[str] = Counter()
        self.worst = 0.0
        self._expected: dict[Step, torch.Tensor] = {}
        actors = ("unet", "unet", "img2img", "composed") if short else (
            "unet", "unet", "img2img", "sdxl", "pixart", "own", "ip", "composed",
        )  # fmt: skip
        self.actors = actors
        self.pipes: dict[str, Any] = {name: build(name) for name in dict.fromkeys(actors)}
        # Both pipelines share one UNet, as for a hires fix.
        components = {**self.pipes["unet"].components, "tokenizer": self.pipes["img2img"].tokenizer}
        self.pipes["img2img"] = StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
        self.pipes["img2img"].set_progress_bar_config(disable=True)
        for name in self.pipes:
            self.optimize(name)

    def optimize(self, name: str) -> None:
        """Optimize a pipeline with a random configuration."""
        options: dict[str, Any] = {"backend": "eager"}
        if not self.short and self.random.random() < 0.1:
            options["graph_memory"] = self.random.choice((1, 100_000_000))
        if name == "composed":
            options["on_unsupported"] = "plain"
        tgate_compile.optimize(self.pipes[name], self.random.choice((1, 2, 3)), **options)

    def drawn(self) -> Step:
        """Draw the next call."""
        pick = self.random.choice
        actor = pick(self.actors)
        event = pick(EVENTS)
        if event == "again" and (self.done["event again"] if self.short else self.random.random() > AGAIN):
            event = ""
        step = Step(actor, event=event, steps=pick((4, 5)), seed=pick((0, 1)), at=pick((0, 1, 2)))
        step = replace(step, gate=pick((1, 2, 3, NEVER)))
        if actor == "composed":
            return replace(step, gate=NEVER)
        if not self.short:
            step = replace(step, width=pick((16, 16, 16, 24)), images=pick((1, 1, 2)))
            if actor != "img2img":
                step = replace(step, guidance=pick((5.0, 5.0, 5.0, 1.0)))
        if actor == "img2img":
            step = replace(step, steps=5, images=1)
        if actor != "own":
            step = replace(step, tokens=pick((0, 0, 8, 24) if not self.short else (0, 0, 24)))
        if actor == "pixart":
            return replace(step, scheduler="DPMSolverMultistepScheduler")
        names = list(SCHEDULERS) if actor != "img2img" else ["DDIMScheduler", "EulerDiscreteScheduler"]
        step = replace(step, scheduler=pick(names))
        if actor == "ip":
            return replace(step, ip_scale=pick((0.3, 0.8)))
        if actor in ("unet", "img2img", "own"):
            adapter = pick(("", "", "a", "b"))
            scale = pick((0.5, 1.0)) if adapter == "a" and not self.short else 1.0
            step = replace(
                step, adapter=adapter, scale=scale, freeu=self.random.random() < (0.1 if self.short else 0.3)
            )
        return step

    def run(self, calls: int, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any] | None:
        """Make `calls` calls; return details about the first wrong result, or None if all are right."""
        number = 0
        while number < calls:
            step = self.drawn()
            batch = [step]
            if step.event == "threads":
                batch.append(self._elsewhere(step))
            if step.event == "again":
                self._again(step.actor)
            for each in batch:
                put_in_state(self.pipes[each.actor], each)
            for each, result in zip(batch, self._results(batch), strict=True):
                problem = self._compared(each, result)
                if problem is not None:
                    return {"call": number, "problem": problem, "of": asdict(each), "alone": self._alone(each)}
                self._count(each)
                number += 1
            progress(number)
        return None

    def _elsewhere(self, step: Step) -> Step:
        """Draw a call of a pipeline with a different denoiser."""
        while True:
            other = replace(self.drawn(), event="threads")
            if {step.actor, other.actor} != {"unet", "img2img"} and step.actor != other.actor:
                return other

    def _again(self, name: str) -> None:
        tgate_compile.restore(self.pipes[name])
        plain = Step(name)
        put_in_state(self.pipes[name], plain)
        shared = {"unet": "img2img", "img2img": "unet"}.get(name)
        if shared is None or tgate_compile.pipeline.optimized.state_of(self.pipes[shared]) is None:
            assert not self._compared(plain, call(self.pipes[name], plain, None)), "restored"
        self.optimize(name)

    def _results(self, batch: list[Step]) -> list[torch.Tensor | BaseException]:
        results: list[Any] = [None] * len(batch)

        def work(position: int) -> None:
            try:
                results[position] = self._called(batch[position], self.pipes[batch[position].actor])
            except (Exception, KeyboardInterrupt) as error:
                results[position] = error

        if len(batch) == 1:
            work(0)
            return results
        threads = [threading.Thread(target=work, args=(position,)) for position in range(len(batch))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _called(self, step: Step, pipe: Any) -> torch.Tensor:
        gate = {} if step.actor == "composed" else {"gate_step": step.gate}
        return call(pipe, step, getattr(pipe, "unet", None), **gate)

    def _compared(self, step: Step, result: torch.Tensor | BaseException) -> str | None:
        if step.event == "raise" and isinstance(result, BrokenError):
            return None
        if isinstance(result, BaseException):
            return f"{type(result).__name__}: {result}"
        key = replace(step, event="" if step.event in ("threads", "again") else step.event)
        if key not in self._expected:
            try:
                self._expected[key] = expected_of(key)
            except BrokenError:
                return "the callback raised an error, but the call continued"
        expected = self._expected[key]
        if result.shape != expected.shape:
            return f"shape {list(result.shape)} instead of {list(expected.shape)}"
        if step.gate == NEVER:
            return None if torch.equal(result, expected) else f"{difference(result, expected):.1e} from plain"
        self.worst = max(self.worst, difference(result, expected))
        far = not difference(result, expected) <= TOLERANCE
        return f"{difference(result, expected):.1e} from the pipeline with hooks" if far else None

    def _alone(self, step: Step) -> str:
        """Describe the result of the same call with a freshly optimized pipeline."""
        pipe = build(step.actor)
        put_in_state(pipe, step)
        plain = {"on_unsupported": "plain"} if step.actor == "composed" else {}
        tgate_compile.optimize(pipe, 2, backend="eager", **plain)
        try:
            problem = self._compared(step, self._called(step, pipe))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return "the same call of a freshly optimized pipeline: " + (problem or "correct")

    def _count(self, step: Step) -> None:
        self.done.update([f"pipeline {step.actor}", f"scheduler {step.scheduler}", "calls"])
        self.done.update([f"event {step.event}"] * bool(step.event))
        self.done["gated" if step.gate != NEVER else "ungated"] += 1
        self.done[f"LoRA {step.adapter or 'off'}"] += step.actor in ("unet", "img2img", "own")
        self.done["FreeU"] += step.freeu
        self.done["without guidance"] += step.guidance <= 1
        self.done[f"prompt of {step.tokens} tokens"] += bool(step.tokens)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def quiet() -> Iterator[None]:
    """Hide expected warnings: a gate that has no effect, a call that runs plain, discarded graphs."""
    logger = logging.getLogger("tgate_compile")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="fewer states and sizes, as in the tests")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Already found a `peft_config`|`isinstance.treespec")
    diffusers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    soak = Soak(arguments.seed, short=arguments.short)

    def progress(done: int) -> None:
        if done % 50 == 0:
            print(f"{done} calls, {time.perf_counter() - began:.0f} s, worst {soak.worst:.1e}", flush=True)

    with quiet():
        problem = soak.run(arguments.calls, progress)
    seconds = time.perf_counter() - began
    for name, count in sorted(soak.done.items()):
        print(f"{name:40} {count:6}")
    if problem is not None:
        again = f"python -m benchmarks.soak --calls {problem['call'] + 2} --seed {arguments.seed}"
        print(json.dumps(problem, indent=2), f"\nTo repeat: {again}{' --short' if arguments.short else ''}")
        raise SystemExit(1)
    print(f"All calls agree ({seconds:.0f} s); the largest relative difference of a gated call is {soak.worst:.1e}.")
    if arguments.out is not None:
        command = f"python -m benchmarks.soak --calls {arguments.calls} --seed {arguments.seed}"
        settings = {"command": command, "seed": arguments.seed, "seconds": round(seconds), "torch": torch.__version__}
        result = {**settings, "diffusers": diffusers.__version__, "tgate_compile": tgate_compile.__version__}
        counts = dict(sorted(soak.done.items()))
        arguments.out.write_text(
            json.dumps({**result, "largest_difference": soak.worst, "counts": counts}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
