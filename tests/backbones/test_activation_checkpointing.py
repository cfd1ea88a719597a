import copy
import io

import pytest
import torch

from stts_slowfast import backbones
from stts_slowfast.hosts import find_blocks
from stts_slowfast.standalone.model import build_model

FAMILIES = ("MViT", "ViT", "TimeSformer", "VideoSwin")


def config(tiny_cfg, family, **stts):
    cfg = tiny_cfg
    cfg.MODEL.MODEL_NAME = "MViT" if family == "ViT" else family
    cfg.DATA.NUM_FRAMES = 4
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = 32
    if family == "ViT":
        cfg.MVIT.POOL_Q_STRIDE, cfg.MVIT.DIM_MUL, cfg.MVIT.HEAD_MUL = [], [], []
        cfg.MVIT.POOL_KV_STRIDE_ADAPTIVE = None
    cfg.MVIT.DROPPATH_RATE = cfg.TIMESFORMER.DROPPATH_RATE = cfg.VIDEO_SWIN.DROPPATH_RATE = 0.3
    node = cfg.TIMESFORMER
    node.PATCH_SIZE, node.EMBED_DIM, node.DEPTH, node.NUM_HEADS = 8, 16, 3, 2
    node = cfg.VIDEO_SWIN
    node.EMBED_DIM, node.DEPTHS, node.NUM_HEADS, node.WINDOW_SIZE = 16, [2, 2], [2, 2], [2, 2, 2]
    cfg.STTS.ENABLE = True
    cfg.STTS.SPACE.BLOCKS = [1]
    return cfg


def built(cfg, recompute):
    cfg.MODEL.ACT_CHECKPOINT = recompute
    torch.manual_seed(3)
    return build_model(cfg).train()


def gradients(model, clips):
    torch.manual_seed(7)
    out = model(clips)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True])
def test_recomputing_changes_no_number(tiny_cfg, family, fused):
    cfg = config(tiny_cfg, family)
    cfg.STTS.FUSED_ATTENTION = fused
    clips = torch.randn(2, 3, 4, 32, 32)
    expected = gradients(built(cfg, False), clips)
    found = gradients(built(cfg, True), clips)
    if fused:  # whose rounding the untrained scorers' normalisation enlarges
        for _, gradient in (expected, found):
            gradient.update({name: None for name in gradient if name.startswith("stts.")})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 if fused else 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_twice_and_selectors_once(tiny_cfg, family):
    cfg = config(tiny_cfg, family)
    cfg.STTS.FUSED_ATTENTION = False
    model = built(cfg, True)
    calls = []
    for name, module in model.named_modules():
        kind = "norm" if name.endswith((".1.norm1", ".1.0.norm1", ".2.0.norm1")) else ""
        if name in ("stts.time_0.scorer", "stts.space_1.scorer"):
            kind = "scorer"
        if kind:
            module.register_forward_hook(lambda *_, kind=kind: calls.append(kind))
    out = model(torch.randn(2, 3, 4, 32, 32))
    once = calls.count("norm")
    assert once >= 1 and calls.count("scorer") == 2
    out.sum().backward()
    assert calls.count("norm") == 2 * once and calls.count("scorer") == 2
    calls.clear()
    model.eval()(torch.randn(2, 3, 4, 32, 32)).sum().backward()
    assert calls.count("norm") == once, "nothing is recomputed in evaluation"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputing_model_can_be_copied_and_saved(tiny_cfg, family):
    model = built(config(tiny_cfg, family), True)
    clips = torch.randn(2, 3, 4, 32, 32)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other.eval()(clips).any(), "the copy computes with its own parameters"
    assert model.eval()(clips).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_learns(tiny_cfg, family):
    cfg = config(tiny_cfg, family)
    cfg.STTS.TIME.SCORER = cfg.STTS.SPACE.SCORER = "uniform"
    cfg.MODEL.DETACH_FINAL_FC = True
    model = built(cfg, False)
    _, found = gradients(model, torch.randn(2, 3, 4, 32, 32))
    assert all((g is not None) == name.startswith("head.") for name, g in found.items())
    assert sum(g is not None for g in found.values()) == 2


def test_scorers_that_could_not_learn_are_refused(tiny_cfg):
    cfg = config(tiny_cfg, "TimeSformer")
    cfg.MODEL.DETACH_FINAL_FC = True
    cfg.STTS.SPACE.SCORER = "random"
    with pytest.raises(ValueError, match=r"DETACH_FINAL_FC is True: .* scorers of STTS.TIME.SC"):
        build_model(cfg)
    cfg.TRAIN.ENABLE = False
    build_model(cfg)


def test_layers_follow_the_blocks(tiny_cfg):
    for family, first, last in (
        ("TimeSformer", ("patch_embed.proj.weight", "time_embed", "pos_embed", "cls_token"), 3),
        ("VideoSwin", ("patch_embed.proj.weight",), 2),
    ):
        cfg = config(tiny_cfg, family)
        model = backbones.build(cfg)
        layer = backbones.family_of(cfg).layer
        depth = len(find_blocks(model))
        assert depth == last
        names = dict(model.named_parameters())
        assert all(name in names and layer(name, depth) == 0 for name in first)
        for number, block in enumerate(find_blocks(model)):
            inside = {id(p) for p in block.parameters()}
            assert {layer(n, depth) for n, p in names.items() if id(p) in inside} == {number + 1}
        assert layer("head.weight", depth) == layer("stts.time_0.x", depth) == depth + 1
    assert layer("features.1.reduction.weight", 2) == 2, "patch merging leads to the second stage"
