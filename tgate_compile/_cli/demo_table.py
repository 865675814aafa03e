"""The demo's figures as a table, and the sentences under it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from tgate_compile._cli.demo_results import Results, Row, saving_by_guidance

# Two lines each, so that the table fits into 80 columns.
_HEADINGS = (
    "time per\nimage",
    "against\nplain",
    "MACs per\nimage",
    "params\ngated",
    "cache",
    "prompts\nright",
    "PSNR to\nplain",
)


def results_table(results: Results) -> RenderableType:
    """What the demo prints."""
    task = results.task
    count = len(task.prompts)
    table = Table(
        title=f"Prompts: {count}, {task.steps} steps, guidance {task.guidance:g}, gate step {task.gate}",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.rows:
        table.add_row(*_cells(row, count))
    return Group(table, *sentences(results))


def sentences(results: Results) -> list[str]:
    """What a reader of the table should know, one line each."""
    lines = [
        "Times: median over the prompts, warm, the rows taking turns. "
        "MACs: the denoiser's linear and convolution layers. "
        f"Parameters after the gate; before it {results.rows[0].parameters / 1e6:.2f} M.",
        "Guidance drop: the plain pipeline with guidance up to the gate only, and nothing cached.",
    ]
    first = [f"{row.title} {row.first_call_extra_seconds:.1f} s" for row in results.rows if row.cache_bytes]
    if first:
        lines.append(f"Once, in the first call, to capture the graphs and compile them: {'; '.join(first)}.")
    lines.append(guidance_sentence(results))
    if any(row.key == "inductor" for row in results.rows):
        lines.append("The compiled row holds Inductor's own effect as well, for better or worse.")
    return lines


def guidance_sentence(results: Results) -> str:
    """How much of T-GATE's saving comes from the dropped guidance alone."""
    rows = {row.key: row for row in results.rows}
    plain, dropped, eager = rows["plain"], rows["guidance_dropped"], rows["eager"]
    if not eager.cache_bytes:
        return "Nothing was gated, so nothing is saved."
    work = (plain.macs - dropped.macs) / (plain.macs - eager.macs)
    share = saving_by_guidance(results.rows)
    if share is None:
        return (
            "T-GATE saved no time here: the machine is too busy, or the images are too few. "
            f"Of the MACs that it saves, dropping guidance after the gate already gives {work:.0%}."
        )
    return (
        f"The guidance drop alone gives {share:.0%} of the time that T-GATE (eager) saves, and {work:.0%} of the MACs. "
        "The rest is the cross-attention, and on a model this small also that a graph runs with less Python."
    )


def _cells(row: Row, count: int) -> tuple[str, ...]:
    psnr = "identical" if row.mean_psnr is None else f"{row.mean_psnr:.1f} dB"
    return (
        row.title,
        f"{row.seconds:.3f} s",
        f"{row.speedup:.2f}x",
        f"{row.macs / 1e9:.2f} G",
        f"{row.parameters_gated / 1e6:.2f} M",
        f"{row.cache_bytes / 1e3:.0f} kB" if row.cache_bytes else "",
        f"{sum(row.right)} of {count}",
        "" if row.key == "plain" else psnr,
    )
