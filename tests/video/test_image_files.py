"""Images are read as OpenCV reads them for SlowFast."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stts_slowfast.video import VideoError
from stts_slowfast.video.image_files import read_image

FILES = Path(__file__).parents[1] / "fixtures" / "videos"
RNG = np.random.default_rng(0)
PIXELS = np.kron(RNG.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
# What each value of EXIF's orientation asks for, of an image as it is stored.
TURNED = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image.swapaxes(0, 1), 2),
    8: lambda image: np.rot90(image),
}


def save(path, image, **keys):
    image.save(path, **keys)
    return str(path)


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("value", TURNED)
def test_images_are_turned_as_exif_says(tmp_path, kind, value):
    exif = Image.Exif()
    exif[274] = value
    image = Image.fromarray(PIXELS)
    plain = read_image(save(tmp_path / f"plain.{kind}", image))
    found = read_image(save(tmp_path / f"turned.{kind}", image, exif=exif))
    np.testing.assert_array_equal(found, TURNED[value](plain))


def test_sixteen_bits_of_grey_keep_the_upper_eight(tmp_path):
    grey = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    for kind in ("png", "tif"):
        found = read_image(save(tmp_path / f"a.{kind}", Image.fromarray(grey)))
        np.testing.assert_array_equal(found, np.repeat((grey >> 8)[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_colours_are_bgr_without_alpha(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    found = read_image(save(tmp_path / "a.png", image))
    np.testing.assert_array_equal(found, np.array(image.convert("RGB"))[..., ::-1])


def test_jpegs_are_equal_to_pillows(tmp_path):
    for number, keys in enumerate(({}, {"progressive": True}, {"quality": 98, "subsampling": 0})):
        path = save(tmp_path / f"{number}.jpg", Image.fromarray(PIXELS), **keys)
        np.testing.assert_array_equal(read_image(path), np.array(Image.open(path))[..., ::-1])


@pytest.mark.parametrize("name", ["exif6.jpg", "grey16.png"])
def test_equal_to_opencv(name):
    cv2 = pytest.importorskip("cv2")
    expected = cv2.imread(str(FILES / name), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(read_image(str(FILES / name)), expected)


def test_given_files():
    assert read_image(str(FILES / "exif6.jpg")).shape == (128, 96, 3)
    grey = read_image(str(FILES / "grey16.png"))
    assert grey.shape == (96, 128, 3) and (grey < 255).mean() > 0.9


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_what_is_no_whole_image_is_refused(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, {"jpg": "JPEG", "png": "PNG"}[kind])
    data = buffer.getvalue()
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    (tmp_path / "none").write_bytes(b"no image")
    for name in ("half", "none"):
        with pytest.raises(VideoError, match=f"{name}: it is not an image, or it is damaged"):
            read_image(str(tmp_path / name))
    with pytest.raises(VideoError, match="No such file"):
        read_image(str(tmp_path / "missing"))
