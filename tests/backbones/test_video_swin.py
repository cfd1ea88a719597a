"""Video Swin gives the authors' numbers, with and without selection."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from torchvision.models.video import swin3d_t

from stts_slowfast import backbones
from stts_slowfast.backbones.video_swin import add_config, block_grids, build
from stts_slowfast.checkpoints import load_weights
from stts_slowfast.config import add_stts_config
from stts_slowfast.hooks import attach, detach, selections

FIXTURES = Path(__file__).parents[1] / "fixtures"


def config(embed_dim=16, depths=(2, 2), heads=(2, 4), window=(2, 4, 4), frames=8, size=32):
    cfg = CfgNode()
    cfg.DATA = CfgNode({"NUM_FRAMES": frames, "TRAIN_CROP_SIZE": size})
    cfg.MODEL = CfgNode({"MODEL_NAME": "VideoSwin", "NUM_CLASSES": 5, "DROPOUT_RATE": 0.5})
    add_config(cfg)
    add_stts_config(cfg)
    cfg.VIDEO_SWIN.EMBED_DIM = embed_dim
    cfg.VIDEO_SWIN.DEPTHS, cfg.VIDEO_SWIN.NUM_HEADS = list(depths), list(heads)
    cfg.VIDEO_SWIN.WINDOW_SIZE = list(window)
    cfg.STTS.TIME.BLOCKS, cfg.STTS.SPACE.BLOCKS = [], []
    return cfg


def fixture(name):
    data = np.load(FIXTURES / f"{name}.npz")
    weights = {
        key.removeprefix("weights/"): torch.from_numpy(data[key])
        for key in data.files
        if key.startswith("weights/")
    }
    node = json.loads(str(data["config"]))
    cfg = config(node["embed_dim"], node["depths"], node["num_heads"], node["window_size"])
    cfg.VIDEO_SWIN.PATCH_SIZE = node["patch_size"]
    return cfg, weights, data


def features(model, clip):
    """What the model hands to its head: (B, C, T, H, W)."""
    seen = []
    handle = model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    model(clip)
    handle.remove()
    return seen[0].permute(0, 4, 1, 2, 3)


@torch.no_grad()
def test_features_are_video_swins():
    cfg, weights, data = fixture("videoswin")
    model = build(cfg).eval()
    loaded = load_weights(model, weights, strict=False)
    assert loaded.unexpected == [] and loaded.mismatched == []
    assert loaded.missing == ["head.weight", "head.bias"]
    out = features(model, torch.from_numpy(data["input"]))
    torch.testing.assert_close(out, torch.from_numpy(data["features"]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_selection_is_the_authors():
    cfg, weights, data = fixture("official_stts_videoswin")
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [0], [0.5]
    model = attach(build(cfg).eval(), cfg.STTS, block_grids(cfg))
    loaded = load_weights(model, weights, strict=False)
    assert loaded.format == "an STTS authors' Video Swin"
    assert loaded.unexpected == [] and loaded.mismatched == []
    assert loaded.missing == ["head.weight", "head.bias"]

    scores = []
    selector = model.stts["time_0"]
    selector.scorer.register_forward_hook(lambda module, args, out: scores.append(out))
    out = features(model, torch.from_numpy(data["input"]))
    torch.testing.assert_close(out, torch.from_numpy(data["features"]), atol=1e-5, rtol=0)
    kept = torch.from_numpy(data["indices/time_score_predictor.0"])
    assert torch.equal(selections(model)["time_0"], kept)
    expected = torch.from_numpy(data["scores/time_score_predictor.0"])
    low, high = scores[0].amin(1, keepdim=True), scores[0].amax(1, keepdim=True)
    normalized = (scores[0] - low) / (high - low + 1e-5)
    torch.testing.assert_close(normalized, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (7, 36)])
@torch.no_grad()
def test_block_grids_are_what_arrives(frames, size):
    cfg = config(depths=(1, 1, 1), heads=(2, 4, 8), frames=frames, size=size)
    model = build(cfg).eval()
    arrived = []
    for stage in (0, 2, 4):
        model.features[stage].register_forward_pre_hook(
            lambda module, args: arrived.append(tuple(args[0].shape[1:4]))
        )
    model(torch.randn(1, 3, frames, size, size))
    assert block_grids(cfg) == arrived


@torch.no_grad()
def test_temporal_and_spatial_selection_before_any_stage():
    cfg = config()
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [0, 1], [0.75, 0.7]
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [1], [0.6]
    model = attach(build(cfg).eval(), cfg.STTS, block_grids(cfg))
    clip = torch.randn(2, 3, 8, 32, 32)
    assert features(model, clip).shape == (2, 32, 2, 3, 3)
    kept = selections(model)
    assert kept["time_0"].shape == (2, 3) and kept["time_1"].shape == (2, 2)
    assert kept["space_1"][:, 2:].tolist() == [[3, 3]] * 4


@torch.no_grad()
def test_temporal_selection_before_stage_0_equals_a_shorter_clip():
    """Patches do not overlap in time: dropping token frames is dropping their frames."""
    torch.manual_seed(1)
    cfg = config()
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [0], [0.5]
    model = build(cfg).eval()
    clip = torch.randn(1, 3, 8, 32, 32)
    attach(model, cfg.STTS)
    logits = model(clip)
    kept = selections(model)["time_0"][0]
    frames = torch.stack([2 * kept, 2 * kept + 1], dim=1).flatten()
    detach(model)
    torch.testing.assert_close(logits, model(clip[:, :, frames]), atol=1e-5, rtol=0)


def test_every_parameter_learns_with_selectors():
    cfg = config()
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [0], [0.5]
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [1], [0.6]
    cfg.VIDEO_SWIN.DROPPATH_RATE = 0.0
    model = attach(build(cfg).train(), cfg.STTS)
    model(torch.randn(2, 3, 8, 32, 32)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_defaults_are_torchvisions_swin_t():
    cfg = config()
    del cfg["VIDEO_SWIN"]
    add_config(cfg)
    cfg.MODEL.NUM_CLASSES = 400
    with torch.device("meta"):
        ours, theirs = backbones.build(cfg), swin3d_t()
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    rates = [m.p for m in ours.modules() if type(m).__name__ == "StochasticDepth"]
    assert rates == [m.p for m in theirs.modules() if type(m).__name__ == "StochasticDepth"]


def test_head_dropout_is_slowfasts_key():
    model = build(config())
    assert [m.p for m in model.avgpool.modules() if isinstance(m, torch.nn.Dropout)] == [0.5]


def test_stages_without_heads_are_named():
    cfg = config(heads=(2,))
    with pytest.raises(ValueError, match=r"DEPTHS has 2 stages but VIDEO_SWIN\.NUM_HEADS has 1"):
        build(cfg)
