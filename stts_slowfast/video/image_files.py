"""Image files as OpenCV reads them for SlowFast: BGR, 8 bits, rotated by their EXIF data."""

import numpy as np
from iopath.common.file_io import g_pathmgr
from PIL import Image, ImageOps

from stts_slowfast.video.io import VideoError


def read_image(path: str) -> np.ndarray:
    """(H, W, 3) uint8, BGR. Raises VideoError if the file is missing, no image, or truncated."""
    try:
        with g_pathmgr.open(path, "rb") as file:
            image = ImageOps.exif_transpose(Image.open(file))
        if image.mode.startswith("I"):  # 16-bit grey, of which the upper eight bits are kept
            grey = (np.array(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, 2)
        return np.array(image.convert("RGB"))[..., ::-1]
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken images
        reason = getattr(error, "strerror", None) or "it is not an image, or it is damaged"
        raise VideoError(path, reason) from error
