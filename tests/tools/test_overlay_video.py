"""Pictures of a clip mark what was kept, at the right positions."""

import numpy as np
import pytest
import torch
from PIL import Image

from stts_slowfast import visualization
from stts_slowfast.tools import overlay_video
from stts_slowfast.tools.inspection import View, crop_window


def test_picture_marks_kept_frames_green_and_windows_red(tmp_path):
    frames = torch.full((4, 32, 32, 3), 128, dtype=torch.uint8)
    regions = visualization.KeptRegions({1: (0.25, 0.25, 0.5, 0.5)})
    strip = visualization.FilmStripRow("a clip", frames, regions, [1], [0, 1, 0.5, 0])
    visualization.draw([strip]).savefig(tmp_path / "strip.png")
    image = np.array(Image.open(tmp_path / "strip.png").convert("RGB")).astype(int)
    red, green, blue = image.reshape(-1, 3).T
    green_pixels = ((green > 120) & (red < 80) & (blue < 80)).sum()
    red_pixels = ((red > 180) & (green < 80) & (blue < 80)).sum()
    blue_pixels = ((blue > 150) & (red < 80) & (green < 140)).sum()
    assert blue_pixels > 100
    assert green_pixels > 200 and red_pixels > 100
    assert (abs(red - 128) < 3).sum() > 1000  # the kept frame is not dimmed


def test_frames_of_the_video_belong_to_the_frame_of_tokens_before_them():
    kept = visualization.KeptRegions({0: (0.0, 0.0, 0.5, 0.5), 2: visualization.FULL_FRAME})
    view = View(torch.zeros(3, 6, 8, 8), [10, 13, 16, 19, 22, 25], (0.25, 0.0, 0.5, 1.0))
    overlay = overlay_video.ViewOverlay(view, 3, kept)
    first, last = (0.25, 0.0, 0.25, 0.5), (0.25, 0.0, 0.5, 1.0)
    boxes = [overlay.boxes_at(number) for number in range(30)]
    assert boxes == [[]] * 10 + [[first]] * 6 + [[]] * 6 + [[last]] * 6 + [[]] * 2


def test_what_no_view_kept_is_dimmed():
    frame = np.full((9, 8, 3), 200, np.uint8)
    dimmed = overlay_video.dim(frame, [None, (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)])
    assert dimmed.shape == (8, 8, 3)
    bright = dimmed[..., 0] == 200
    assert bright[:4, :4].all() and bright[4:, 4:].all() and bright.sum() == 32
    assert (dimmed[~bright] == 200 * overlay_video.DIM).all()


@pytest.mark.parametrize(("height", "width"), [(340, 256), (256, 340), (90, 120)])
def test_crop_is_the_middle_square(height, width):
    top, left, tall, wide = crop_window(height, width, 256, 224)
    assert tall * height == pytest.approx(wide * width, rel=0.01)
    assert top + tall / 2 == pytest.approx(0.5, abs=0.01)
    assert left + wide / 2 == pytest.approx(0.5, abs=0.01)
    assert min(tall * height, wide * width) / min(height, width) == pytest.approx(224 / 256, 0.01)
