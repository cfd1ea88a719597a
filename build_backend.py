"""setuptools' build backend, whose editable wheels hold ``stts_slowfast_autoload.py`` as a copy.

An editable install links modules to the checkout. PyTorch imports this one with every ``import
torch``, and must find it also when the checkout has moved.
"""

import base64
import hashlib
import os
import zipfile

from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import build_editable as _build_editable

MODULE = "stts_slowfast_autoload.py"


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """The editable wheel of setuptools, with the module."""
    name = _build_editable(wheel_directory, config_settings, metadata_directory)
    path = os.path.join(wheel_directory, name)
    with zipfile.ZipFile(path) as wheel:
        files = {entry.filename: wheel.read(entry) for entry in wheel.infolist()}
    with open(MODULE, "rb") as file:
        files[MODULE] = file.read()
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    digest = base64.urlsafe_b64encode(hashlib.sha256(files[MODULE]).digest()).rstrip(b"=").decode()
    row = f"{MODULE},sha256={digest},{len(files[MODULE])}\n"
    files[record] = row.encode() + files[record]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for entry, content in files.items():
            wheel.writestr(entry, content)
    return name
