"""Writes the videos that loader.py, decoders.py and exact_frames.py read.

    python projects/stts/benchmarks/sample_videos.py FOLDER [COUNT]

FOLDER then has COUNT (six) H.264 videos of 10 s, 456x256, and train.csv, val.csv and test.csv, as
``DATA.PATH_TO_DATA_DIR`` of ``stts bench --data`` and ``--end-to-end``.
"""

import functools
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import torch

FRAMES = 300


def write_video(
    path: Path, images: Iterable[np.ndarray], codec: str = "libx264", **options
) -> None:
    """Encodes images (H, W, 3) at 30 frames a second, by x264's defaults (with B-frames)."""
    images = iter(images)
    first = next(images)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        for image in itertools.chain([first], images):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@functools.lru_cache(maxsize=1)
def draw_images(frames: int, height: int, width: int, grain: float = 2.0) -> list[np.ndarray]:
    """Objects that rotate and drift over a panned background: textures with the spectrum of natural
    images, and grain."""
    rng = np.random.default_rng(0)
    back, front = _texture(rng, 512), _texture(rng, 256)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width) * width / height, indexing="ij"
    )

    def look(texture, across, down):
        grid = torch.stack([across, down], -1)[None]
        return torch.nn.functional.grid_sample(
            texture, grid, padding_mode="reflection", align_corners=False
        )[0]

    images = []
    for number in range(frames):
        t = number / 30
        zoom = 0.4 + 0.05 * np.sin(t / 2)
        image = look(back, x * zoom + 0.3 * np.sin(t / 2), y * zoom + 0.2 * np.cos(0.4 * t))
        for each in range(3):
            turn = t * (0.9 + 0.4 * each) + 2 * each
            u = (x - 1.2 * np.sin(turn)) / (0.28 + 0.05 * each)
            v = (y - 0.6 * np.cos(1.3 * turn)) / (0.28 + 0.05 * each)
            across = np.cos(turn) * u - np.sin(turn) * v
            down = np.sin(turn) * u + np.cos(turn) * v
            inside = u * u + 1.5 * v * v < 1
            image = torch.where(inside, look(front, across / 2, down / 2).flip(0), image)
        pixels = image.permute(1, 2, 0).numpy() + grain * rng.standard_normal((height, width, 1))
        images.append(pixels.clip(0, 255).astype(np.uint8))
    return images


def _texture(rng, size: int) -> torch.Tensor:
    """(1, 3, size, size) around 110; amplitudes decrease with frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 1 / size
    waves = np.fft.rfft2(rng.standard_normal((3, size, size))) / frequency**1.1
    waves[:, 0, 0] = 0
    image = np.fft.irfft2(waves, (size, size))
    return torch.from_numpy(110 + 45 * image / image.std((1, 2), keepdims=True)).float()[None]


def write_folder(folder: Path, videos: int = 6) -> None:
    """Writes videos, and lists of them with labels 0, 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "0.mp4"
    write_video(first, draw_images(FRAMES, 256, 456), g="250")
    for number in range(1, videos):
        (folder / f"{number}.mp4").write_bytes(first.read_bytes())
    lines = [f"{(folder / f'{number}.mp4').resolve()} {number}\n" for number in range(videos)]
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(lines))


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]), *map(int, sys.argv[2:]))
