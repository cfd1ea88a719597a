"""Wheel and sdist as they are built: what is in them, and that configs are found by name."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import stts_slowfast

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist, built from a copy of the sources."""
    sources = tmp_path_factory.mktemp("sources") / "stts"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("stts_slowfast", "configs"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    out = sources.parent / "dist"
    program = (
        "from setuptools import build_meta as b\n"
        f"b.build_sdist({str(out)!r}), b.build_wheel({str(out)!r})\n"
    )
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=sources, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def test_configs_travel_in_wheel_and_sdist(built):
    ours = {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*/*.yaml")}
    assert len(ours) > 20
    wheel = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert {f"stts_slowfast/{name}" for name in ours} <= wheel
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        sdist = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {f"stts_slowfast/{name}" for name in ours} <= sdist
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "stts_slowfast").rglob("*.py")}
    assert modules <= wheel and modules <= sdist
    assert "stts_slowfast/py.typed" in wheel & sdist


def test_the_version_is_the_packages(built):
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    assert wheel.name.startswith(f"stts_slowfast-{stts_slowfast.__version__}-")
    assert sdist.name == f"stts_slowfast-{stts_slowfast.__version__}.tar.gz"
    versions = re.findall(r"^## \[(.+?)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == stts_slowfast.__version__


def test_the_wheel_loads_configs_by_name(built, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(site)
    program = (
        "import stts_slowfast as stts\n"
        "print(stts.__file__)\n"
        "print(stts.load_config('STTS_MVIT_B_16x4_T0_0.9_S4_0.9').STTS.ENABLE)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(site / "stts_slowfast" / "__init__.py"), "True"], done.stderr
