"""The demo's picture: a row per prompt, with the plain image, T-GATE's, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont

from tgate_compile._cli.demo_runs import Mode, Results, Row

TILE = 168
MARGIN = 28
GAP = 14
PROMPT_WIDTH = 250
MAX_ROWS = 12
AMPLIFICATION = 4

_PAPER = "#ffffff"
_INK = "#1a1c20"
_SOFT = "#6a707a"
_FULL = "#2f5d9e"
_PRUNED = "#8fc7a3"
_WRONG = "#b3402e"
_LINE = "#d9dce1"


def draw_picture(results: Results, plain: Mode, gated: Mode) -> Image.Image:
    """The grid, `plain` beside `gated`; both have run all of the task's prompts."""
    prompts = results.task.prompts[:MAX_ROWS]
    head = _draw_head(results)
    width = head.width
    picture = Image.new("RGB", (width, head.height + len(prompts) * (TILE + GAP) + MARGIN - GAP), _PAPER)
    picture.paste(head)
    rows = {row.key: row for row in results.rows}
    for index, prompt in enumerate(prompts):
        top = head.height + index * (TILE + GAP)
        _write_prompt(picture, top, prompt, index, rows[plain.key], rows[gated.key])
        for column, tile in enumerate(_tiles(plain.images[index], gated.images[index])):
            picture.paste(tile, (_left(column), top))
            # White backgrounds would have no edge.
            box = (_left(column), top, _left(column) + TILE - 1, top + TILE - 1)
            ImageDraw.Draw(picture).rectangle(box, outline=_LINE)
    return picture


def _tiles(plain: Image.Image, gated: Image.Image) -> list[Image.Image]:
    difference = ImageChops.difference(plain.convert("RGB"), gated.convert("RGB"))
    amplified = difference.point(lambda value: min(value * AMPLIFICATION, 255))
    # Lanczos for the images, which are smooth; the difference pixel by pixel, since every one of them counts.
    return [
        plain.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS),
        gated.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS),
        amplified.resize((TILE, TILE), Image.Resampling.NEAREST),
    ]


def _draw_head(results: Results) -> Image.Image:
    task = results.task
    head = Image.new("RGB", (_left(3) - GAP + MARGIN, 214), _PAPER)
    draw = ImageDraw.Draw(head)
    draw.text((MARGIN, 24), "The same prompts and seeds, with and without T-GATE", _INK, _font(27))
    times = "    ".join(f"{row.title} {_time(row)}" for row in results.rows if row.key != "guidance_dropped")
    draw.text((MARGIN, 66), times, _INK, _font(18))
    _draw_strip(draw, results.strip, top=102)
    columns = ("plain", "T-GATE", f"difference x {AMPLIFICATION}")
    notes = (f"{task.steps} steps, guidance {task.guidance:g}", f"gate step {task.gate}", "black: the same")
    draw.text((MARGIN, 158), "prompt", _INK, _font(20))
    draw.text((MARGIN, 184), "combinations never trained on", _SOFT, _font(15))
    for column, (heading, note) in enumerate(zip(columns, notes, strict=True)):
        draw.text((_left(column), 158), heading, _INK, _font(20))
        draw.text((_left(column), 184), note, _SOFT, _font(15))
    return head


def _draw_strip(draw: ImageDraw.ImageDraw, strip: str, top: int) -> None:
    """The schedule: a cell per step, and what the two colours mean."""
    cell = min(16, 460 // len(strip))
    for step, kind in enumerate(strip):
        left = MARGIN + step * cell
        draw.rectangle((left, top, left + max(cell - 3, 1), top + 14), fill=_FULL if kind == "F" else _PRUNED)
    left = MARGIN + len(strip) * cell + 14
    full = strip.count("F")
    for text, colour in ((f"{full} full steps", _FULL), (f"{len(strip) - full} pruned, at half the batch", _PRUNED)):
        draw.rectangle((left, top + 2, left + 11, top + 13), fill=colour)
        draw.text((left + 18, top - 1), text, _SOFT, _font(15))
        left += 18 + int(draw.textlength(text, _font(15))) + 20


def _write_prompt(picture: Image.Image, top: int, prompt: str, index: int, plain: Row, gated: Row) -> None:
    draw = ImageDraw.Draw(picture)
    lines = _wrap(draw, prompt, _font(19), PROMPT_WIDTH)
    line_height = 25
    y = top + (TILE - line_height * len(lines) - 56) // 2
    for line in lines:
        draw.text((MARGIN, y), line, _INK, _font(19))
        y += line_height
    psnr = gated.psnrs[index]
    draw.text((MARGIN, y + 10), "identical" if psnr is None else f"PSNR {psnr:.1f} dB", _SOFT, _font(15))
    verdicts = [
        f"{name} {'right' if row.right[index] else 'wrong'}" for name, row in (("plain", plain), ("T-GATE", gated))
    ]
    colour = _SOFT if plain.right[index] and gated.right[index] else _WRONG
    draw.text((MARGIN, y + 32), "read: " + ", ".join(verdicts), colour, _font(15))


def _wrap(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _time(row: Row) -> str:
    time = f"{row.seconds:.2f} s"
    return time if row.key == "plain" else f"{time} ({row.speedup:.2f}x)"


def _left(column: int) -> int:
    return MARGIN + PROMPT_WIDTH + GAP + column * (TILE + GAP)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def shown_modes(modes: Sequence[Mode]) -> tuple[Mode, Mode]:
    """The two modes to draw: plain, and T-GATE on the last of the backends."""
    return modes[0], modes[-1]
