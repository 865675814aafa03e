"""Bundles of format "aoti" are untrusted: their content is checked before any of it is run."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exported import exported_compiled
from tgate_compile import BackendError, BundleError
from tgate_compile.bundle.read import read_bundle
from tgate_compile.exports.inductor.save import open_graph

PACKAGE = "graphs/graphs.pt2"
INDEX = "graphs/weights.json"
ENTRY = "graphs/data/aotinductor/full.graph"

#: Names and contents of the files in a package.
Members = dict[str, bytes]

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def original() -> Path:
    return exported_compiled("aoti")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def tell_manifest(folder: Path, name: str) -> None:
    """Update the manifest for the file `name`, as in a deliberately modified bundle."""
    content = (folder / name).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_package(folder: Path, change: Callable[[Members], object], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(folder / PACKAGE) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(folder / PACKAGE, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    tell_manifest(folder, PACKAGE)


def change_index(folder: Path, change: Callable[[Any], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    tell_manifest(folder, INDEX)


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(folder)
    for part in parts:
        assert part in str(caught.value)


def test_a_package_that_is_only_packed_anew(folder: Path) -> None:
    change_package(folder, lambda members: None)
    read_bundle(folder)


@pytest.mark.parametrize(
    "name",
    [
        "graphs/data/weights/weight_0",
        "graphs/data/constants/custom_obj_0",
        "graphs/data/sample_inputs/model.pt",
        "graphs/models/full.json",
        "graphs/extra/x.pkl",
        f"{ENTRY}/x.pkl",
        f"{ENTRY}/more/x.cpp",
        f"{ENTRY}/../x.so",
        f"{ENTRY}/a_compile_flags.json",
        "graphs/data/aotinductor/../../../x.so",
        "/x.so",
        "other/data/aotinductor/full.graph/x.cpp",
        "graphs/data/aotinductor/full.graph\\x.so",
    ],
)
def test_files_that_have_no_place_in_a_package(folder: Path, name: str) -> None:
    change_package(folder, lambda members: members.update({name: b""}))
    refused(folder, "graphs.pt2", "an unexpected file")


def test_libraries_that_are_missing_or_too_many(folder: Path) -> None:
    def without(members: Members) -> None:
        members.pop(next(name for name in members if name.startswith(ENTRY) and name.endswith(".so")))

    change_package(folder, lambda members: members.update({f"{ENTRY}/more.so": b""}))
    refused(folder, "['full.graph', 'full.graph', 'pruned.graph']")
    change_package(folder, without)
    read_bundle(folder)
    change_package(folder, without)
    refused(folder, "the libraries ['pruned.graph']")


def test_packages_that_are_none(folder: Path) -> None:
    change_package(folder, lambda members: None, zipfile.ZIP_DEFLATED)
    refused(folder, "graphs.pt2", "an unexpected file")
    (folder / PACKAGE).write_bytes(b"no package")
    tell_manifest(folder, PACKAGE)
    refused(folder, "not a valid AOTInductor package")


def test_changed_bytes(folder: Path) -> None:
    with (folder / PACKAGE).open("r+b") as file:
        file.seek(100_000)
        file.write(b"changed")
    refused(folder, PACKAGE, "has been changed")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda index: index["conv_in.bias"].update(offset=2**40), ("conv_in.bias", "dtype float32 and shape [32]")),
        (lambda index: index["conv_in.bias"].update(offset=4), ("conv_in.bias",)),
        (lambda index: index["conv_in.bias"].update(offset=-64), ("not a valid index", "greater than")),
        (lambda index: index["conv_in.bias"].update(shape=[64]), ("conv_in.bias", "dtype float32 and shape [64]")),
        (lambda index: index["conv_in.bias"].update(dtype="object"), ("not a valid index",)),
        (lambda index: index["conv_in.bias"].update(more=1), ("not a valid index",)),
        (lambda index: index["conv_in.bias"].update(order=[1]), ("conv_in.bias", "order [1]", "shape [32]")),
    ],
)
def test_an_index_that_is_wrong(folder: Path, change: Callable[[Any], object], parts: tuple[str, ...]) -> None:
    change_index(folder, change)
    refused(folder, "weights.json", *parts)


def test_an_index_without_a_weight(folder: Path) -> None:
    change_index(folder, lambda index: index.pop("conv_in.bias"))
    manifest = read_bundle(folder).manifest
    with pytest.raises(BundleError, match=r"does not have the weights conv_in\.bias"):
        open_graph(manifest.graphs["full"], folder, torch.device("cpu"), {})


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["graphs"]["full"].update(entry=None),
        lambda manifest: manifest["graphs"]["full"].update(entry="pruned.graph"),
        lambda manifest: manifest["graphs"]["full"].update(file=INDEX),
        lambda manifest: manifest.update(weights=None),
    ],
)
def test_a_manifest_that_differs(folder: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, "must be entries of graphs/graphs.pt2")


def test_code_for_another_machine(folder: Path) -> None:
    def move(members: Members) -> None:
        for name in [name for name in members if name.endswith("_metadata.json")]:
            metadata = json.loads(members[name])
            members[name] = json.dumps({**metadata, "AOTI_MACHINE": "z80"}).encode()

    change_package(folder, move)
    manifest = read_bundle(folder).manifest
    with pytest.raises(BackendError, match=r"native code for .*z80.*x86-64-v3"):
        open_graph(manifest.graphs["full"], folder, torch.device("cpu"), {})
