"""`python -m training STAGE`: see README.md in this folder for the stages and their order."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from training.unet_training import LATEST, UNetTraining

WEIGHTS = Path("tgate_compile/_demo/weights")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    text = _stage(stages, "text", _text, steps=700, batch=128)
    text.add_argument("--start-from", type=Path, help="folder of a text encoder to train further")
    vae = _stage(stages, "vae", _vae, minutes=6.5, batch=24)
    vae.add_argument("--start-from", type=Path, help="folder of an autoencoder to train further")
    vae.add_argument("--decoder-only", action="store_true", help="leave the latents as they are")
    _stage(stages, "reader", _reader, steps=600, batch=128)
    default = UNetTraining()
    unet = _stage(stages, "unet", _unet, minutes=default.minutes, batch=default.batch)
    unet.add_argument("--family", default=default.family, help="sd, sdxl or pixart (default: %(default)s)")
    unet.add_argument("--images", type=int, default=default.images, help="images per worker (default: %(default)s)")
    unet.add_argument("--pair-share", type=float, default=default.pair_share, help="default: %(default)s")
    unet.add_argument("--learning-rate", type=float, default=default.learning_rate, help="default: %(default)s")
    _stage(stages, "probe", _probe).add_argument("--captions", type=int, default=256)
    _stage(stages, "export", _export).add_argument("--checkpoint", type=Path)
    evaluation = _stage(stages, "evaluate", _evaluate)
    evaluation.add_argument(
        "--guidance", type=float, nargs="+", default=[5.0], help="of several, the best is chosen (default: 5)"
    )
    evaluation.add_argument("--out", type=Path, help="a JSON file for the result; otherwise it is printed")
    arguments = parser.parse_args()
    arguments.command = shlex.join(["python", "-m", "training", *sys.argv[1:]])
    arguments.run(arguments)


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


# The imports below are late because no stage should wait for the libraries of the others.


def _text(arguments: argparse.Namespace) -> None:
    from training.train_text import train_text

    a = arguments
    accuracy = train_text(a.parts, steps=a.steps, device=a.device, seed=a.seed, batch=a.batch, start_from=a.start_from)
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
    config = UNetTraining(
        family=a.family,
        minutes=a.minutes,
        batch=a.batch,
        images=a.images,
        pair_share=a.pair_share,
        learning_rate=a.learning_rate,
        seed=a.seed,
    )
    train_unet(a.parts, a.parts / f"unet_{a.family}", config, device=a.device)


def _probe(arguments: argparse.Namespace) -> None:
    from training.probe import probe

    a = arguments
    print(json.dumps(probe(a.parts, a.parts / "unet_sd" / LATEST, n=a.captions, seed=a.seed), indent=1))


def _export(arguments: argparse.Namespace) -> None:
    from training.export_pipeline import export_pipeline

    a = arguments
    export_pipeline(a.parts, a.checkpoint or a.parts / "unet_sd" / LATEST, WEIGHTS)


def _evaluate(arguments: argparse.Namespace) -> None:
    from tgate_compile._demo.pipeline import load_demo_pipeline
    from training.evaluate import evaluate

    a = arguments
    pipeline = load_demo_pipeline().to(a.device)
    result = json.dumps({"command": a.command} | evaluate(pipeline, a.guidance, seed=a.seed), indent=1)
    if a.out is None:
        print(result)
    else:
        a.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
