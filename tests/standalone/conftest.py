"""Real video files, a short run on them, and what such a run leaves in its folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import simplejson
import torch


class Run:
    """A config of a short run, and a look at what it wrote."""

    num_videos = 7  # does not divide by the batch size, nor by the number of processes

    def __init__(self, cfg, tmp_path):
        self.cfg, self.tmp_path = cfg, tmp_path

    @property
    def folder(self):
        return Path(self.cfg.OUTPUT_DIR)

    def json_stats(self, kind=None, name="stdout.log"):
        text = (self.folder / name).read_text()
        stats = [simplejson.loads(line) for line in re.findall(r"json_stats: (.*)", text)]
        return [s for s in stats if kind in (None, s.get("_type"), s.get("split"))]

    def checkpoint(self, epoch):
        path = self.folder / "checkpoints" / f"checkpoint_epoch_{epoch:05d}.pyth"
        return torch.load(path, weights_only=True)

    def checkpoints(self):
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))

    def write(self):
        """Writes the config to a file."""
        path = self.tmp_path / "cfg.yaml"
        path.write_text(self.cfg.dump())
        return path

    def start(self, *words, launcher=(), **environment):
        """Starts ``stts run`` on the config as a command; its output comes by a pipe."""
        command = ["-m", "stts_slowfast", "run", "--engine", "standalone", "--cfg", self.write()]
        return subprocess.Popen(
            [*(launcher or [sys.executable]), *map(str, command), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )


@pytest.fixture(scope="session")
def run_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    lines = []
    for number in range(Run.num_videos):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            image = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            for shift in range(16):
                frame = av.VideoFrame.from_ndarray(np.roll(image, shift, 1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        lines.append(f"{number}.mp4 {number % 6}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def run(tiny_cfg, run_videos, tmp_path):
    """Two epochs of three iterations, with everything on that draws random numbers."""
    cfg = tiny_cfg
    cfg.NUM_GPUS, cfg.LOG_PERIOD, cfg.LOG_MODEL_INFO = 0, 1, False
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATA.PATH_TO_DATA_DIR = cfg.DATA.PATH_PREFIX = str(run_videos)
    cfg.DATA.SAMPLING_RATE, cfg.DATA.TRAIN_JITTER_SCALES = 1, [32, 36]
    cfg.DATA_LOADER.NUM_WORKERS = 0
    cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.EVAL_PERIOD, cfg.TRAIN.CHECKPOINT_PERIOD = 2, 5, 1
    cfg.TEST.BATCH_SIZE, cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS = 4, 2, 1
    cfg.TEST.ENABLE = False
    cfg.MIXUP.ENABLE, cfg.MODEL.DROPOUT_RATE = True, 0.5
    cfg.MODEL.LOSS_FUNC = "soft_cross_entropy"
    cfg.SOLVER.MAX_EPOCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.OPTIMIZING_METHOD = 2, 1e-3, "adamw"
    cfg.STTS.ENABLE, cfg.STTS.FREEZE_BACKBONE_EPOCHS = True, 0.5
    return Run(cfg, tmp_path)


@pytest.fixture
def plain_run(run):
    """The same with nothing that draws, so that processes may share the work as they like."""
    cfg = run.cfg
    cfg.DATA.NUM_FRAMES, cfg.DATA.SAMPLING_RATE = 8, 2  # all of a video
    cfg.DATA.TRAIN_JITTER_SCALES, cfg.DATA.RANDOM_FLIP = [32, 32], False
    cfg.MIXUP.ENABLE, cfg.MODEL.LOSS_FUNC = False, "cross_entropy"
    cfg.MODEL.DROPOUT_RATE = cfg.MVIT.DROPPATH_RATE = 0.0
    cfg.STTS.ENABLE = False
    cfg.TRAIN.EVAL_PERIOD = 1
    return run
