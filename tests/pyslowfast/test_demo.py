"""What the demo does with frames that are not square."""

from types import SimpleNamespace

import numpy as np
import pytest
from fvcore.common.config import CfgNode

from stts_slowfast.pyslowfast.compat import tools


@pytest.fixture
def process():
    utils = SimpleNamespace(process_cv2_inputs=lambda frames, cfg: [f.shape[:2] for f in frames])
    tools.patch_demo(utils)
    return utils.process_cv2_inputs


def config(arch="mvit", detection=False):
    model = {"ARCH": arch, "MODEL_NAME": "MViT"}
    return CfgNode({"MODEL": model, "DETECTION": {"ENABLE": detection}})


def test_an_mvit_gets_the_middle_square_and_convolutions_all(process):
    frames = [np.zeros((24, 32, 3), np.uint8)]
    assert process(frames, config()) == [(24, 24)]
    assert process(frames, config("slow", detection=True)) == [(24, 32)]


def test_boxes_on_frames_that_are_not_square_are_refused(process):
    with pytest.raises(ValueError, match=r"DETECTION\.ENABLE is True and frames are 32x24, "):
        process([np.zeros((24, 32, 3), np.uint8)], config(detection=True))
    assert process([np.zeros((24, 24, 3), np.uint8)], config(detection=True)) == [(24, 24)]
