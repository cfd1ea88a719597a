import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from stts_slowfast.plugins import EXTRAS, MissingPackageError, require
from stts_slowfast.tools import cli

SETUP = Path(__file__).parents[1] / "setup.cfg"


def hide(monkeypatch, package):
    real = importlib.import_module

    def import_module(name, *args):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    hide(monkeypatch, "safetensors")
    with pytest.raises(MissingPackageError, match=r"pip install 'stts-slowfast\[tools\]'"):
        require("safetensors.torch")


def test_other_missing_packages_raise_pythons_error():
    with pytest.raises(ModuleNotFoundError):
        require("no_such_package_at_all")
    assert require("json").dumps([]) == "[]"


def test_setup_knows_every_optional_package():
    config = configparser.ConfigParser()
    config.read(SETUP)
    extras = config["options.extras_require"]
    for package, extra in EXTRAS.items():
        assert f"\n{package.replace('_', '-')}>=" in extras[extra], package
        assert package not in config["options"]["install_requires"]


def test_a_command_without_its_package_ends_in_one_line(monkeypatch, capsys):
    hide(monkeypatch, "rich")

    def main(args):
        importlib.import_module("rich.console")

    command = type("Command", (), {"add_arguments": staticmethod(lambda p: 0), "main": main})
    command.main = staticmethod(main)
    monkeypatch.setitem(cli.COMMANDS, "doctor", ("tests_command", "look"))
    monkeypatch.setitem(sys.modules, "tests_command", command)
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "stts: error: this needs rich, which is not installed: pip install 'stts-slowfast[tools]'\n"
    )


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_names_the_missing_package(command):
    """A process in which none of the optional packages can be imported."""
    program = (
        "import sys\n"
        f"for name in {sorted(EXTRAS)}: sys.modules[name] = None\n"
        "from stts_slowfast.tools import cli\n"
        f"sys.exit(cli.main([{command!r}, '--help']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or "pip install 'stts-slowfast[" in done.stderr
