"""Measure step times, downloads and memory of the site of `tgate-compile web` in Chromium.

    python benchmarks/web.py --out benchmarks/results/web.json
    python benchmarks/web.py --site my-site --threads 1 --pairs 2

A pair consists of a plain image and one with T-GATE from the same noise, made in alternating steps by the page's
modules in a worker. Workers with 1 and 2 threads take turns after each pair, so that other load on the machine affects
all of them. The first pairs warm up; they are part of the results, but not of the summaries. Needs Chromium with
chromedriver, selenium, and the requirements of `tgate-compile web`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from tgate_compile._web.site import VERSION, serving
from tgate_compile.study.bench.measure import processor

PROMPT = "a small green star on a white background"
#: Time limit of a script in seconds.
PATIENCE = 600
#: Decimal places of times in the results.
DIGITS = 3

MSG_NO_BROWSER = "This benchmark needs Chromium and chromedriver on the PATH, but {missing} cannot be found."
MSG_NOT_ISOLATED = "The worker should have {asked} threads, but has {had}."

#: Bodies of async functions with the argument `given`. Workers stay on the page and are referred to by name.
OPEN = """
const { Engine } = await import(new URL("engine.js", document.baseURI));
const engine = new Engine();
let fetched = 0;
const { threads } = await engine.open(
  { bundle: "bundle/", runtime: "runtime/", ...given.settings }, { bytes: (count) => (fetched += count) });
(window.engines ??= {})[given.name] = engine;
return { threads, fetched };
"""
PAIR = """
let fetched = 0;
const call = { prompt: given.prompt };
const results = await window.engines[given.name].compare(
  [{ ...call, plain: true }, call], { bytes: (count) => (fetched += count) });
return { fetched, results: results.map(({ pixels, ...others }) => others) };
"""
CLOSE = "window.engines[given.name].close();"
CACHES = """
const { cacheBytes, readManifest } = await import(new URL("manifest.js", document.baseURI));
return cacheBytes(await readManifest(new URL("bundle/manifest.json", document.baseURI)));
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, help="existing site to use instead of the embedded model's")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pairs", type=int, default=6, help="number of pairs for each number of threads")
    parser.add_argument("--warm-up", type=int, default=2, help="number of additional pairs before these")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        site = options.site or written(Path(temporary, "site"))
        with serving(site) as address, chromium() as browser:
            browser.get(address)
            rows = measured(browser, options.threads, options.warm_up, options.pairs)
            results = {
                "command": " ".join(
                    ["python", "benchmarks/web.py", *(sys.argv[1:] if arguments is None else arguments)]
                ),
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "machine": {
                    "processor": processor(),
                    "cores": os.cpu_count(),
                    "platform": f"{platform.system()} {platform.machine()}",
                },
                "browser": " ".join(browser.capabilities[key] for key in ("browserName", "browserVersion")),
                "onnxruntime_web": VERSION,
                "prompt": PROMPT,
                "warm_up": options.warm_up,
                "cache_bytes": evaluated(browser, CACHES),
                "rows": rows,
                "low_memory": low_memory(browser),
            }
    report(results)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def written(folder: Path) -> Path:
    """Write the embedded model's site with the command line; return `folder`."""
    subprocess.run([sys.executable, "-m", "tgate_compile", "web", "--out", str(folder)], check=True)
    return folder


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a new headless Chromium with an empty cache."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise SystemExit(MSG_NO_BROWSER.format(missing=" and ".join(missing)))
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(found["chromedriver"]))
    browser.set_script_timeout(PATIENCE)
    try:
        yield browser
    finally:
        browser.quit()


def evaluated(browser: Any, body: str, **given: Any) -> Any:
    """Run an async function on the page and return its result.

    Raises:
        RuntimeError: the function has thrown an error.
    """
    script = f"""
    const [given, done] = arguments;
    (async () => {{ {body} }})().then((result) => done({{ result }}), (error) => done({{ error: String(error) }}));
    """
    answer = browser.execute_async_script(script, given)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]


def measured(browser: Any, threads: Sequence[int], warm_up: int, pairs: int) -> list[dict[str, Any]]:
    """Return a row for each number of threads."""
    rows = {}
    for count in threads:
        opened = evaluated(browser, OPEN, name=str(count), settings={"threads": count})
        if opened["threads"] != count:
            raise RuntimeError(MSG_NOT_ISOLATED.format(asked=count, had=opened["threads"]))
        rows[count] = {"threads": count, "fetched": {"runtime": opened["fetched"], "bundle": 0}, "pairs": []}
    for number in range(warm_up + pairs):
        for count, row in rows.items():
            made = evaluated(browser, PAIR, name=str(count), prompt=PROMPT)
            row["fetched"]["bundle"] += made["fetched"]
            row["heap_bytes"] = made["results"][0]["heapBytes"]
            row["pairs"].append(dict(zip(("plain", "tgate"), map(run_of, made["results"]), strict=True)))
            print(f"pair {number}, {count} threads: {_seconds(row['pairs'][-1])}", flush=True)
    for count in threads:
        evaluated(browser, CLOSE, name=str(count))
    return [row | summary(row["pairs"][warm_up:]) for row in rows.values()]


def run_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return the times of a generation: steps in milliseconds, with the names of their graphs, others in seconds."""
    return {
        "strip": result["strip"],
        "ms": [round(1e3 * step["seconds"], DIGITS) for step in result["done"]],
        "graphs": [step["graph"] for step in result["done"]],
        **{f"{key}_s": round(result[f"{key}Seconds"], DIGITS) for key in ("open", "encode", "decode")},
        "warm_up_s": round(result["warmUpSeconds"], DIGITS),
    }


def summary(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the times of each graph's steps in both runs, and the total times of the images."""
    steps: dict[str, list[float]] = {}
    for run in (run for pair in pairs for run in pair.values()):
        for graph, ms in zip(run["graphs"], run["ms"], strict=True):
            steps.setdefault(graph, []).append(ms)
    images = {name: [sum(pair[name]["ms"]) / 1e3 for pair in pairs] for name in ("plain", "tgate")}
    speedups = [plain / tgate for plain, tgate in zip(*images.values(), strict=True)]
    return {
        "step_ms": {graph: {"median": median(ms), "least": min(ms)} for graph, ms in steps.items()},
        "image_s": {name: {"median": median(seconds), "least": min(seconds)} for name, seconds in images.items()},
        "speedup": {"least": min(speedups), "median": median(speedups), "most": max(speedups)},
    }


def low_memory(browser: Any) -> dict[str, Any]:
    """Measure one pair with the page's low-memory setting, which loads each graph when it is needed."""
    opened = evaluated(browser, OPEN, name="low", settings={"threads": 1, "sequential": True})
    made = evaluated(browser, PAIR, name="low", prompt=PROMPT)
    evaluated(browser, CLOSE, name="low")
    return {
        "fetched": {"runtime": opened["fetched"], "bundle": made["fetched"]},
        "heap_bytes": made["results"][-1]["heapBytes"],
    }


def report(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        steps = ", ".join(f"{graph} {ms['median']:.0f} ({ms['least']:.0f})" for graph, ms in row["step_ms"].items())
        print(
            f"{row['threads']} threads, ms of a step, median (least): {steps}; speedup {row['speedup']['median']:.2f}"
        )
        print(f"  fetched {row['fetched']}, WebAssembly's memory {row['heap_bytes'] / 1e6:.1f} MB")
    low = results["low_memory"]
    print(f"low memory: fetched {low['fetched']}, WebAssembly's memory {low['heap_bytes'] / 1e6:.1f} MB")


def _seconds(pair: dict[str, Any]) -> str:
    return ", ".join(f"{name} {sum(run['ms']) / 1e3:.2f} s" for name, run in pair.items())


if __name__ == "__main__":
    main()
