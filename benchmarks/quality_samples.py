"""Show images kept by `quality.py --images`: the plain pipeline's in the first row, and those of contenders below.

    python benchmarks/quality_samples.py FOLDER benchmarks/results/quality_embedded.json \\
        --contenders "tgate 3" "tgate 3 anchor 1.0" --out docs/results/quality_samples.png

The columns are captions that the first contender gets wrong, evenly sampled from all of them, singles first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from quality_schedules import CONTENDERS

COLUMNS, TILE, GAP, TITLE = 8, 128, 4, 24


def draw(folder: Path, results: Path, names: Sequence[str], path: Path) -> None:
    """Write a picture with one row of images per name, below its title."""
    first = json.loads(results.read_text())["rows"][names[0]]
    right = first["single"]["right"] + first["pair"]["right"]
    wrong = [i for i, letter in enumerate(right) if letter == "0"]
    if not wrong:
        raise SystemExit(f"{names[0]} gets every caption right, so there is nothing to show.")
    chosen = [wrong[at] for at in np.linspace(0, len(wrong) - 1, min(COLUMNS, len(wrong))).round().astype(int)]
    rows = [CONTENDERS[0].name, *names]
    width, height = len(chosen) * (TILE + GAP) - GAP, len(rows) * (TITLE + TILE + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=17)
    for row, name in enumerate(rows):
        top = row * (TITLE + TILE + GAP)
        pen.text((2, top), name, fill="black", font=font)
        images = np.load(folder / f"{name}.npy")  # [captions, 3, 64, 64]
        for column, i in enumerate(chosen):
            tile = Image.fromarray(images[i].transpose(1, 2, 0)).resize((TILE, TILE))
            canvas.paste(tile, (column * (TILE + GAP), top + TITLE))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--contenders", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    draw(options.folder, options.results, options.contenders, options.out)


if __name__ == "__main__":
    main()
