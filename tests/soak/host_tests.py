"""Runs the tests of a model library with selectors that keep everything, attached to every model.

    python tests/soak/host_tests.py timm CHECKOUT/tests/test_models.py [-- -k vit -x]
    python tests/soak/host_tests.py torchvision CHECKOUT/test/test_models.py -- -k "mvit or swin3d"
    python tests/soak/host_tests.py pytorchvideo CHECKOUT/tests/test_models_vision_transformers.py

The libraries' wheels have no tests: give a path in a checkout of the installed version. The tests
run twice, without selectors and with selectors that keep all tokens, which may not change a bit in
evaluation. A test that passes without and fails with selectors is a fault; the exit status is then
1. Not part of the test suite.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# By library, the classes whose instances get selectors.
MODELS = {
    "timm": [("timm.models.vision_transformer", "VisionTransformer")],
    "torchvision": [
        ("torchvision.models.video.mvit", "MViT"),
        ("torchvision.models.video.swin_transformer", "SwinTransformer3d"),
    ],
    "pytorchvideo": [("pytorchvideo.models.vision_transformers", "MultiscaleVisionTransformers")],
}
# Scripting is refused with a reason, so these failures are not faults.
REFUSED = "cannot be compiled by torch.jit.script"


class Selecting:
    """A pytest plugin that attaches selectors and records the outcome of each test."""

    def __init__(self, library: str | None, out: str):
        self.out, self.ended, self.attached = out, {}, 0
        for module, name in MODELS.get(library, []):
            self._select_in(getattr(importlib.import_module(module), name))

    def _select_in(self, kind: type) -> None:
        plain = kind.__init__

        def __init__(model, *args, **kwargs):
            plain(model, *args, **kwargs)
            if type(model) is kind:
                self._attach(model)

        kind.__init__ = __init__
        for derived in kind.__subclasses__():
            if "__init__" in vars(derived):
                self._select_in(derived)

    def _attach(self, model) -> None:
        from stts_slowfast import attach
        from stts_slowfast.hosts import find_blocks

        middle = len(find_blocks(model)) // 2
        attach(model, time={0: 1.0}, space={middle: 1.0}, num_samples=10)
        self.attached += 1

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and REFUSED in str(report.longrepr):
            self.ended[report.nodeid] = "refused"
        elif report.failed or report.when == "call" or report.skipped:
            self.ended.setdefault(report.nodeid, report.outcome)

    def pytest_sessionfinish(self) -> None:
        Path(self.out).write_text(json.dumps([self.attached, self.ended]))


def run(library: str | None, path: str, more: list[str]) -> tuple[int, dict[str, str]]:
    """How many models got selectors, and how each test ended; without a library, as they are."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "ended.json")
        command = [sys.executable, __file__, "--inside", library or "", out, path, *more]
        subprocess.run(command, check=False)
        return json.loads(Path(out).read_text())


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        library, out, path, *more = sys.argv[2:]
        for folder in Path(path).resolve().parents:  # the checkout's library, if it is there
            if any((folder / name / "__init__.py").is_file() for name in MODELS):
                sys.path.insert(0, str(folder))
                break
        return pytest.main(["-q", "-p", "no:cacheprovider", path, *more], [Selecting(library, out)])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=MODELS, help="the library")
    parser.add_argument("path", help="test file or folder in a checkout of the library")
    parser.add_argument("more", nargs="*", help="arguments of pytest, behind --")
    args = parser.parse_args()
    _, plain = run(None, args.path, args.more)
    attached, selecting = run(args.name, args.path, args.more)
    faults = [
        test
        for test, ended in plain.items()
        if ended == "passed" and selecting.get(test, "missing") not in ("passed", "refused")
    ]
    count = {
        ended: list(selecting.values()).count(ended) for ended in sorted({*selecting.values()})
    }
    print(f"{attached} models got selectors; tests with them: {count}; as they are: {len(plain)}")
    for test in faults:
        print(f"FAULT {test}: {selecting.get(test, 'missing')}")
    return int(bool(faults) or not attached)


if __name__ == "__main__":
    sys.exit(main())
