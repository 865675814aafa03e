"""Settings and fixtures for all tests."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from tests import once

#: The markers of tests that are skipped unless the option of the same name is given, with the reason.
OPTIONAL = {
    "heavy": "takes long, or repeats what a quick test shows; `pytest --heavy` runs it, CI does not",
    "sweep": "one of many like it, which together take many minutes; `pytest --sweep` runs it, CI does not",
}


#: The files that take longest with --heavy, run first: one of them at the end would keep one process busy while the
#: others wait. In the order of their times, as in the file of `pytest --heavy --junit-xml=...`.
LONGEST = (
    "test_runtime.py",
    "test_preludes.py",
    "test_kept_graphs.py",
    "test_cost.py",
    "test_joint_guidance.py",
    "test_freeu.py",
    "test_export.py",
    "test_pipelines.py",
    "test_authors_reference.py",
    "test_executorch.py",
    "test_openvino_bundle.py",
    "test_executorch_quantization.py",
    "test_quantization.py",
    "test_aoti.py",
    "test_gpu_benchmark.py",
    "test_denoisers.py",
    "test_quantized_weights.py",
    "test_sequential.py",
    "test_disk_cache.py",
    "test_modular.py",
    "test_openvino.py",
    "test_static_methods.py",
    "test_cli_generate.py",
    "test_joint_attention.py",
    "test_onnx_runtime.py",
    "test_state.py",
    "test_ray.py",
    "test_foreign_code.py",
    "test_editors.py",
    "test_tune.py",
    "test_evaluate.py",
    "test_packaging.py",
    "test_engine.py",
    "test_cache_options.py",
    "test_denoisers_guidance.py",
    "test_cli_export.py",
    "test_precision.py",
    "test_server.py",
    "test_separate_tokens.py",
    "test_user_loops.py",
    "test_tensorrt_rtx.py",
    "test_bundle_killed.py",
    "test_trusted_backends.py",
    "test_soak.py",
)


#: Files run by the process that runs another file, whose captures in memory they share.
TOGETHER = {"tests/test_cli_report.py": "tests/test_cost.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in OPTIONAL:
        parser.addoption(f"--{name}", action="store_true", help=f"run the tests marked {name}, too")


def pytest_configure(config: pytest.Config) -> None:
    once.begin(config)
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        _set_up_libraries()


def _set_up_libraries() -> None:
    """Import the large libraries and set them up, except in a process that only distributes tests to others."""
    import diffusers
    import torch
    import transformers

    # On tiny tensors threads cost more than they gain, and far more on a busy machine.
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking the imported packages, which takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # plugins that are imported last look for referrers of their objects


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    once.tell(node.config, node.workerinput)


def pytest_unconfigure(config: pytest.Config) -> None:
    once.end(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for name, reason in OPTIONAL.items():
        for item in items if not config.getoption(f"--{name}") else ():
            if item.get_closest_marker(name) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run each file in a single process, so that its fixtures are made once, unless --dist is given."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False  # would sort by the number of tests
    return Scheduling(config, log)
