"""The contents of wheel and sdist, and an editable install whose checkout is moved."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import stts_slowfast

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
FILES += ("build_backend.py", "stts_slowfast_autoload.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel and an sdist, built from a copy of the sources."""
    sources = tmp_path_factory.mktemp("sources") / "stts"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("stts_slowfast", "configs"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, sources)
    out = sources.parent / "dist"
    program = (
        "import sys; sys.path.insert(0, '.'); import build_backend as b\n"
        f"b.build_sdist({str(out)!r}), b.build_wheel({str(out)!r})\n"
    )
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=sources, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def test_wheel_and_sdist_have_every_file(built):
    ours = {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*/*.yaml")}
    assert len(ours) > 20
    wheel = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert {f"stts_slowfast/{name}" for name in ours} <= wheel
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        sdist = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {f"stts_slowfast/{name}" for name in ours} <= sdist
    package = [path for path in (ROOT / "stts_slowfast").rglob("*") if path.is_file()]
    files = {str(path.relative_to(ROOT)) for path in package if path.suffix != ".pyc"}
    assert {"stts_slowfast/py.typed", "stts_slowfast/standalone/slowfast_defaults.yaml"} <= files
    files.add("stts_slowfast_autoload.py")
    assert files | {"stts_slowfast_autoload.pth"} <= wheel
    assert files | {"build_backend.py"} <= sdist


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


IMPORT = "import torch; print('torch', torch.__version__)"


@pytest.fixture
def editable(tmp_path_factory):
    """A copy of the sources, installed with ``pip install -e`` into a virtual environment that sees
    this one's packages, and a function that runs its Python."""
    folder = tmp_path_factory.mktemp("editable")
    sources, python = folder / "checkout", folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Listed after the environment's own packages, without the links of its editable installs.
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "stts_slowfast", sources / "stts_slowfast", ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, sources)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TORCH_DEVICE"))}

    def run(*words) -> subprocess.CompletedProcess:
        command = [str(python), *map(str, words)]
        return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)

    quiet = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    done = run("-m", "pip", "install", *quiet, "--no-build-isolation", "-e", sources)
    if done.returncode:
        pytest.skip(f"pip cannot install here: {done.stderr.strip()[-300:]}")
    return sources, run


DEFAULTS = "from fvcore.common.config import CfgNode\n_C = CfgNode()\nget_cfg = _C.clone\n"
DEFAULTS += "def assert_and_infer_cfg(cfg):\n    return cfg\n"


def test_a_config_may_be_read_before_torch_is_imported(editable):
    sources, run = editable
    folder = sources.with_name("slowfast") / "config"
    folder.mkdir(parents=True)
    (folder / "defaults.py").write_text(DEFAULTS)
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("")
    read = "from slowfast.config.defaults import get_cfg; cfg = get_cfg(); "
    read += "cfg.merge_from_list(['STTS.ENABLE', 'True']); print(cfg.STTS.ENABLE)"
    done = run("-c", read)
    assert done.stdout.strip() == "True", done.stderr
    done = run("-c", f"import torch; {read}")
    assert done.stdout.strip() == "True", done.stderr
    # Without SlowFast only that one module is imported.
    names = run("-c", "import sys; print([name for name in sys.modules if 'stts' in name])").stdout
    assert "stts_slowfast_autoload" in names and "'stts_slowfast'" not in names
    done = run("-c", "import os; os.environ['STTS_AUTOLOAD'] = '0'; " + read)
    assert "Non-existent key: STTS" in done.stderr


def test_import_torch_survives_a_checkout_that_is_moved_or_broken(editable):
    sources, run = editable
    done = run("-c", f"{IMPORT}; import sys; print('stts_slowfast.pyslowfast' in sys.modules)")
    assert done.stdout.split()[::2] == ["torch", "True"], done.stderr
    broken = sources / "stts_slowfast" / "pyslowfast" / "autoload.py"
    broken.write_text("def register(:")  # half of an upgrade
    done = run("-c", IMPORT)
    assert done.stdout.startswith("torch") and "stts_slowfast" not in done.stderr, done.stderr
    sources.rename(sources.with_name("moved"))
    package = sources.with_name("slowfast")
    package.mkdir()
    (package / "__init__.py").write_text("")
    done = run("-c", f"{IMPORT}; import slowfast")
    assert done.stdout.startswith("torch"), done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "stts_slowfast" in line]
    assert "SlowFast runs without it (ModuleNotFoundError" in told
    assert run("-m", "pip", "uninstall", "--quiet", "--yes", "stts-slowfast").returncode == 0
    assert not list(sources.parent.glob("venv/lib/python*/site-packages/stts_slowfast*"))
