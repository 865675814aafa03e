"""`tgate-compile web`: the files it writes, serves and refuses. `test_web.py` tests the page itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.programs import program
from tgate_compile import BundleError, ConfigurationError
from tgate_compile._cli.app import app
from tgate_compile._web import site as onnxruntime_web
from tgate_compile._web.site import FILES, address_of, check_bundle, runtime_files, server_for

run = CliRunner().invoke


@pytest.fixture
def runtime(tmp_path: Path) -> str:
    """Return a folder with files of the right names; no browser loads them here."""
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name)
    return str(folder)


@pytest.fixture
def bundle() -> str:
    return str(program())


@pytest.mark.heavy
def test_a_site(bundle: str, runtime: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "site"
    arguments = ["web", "--bundle", bundle, "--runtime", runtime, "--out", str(out)]
    result = run(app, [*arguments, "--json", "-p", "red cat"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert json.loads((out / "site.json").read_text()) == {"prompts": ["red cat"]}
    assert {path.name for path in (out / "runtime").iterdir()} == set(FILES)
    assert check_bundle(out / "bundle") == check_bundle(Path(bundle))
    assert {"index.html", "page.css", "page.js", "worker.js"} <= {path.name for path in out.iterdir()}
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "--force" in again.stderr
    assert run(app, [*arguments, "--force"]).exit_code == 0
    assert json.loads((out / "site.json").read_text()) == {"prompts": []}
    assert [path.name for path in out.parent.iterdir()] == ["site"]


@pytest.mark.heavy
def test_other_folders_are_not_replaced(bundle: str, runtime: str, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    result = run(app, ["web", "--bundle", bundle, "--runtime", runtime, "--out", str(out), "--force"])
    assert result.exit_code == 1
    assert "is not a site" in result.stderr
    assert (out / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bundle", "nothing"], "is not a bundle"),
        (["--bundle", "x", "--gate-step", "3", "--model", "y"], "Leave out --model and --gate-step"),
        (["--runtime", "nothing"], "has no ort.wasm.min.mjs"),
        (["--port", "1", "--serve"], "cannot be served at port 1"),
    ],
)
def test_errors_come_first(arguments: list[str], expected: str, tmp_path: Path) -> None:
    if "--port" in arguments and os.geteuid() == 0:
        pytest.skip("root may serve at any port")
    result = run(app, ["web", "--out", str(tmp_path / "site"), *arguments])
    assert result.exit_code == 1
    assert expected in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_bundle_of_the_denoiser_alone(tmp_path: Path) -> None:
    from tests.exported import exported

    with pytest.raises(BundleError, match="--components all"):
        check_bundle(exported())


def test_the_server_lets_pages_have_threads(tmp_path: Path) -> None:
    for name in ("a.js", "a.mjs", "a.wasm"):
        (tmp_path / name).touch()
    server = server_for(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        kinds = {}
        for name in ("a.js", "a.mjs", "a.wasm"):
            with urllib.request.urlopen(address_of(server) + name) as response:
                kinds[name] = response.headers["Content-Type"]
                assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert kinds == {"a.js": "text/javascript", "a.mjs": "text/javascript", "a.wasm": "application/wasm"}
        with pytest.raises(ConfigurationError, match="Choose another --port"):
            server_for(tmp_path, server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


def npm_that(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a script called npm the only program on PATH, with an empty cache."""
    programs = folder / "programs"
    programs.mkdir()
    path = programs / "npm"
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cache is elsewhere")
def test_npm_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = "pathlib.Path(sys.argv[-1], 'x.tgz').write_bytes(b'forged')"
    npm_that(forged, tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError, match="not the one that this tgate_compile expects"):
        runtime_files()
    (tmp_path / "programs" / "npm").write_text(
        f"#!{sys.executable}\nimport sys\nsys.exit('npm warn x\\nnpm error code E404\\nnpm error 404 Not Found.')"
    )
    with pytest.raises(ConfigurationError, match=r"could not fetch onnxruntime-web .*: 404 Not Found\. Check"):
        runtime_files()
    (tmp_path / "programs" / "npm").unlink()
    with pytest.raises(ConfigurationError, match=r"npm is not installed.*--runtime"):
        runtime_files()
    assert not list((tmp_path / "cache" / "tgate_compile").iterdir())


def test_the_pinned_hash_has_the_form_of_one() -> None:
    kind, _, digest = onnxruntime_web.INTEGRITY.partition("-")
    assert (kind, len(digest)) == ("sha512", 88)


@pytest.mark.heavy
def test_a_real_process_without_torch(bundle: str, runtime: str, tmp_path: Path) -> None:
    without = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'onnx'):\n    sys.modules[name] = None\n"
        "from tgate_compile._cli import main\nmain()\n"
    )
    out = tmp_path / "site"
    arguments = ["web", "--bundle", bundle, "--runtime", runtime, "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", without, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "index.html").is_file()


def test_the_site_takes_the_schedulers_of_the_page() -> None:
    source = (Path(onnxruntime_web.__file__).parent / "site" / "schedulers.js").read_text(encoding="utf-8")
    assert set(re.findall(r"^  (\w+Scheduler): \w+,$", source, re.MULTILINE)) == set(onnxruntime_web.SCHEDULERS)
