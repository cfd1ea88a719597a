"""Frames are turned and mirrored as players show them."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest

from stts_slowfast.video import Video

FILES = Path(__file__).parents[1] / "fixtures" / "videos"
ONE = 65536
# The display matrix (a, b, c, d), and what FFmpeg's filters make of a stored frame for it.
ORIENTATIONS = {
    "as stored": ((1, 0, 0, 1), lambda image: image),
    "hflip": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "vflip": ((1, 0, 0, -1), lambda image: image[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    "clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "anticlockwise": ((0, -1, 1, 0), lambda image: np.rot90(image)),
    "transposed the other way": ((0, -1, -1, 0), lambda image: np.rot90(image.swapaxes(0, 1), 2)),
}


def decode_all(source):
    with av.open(str(source)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_all_eight_orientations(tmp_path, name):
    (a, b, c, d), shown = ORIENTATIONS[name]
    data = (FILES / "hflip.mp4").read_bytes()
    place = data.index(struct.pack(">9i", -ONE, 0, 0, 0, ONE, 0, 128 * ONE, 0, 1 << 30))
    matrix = struct.pack(">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    path = tmp_path / "a.mp4"
    path.write_bytes(data[:place] + matrix + data[place + 36 :])
    expected = [shown(image) for image in decode_all(path)]
    with Video(path) as video:
        for index in (0, 30, 74):
            np.testing.assert_array_equal(video.decode([index])[0], expected[index])
        sides = expected[0].shape[:2]
        assert (video.info.height, video.info.width) == sides
        assert video.decode([0], 24).shape[1:3] == tuple(round(s * 24 / min(sides)) for s in sides)


@pytest.mark.parametrize("name", ["hflip", "transpose", "rot270flip"])
def test_files_that_are_mirrored(name):
    names = {"transpose": "transposed", "rot270flip": "transposed the other way"}
    shown = ORIENTATIONS[names.get(name, name)][1]
    expected = np.stack([shown(image) for image in decode_all(FILES / f"{name}.mp4")])
    with Video(FILES / f"{name}.mp4") as video:
        np.testing.assert_array_equal(video.decode(range(75)), expected)
    with Video(FILES / f"{name}.mp4", rotate=False) as video:
        assert video.decode([0]).shape == (1, *decode_all(FILES / f"{name}.mp4")[0].shape)
