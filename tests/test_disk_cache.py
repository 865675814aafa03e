"""Captures, conversions and comparisons of a process are reused by the next one, and never by another model."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import tgate_compile
from tests.test_joint_guidance import run as denoised
from tests.tiny_joint import JOINT
from tests.tiny_pipelines import add_lora, pixart, pixart_prompt, run, stable_diffusion
from tgate_compile import ConfigurationError
from tgate_compile._cache import DEFAULT_SIZE, FOLDER_VARIABLE, SIZE_VARIABLE, DiskCache, disk_cache
from tgate_compile.engine import capture as capturing
from tgate_compile.engine import trust

KEY = "ab" + 62 * "0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The denoisers that torch.export has traced."""
    traced: list[str] = []
    export = torch.export.export

    def counted(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        traced.append(type(module).__name__)
        return export(module, *args, **options)

    monkeypatch.setattr(capturing.torch.export, "export", counted)
    return traced


def small() -> Any:
    return stable_diffusion(layout="least")


def image_of(make: Callable[[], Any], change: Callable[[Any], object] = lambda pipe: None, **options: Any) -> Any:
    """Return the latents of a new pipeline, which has no graphs yet."""
    pipe = make()
    change(pipe)
    tgate_compile.optimize(pipe, 2, **{"backend": "eager", **options})
    return run(pipe, steps=4)


@pytest.fixture(scope="module")
def of_small(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Path]:
    """Return `image_of(small)`, and a folder with the graphs that it needed."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        return image_of(small), folder


@pytest.fixture
def first(of_small: tuple[torch.Tensor, Path], folder: Path) -> torch.Tensor:
    """Return `image_of(small)`, whose graphs are on disk."""
    image, graphs = of_small
    shutil.copytree(graphs, folder)
    return image


class TestGraphs:
    def test_are_captured_once(self, captures: list[str]) -> None:
        first = image_of(small)
        assert len(captures) == 2  # with guidance and without
        second = image_of(small)
        assert len(captures) == 2
        assert torch.equal(first, second)

    def test_use_the_weights_of_the_new_model(
        self, first: torch.Tensor, captures: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def with_other_weights(pipe: Any) -> None:
            generator = torch.Generator().manual_seed(1)
            for parameter in pipe.unet.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)

        from_disk = image_of(small, with_other_weights)
        assert not captures
        assert not torch.equal(from_disk, first)
        monkeypatch.setenv(FOLDER_VARIABLE, "off")
        assert torch.equal(from_disk, image_of(small, with_other_weights))
        assert len(captures) == 2

    @pytest.mark.usefixtures("first")
    def test_read_weights_that_change_later(self) -> None:
        pipe = tgate_compile.optimize(small(), 2, backend="eager")
        before = run(pipe, steps=4)
        with torch.no_grad():
            pipe.unet.conv_in.weight *= 1.5
        after = run(pipe, steps=4)
        assert not torch.equal(before, after)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda pipe: add_lora(pipe.unet), id="a LoRA"),
            pytest.param(lambda pipe: pipe.enable_freeu(1.1, 1.2, 1.3, 1.4), id="FreeU", marks=pytest.mark.heavy),
            pytest.param(lambda pipe: pipe.unet.to(torch.float64), id="another dtype"),
            pytest.param(
                lambda pipe: setattr(pipe.unet.up_blocks[0].resnets[0], "output_scale_factor", 2.0), id="a setting"
            ),
            pytest.param(
                lambda pipe: pipe.unet.fuse_qkv_projections(), id="fused projections", marks=pytest.mark.heavy
            ),
        ],
    )
    @pytest.mark.usefixtures("first")
    def test_are_not_those_of_another_model(self, change: Callable[[Any], object], captures: list[str]) -> None:
        def changed() -> Any:
            pipe = small()
            change(pipe)
            if pipe.unet.dtype == torch.float64:
                pipe.to(torch.float64)
            return pipe

        given = image_of(changed)
        assert len(captures) == 2
        assert torch.equal(given, image_of(changed))
        assert len(captures) == 2

    @pytest.mark.usefixtures("first")
    def test_of_other_settings_are_captured(self, captures: list[str]) -> None:
        image_of(small, sites=["down_blocks.*"])
        assert len(captures) == 2
        image_of(small, cache_dtype=torch.float16)
        assert len(captures) == 4

    def test_of_code_that_is_not_known_are_not_kept(self, captures: list[str], folder: Path) -> None:
        class Processor(diffusers.models.attention_processor.AttnProcessor2_0):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **kwargs) * 0.5

        def patched() -> Any:
            pipe = small()
            pipe.unet.set_attn_processor(Processor())
            return pipe

        image_of(patched)
        image_of(patched)
        assert len(captures) == 4
        assert not list(folder.rglob("*.entry"))

    def test_with_a_table_that_has_no_elements_are_not_kept(self, captures: list[str], folder: Path) -> None:
        def with_a_table(pipe: Any) -> None:
            pipe.unet.up_blocks[0].table = torch.empty(100, device="meta")

        image_of(small, with_a_table)
        assert len(captures) == 2
        assert not list(folder.rglob("*.entry"))

    @pytest.mark.usefixtures("first")
    def test_of_diffusers_under_development_are_captured_again(
        self, captures: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tgate_compile.engine import disk

        state = disk._state_of
        monkeypatch.setattr(disk, "_state_of", lambda package: (*state(package), "edited"))
        image_of(small)
        assert len(captures) == 2

    def test_with_constants_of_their_own(self, captures: list[str]) -> None:
        def latents() -> Any:
            pipe = tgate_compile.optimize(pixart(), 2, backend="eager")
            return pipe(**pixart_prompt(), num_inference_steps=4, output_type="latent", generator=torch.manual_seed(0))[
                0
            ]

        first = latents()
        count = len(captures)
        assert torch.equal(first, latents())
        assert len(captures) == count

    def test_with_joint_attention(self, captures: list[str]) -> None:
        def latents() -> Any:
            case = JOINT["StableDiffusion3Pipeline"]
            return denoised(tgate_compile.optimize(case.build(), 2, backend="eager"), **case.call(1))

        first = latents()
        count = len(captures)
        assert torch.equal(first, latents())
        assert len(captures) == count

    def test_serve_the_next_process(self, first: torch.Tensor) -> None:
        program = (
            "import logging, torch, tgate_compile\n"
            "from tests.tiny_pipelines import run, stable_diffusion\n"
            "torch.set_num_threads(1)\n"
            "logging.basicConfig(level=logging.INFO)\n"
            "pipe = tgate_compile.optimize(stable_diffusion(layout='least'), 2, backend='eager')\n"
            "print(run(pipe, steps=4).double().sum().item())\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert float(done.stdout) == first.double().sum().item()
        assert "captured UNet2DConditionModel" not in done.stderr
        assert done.stderr.count("was captured by an earlier process") == 2


class TestBackends:
    @pytest.mark.parametrize("backend", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.heavy)])
    def test_neither_convert_nor_compare_again(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip(backend)
        from tgate_compile.exports.onnx import convert

        converted, compared = [], []
        to_onnx, compare = convert.to_onnx, trust.Served.compare
        monkeypatch.setattr(convert, "to_onnx", lambda variant: converted.append(variant) or to_onnx(variant))
        monkeypatch.setattr(
            trust.Served, "compare", lambda self, *given: compared.append(self) or compare(self, *given)
        )
        first = image_of(small, backend=backend)
        assert (len(converted), len(compared)) == (2, 2)
        second = image_of(small, backend=backend)
        assert (len(converted), len(compared)) == (2, 2)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)

        def with_other_weights(pipe: Any) -> None:
            pipe.unet.conv_in.weight.data *= 1.1

        third = image_of(small, with_other_weights, backend=backend)
        assert (len(converted), len(compared)) == (2, 4)  # the values decide whether the results agree
        expected = image_of(small, with_other_weights)
        torch.testing.assert_close(third, expected, rtol=1e-3, atol=1e-3)

    def test_a_wrong_result_is_not_kept(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        pytest.importorskip("openvino")
        from tgate_compile.exports.openvino import live

        call = live._Compiled.__call__
        monkeypatch.setattr(live._Compiled, "__call__", lambda self, *given: [2 * each for each in call(self, *given)])
        for _ in range(2):
            with pytest.raises(tgate_compile.BackendError, match=r"is .* from PyTorch's"):
                image_of(small, backend="openvino")
        cache = disk_cache()
        assert cache is not None
        assert all(entry.kind != "verdict" for entry in cache.entries())


class TestDamage:
    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda data: data[:-20], id="cut short"),
            pytest.param(lambda data: data[:200] + b"?" + data[201:], id="changed"),
            pytest.param(lambda data: b"", id="empty"),
            pytest.param(lambda data: b"\x80\x04garbage", id="something else"),
        ],
    )
    def test_is_ignored_and_made_good(
        self,
        damage: Callable[[bytes], bytes],
        first: torch.Tensor,
        captures: list[str],
        folder: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        for path in folder.rglob("*.entry"):
            path.write_bytes(damage(path.read_bytes()))
        with caplog.at_level(logging.INFO, "tgate_compile"):
            assert torch.equal(first, image_of(small))
        assert len(captures) == 2
        assert "its checksum does not match" in caplog.text
        assert torch.equal(first, image_of(small))
        assert len(captures) == 2

    def test_a_graph_of_another_model_under_the_same_key_is_refused(self, captures: list[str], folder: Path) -> None:
        image_of(lambda: stable_diffusion(layout="small"))
        other = [path.read_bytes() for path in sorted(folder.rglob("*.entry"))]
        disk_cache().clear()  # type: ignore[union-attr]
        first = image_of(small)
        for path, data in zip(sorted(folder.rglob("*.entry")), other, strict=True):
            path.write_bytes(data)  # its checksum is right
        assert torch.equal(first, image_of(small))
        assert len(captures) == 6

    def test_a_folder_that_cannot_be_written_does_no_harm(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
        image_of(small)


class TestFolder:
    def test_keeps_the_entries_used_last(self, tmp_path: Path) -> None:
        cache = DiskCache(tmp_path, limit=1200)
        keys = [f"{number:02x}" + 62 * "0" for number in range(3)]
        for number, key in enumerate(keys[:2]):
            cache.write(key, bytes(400), kind="graph", label="a model")
            os.utime(cache._path(key), (1000 + number, 1000 + number))
        assert cache.read(keys[0]) is not None  # now the last one used
        cache.write(keys[2], bytes(400), kind="graph", label="a model")
        assert [cache.read(key) is not None for key in keys] == [True, False, True]

    def test_leaves_no_unfinished_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = DiskCache(tmp_path)

        def full(self: Path, target: Path) -> Path:
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        cache.write(KEY, b"contents", kind="graph", label="a model")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert cache.read(KEY) is None

    def test_may_be_shared(self, tmp_path: Path) -> None:
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from tgate_compile._cache import DiskCache\n"
            "cache = DiskCache(Path(sys.argv[1]), limit=60_000)\n"
            "for number in range(300):\n"
            "    key = f'{number % 20:02x}' + 62 * '0'\n"
            "    found = cache.read(key)\n"
            "    assert found in (None, key.encode() * 100), found\n"
            "    cache.write(key, key.encode() * 100, kind='graph', label='a model')\n"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(4)
        ]
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors.decode()
        assert sum(entry.nbytes for entry in DiskCache(tmp_path).entries()) <= 60_000

    @pytest.mark.parametrize(
        ("text", "size"), [("", DEFAULT_SIZE), ("500", 500), ("1.5 gb", 1_500_000_000), ("2MB", 2 * 10**6)]
    )
    def test_has_the_size_of_the_variable(self, text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SIZE_VARIABLE, text)
        cache = disk_cache()
        assert cache is not None
        assert cache.limit == size

    def test_refuses_invalid_sizes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SIZE_VARIABLE, "much")
        with pytest.raises(ConfigurationError, match="TGATE_COMPILE_CACHE_SIZE must be a size such as 500MB"):
            disk_cache()

    def test_is_in_the_users_cache_by_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(FOLDER_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        cache = disk_cache()
        assert cache is not None
        assert cache.folder == Path("/somewhere/tgate_compile")
