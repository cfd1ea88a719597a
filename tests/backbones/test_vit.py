"""The plain ViT that SlowFast builds from its MVIT node."""

import pytest
import torch
from fvcore.common.config import CfgNode
from torchvision.models.video.mvit import MViT

from stts_slowfast import backbones
from stts_slowfast.backbones.vit import ViT, build, is_plain_vit, sincos_3d, vit_grid
from stts_slowfast.checkpoints import load_weights
from stts_slowfast.config import add_stts_config
from stts_slowfast.hooks import attach, selections

DEFAULTS = dict(
    MODE="conv", POOL_FIRST=False, CLS_EMBED_ON=True, PATCH_2D=False, EMBED_DIM=32, NUM_HEADS=4,
    MLP_RATIO=4.0, QKV_BIAS=True, DROPPATH_RATE=0.0, LAYER_SCALE_INIT_VALUE=0.0, DEPTH=2,
    NORM="layernorm", DIM_MUL=[], HEAD_MUL=[], POOL_KV_STRIDE=[], POOL_KV_STRIDE_ADAPTIVE=None,
    POOL_Q_STRIDE=[], POOL_KVQ_KERNEL=None, ZERO_DECAY_POS_CLS=True, NORM_STEM=False,
    SEP_POS_EMBED=True, DROPOUT_RATE=0.0, USE_ABS_POS=True, REL_POS_SPATIAL=False,
    REL_POS_TEMPORAL=False, REL_POS_ZERO_INIT=False, RESIDUAL_POOLING=False, DIM_MUL_IN_ATT=False,
    SEPARATE_QKV=False, HEAD_INIT_SCALE=1.0, USE_MEAN_POOLING=True, USE_FIXED_SINCOS_POS=False,
    PATCH_KERNEL=[2, 8, 8], PATCH_STRIDE=[2, 8, 8], PATCH_PADDING=[0, 0, 0],
)  # fmt: skip


def config(**mvit):
    cfg = CfgNode()
    cfg.DATA = CfgNode(
        {"NUM_FRAMES": 4, "TRAIN_CROP_SIZE": 32, "TEST_CROP_SIZE": 32, "INPUT_CHANNEL_NUM": [3]}
    )
    cfg.MODEL = CfgNode({"MODEL_NAME": "MViT", "NUM_CLASSES": 5, "DROPOUT_RATE": 0.0})
    cfg.MVIT = CfgNode({**DEFAULTS, "REV": CfgNode({"ENABLE": False}), **mvit})
    add_stts_config(cfg)
    return cfg


def test_mvit_node_without_pooling_is_a_vit():
    assert isinstance(backbones.build(config()), ViT)
    assert backbones.block_grids(config()) == [(2, 4, 4)] * 2


@pytest.mark.parametrize(
    "pooling",
    [
        {"POOL_Q_STRIDE": [[1, 1, 2, 2]]},
        {"POOL_KV_STRIDE_ADAPTIVE": [1, 4, 4]},
        {"DIM_MUL": [[1, 2.0]]},
        {"REL_POS_SPATIAL": True},
        {"RESIDUAL_POOLING": True},
    ],
)
def test_pooling_is_no_plain_vit(pooling):
    assert not is_plain_vit(config(**pooling))


def test_pooling_mvit_stays_torchvisions():
    cfg = config(POOL_Q_STRIDE=[[1, 1, 2, 2]], USE_MEAN_POOLING=False)
    assert isinstance(backbones.build(cfg), MViT)


@torch.no_grad()
def test_plain_vit_equals_torchvisions_mvit_without_pooling():
    """Where torchvision can express it (class token, no mean pooling), both give one number."""
    cfg = config(USE_MEAN_POOLING=False)
    ours = build(cfg).eval()
    theirs = backbones.mvit.build(cfg).eval()
    loaded = load_weights(theirs, ours.state_dict())
    assert loaded.missing == loaded.unexpected == loaded.mismatched == []
    clip = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(ours(clip), theirs(clip), atol=1e-6, rtol=0)


@torch.no_grad()
def test_mean_pooling_leaves_the_class_token_out():
    model = build(config(DEPTH=1)).eval()
    for name in ("proj", "fc2"):  # a block that changes nothing
        for module in model.blocks.modules():
            if hasattr(module, name):
                getattr(module, name).weight.zero_()
                getattr(module, name).bias.zero_()
    clip = torch.randn(1, 3, 4, 32, 32)
    before = model(clip)
    model.cls_token += 1.0
    assert torch.equal(model(clip), before)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@torch.no_grad()
def test_every_variant_runs_and_selects(class_token, separate):
    cfg = config(CLS_EMBED_ON=class_token, SEP_POS_EMBED=separate)
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [0], [0.5]
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [1], [0.6]
    model = attach(build(cfg).eval(), cfg.STTS, backbones.block_grids(cfg))
    assert model(torch.randn(2, 3, 4, 32, 32)).shape == (2, 5)
    assert selections(model)["space_1"][:, 2:].tolist() == [[3, 3]] * 2


def test_fixed_positions_do_not_learn_and_are_distinct():
    model = build(config(SEP_POS_EMBED=False, USE_FIXED_SINCOS_POS=True))
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(32))
    assert len(model.pos_embed[0].unique(dim=0)) == 1 + 2 * 4 * 4


def test_sincos_positions_are_the_formula():
    table = sincos_3d(16, (2, 3, 3)).reshape(2, 3, 3, 16)
    t, y, x = 1, 2, 1
    rates = [1.0, 10000.0 ** (-1 / 2)]
    time = [torch.tensor(t * rate) for rate in rates]
    torch.testing.assert_close(table[t, y, x, :2], torch.stack(time).sin())
    torch.testing.assert_close(table[t, y, x, 2:4], torch.stack(time).cos())
    rates = [10000.0 ** (-i / 3) for i in range(3)]
    for place, offset in ((x, 4), (y, 10)):
        angles = torch.tensor([place * rate for rate in rates])
        torch.testing.assert_close(table[t, y, x, offset : offset + 3], angles.sin())
        torch.testing.assert_close(table[t, y, x, offset + 3 : offset + 6], angles.cos())


def test_head_is_scaled():
    torch.manual_seed(0)
    full = build(config()).head.projection.weight
    torch.manual_seed(0)
    scaled = build(config(HEAD_INIT_SCALE=0.001)).head.projection.weight
    torch.testing.assert_close(scaled, full * 0.001)


def test_positions_decay_if_the_config_asks():
    model = build(config())
    assert model.no_weight_decay() == [
        "cls_token",
        "pos_embed_spatial",
        "pos_embed_temporal",
        "pos_embed_class",
    ]
    assert build(config(ZERO_DECAY_POS_CLS=False)).no_weight_decay() == []


def test_overlapping_patches_count_as_slowfast_counts():
    cfg = config(PATCH_KERNEL=[3, 7, 7], PATCH_STRIDE=[2, 4, 4], PATCH_PADDING=[1, 3, 3])
    assert vit_grid(cfg) == (2, 8, 8)


def test_a_clip_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"grid of \(3, 4, 4\).*built for \(2, 4, 4\)"):
        build(config())(torch.randn(1, 3, 6, 32, 32))


def test_layer_scale_is_refused(tiny_cfg):
    node = tiny_cfg.MVIT
    node.DIM_MUL, node.HEAD_MUL, node.POOL_Q_STRIDE = [], [], []
    node.POOL_KV_STRIDE, node.POOL_KV_STRIDE_ADAPTIVE = [], None
    node.LAYER_SCALE_INIT_VALUE = 0.1
    with pytest.raises(ValueError, match=r"MVIT\.LAYER_SCALE_INIT_VALUE is 0\.1, but this ViT"):
        backbones.build(tiny_cfg)
