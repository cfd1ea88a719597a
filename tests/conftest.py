"""Fixtures shared by the tests: golden numbers, small configs, a small model."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from stts_slowfast.standalone import signals
from stts_slowfast.standalone.config import get_cfg

FIXTURES = Path(__file__).parent / "fixtures"


class Golden:
    """One ``tests/fixtures/*.npz``: arrays as tensors, ``config`` as a dict, ``weights`` apart."""

    def __init__(self, name: str):
        arrays = np.load(FIXTURES / f"{name}.npz", allow_pickle=False)
        self.config = json.loads(str(arrays["config"])) if "config" in arrays.files else {}
        self.arrays = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "config"}
        self.weights = {
            key.removeprefix("weights/"): value
            for key, value in self.arrays.items()
            if key.startswith("weights/")
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]

    def cfg(self):
        """The fixture's config as a standalone config; the authors' selection keys left out."""
        cfg = get_cfg()
        for key, value in self.config.items():
            node, _, name = key.rpartition(".")
            if name in cfg[node]:
                cfg[node][name] = value
        return cfg


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A stopped run in this very process is not ended by force, however busy the machine is."""
    monkeypatch.setattr(signals, "GRACE_PERIOD", 600.0)


@pytest.fixture
def golden():
    return Golden


@pytest.fixture
def tiny_cfg():
    """A two-stage MViT on 8 frames of 32x32: grids 4x8x8, then 4x4x4 from block 2 on."""
    cfg = Golden("slowfast_mvit_v1").cfg()
    cfg.STTS.TIME.KEEP = [0.5]
    cfg.STTS.SPACE.BLOCKS = [2]
    cfg.STTS.SPACE.KEEP = [0.6]
    cfg.STTS.NUM_SAMPLES = 50
    # The paper's, whatever the defaults.
    cfg.STTS.SIGMA = cfg.STTS.BACKBONE_LR = 0.1
    cfg.STTS.SHRINK = 0.0
    return cfg


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
