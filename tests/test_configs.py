"""Every file in configs/: what it builds at full size, and that it trains and tests reduced."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from stts_slowfast import backbones
from stts_slowfast.config import selection_plan
from stts_slowfast.hooks import selections
from stts_slowfast.schedule import Schedule
from stts_slowfast.standalone.config import get_cfg, load_config
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.standalone.mixup import batch_mixer
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.optim import build_optimizer, lr_at, set_lr
from stts_slowfast.standalone.transforms import normalize_clips, train_transform, view_transform
from stts_slowfast.standalone.value_ranges import check_solver

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT / "configs").with_suffix("")) for path in FILES]

MVIT_B = {
    "0.9": {"time_0": (8, 7), "space_4": (14, 13)},
    "0.8": {"time_0": (8, 6), "space_4": (14, 13)},
    "0.6": {"time_0": (8, 5), "space_4": (14, 13)},
    "0.5": {"time_0": (8, 4), "space_4": (14, 12)},
    "0.4": {"time_0": (8, 3), "space_4": (14, 11)},
}
SWIN_FRAMES = {"0.9": 14, "0.8": 12, "0.6": 10, "0.5": 9, "0.4": 6}


def load(name, *opts):
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), opts)


def expected_steps(name):
    """Frames, or the window's side, before and after each selector, as in the file's name."""
    block, keep = re.search(r"T(\d)_(0\.\d)", name).groups()
    if "SWIN" in name:
        return {"time_0": (16, 8 if name in RECOMMENDED else SWIN_FRAMES[keep])}
    if "32x3" in name:
        return {"time_0": (16, 14), "space_6": (14, 13)}
    if "96x4" in name:
        return {"time_0": (96, 48), "space_4": (14, 13)}
    return {key.replace("time_0", f"time_{block}"): step for key, step in MVIT_B[keep].items()}


PAPER = [name for name in NAMES if "/STTS_" in name]
RECOMMENDED = [name for name in NAMES if "/RECOMMENDED_" in name]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipe_is_whole(name):
    node = load(name).STTS
    assert node.TEACHER == "mixture"
    assert (node.OPERATOR, node.SIGMA, node.SIGMA_DECAY) == ("perturbed", 0.1, "linear")
    assert (node.NUM_SAMPLES, node.BACKBONE_LR, node.SHRINK) == (500, 0.1, 0.0)
    assert (node.TIME.SCORER, node.SPACE.SCORER, node.SPACE.SHARED) == ("learned", "learned", False)
    frozen = node.FREEZE_BACKBONE_EPOCHS
    assert frozen == (0.0 if "SWIN" in name else 3.0)


# What a family needs beside the defaults; docs/recipes.md has the reasons.
BESIDE_DEFAULTS = {
    "TIMESFORMER": {"SPACE.SHARED": True, "TIME.BLOCKS": [1]},
    "SWIN": {"TIME.KEEP": [0.5], "SPACE.BLOCKS": []},
}


@pytest.mark.parametrize("name", RECOMMENDED)
def test_the_recommended_recipe_is_what_enable_alone_gives(name):
    family = next((family for family in BESIDE_DEFAULTS if family in name), None)
    opts = ["STTS.ENABLE", True]
    for key, value in BESIDE_DEFAULTS.get(family, {}).items():
        opts += [f"STTS.{key}", value]
    node = load(name).STTS
    stock = load(name, "STTS.ENABLE", False)
    stock.STTS = get_cfg().STTS
    stock.merge_from_list(opts)
    if not stock.STTS.SPACE.BLOCKS:
        node.SPACE.KEEP = stock.STTS.SPACE.KEEP  # nothing reads it
    assert node == stock.STTS


def test_there_is_a_file_for_every_published_row_and_one_recommended_for_every_family():
    assert len(PAPER) == 28 and len(FILES) == 28 + len(RECOMMENDED)
    families = {re.match(r"Kinetics/RECOMMENDED_(MVITv2|[A-Z]+)", name)[1] for name in RECOMMENDED}
    assert families == {"MVIT", "MVITv2", "VIT", "TIMESFORMER", "SWIN"}
    assert {path.parent.name for path in FILES} == {"Kinetics", "SSv2"}


@pytest.mark.parametrize("name", NAMES)
def test_selectors_keep_what_the_name_promises(name):
    cfg = load(name)
    steps = selection_plan(cfg.STTS, backbones.block_grids(cfg))
    sizes = {
        key: (before[0], after[0]) if key.startswith("time") else (before[1], after[1])
        for key, (before, after) in steps.items()
    }
    assert sizes == expected_steps(name)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_zoo_s(name):
    with torch.device("meta"):
        model = build_model(load(name))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{count:.2f}" == zoo_row(name)["params (M), measured"]


# One file a backbone, and the paper's five points.
COUNTED = [
    *(name for name in NAMES if "Kinetics/STTS_MVIT_B_16x4" in name),
    "Kinetics/STTS_MVIT_B_32x3_T0_0.9_S6_0.9",
    "Kinetics/STTS_MVITv2_S_16x4_T0_0.9_S4_0.9",
    "Kinetics/STTS_VIT_B_16x4_T0_0.9_S4_0.9",
    "Kinetics/STTS_TIMESFORMER_8x32_T0_0.9_S4_0.9",
    "Kinetics/STTS_SWIN_T_32x2_T0_0.9",
]


@pytest.mark.parametrize("name", COUNTED)
@torch.no_grad()
def test_gflops_are_the_zoo_s(name):
    """On meta tensors, by PyTorch's counter; it leaves norms and pooling out, fvcore does not."""
    cfg = load(name, "STTS.FUSED_ATTENTION", False)
    size = cfg.DATA.TRAIN_CROP_SIZE
    with torch.device("meta"):
        model = build_model(cfg).eval()
        clip = torch.empty(1, 3, cfg.DATA.NUM_FRAMES, size, size)
        with FlopCounterMode(display=False) as counter:
            assert model(clip).shape == (1, cfg.MODEL.NUM_CLASSES)
    counted = counter.get_total_flops() / 2e9
    assert counted == pytest.approx(float(zoo_row(name)["GFLOPs, measured"]), rel=0.015)


@pytest.mark.parametrize(
    "point, expected",
    [("0.9_S4_0.9", 56.39), ("0.8_S4_0.9", 47.21), ("0.6_S4_0.9", 38.46), ("0.5_S4_0.7", 26.95),
     ("0.4_S4_0.6", 18.46)],
)  # fmt: skip
def test_the_papers_points_cost_what_the_authors_code_costs(point, expected):
    """By fvcore, scorers included, as the authors' released code was counted."""
    model = build_model(load(f"Kinetics/STTS_MVIT_B_16x4_T0_{point}"))
    gflops = count_gflops(model, torch.zeros(1, 3, 16, 224, 224))
    assert gflops == pytest.approx(expected, rel=0.001)


def zoo_row(name):
    """The columns of a configuration in the model zoo."""
    table = (ROOT / "projects" / "stts" / "README.md").read_text().split("### With selection")[1]
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[0].startswith(f"[{name}]"):
            return dict(zip(columns, cells))
    raise AssertionError(f"the model zoo has no row for {name}")


REDUCED = {
    "MViT": ("MVIT.EMBED_DIM", 16),
    "VIT_B": ("MVIT.EMBED_DIM", 24, "MVIT.DEPTH", 5),
    "TimeSformer": ("TIMESFORMER.EMBED_DIM", 24, "TIMESFORMER.DEPTH", 5),
    "VideoSwin": ("VIDEO_SWIN.DEPTHS", [2, 1, 1, 1], "VIDEO_SWIN.WINDOW_SIZE", [8, 4, 4]),
}


def reduced(name):
    cfg = load(name)
    family = "VIT_B" if "_VIT_B" in name else cfg.MODEL.MODEL_NAME
    width = ("VIDEO_SWIN.EMBED_DIM", 4 * cfg.VIDEO_SWIN.NUM_HEADS[0])
    small = (*REDUCED[family], *(width if family == "VideoSwin" else ()))
    size = 32 if family == "VideoSwin" else 64  # patches of 16 pixels need the larger clip
    crop = ("DATA.TRAIN_CROP_SIZE", size, "DATA.TEST_CROP_SIZE", size)
    return load(name, *small, *crop, "STTS.NUM_SAMPLES", 20)


@pytest.mark.parametrize("name", NAMES)
def test_one_training_step_and_one_test_step(name):
    cfg = reduced(name)
    check_solver(cfg)
    model = build_model(cfg).train()
    optimizer = build_optimizer(model, cfg)
    epoch = cfg.STTS.FREEZE_BACKBONE_EPOCHS + 0.5
    set_lr(optimizer, lr_at(epoch, cfg))
    Schedule(model, optimizer, max_epochs=cfg.SOLVER.MAX_EPOCH, pretrained=True).step(epoch)
    before = {key: value.clone() for key, value in model.named_parameters()}

    video = torch.randint(0, 256, (cfg.DATA.NUM_FRAMES, 3, 80, 90), dtype=torch.uint8)
    cfg.DATA.TRAIN_JITTER_SCALES = [72, 80]
    augment, mix = train_transform(cfg, "train"), batch_mixer(cfg)
    clips = normalize_clips(torch.stack([augment(video), augment(video)]), cfg)
    labels = torch.tensor([0, 3])
    clips, labels = mix(clips, labels) if mix else (clips, labels)
    loss = F.cross_entropy(model(clips), labels)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    learned = {
        key for key, value in model.named_parameters() if not torch.equal(value, before[key])
    }
    assert any(key.startswith("stts.") for key in learned), "no scorer has learned"
    assert any(not key.startswith("stts.") for key in learned), "the backbone has not learned"

    model.eval()
    position = min(1, cfg.TEST.NUM_SPATIAL_CROPS - 1)
    with torch.no_grad():
        logits = model(normalize_clips(view_transform(cfg, position)(video)[None], cfg))
    assert logits.shape == (1, cfg.MODEL.NUM_CLASSES) and logits.isfinite().all()
    kept = selections(model)
    key = next(key for key in kept if key.startswith("time"))
    frames, (_, after) = kept[key], expected_steps(name)[key]
    assert frames.shape == (1, after)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_whole(name):
    """The keys for a run's start, length and data."""
    cfg = load(name)
    assert cfg.STTS.ENABLE and cfg.TRAIN.ENABLE and cfg.TEST.ENABLE
    assert cfg.TRAIN.CHECKPOINT_EPOCH_RESET, "a trained backbone is a start, not a run to resume"
    assert name.split("/")[0].lower() == cfg.TRAIN.DATASET == cfg.TEST.DATASET
    assert {"kinetics": 400, "ssv2": 174}[cfg.TRAIN.DATASET] == cfg.MODEL.NUM_CLASSES
    assert (cfg.TRAIN.DATASET == "kinetics") == cfg.DATA.RANDOM_FLIP
    assert cfg.SOLVER.OPTIMIZING_METHOD == "adamw"
    assert cfg.DATA.TRAIN_CROP_SIZE == cfg.DATA.TEST_CROP_SIZE == 224
