"""Every file in configs/ inside SlowFast: it is read as in the standalone runner, and it builds."""

from pathlib import Path

import pytest
import torch
import yaml

from stts_slowfast.hooks import selections
from stts_slowfast.standalone.config import load_config

ROOT = Path(__file__).parents[2]
FILES = {
    str(path.relative_to(ROOT / "configs").with_suffix("")): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
}
# What models, selection, training and testing read; the rest has no counterpart in one of the two.
NODES = (
    "STTS",
    "MVIT",
    "TIMESFORMER",
    "VIDEO_SWIN",
    "SOLVER",
    "DATA",
    "AUG",
    "MIXUP",
    "TRAIN",
    "TEST",
)


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", FILES)
def test_both_read_the_same(get_cfg, name):
    theirs = dict(leaves(get_cfg(stock=FILES[name])))
    ours = dict(leaves(load_config(str(FILES[name]))))
    given = {k for k in ours if k.split(".")[0] in NODES} & set(theirs)
    assert len(given) > 150
    assert {k: theirs[k] for k in given} == {k: ours[k] for k in given}


SMALL = {
    "Kinetics/STTS_TIMESFORMER_8x32_T0_0.9_S4_0.9": {
        "DATA.TRAIN_CROP_SIZE": 64, "DATA.TEST_CROP_SIZE": 64,
        "TIMESFORMER.EMBED_DIM": 24, "TIMESFORMER.DEPTH": 5,
    },
    "Kinetics/STTS_SWIN_T_32x2_T0_0.6": {
        "DATA.TRAIN_CROP_SIZE": 32, "DATA.TEST_CROP_SIZE": 32, "VIDEO_SWIN.EMBED_DIM": 12,
        "VIDEO_SWIN.WINDOW_SIZE": [8, 4, 4],
    },
    "Kinetics/STTS_VIT_B_16x4_T0_0.9_S4_0.9": {
        "DATA.TRAIN_CROP_SIZE": 64, "DATA.TEST_CROP_SIZE": 64,
        "MVIT.EMBED_DIM": 24, "MVIT.DEPTH": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_family_runs_inside_slowfast(get_cfg, build, name):
    opts = [word for pair in SMALL[name].items() for word in pair]
    cfg = get_cfg(*opts, "STTS.NUM_SAMPLES", 20, stock=FILES[name])
    model = build(cfg)
    size = cfg.DATA.TRAIN_CROP_SIZE
    clips = torch.randn(2, 3, cfg.DATA.NUM_FRAMES, size, size)
    model.train()
    model([clips]).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model([clips]).sum(1), torch.ones(2))
    keep = yaml.safe_load(FILES[name].read_text()).get("STTS", {}).get("TIME", {}).get("KEEP")
    kept = selections(model)["time_0"]
    assert kept.shape[1] == (10 if keep == [0.625] else 7)
