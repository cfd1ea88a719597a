"""TimeSformer gives the authors' numbers, and selection does to it what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis

from stts_slowfast.backbones.timesformer import (
    BLOCKS,
    TimeSformer,
    add_config,
    block_grids,
    build,
    resize_positions,
    resize_times,
)
from stts_slowfast.config import add_stts_config
from stts_slowfast.hooks import attach, selections

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = dict(img_size=32, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=4)


def load_fixture(attention_type):
    data = np.load(FIXTURES / f"timesformer_{attention_type}.npz")
    model = TimeSformer(**json.loads(str(data["config"]))).eval()
    weights = {
        name.removeprefix("weights/"): torch.from_numpy(data[name])
        for name in data.files
        if name.startswith("weights/")
    }
    model.load_state_dict(weights)
    return model, torch.from_numpy(data["input"]), torch.from_numpy(data["logits"])


def tiny(attention_type, **changes):
    torch.manual_seed(0)
    model = TimeSformer(**{**TINY, "num_frames": 6, **changes}, attention_type=attention_type)
    for parameter in model.parameters():  # also time embeddings and what starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def stts(time=(), space=(), **space_keys):
    cfg = CfgNode()
    add_stts_config(cfg)
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [b for b, _ in time], [k for _, k in time]
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [b for b, _ in space], [k for _, k in space]
    for key, value in space_keys.items():
        cfg.STTS.SPACE[key] = value
    return cfg.STTS


@pytest.mark.parametrize("attention_type", BLOCKS)
@torch.no_grad()
def test_logits_are_the_authors(attention_type):
    model, clip, logits = load_fixture(attention_type)
    torch.testing.assert_close(model(clip), logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_traced_attention_is_the_fused_one():
    model, clip, logits = load_fixture("divided_space_time")
    traced = torch.jit.trace(model, clip)
    torch.testing.assert_close(traced(clip), logits, atol=1e-5, rtol=0)


def test_flop_count_sees_attention():
    model = tiny("joint_space_time", depth=1)
    tokens, width = 1 + 6 * 16, 32
    linear = tokens * width * width * (3 + 1 + 4 + 4)
    products = 2 * tokens * tokens * width
    count = FlopCountAnalysis(model, torch.zeros(1, 3, 6, 32, 32)).unsupported_ops_warnings(False)
    by_operator = count.by_operator()
    assert by_operator["linear"] == linear + 5 * width
    assert by_operator["matmul"] == products


@pytest.mark.parametrize("attention_type", BLOCKS)
@torch.no_grad()
def test_kept_frames_keep_their_own_time_embeddings(attention_type):
    model = tiny(attention_type)
    clip = torch.randn(1, 3, 6, 32, 32)
    attach(model, stts(time=[(0, 0.5)]))
    logits = model(clip)
    kept = selections(model)["time_0"][0]
    assert kept.shape == (3,)
    assert kept.tolist() != [0, 1, 2], "the first frames alone would hide a wrong time embedding"

    expected = tiny(attention_type)
    if attention_type != "space_only":
        expected.time_embed.data = expected.time_embed[:, kept]
    torch.testing.assert_close(logits, expected(clip[:, :, kept]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention_type", BLOCKS)
@torch.no_grad()
def test_shared_window_equals_a_cropped_clip(attention_type):
    model = tiny(attention_type)
    clip = torch.randn(1, 3, 6, 32, 32)
    attach(model, stts(space=[(0, 0.57)], SHARED=True))
    logits = model(clip)
    top, left, height, width = selections(model)["space_0"][0].tolist()
    assert (height, width) == (3, 3)

    expected = tiny(attention_type)
    places = expected.pos_embed[:, 1:].unflatten(1, (4, 4))
    places = places[:, top : top + 3, left : left + 3].flatten(1, 2)
    expected.pos_embed.data = torch.cat([expected.pos_embed[:, :1], places], dim=1)
    crop = clip[..., top * 8 : (top + 3) * 8, left * 8 : (left + 3) * 8]
    torch.testing.assert_close(logits, expected(crop), atol=1e-5, rtol=0)


@torch.no_grad()
def test_divided_attention_sees_time_at_the_place_within_the_window():
    """With windows that differ from frame to frame, token i attends to every frame's token i."""
    block = tiny("divided_space_time").blocks[0]
    x = torch.randn(1, 1 + 2 * 4, 32)
    changed = x.clone()
    changed[:, 1 + 4 + 3] += 1.0  # frame 1, last place of its window
    over_time = [
        block.attend_over_time(tokens[:, 1:].reshape(1, 2, 4, 32)) for tokens in (x, changed)
    ]
    moved = (over_time[0] - over_time[1]).abs().amax(dim=(0, 3)) > 0
    assert moved.tolist() == [[False, False, False, True]] * 2


@pytest.mark.parametrize("attention_type", BLOCKS)
def test_every_parameter_learns_with_selectors(attention_type):
    model = tiny(attention_type, drop_path=0.0).train()
    attach(model, stts(time=[(0, 0.5)], space=[(1, 0.57)]))
    model(torch.randn(2, 3, 6, 32, 32)).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == []


@pytest.mark.parametrize("attention_type", ["divided_space_time", "joint_space_time"])
@torch.no_grad()
def test_new_model_distinguishes_a_clip_from_its_reverse(attention_type):
    """With times of zero, order showed only once they had learned, and many models never got so
    far."""
    torch.manual_seed(0)
    model = TimeSformer(**TINY, num_frames=4, attention_type=attention_type).eval()
    clip = torch.randn(8, 3, 4, 32, 32)
    change = (model(clip) - model(clip.flip(2))).std() / model(clip).std()
    assert change > 0.01


@pytest.mark.parametrize("width", [64, 256])
@torch.no_grad()
def test_new_model_of_any_width_passes_on_what_it_sees(width):
    """A layer's output has about the size of its input, which 0.02 grants at one width only."""
    torch.manual_seed(0)
    model = TimeSformer(**{**TINY, "embed_dim": width}, num_frames=4)
    mlp, x = model.blocks[0].mlp, torch.randn(256, width)
    assert mlp.fc1(x).std() == pytest.approx((2 / 5) ** 0.5, rel=0.1)
    assert model.blocks[0].temporal_fc(x).std() == pytest.approx(1, rel=0.1)


@torch.no_grad()
def test_other_clip_sizes_resample_positions():
    model = tiny("divided_space_time")
    assert model(torch.randn(2, 3, 3, 48, 40)).shape == (2, 5)


def test_resized_positions_keep_the_class_token_and_flat_maps():
    embedding = torch.cat([torch.full((1, 1, 4), 7.0), torch.full((1, 9, 4), 2.0)], dim=1)
    resized = resize_positions(embedding, (5, 5))
    assert resized.shape == (1, 26, 4)
    torch.testing.assert_close(resized[:, 0], torch.full((1, 4), 7.0))
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 25, 4), 2.0))


def test_positions_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="8 position embeddings do not form a square"):
        resize_positions(torch.zeros(1, 9, 4), (5, 5))


def test_resized_times_keep_their_order():
    times = torch.arange(4.0)[None, :, None]
    assert resize_times(times, 8).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def config():
    cfg = CfgNode()
    cfg.DATA = CfgNode({"NUM_FRAMES": 4, "TRAIN_CROP_SIZE": 32})
    cfg.MODEL = CfgNode({"NUM_CLASSES": 7, "DROPOUT_RATE": 0.0})
    add_config(cfg)
    return cfg


def test_config_builds_the_model_it_describes():
    cfg = config()
    cfg.TIMESFORMER.EMBED_DIM, cfg.TIMESFORMER.NUM_HEADS, cfg.TIMESFORMER.DEPTH = 32, 4, 3
    model = build(cfg)
    assert model(torch.randn(1, 3, 4, 32, 32)).shape == (1, 7)
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0, 0.05, 0.1])
    assert block_grids(cfg) == [(4, 2, 2)] * 3


def test_config_node_is_added_once():
    cfg = config()
    cfg.TIMESFORMER.DEPTH = 5
    add_config(cfg)
    assert cfg.TIMESFORMER.DEPTH == 5


def test_unknown_attention_is_named():
    cfg = config()
    cfg.TIMESFORMER.ATTENTION_TYPE = "axial"
    with pytest.raises(ValueError, match=r"ATTENTION_TYPE is 'axial'.*divided_space_time"):
        build(cfg)
