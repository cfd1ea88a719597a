"""Fixtures of the tests that run inside a SlowFast checkout, and their skipping without one.

SLOWFAST_ROOT=/path/to/SlowFast pytest tests/slowfast
"""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from stts_slowfast.pyslowfast import launch

HERE = Path(__file__).parent
try:
    LAUNCHER, REASON = launch.find_launcher(), "SLOWFAST_ROOT is not set, slowfast not importable"
except FileNotFoundError as error:
    LAUNCHER, REASON = None, str(error)


def pytest_collection_modifyitems(items):
    if LAUNCHER is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The checkout's root, importable in this process and with the plugin in place."""
    root = Path(LAUNCHER).parents[1]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    import stts_slowfast.pyslowfast

    stts_slowfast.pyslowfast.autoload.register_hooks()
    return root


@pytest.fixture(scope="session")
def get_cfg(checkout):
    """Makes SlowFast configs of a small MViT: 4 blocks, 8 frames of 32x32, 8 classes."""
    from slowfast.config import defaults

    def make(*opts, stock: str | None = None):
        cfg = defaults.get_cfg()
        cfg.merge_from_file(str(checkout / stock) if stock else str(HERE / "tiny.yaml"))
        cfg.NUM_GPUS = 0
        cfg.merge_from_list(list(opts))
        return cfg

    return make


@pytest.fixture(scope="session")
def build(checkout):
    """SlowFast's ``build_model``."""
    from slowfast.models import build_model

    return build_model


@pytest.fixture(scope="session")
def write_video():
    """``write_video(path, frames, fps=30)``: RGB frames as mp4."""
    return _write_video


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Lists train, val and test of mp4 files in 8 classes; one of the training files is broken."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8), ("test", 8)):
        rows = []
        for number in range(count):
            path = folder / f"{split}_{number}.mp4"
            _write_video(path, [frame(number % 8, t, rng) for t in range(24)])
            rows.append(f"{path} {number % 8}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    (folder / "broken.mp4").write_bytes(b"this is no video")
    with open(folder / "train.csv", "a") as file:
        file.write(f"{folder / 'broken.mp4'} 0\n")
    return folder


@pytest.fixture
def bad_lists(videos, tmp_path) -> Path:
    """Lists train, val and test: readable, broken, readable, missing its end, readable."""
    whole = (videos / "val_0.mp4").read_bytes()
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    names = [videos / "val_0.mp4", "broken.mp4", videos / "val_1.mp4", "half.mp4"]
    rows = [f"{tmp_path / name} 1" for name in [*names, videos / "val_2.mp4"]]
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def frame(label: int, time: int, rng) -> np.ndarray:
    """A noisy frame with a square whose row tells the class."""
    image = rng.integers(0, 60, (48, 64, 3), dtype=np.uint8)
    left = time * 2 % 48
    image[label * 5 : label * 5 + 10, left : left + 12] = 240
    return image


def _write_video(path: Path, frames: list[np.ndarray], fps: int = 30) -> None:
    """Writes RGB frames as mp4 (MPEG-4 part 2, which every FFmpeg can write)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def python(checkout):
    """Runs a script's text in a fresh interpreter, as a user's script beside SlowFast would."""

    def run(path: Path, text: str, *args: str, **env: str) -> str:
        path.write_text(text)
        command = [sys.executable, str(path), *args]
        done = subprocess.run(
            command, env={**environment(), **env}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def environment() -> dict[str, str]:
    """This process's environment, with the checkout and one thread a process."""
    return {**launch.environment(LAUNCHER), "OMP_NUM_THREADS": "1"}
