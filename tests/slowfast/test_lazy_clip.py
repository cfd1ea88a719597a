"""The frames of clips are those of SlowFast's own ``decode``, in both engines.

SlowFast's decoder reads videos by functions that torchvision no longer has. Here they are written
again as torchvision describes them, over films whose frames say their numbers: everything else is
SlowFast's code as it is in the checkout.
"""

import importlib.util
import json
import random
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from stts_slowfast.standalone.annotations import VideoRecord
from stts_slowfast.standalone.config import get_cfg as standalone_cfg
from stts_slowfast.standalone.data import ClipDataset, normalize_clips, read_kinetics
from stts_slowfast.video import Video, clip_frames

FIXTURE = Path(__file__).parents[1] / "fixtures" / "slowfast_clips.json"
RATES = [Fraction(n) for n in (8, 10, 15, 24, 25, 30, 50, 60)]
RATES += [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001), Fraction(77, 4)]


class Seconds(float):
    """A duration that, times the rate, is the number of frames, whatever floats make of it."""

    def __rmul__(self, rate: float) -> float:
        return float(self.frames)


class Film:
    """What torchvision sees of a film: its frames' numbers and time stamps."""

    def __init__(self, fps: Fraction, time_base: Fraction, pts: list[int]):
        self.fps, self.time_base, self.pts = fps, time_base, np.array(pts)
        self.duration = Seconds(len(pts) / float(fps))
        self.duration.frames = len(pts)

    def _probe_video_from_memory(self, data):
        return SimpleNamespace(
            video_timebase=self.time_base, has_video=True, video_duration=self.duration,
            video_fps=float(self.fps), audio_timebase=Fraction(0, 1), has_audio=False,
            audio_duration=0.0, audio_sample_rate=0.0,
        )  # fmt: skip

    def _read_video_from_memory(self, data, video_pts_range, **others):
        low, high = video_pts_range
        shown = self.pts >= low
        if high >= 0:
            shown &= self.pts <= high
        numbers = torch.from_numpy(np.flatnonzero(shown))
        return (numbers[:, None] if len(numbers) else torch.empty(0)), None


@pytest.fixture(scope="module")
def stock(checkout):
    """SlowFast's ``decode`` on a `Film`, as its own file defines it: the numbers of the frames."""
    name = "slowfast.datasets.decoder_of_the_checkout"
    path = checkout / "slowfast" / "datasets" / "decoder.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def frames(film, num_frames, sampling_rate, target_fps, clip_idx, num_clips, use_offset):
        module.io = film
        clips, *_ = module.decode(
            b"a film", [sampling_rate], [num_frames], clip_idx, num_clips, {}, target_fps,
            backend="torchvision", use_offset=use_offset,
        )  # fmt: skip
        return clips[0][:, 0].tolist()

    yield frames
    del sys.modules[name]


def draw(rng) -> dict:
    """A film and a clip of it."""
    fps = rng.choice(RATES)
    base = rng.choice([1 / fps / 512, 1 / fps / 512, Fraction(1, 1000), 1 / fps])
    if base.numerator != 1:  # SlowFast takes it to be 1
        base = Fraction(1, fps.numerator)
    test = rng.random() < 0.6
    return {
        "num_video_frames": rng.choice([rng.randint(1, 80), rng.randint(60, 400)]),
        "fps": [fps.numerator, fps.denominator],
        "time_base": [base.numerator, base.denominator],
        "num_frames": rng.choice([1, 4, 8, 8, 16, 16, 32]),
        "sampling_rate": rng.choice([1, 2, 4, 4, 8, 3, 5]),
        "target_fps": rng.choice([30, 30, 30, 24, 25, 12.5, 29.97, 30 + 5 * rng.random()]),
        "num_clips": (num_clips := rng.choice([1, 2, 3, 4, 5, 10])),
        "clip_idx": rng.randrange(num_clips) if test else -1,
        "use_offset": rng.random() < 0.3,
    }


def film_of(case: dict) -> Film:
    fps, base = Fraction(*case["fps"]), Fraction(*case["time_base"])
    step = 1 / fps / base
    pts = [int(number * step + Fraction(1, 2)) for number in range(case["num_video_frames"])]
    return Film(fps, base, pts)


def slowfasts(stock, case: dict, seed: int) -> list[int]:
    random.seed(seed)
    keys = "num_frames", "sampling_rate", "target_fps", "clip_idx", "num_clips", "use_offset"
    return stock(film_of(case), *(case[key] for key in keys))


def ours(case: dict, seed: int) -> list[int]:
    case = dict(case)
    fps, base = float(Fraction(*case.pop("fps"))), case.pop("time_base")
    ticks = base[1] / fps / base[0]
    return clip_frames(fps=fps, ticks=ticks, rng=random.Random(seed), **case)


def test_clips_of_any_film_and_rule_are_slowfasts(stock):
    rng = random.Random(0)
    for seed in range(1500):
        case = draw(rng)
        assert ours(case, seed) == slowfasts(stock, case, seed), case


def test_the_table_that_the_standalone_tests_read_is_slowfasts(stock):
    """Written by this file's ``write_table``."""
    table = json.loads(FIXTURE.read_text())
    assert len(table) >= 300
    for row in table:
        assert slowfasts(stock, row["case"], row["seed"]) == row["frames"]


def write_table(stock) -> None:
    rng, rows = random.Random(1), []
    for seed in range(400):
        case = draw(rng)
        rows.append({"case": case, "seed": seed, "frames": slowfasts(stock, case, seed)})
    FIXTURE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


# ---- on files, through both engines ---------------------------------------------------------


def write_film(path, fps: Fraction, frames: int, codec="libx264", **options) -> None:
    """Frames that say their numbers: sixteenths by the grey of the right half, the rest left."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "24", **options})
        stream.bit_rate = 4_000_000
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for number in range(frames):
            image = np.empty((32, 64, 3), np.uint8)
            image[:, :32], image[:, 32:] = number % 16 * 14 + 16, number // 16 * 10 + 16
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def numbers(images) -> list[int]:
    images = np.asarray(images, np.float64)
    low = images[:, 4:28, 4:28].mean((1, 2, 3))
    high = images[:, 4:28, 36:60].mean((1, 2, 3))
    found = np.rint((low - 16) / 14) + 16 * np.rint((high - 16) / 10)
    return found.astype(int).tolist()


FILMS = {
    "30.mp4": (Fraction(30), 300),
    "ntsc.mp4": (Fraction(30000, 1001), 150),
    "25.mkv": (Fraction(25), 120),
    "24.mkv": (Fraction(24), 90),
    "15.avi": (Fraction(15), 75, "mpeg4"),
    "packed times.avi": (Fraction(25), 100, "mpeg4"),
    "short.mp4": (Fraction(12), 40),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Paths, and the films as torchvision would see them."""
    folder, found = tmp_path_factory.mktemp("films"), {}
    for name, (fps, frames, *codec) in FILMS.items():
        path = folder / name
        write_film(path, fps, frames, *codec, **({"bf": "2"} if "packed" in name else {}))
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            pts = sorted(frame.pts for frame in container.decode(stream))
            base = stream.time_base
        assert len(pts) == frames
        found[str(path)] = Film(fps, base, [each - pts[0] for each in pts])
        with Video(path) as video:
            assert numbers(video.decode(range(frames))) == list(range(frames))
    return found


def cases(films, count, rng):
    for path in films:
        for _ in range(count):
            case = draw(rng)
            keys = "sampling_rate", "target_fps", "clip_idx", "num_clips", "use_offset"
            yield path, rng.choice([4, 8, 16]), *(case[key] for key in keys)


def test_the_standalone_runners_clips_are_slowfasts(stock, films):
    compared = 0
    for path, num_frames, rate, target, clip_idx, num_clips, offset in cases(
        films, 12, random.Random(2)
    ):
        cfg = standalone_cfg()
        cfg.DATA.update(NUM_FRAMES=num_frames, SAMPLING_RATE=rate, TARGET_FPS=target,
                        USE_OFFSET_SAMPLING=offset)  # fmt: skip
        cfg.TEST.NUM_ENSEMBLE_VIEWS = num_clips
        split = "train" if clip_idx < 0 else "test"
        images, clips, damage = read_kinetics(cfg, VideoRecord(path, 0), split, 0, random.Random(7))
        assert damage == ""
        for number, clip in enumerate(clips):
            random.seed(7)
            index = -1 if clip_idx < 0 else number
            expected = stock(films[path], num_frames, rate, target, index, num_clips, offset)
            assert numbers([images[place] for place in clip]) == expected
            compared += 1
    assert compared > 150


@pytest.mark.parametrize("backend", ["pyav", "torchvision"])
def test_clips_inside_slowfast_are_slowfasts(stock, films, backend):
    from slowfast.datasets import decoder
    from slowfast.datasets.video_container import get_video_container

    for path, num_frames, rate, target, clip_idx, num_clips, offset in cases(
        films, 14, random.Random(3)
    ):
        container = get_video_container(path, False, backend)
        random.seed(7)
        frames, *_ = decoder.decode(
            container, [rate], [num_frames], clip_idx, num_clips, {}, target, backend=backend,
            use_offset=offset,
        )  # fmt: skip
        clip = frames[0].materialize() if hasattr(frames[0], "materialize") else frames[0]
        random.seed(7)
        expected = stock(films[path], num_frames, rate, target, clip_idx, num_clips, offset)
        assert numbers(clip) == expected


@pytest.mark.parametrize("backend", ["pyav", "torchvision"])
def test_the_views_of_both_engines_are_equal(get_cfg, films, tmp_path, backend):
    """10 x 3 views of a film of 10 s, 16x4: most starts lie between two frames."""
    from slowfast.datasets import build_dataset

    path = next(path for path in films if path.endswith("30.mp4"))
    (tmp_path / "test.csv").write_text(f"{path} 0\n")
    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(tmp_path), "DATA.DECODING_BACKEND", backend,
                  "DATA.NUM_FRAMES", "16", "DATA.SAMPLING_RATE", "4",
                  "TEST.NUM_ENSEMBLE_VIEWS", "10", "TEST.NUM_SPATIAL_CROPS", "3")  # fmt: skip
    own = standalone_cfg()
    own.DATA.update({key: cfg.DATA[key] for key in own.DATA if key in cfg.DATA})
    own.TEST.update(NUM_ENSEMBLE_VIEWS=10, NUM_SPATIAL_CROPS=3)
    dataset = build_dataset("kinetics", cfg, "test")
    views = normalize_clips(ClipDataset(own, "test")[0][0], own)
    assert len(views) == 30
    for number, view in enumerate(views):
        torch.testing.assert_close(view, dataset[number][0][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["pyav", "torchvision"])
@pytest.mark.parametrize("name", ["xvid.avi", "h264.asf", "nvop.avi", "nostss_m4.mp4"])
def test_frames_of_files_that_claim_what_they_are_not(checkout, backend, name):
    from slowfast.datasets import decoder
    from slowfast.datasets.video_container import get_video_container

    path = FIXTURE.parent / "videos" / name
    with av.open(str(path)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with Video(path) as video:
        clips = [
            video.frames_at(clip_frames(len(images), video.fps, 8, 2, 30.0, view, 3, False,
                                        video.ticks))
            for view in range(3)
        ]  # fmt: skip
    for view in (2, 0, 1):
        container = get_video_container(str(path), False, backend)
        frames, *_ = decoder.decode(container, [2], [8], view, 3, {}, 30, backend=backend)
        expected = np.stack([images[number] for number in clips[view]])
        clip = frames[0].materialize() if hasattr(frames[0], "materialize") else frames[0]
        np.testing.assert_array_equal(clip.numpy(), expected)
