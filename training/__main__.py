"""Run a training stage with `python -m training STAGE`. README.md in this folder lists the stages and their order."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from training.unet_training import DEFAULTS, LATEST

DEMO = Path("tgate_compile/_demo")
WEIGHTS = DEMO / "weights"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    text = _stage(stages, "text", _text, batch=128)
    _family(text)
    text.add_argument("--steps", type=int, help="default: 700, for pixart 900, for sdxl 1200")
    text.add_argument("--start-from", type=Path, help="folder of a text encoder of sd to continue training")
    vae = _stage(stages, "vae", _vae, minutes=6.5, batch=24)
    vae.add_argument("--start-from", type=Path, help="folder of an autoencoder to continue training")
    vae.add_argument("--decoder-only", action="store_true", help="keep the latents unchanged")
    _stage(stages, "reader", _reader, steps=600, batch=128)
    unet = _stage(stages, "unet", _unet)
    _family(unet)
    for option in ("minutes", "batch", "images", "pair-share", "learning-rate"):
        kind = int if option in ("batch", "images") else float
        unet.add_argument(f"--{option}", type=kind, help="default: see the family in unet_training.py")
    probing = _stage(stages, "probe", _probe)
    _family(probing)
    probing.add_argument("--captions", type=int, default=256)
    export = _stage(stages, "export", _export)
    _family(export)
    export.add_argument("--checkpoint", type=Path)
    evaluation = _stage(stages, "evaluate", _evaluate)
    _family(evaluation)
    evaluation.add_argument("--steps", type=int, help="default: the family's")
    evaluation.add_argument(
        "--guidance", type=float, nargs="+", help="scales to try; the best one is used; default: the family's"
    )
    evaluation.add_argument("--out", type=Path, help="JSON file for the result, which is otherwise printed")
    picture = _stage(stages, "picture", _picture)
    picture.add_argument("--out", type=Path, default=Path("docs/demo_models.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.command = shlex.join(["python", "-m", "training", *sys.argv[1:]])
    arguments.run(arguments)


def _family(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=DEFAULTS, default="sd", help="default: %(default)s")


def _stage(
    stages: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    batch: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
) -> argparse.ArgumentParser:
    parser = stages.add_parser(name)
    parser.set_defaults(run=run)
    parser.add_argument("--parts", type=Path, default=Path("build/demo"), help="where the trained parts are kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    if batch is not None:
        parser.add_argument("--batch", type=int, default=batch, help="per worker (default: %(default)s)")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    if minutes is not None:
        parser.add_argument("--minutes", type=float, default=minutes, help="wall-clock (default: %(default)s)")
    return parser


# Imported late, so that no stage has to wait for the libraries of the others.


def _text(arguments: argparse.Namespace) -> None:
    a = arguments
    if a.family == "sd":
        from training.train_text import train_text

        accuracy = train_text(
            a.parts, steps=a.steps or 700, device=a.device, seed=a.seed, batch=a.batch, start_from=a.start_from
        )
    elif a.family == "pixart":
        from training.train_t5 import train_t5

        accuracy = train_t5(a.parts / "pixart", steps=a.steps or 900, device=a.device, seed=a.seed, batch=a.batch)
    elif a.family == "sdxl":
        from training.train_penultimate import train_penultimate

        accuracy = train_penultimate(
            WEIGHTS, a.parts / "sdxl", steps=a.steps or 1200, device=a.device, seed=a.seed, batch=a.batch
        )
    else:
        raise SystemExit(f"the family {a.family} uses the text encoder of sd, so there is nothing to train.")
    print(json.dumps(accuracy, indent=1))


def _vae(arguments: argparse.Namespace) -> None:
    from training.train_vae import train_vae

    a = arguments
    train_vae(
        a.parts / "vae",
        minutes=a.minutes,
        device=a.device,
        seed=a.seed,
        batch=a.batch,
        start_from=a.start_from,
        decoder_only=a.decoder_only,
    )


def _reader(arguments: argparse.Namespace) -> None:
    from training.train_reader import train_reader

    a = arguments
    out = WEIGHTS / "attribute_reader.safetensors"
    train_reader(a.parts / "vae", out, steps=a.steps, device=a.device, seed=a.seed, batch=a.batch)


def _unet(arguments: argparse.Namespace) -> None:
    from training.train_unet import train_unet

    a = arguments
    given = {name: getattr(a, name) for name in ("minutes", "batch", "images", "pair_share", "learning_rate")}
    config = dataclasses.replace(DEFAULTS[a.family], seed=a.seed, **{k: v for k, v in given.items() if v is not None})
    train_unet(a.parts, WEIGHTS, a.parts / f"unet_{a.family}", config, device=a.device)


def _probe(arguments: argparse.Namespace) -> None:
    from training.probe import probe

    a = arguments
    result = probe(a.parts, WEIGHTS, a.parts / f"unet_{a.family}" / LATEST, n=a.captions, seed=a.seed)
    print(json.dumps(result, indent=1))


def _export(arguments: argparse.Namespace) -> None:
    from training.export_pipeline import export_pipeline

    a = arguments
    export_pipeline(a.parts, a.checkpoint or a.parts / f"unet_{a.family}" / LATEST, DEMO)


def _evaluate(arguments: argparse.Namespace) -> None:
    from tgate_compile._demo.pipeline import load_demo_pipeline
    from training.evaluate import evaluate, training_of

    a = arguments
    pipeline = load_demo_pipeline(a.family).to(a.device)
    measured = evaluate(pipeline, a.family, a.guidance, steps=a.steps, seed=a.seed)
    checkpoint = a.parts / f"unet_{a.family}" / LATEST
    result = {"command": a.command} | measured | ({"training": training_of(checkpoint)} if checkpoint.exists() else {})
    if a.out is None:
        print(json.dumps(result, indent=1))
        return
    if a.family != "sd":  # all other families share a file
        result = (json.loads(a.out.read_text()) if a.out.exists() else {}) | {a.family: result}
    a.out.write_text(json.dumps(result, indent=1) + "\n")


def _picture(arguments: argparse.Namespace) -> None:
    from training.draw_models import draw_models

    draw_models(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
