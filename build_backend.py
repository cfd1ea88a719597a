"""setuptools' build backend; it adds a ``.pth`` file that Python reads when it starts, and a copy
of ``stts_slowfast_autoload.py`` to editable installs.

An editable install links modules to the checkout. Python and PyTorch import this module whenever
they start, and must find it even if the checkout has moved.
"""

import base64
import hashlib
import os
import zipfile

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import build_editable as _build_editable
from setuptools.build_meta import build_wheel as _build_wheel

MODULE, PTH_FILE = "stts_slowfast_autoload.py", "stts_slowfast_autoload.pth"
# It must neither fail nor print, even if the module is gone.
PTH_LINE = (
    rb"import sys; exec('try:\n import stts_slowfast_autoload as s; s.wait()\nexcept Exception: 0')"
)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """setuptools' wheel with the ``.pth`` file."""
    name = _build_wheel(wheel_directory, config_settings, metadata_directory)
    _add(os.path.join(wheel_directory, name), {PTH_FILE: PTH_LINE})
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """setuptools' editable wheel with the ``.pth`` file and the module."""
    name = _build_editable(wheel_directory, config_settings, metadata_directory)
    with open(MODULE, "rb") as file:
        module = file.read()
    _add(os.path.join(wheel_directory, name), {PTH_FILE: PTH_LINE, MODULE: module})
    return name


def _add(path: str, added: dict[str, bytes]) -> None:
    """Adds files to a wheel and to its RECORD."""
    with zipfile.ZipFile(path) as wheel:
        files = {entry.filename: wheel.read(entry) for entry in wheel.infolist()}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    for name, content in added.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        files[name] = content
        files[record] = f"{name},sha256={digest},{len(content)}\n".encode() + files[record]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for entry, content in files.items():
            wheel.writestr(entry, content)
