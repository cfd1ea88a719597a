"""Every entry of the table of replacements names a module that exists, and replaces it."""

import importlib
import inspect

import pytest
from torchvision.models.video.mvit import MultiscaleAttention, MultiscaleBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from stts_slowfast.fused import pytorchvideo, torchvision, video_swin
from stts_slowfast.fused.registry import BLOCKS, FINAL_NORMS, SUBMODULES
from stts_slowfast.fused.replacement import Replacement

NAMES = [pytorchvideo.ATTENTION, pytorchvideo.BLOCK, pytorchvideo.DROP_PATH]
NAMES += [pytorchvideo.MODEL, pytorchvideo.POOL]


def test_every_replacement_of_this_room_is_in_the_table():
    defined = {
        cls
        for module in (torchvision, pytorchvideo, video_swin)
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, Replacement)
        and cls.__module__ == module.__name__
    }
    assert defined == {
        cls for cls in SUBMODULES + BLOCKS if cls.__module__.startswith("stts_slowfast.fused.")
    }
    assert {torchvision.final_norm, pytorchvideo.final_norm} <= set(FINAL_NORMS)


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        (MultiscaleAttention, torchvision.TorchvisionAttention),
        (MultiscaleBlock, torchvision.TorchvisionBlock),
        (ShiftedWindowAttention3d, video_swin.SwinAttention),
    ],
)
def test_torchvisions_modules_have_one_replacement_each(module, cls):
    found = module.__new__(module)
    assert [entry for entry in SUBMODULES + BLOCKS if entry.matches(found)] == [cls]


@pytest.mark.parametrize("name", NAMES)
def test_pytorchvideos_classes_exist(name):
    pytest.importorskip("pytorchvideo")
    module, _, cls = name.rpartition(".")
    assert inspect.isclass(getattr(importlib.import_module(module), cls))
