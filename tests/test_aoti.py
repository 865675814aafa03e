"""Bundles of format "aoti": compiled ahead of time, the results of `optimize`, one copy of the weights."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import difference
from tests.exported import COMPILED_GATE as GATE
from tests.exported import COMPILED_STEPS as STEPS
from tests.exported import exported_compiled, least
from tests.tiny_pipelines import run
from tgate_compile import BackendError, BundleError, ConfigurationError
from tgate_compile._cli.app import app
from tgate_compile.bundle.read import read_bundle
from tgate_compile.bundle.weights import in_order, mapped_weights, order_of
from tgate_compile.exports.inductor import save as aoti_graphs
from tgate_compile.exports.inductor.open import AotiSession, entry_name
from tgate_compile.exports.inductor.save import to_aoti
from tgate_compile.methods.method import Phase
from tgate_compile.passes.graphs import Variant, flat_program

#: Inductor adds in a different order.
CLOSE = 1e-4
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def bundle() -> Path:
    return exported_compiled("aoti")


def opened(bundle: Path, name: str) -> tuple[AotiSession, list[torch.Tensor]]:
    """Return a session for a graph of `bundle`, and inputs for it."""
    graph = read_bundle(bundle).manifest.graphs[name]
    batch = 2 if name == "full" else 1
    inputs = [torch.randn(batch, 4, 8, 8), torch.tensor(500.0)]
    if name == "full":
        inputs.append(torch.randn(batch, 16, 32))
    inputs += [torch.randn(batch, 64, 32) for _ in graph.cache_inputs]
    return AotiSession(graph, bundle, CPU), inputs


# Supported calls and pipelines.


def test_as_after_optimize(bundle: Path) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"prompt": ["red", "cat"]},
        {"height": 32, "width": 16, "num_images_per_prompt": 3},
        {"steps": 6, "gate_step": 4},
    ]
    pipe = least()
    before = run(pipe, steps=STEPS)
    tgate_compile.optimize(pipe, GATE, backend="eager")
    expected = [run(pipe, **{"steps": STEPS, **call}) for call in calls]
    tgate_compile.restore(pipe)
    tgate_compile.load(pipe, bundle)
    for call, wanted in zip(calls, expected, strict=True):
        assert difference(run(pipe, **{"steps": STEPS, **call}), wanted) < CLOSE
    assert tgate_compile.describe(pipe, prompt="", num_inference_steps=4).strip == "FFpp"
    tgate_compile.restore(pipe)
    assert torch.equal(run(pipe, steps=STEPS), before)


def test_what_a_bundle_says(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    assert manifest.graph_format == "aoti"
    assert manifest.versions.runtime == f"AOTInductor {torch.__version__}"
    assert set(manifest.files) == {"graphs/graphs.pt2", "graphs/weights.bin", "graphs/weights.json"}
    for name, graph in manifest.graphs.items():
        assert (graph.file, graph.entry) == ("graphs/graphs.pt2", entry_name(name))
        assert graph.parity is not None
        assert graph.parity.provider == "AOTInductor, cpu"
        assert 0 < graph.parity.relative < 1e-5
        assert len(graph.parity.measured) == 2  # also at other sizes
    result = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    assert "verified: 3 files" in result.stdout


def test_weights_are_stored_once(bundle: Path) -> None:
    unet = least().unet
    index = json.loads((bundle / "graphs/weights.json").read_text())
    assert set(index) == {name for name, _ in unet.named_parameters()}
    size = sum(parameter.nbytes for parameter in unet.parameters())
    assert (bundle / "graphs/weights.bin").stat().st_size < 1.02 * size


def test_weights_are_in_memory_once(bundle: Path) -> None:
    """Both graphs see a change of the mapped tensor, and the file is unchanged."""
    sessions = [opened(bundle, name) for name in ("full", "pruned")]
    before = [session.run(inputs)[0] for session, inputs in sessions]
    weight = mapped_weights(bundle, CPU).tensors(["conv_out.bias"])["conv_out.bias"]
    weight += 1
    try:
        for (session, inputs), expected in zip(sessions, before, strict=True):
            assert difference(session.run(inputs)[0], expected + 1) < CLOSE
    finally:
        weight -= 1
    read_bundle(bundle)


def unpacked_folders() -> set[Path]:
    """Return the folders into which torch has unpacked packages for this process."""
    libraries = re.findall(r"(/\S+)/data/aotinductor/", Path("/proc/self/maps").read_text())
    return {Path(library) for library in libraries if Path(library).exists()}


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what is mapped")
def test_nothing_is_left_in_the_temporary_folder(bundle: Path) -> None:
    gc.collect()
    before = unpacked_folders()
    session, _ = opened(bundle, "pruned")
    assert len(unpacked_folders() - before) == 1
    del session
    gc.collect()
    assert unpacked_folders() == before
    # Nor when Python exits while something still holds a session.
    program = (
        "import builtins, tests.test_aoti as t; from pathlib import Path; "
        f"builtins.held = t.opened(Path({str(bundle)!r}), 'pruned'); print(*t.unpacked_folders())"
    )
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip()
    assert not Path(told.stdout.strip()).exists()


# Calls and bundles that are refused.


def test_code_for_other_devices(bundle: Path) -> None:
    graph = read_bundle(bundle).manifest.graphs["full"]
    with pytest.raises(BackendError, match=r"native code for .* cpu.* but this machine is .* mps"):
        aoti_graphs.open_graph(graph, bundle, torch.device("mps"), {})


def test_inputs_that_the_code_does_not_take(bundle: Path) -> None:
    session, inputs = opened(bundle, "full")
    with pytest.raises(BackendError, match=r"could not run full.graph"):
        session.run(inputs[:1])


def test_options(bundle: Path) -> None:
    for options, parts in (
        ({"tune": True}, ["'tune'", "target"]),
        ({"target": "z80"}, ["target", '"x86-64-v3"', "'z80'"]),
    ):
        with pytest.raises(ConfigurationError) as caught:
            aoti_graphs.check_options(options)
        assert all(part in str(caught.value) for part in parts)
    pipe = least()
    with pytest.raises(ConfigurationError, match=r"'threads'.*torch.set_num_threads"):
        tgate_compile.load(pipe, bundle, backend_options={"threads": 1})
    with pytest.raises(ConfigurationError, match=r'"aoti".*"onnxruntime"'):
        tgate_compile.load(pipe, bundle, backend="onnxruntime")
    with pytest.raises(ConfigurationError, match=r"export.*load"):
        tgate_compile.optimize(pipe, GATE, backend="aoti")
    tgate_compile.load(pipe, bundle, backend="aoti")


# Exports that are refused.


def test_no_compiler(tmp_path: Path) -> None:
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with (
        inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigurationError, match=r"compiler such as g\+\+"),
    ):
        tgate_compile.export(pipe, tmp_path / "bundle", "aoti")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in --version|-v) exit 0;; esac\necho "it is broken" >&2\nexit 1\n')
    compiler.chmod(0o755)
    pipe = least()
    tgate_compile.optimize(pipe, GATE, backend="eager")
    with (
        inductor_config.patch({"cpp.cxx": (str(compiler),), "cpp.vec_isa_ok": True}),
        pytest.raises(BundleError, match=r"cannot compile the full graph.*Nothing has been written"),
    ):
        tgate_compile.export(pipe, tmp_path / "bundle", "aoti", dynamic=False)
    assert [path.name for path in tmp_path.iterdir()] == ["g++"]


# Weights.


@pytest.mark.parametrize("keep_layout", [False, True])
def test_weights_in_another_memory_format(tmp_path: Path, keep_layout: bool) -> None:
    """Compiled code depends on its weights' strides. For a CPU they are contiguous, for a GPU they stay as they are."""
    from torch._inductor.package.package import package_aoti

    convolution = torch.nn.Conv2d(3, 5, 3).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    example = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(convolution, (example,))
    program = flat_program(exported, exported.graph_module)
    variant = Variant(Phase(guided=False), program, ("input",), (), ())
    options = {"layout_optimization": False}
    files: Any = {"one": to_aoti(variant, tmp_path / "compiled", options, keep_layout=keep_layout)}
    package_aoti(str(tmp_path / "one.pt2"), files)
    loader = torch._C._aoti.AOTIModelPackageLoader(str(tmp_path / "one.pt2"), "one", False, 1, -1)
    weights = {
        name: in_order(tensor.contiguous(), order_of(tensor) if keep_layout else None)
        for name, tensor in convolution.named_parameters()
    }
    assert weights["weight"].is_contiguous() != keep_layout
    loader.load_constants(weights, False, True, True)
    (result,) = loader.boxed_run([example])
    assert difference(result, convolution(example)) < CLOSE
    assert not convolution.weight.is_contiguous()  # the user's weight is unchanged
