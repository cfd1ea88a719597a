"""Our plain ViT is SlowFast's: the same parameters, the same numbers."""

import pytest
import torch

from stts_slowfast import backbones
from stts_slowfast.annealing import set_progress
from stts_slowfast.backbones.vit import build as build_ours
from stts_slowfast.backbones.vit import is_plain_vit
from stts_slowfast.hooks import selections
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.model import build_model

VARIANTS = {
    "FT": {},
    "FT, positions without decay": {"ZERO_DECAY_POS_CLS": True},
    "sincos": {"SEP_POS_EMBED": False, "USE_FIXED_SINCOS_POS": True},
    "joint positions": {"SEP_POS_EMBED": False, "USE_MEAN_POOLING": False},
    "no class token": {"CLS_EMBED_ON": False},
    "no class token, norm first": {"CLS_EMBED_ON": False, "USE_MEAN_POOLING": False},
    "no positions, no bias": {"USE_ABS_POS": False, "QKV_BIAS": False},
}
SMALL = (
    "DATA.NUM_FRAMES", 4, "DATA.TRAIN_CROP_SIZE", 32, "DATA.TEST_CROP_SIZE", 32,
    "MVIT.PATCH_KERNEL", [2, 8, 8], "MVIT.PATCH_STRIDE", [2, 8, 8], "MVIT.EMBED_DIM", 32,
    "MVIT.NUM_HEADS", 4, "MVIT.DEPTH", 3, "MODEL.NUM_CLASSES", 11, "STTS.ENABLE", False,
)  # fmt: skip


@pytest.fixture
def small(get_cfg):
    def make(mvit):
        opts = [word for key, value in mvit.items() for word in (f"MVIT.{key}", value)]
        return get_cfg(*SMALL, *opts, stock="configs/masked_ssl/k400_VIT_B_16x4_FT.yaml")

    return make


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_probabilities_are_slowfasts(small, build, variant):
    cfg = small(VARIANTS[variant])
    assert is_plain_vit(cfg)
    theirs, ours = build(cfg).eval(), build_ours(cfg).eval()
    state = theirs.state_dict()
    if variant == "sincos":
        assert torch.equal(ours.pos_embed, state["pos_embed"])
    assert set(ours.no_weight_decay()) == set(theirs.no_weight_decay()) & set(state)
    ours.load_state_dict(state)
    for parameter in ours.parameters():  # a fresh head is scaled to almost nothing
        parameter.mul_(2.0)
    theirs.load_state_dict(ours.state_dict())
    clip = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(ours(clip).softmax(1), theirs([clip]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rest", ["drop", "merge"])
def test_single_tokens_of_slowfasts_vit_are_ours(get_cfg, build, rest):
    tokens = [
        "STTS.TOKENS.BLOCKS",
        [0, 1],
        "STTS.TOKENS.KEEP",
        [0.5, 0.5],
        "STTS.TOKENS.REST",
        rest,
    ]
    tokens += ["STTS.TIME.BLOCKS", [], "STTS.SPACE.BLOCKS", [], "STTS.TEACHER", "saliency"]
    tokens += ["MVIT.DROPPATH_RATE", 0.0, "MODEL.DROPOUT_RATE", 0.0]
    cfg = get_cfg(
        *SMALL, *tokens, "STTS.ENABLE", True, stock="configs/masked_ssl/k400_VIT_B_16x4_FT.yaml"
    )
    theirs, ours = build(cfg), build_model(cfg)
    with torch.no_grad():
        for parameter in ours.parameters():  # a fresh head is scaled to almost nothing
            parameter.mul_(2.0)
    theirs.load_state_dict(ours.state_dict())
    clip, gradients = torch.randn(2, 3, 4, 32, 32), []
    for model, clips in ((theirs, [clip]), (ours, clip)):
        out = model.eval()(clips)
        out = out if model is theirs else out.softmax(1)
        gradients.append([out.detach(), *selections(model).values()])
        for progress in (0.0, 1.0):  # all tokens pass; KEEP
            set_progress(model.train(), progress)
            model.zero_grad()
            torch.manual_seed(0)
            model(clips).log_softmax(1)[:, 0].mean().backward()
            gradients[-1] += [p.grad.clone() for name, p in sorted(model.named_parameters())]
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", ["B", "L", "H"])
def test_every_published_size_has_slowfasts_parameters(get_cfg, build, size):
    stock = f"configs/masked_ssl/k400_VIT_{size}_16x4_FT.yaml"
    cfg = get_cfg("STTS.ENABLE", False, "MVIT.DEPTH", 2, stock=stock)  # blocks are all alike
    theirs = build(cfg).state_dict()
    with torch.device("meta"):
        ours = build_ours(cfg).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("size", ["B", "L", "H"])
def test_slowfasts_own_files_build_standalone(checkout, size):
    cfg = load_config(str(checkout / f"configs/masked_ssl/k400_VIT_{size}_16x4_FT.yaml"))
    with torch.device("meta"):
        model = backbones.build(cfg)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(millions) == {"B": 87, "L": 305, "H": 632}[size]
