"""What the doctor says, and the status it leaves with."""

import argparse

import pytest

from stts_slowfast.pyslowfast import autoload, compat
from stts_slowfast.tools import doctor

LOG = "stts_slowfast: mended decoder: both backends\nModuleNotFoundError: no detectron2\n"


def test_mends_are_read_from_the_log(monkeypatch):
    monkeypatch.delenv("STTS_COMPAT", raising=False)
    assert doctor.mend("decoder", LOG).status == doctor.MENDED
    assert doctor.mend("vision_imports", LOG).status == doctor.OK


def test_a_needed_mend_that_is_switched_off_is_missing(monkeypatch):
    monkeypatch.setenv("STTS_COMPAT", "0")
    assert doctor.mend("decoder", LOG).status == doctor.MISSING
    assert doctor.mend("vision_imports", LOG).status == doctor.OK


def test_a_package_without_the_needed_name_is_missing(monkeypatch):
    monkeypatch.setitem(doctor.NEEDED_NAMES, "pytorchvideo", ("math", "cat_all_gather"))
    check = doctor.needed_name("pytorchvideo")
    assert check.status == doctor.MISSING
    assert "cat_all_gather" in check.found
    assert check.todo == compat.REMEDIES["pytorchvideo"]


def test_brackets_in_what_was_found_are_no_markup(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("x", doctor.OK, "a [/b] [c]")])
    assert doctor.main(argparse.Namespace()) == 0
    assert "a [/b] [c]" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["STTS_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_autoload_that_is_switched_off_is_told(monkeypatch, key):
    monkeypatch.setenv(key, "0")
    check = doctor.autoload()
    assert (check.status, check.found) == (doctor.OFF, f"{key}=0")
    assert "stts run" in check.todo


def test_it_fails_where_a_run_cannot_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLOWFAST_ROOT", str(tmp_path))
    assert doctor.main(argparse.Namespace()) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "A SlowFast run cannot start:" in told and "SlowFast" in told


def test_it_passes_where_nothing_is_missing(monkeypatch, capsys):
    checks = [doctor.Check("torch", doctor.OK, "2"), doctor.Check("CUDA", doctor.OFF, "no device")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert doctor.main(argparse.Namespace()) == 0
    assert "A SlowFast run can start." in capsys.readouterr().out


def test_every_mend_has_its_line():
    hooks = [name.rpartition(".")[2] for names in autoload.HOOKS.values() for name in names]
    mends = {name.removeprefix("mend_") for name in hooks if name.startswith("mend_")}
    assert mends == set(compat.MENDS)
