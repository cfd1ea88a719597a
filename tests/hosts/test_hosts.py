"""How the host of a model is found."""

import subprocess
import sys

import pytest
from torch import nn

from stts_slowfast.hosts import is_instance_of, resolve_host


class VisionTransformer(nn.Module):
    """Has timm's name, and nothing else of it."""


def test_a_class_of_the_same_name_from_elsewhere_is_another():
    with pytest.raises(ValueError, match="VisionTransformer has no blocks to select tokens before"):
        resolve_host(VisionTransformer())
    assert is_instance_of(VisionTransformer(), __name__.partition(".")[0], "VisionTransformer")


def test_what_comes_from_a_known_class_is_known(example):
    kind = type(example.model)
    example.model.__class__ = type("Mine", (kind,), {"__module__": "mine"})
    assert len(resolve_host(example.model)[1]) == 4


def test_no_library_is_imported_to_find_a_host():
    code = (
        "import sys, torchvision; from stts_slowfast.hosts import resolve_host;"
        "resolve_host(torchvision.models.video.mvit_v1_b());"
        "print([name for name in ('transformers', 'timm', 'pytorchvideo') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
