"""A model trained at one budget, or at a range of them, is tested at another."""

import contextlib
from pathlib import Path

import av
import numpy as np
import pytest

from stts_slowfast import selections
from stts_slowfast.standalone import engine
from stts_slowfast.standalone.signals import Interrupted
from stts_slowfast.tools.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "TimeSformer": {
        "cfg": CONFIGS / "Kinetics" / "STTS_TIMESFORMER_8x32_T0_0.9_S4_0.9.yaml",
        "DATA.TRAIN_CROP_SIZE": 48,
        "DATA.TEST_CROP_SIZE": 48,
        "TIMESFORMER.EMBED_DIM": 24,
        "TIMESFORMER.DEPTH": 5,
        "STTS.SPACE.KEEP": [0.5],
    },
    "VideoSwin": {
        "cfg": CONFIGS / "Kinetics" / "STTS_SWIN_T_32x2_T0_0.9.yaml",
        "DATA.NUM_FRAMES": 8,
        "DATA.TRAIN_CROP_SIZE": 32,
        "DATA.TEST_CROP_SIZE": 32,
        "VIDEO_SWIN.EMBED_DIM": 12,
        "VIDEO_SWIN.DEPTHS": [1, 1, 1, 1],
        "VIDEO_SWIN.WINDOW_SIZE": [4, 4, 4],
    },
}
TINY_RUN = {
    "NUM_GPUS": 0,
    "DATA.SAMPLING_RATE": 2,
    "DATA.TRAIN_JITTER_SCALES": [48, 56],
    "DATA_LOADER.NUM_WORKERS": 0,
    "TRAIN.BATCH_SIZE": 2,
    "TRAIN.CHECKPOINT_PERIOD": 1,
    "TEST.BATCH_SIZE": 2,
    "TEST.NUM_ENSEMBLE_VIEWS": 1,
    "TEST.NUM_SPATIAL_CROPS": 1,
    "SOLVER.MAX_EPOCH": 1,
    "STTS.NUM_SAMPLES": 20,
    "STTS.FREEZE_BACKBONE_EPOCHS": 0.0,
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    lines = []
    for number in range(2):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for _ in range(20):
                image = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        lines.append(f"{folder / f'{number}.mp4'} {number}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("family", SMALL)
def test_trained_at_one_share_tested_at_another(family, videos, tmp_path, caplog):
    keys = {**TINY_RUN, **SMALL[family], "OUTPUT_DIR": tmp_path, "DATA.PATH_TO_DATA_DIR": videos}
    cfg = str(keys.pop("cfg"))
    opts = [str(word) for pair in keys.items() for word in pair]

    def run(*more):
        """Runs once more; returns what was logged."""
        caplog.clear()
        with caplog.at_level("INFO"):
            command = ["run", "--engine", "standalone", "--cfg", cfg, "--opts", *opts, *more]
            assert main(command) == 0
        return caplog.text

    trained = run("STTS.TIME.KEEP", "[0.9]")
    checkpoints = sorted(tmp_path.rglob("checkpoint_epoch_*.pyth"))
    assert len(checkpoints) == 1

    tested = run("TRAIN.ENABLE", "False", "STTS.TIME.KEEP", "[0.5]")
    assert "train_epoch" in trained and "train_epoch" not in tested
    assert "test_final" in tested
    before, at_90, at_50 = {"TimeSformer": (8, 7, 4), "VideoSwin": (4, 3, 2)}[family]
    grid = {"TimeSformer": "3x3", "VideoSwin": "8x8"}[family]
    assert f"keep 0.9, {before}x{grid} -> {at_90}x{grid}" in trained
    assert f"keep 0.5, {before}x{grid} -> {at_50}x{grid}" in tested
    assert str(checkpoints[0]) in tested
    assert not any(word in tested for word in ("missing", "unexpected", "mismatched"))


@pytest.fixture
def ranged(run):
    run.cfg.STTS.TIME.KEEP, run.cfg.STTS.SPACE.KEEP = [[0.25, 0.9]], [[0.1, 1.0]]
    return run


def drawn(cfg, stop_after=99):
    """Trains, at most for some iterations; frames and side of the window at each."""
    found = []

    def look(split, model, batch):
        kept = selections(model)
        if split == "train":
            found.append((kept["time_0"].shape[1], int(kept["space_2"][0, 2])))
            if len(found) == stop_after:
                raise KeyboardInterrupt

    with contextlib.suppress(Interrupted):
        engine.train(cfg, watch=look)
    return found


def test_a_resumed_run_draws_the_budgets_of_the_whole_run(ranged, tmp_path):
    cfg = ranged.cfg
    whole = drawn(cfg)
    assert len(whole) == 6 and len(set(whole)) > 2
    assert all(1 <= frames <= 3 and 1 <= side <= 4 for frames, side in whole)
    cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    assert drawn(cfg, 4) == whole[:4]
    assert drawn(cfg) == whole[3:]
    cfg.RNG_SEED, cfg.OUTPUT_DIR = 5, str(tmp_path / "other")
    assert drawn(cfg) != whole


def test_one_checkpoint_is_tested_at_any_budget_but_at_none_unsaid(ranged):
    cfg = ranged.cfg
    cfg.LOG_MODEL_INFO, cfg.TRAIN.EVAL_PERIOD = True, 1
    engine.train(cfg)  # validates and counts GFLOPs at the high end
    with pytest.raises(ValueError, match=r'STTS.TIME.KEEP of block 0 .*--opts STTS.TIME.KEEP "\[0'):
        engine.test(cfg)
    gflops = []
    for keep in (0.25, 0.5, 0.6, 0.75, 0.9):
        cfg.STTS.TIME.KEEP, cfg.STTS.SPACE.KEEP = [keep], [keep]
        result = engine.test(cfg)
        assert result["num_videos"] == ranged.num_videos
        gflops.append(result["gflops"])
    assert gflops == sorted(gflops) and gflops[0] < gflops[-1]
