"""The doctor's table and its exit status."""

import argparse
import re
from pathlib import Path

import pytest

from stts_slowfast.pyslowfast import autoload, compat
from stts_slowfast.tools import doctor

APPLIED = ["decoder", "bad_videos"]


def test_a_patch_is_applied_or_not_needed(monkeypatch):
    monkeypatch.delenv("STTS_COMPAT", raising=False)
    assert doctor.patch("decoder", APPLIED).status == doctor.PATCHED
    check = doctor.patch("vision_imports", APPLIED)
    assert check.status == doctor.OK
    assert compat.PATCHES["vision_imports"].acts in check.found


@pytest.mark.parametrize("switch", ["0", "-decoder,-demo"])
def test_a_needed_patch_that_is_switched_off_is_missing(monkeypatch, switch):
    monkeypatch.setenv("STTS_COMPAT", switch)
    assert doctor.patch("decoder", APPLIED).status == doctor.MISSING
    assert doctor.patch("demo", APPLIED).status == doctor.OFF


def test_a_package_without_the_required_name_is_missing(monkeypatch):
    monkeypatch.setitem(doctor.REQUIRED_NAMES, "pytorchvideo", ("math", "cat_all_gather"))
    check = doctor.required_name("pytorchvideo")
    assert check.status == doctor.MISSING
    assert "cat_all_gather" in check.found
    assert check.fix == compat.REMEDIES["pytorchvideo"]


def test_brackets_in_what_was_found_are_no_markup(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("x", doctor.OK, "a [/b] [c]")])
    assert doctor.main(argparse.Namespace()) == 0
    assert "a [/b] [c]" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["STTS_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_autoload_that_is_switched_off_is_reported(monkeypatch, key):
    monkeypatch.setenv(key, "0")
    check = doctor.autoload()
    assert (check.status, check.found) == (doctor.OFF, f"{key}=0")
    assert "stts run" in check.fix


def test_an_error_of_the_launcher_is_a_row(tmp_path):
    launcher = tmp_path / "tools" / "run_net.py"
    launcher.parent.mkdir()
    launcher.write_text("import detectron2_that_is_missing\n")
    check = doctor.start(str(launcher))[-1]
    assert (check.name, check.status) == ("tools/run_net.py", doctor.MISSING)
    assert check.found.startswith("ModuleNotFoundError: No module named 'detectron2_that")
    assert check.fix == compat.REMEDIES["detectron2"]
    launcher.write_text("def main():\n    raise SystemExit(0)\n")
    assert doctor.start(str(launcher))[-1].status == doctor.OK


def test_it_fails_if_a_run_cannot_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLOWFAST_ROOT", str(tmp_path))
    assert doctor.main(argparse.Namespace()) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "SlowFast cannot start: missing" in printed and "SlowFast" in printed


def test_it_passes_if_nothing_is_missing(monkeypatch, capsys):
    checks = [doctor.Check("torch", doctor.OK, "2"), doctor.Check("CUDA", doctor.OFF, "no device")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert doctor.main(argparse.Namespace()) == 0
    assert "A SlowFast run can start." in capsys.readouterr().out


def test_every_patch_has_its_row_and_every_row_its_hooks():
    """The table of the guide is the one in the code, and no patch is outside of it."""
    guide = (Path(__file__).parents[2] / "projects" / "stts" / "README.md").read_text()
    rows = [line for line in guide.splitlines() if line.startswith("| `") and line.count("|") == 4]
    assert [row for row in rows if row in compat.table()] == compat.table()
    named = {function for one in compat.PATCHES.values() for function in one.hooks.values()}
    hooks = {name for names in autoload.HOOKS.values() for name in names}
    assert {name for name in hooks if ".patch_" in name} == named
    for function in named:  # each names, in the code, the row that switches it off
        file, _, name = function.rpartition(".")
        source = Path(compat.__file__).parents[1].joinpath(*file.split(".")).with_suffix(".py")
        (switch,) = re.findall(rf'@patch\("(\w+)"\)\ndef {name}\(', source.read_text())
        assert function in compat.PATCHES[switch].hooks.values()
