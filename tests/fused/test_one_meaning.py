"""Fused or not, every family computes the same numbers after any selection."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

from stts_slowfast import attach, selections, set_progress
from stts_slowfast.backbones.timesformer import TimeSformer
from stts_slowfast.backbones.vit import ViT
from stts_slowfast.standalone.config import get_cfg

SELECTIONS = {
    "time": {"time": {0: 0.75}, "space": {}},
    "space": {"time": {}, "space": {1: 0.6}},
    "both": {"time": {0: 0.75}, "space": {1: 0.6}},
    "twice": {"time": {0: 0.75, 2: 0.7}, "space": {1: 0.6, 2: 0.7}},
}


def mvit(relative: bool) -> MViT:
    """Three blocks on 4x8x8 tokens that pool keys by 4, 2 and 1, queries by 1, 2 and 1."""
    kernel = [3, 3, 3]
    blocks = [
        MSBlockConfig(1, 8, 16, kernel, kernel, [1, 1, 1], [1, 4, 4]),
        MSBlockConfig(2, 16, 16, kernel, kernel, [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(2, 16, 16, [], kernel, [], [1, 1, 1]),
    ]
    return MViT(
        (32, 32),
        8,
        blocks,
        residual_pool=relative,
        residual_with_cls_embed=False,
        rel_pos_embed=relative,
        proj_after_attn=relative,
        stochastic_depth_prob=0.5,
        num_classes=5,
    )


def vit() -> ViT:
    """Three blocks on 4x8x8 tokens."""
    cfg = get_cfg()
    values = {"PATCH_KERNEL": [2, 4, 4], "PATCH_STRIDE": [2, 4, 4], "PATCH_PADDING": [0, 0, 0]}
    values |= {"EMBED_DIM": 16, "DEPTH": 3, "NUM_HEADS": 2, "DROPPATH_RATE": 0.5}
    values |= {"USE_ABS_POS": True, "SEP_POS_EMBED": True, "USE_MEAN_POOLING": True}
    cfg.MVIT.update(values)
    cfg.DATA.update({"NUM_FRAMES": 8, "TRAIN_CROP_SIZE": 32})
    cfg.MODEL.update({"NUM_CLASSES": 5, "DROPOUT_RATE": 0.0})
    return ViT(cfg)


FAMILIES = {
    "MViT": lambda: mvit(False),
    "MViTv2": lambda: mvit(True),
    "Video Swin": lambda: SwinTransformer3d(
        [2, 4, 4], 8, [2, 1, 1], [1, 2, 2], [2, 4, 4], num_classes=5, stochastic_depth_prob=0.5
    ),
    "TimeSformer": lambda: TimeSformer(32, 4, 4, 16, 3, 2, num_classes=5, drop_path=0.5),
    "ViT": vit,
}


def run(model, clips):
    """Output and gradients, from the same draws each time."""
    torch.manual_seed(3)
    out = model(clips)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return out.detach(), gradients


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_do_not_depend_on_fusion(family, selection, training):
    stock = FAMILIES[family]()
    for name, parameter in stock.named_parameters():
        if "rel" in name or parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    frames = 4 if family == "TimeSformer" else 8
    clips = torch.randn(2, 3, frames, 32, 32)
    results = {}
    for true_distances in (True, False):
        for fuse in (True, False):
            model = attach(
                copy.deepcopy(stock),
                **SELECTIONS[selection],
                operator="perturbed",
                sigma=0.1,
                num_samples=20,
                fused_attention=fuse,
                true_distances=true_distances,
            )
            torch.manual_seed(4)
            for parameter in model.stts.parameters():
                nn.init.normal_(parameter, std=0.3)
            results[true_distances, fuse] = run(model.train(training), clips)
        assert_same(results[true_distances, True], results[true_distances, False])
    apart = (results[True, True][0] - results[False, True][0]).abs().max()
    positions = family == "MViTv2" or (family == "Video Swin" and selection != "time")
    assert (apart > 1e-4) == positions  # else nothing was told apart


@pytest.mark.parametrize("operator", ["perturbed", "subset"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawn_budget_computes_what_a_model_of_that_budget_computes(family, operator):
    """Also in training, positions and gradients included, one budget after the other."""
    stock = FAMILIES[family]()
    frames = 4 if family == "TimeSformer" else 8
    clips = torch.randn(2, 3, frames, 32, 32)

    def attached(time, space, shrink=0.0):
        torch.manual_seed(4)
        settings = {"time": {0: time}, "space": {1: space}, "shrink": shrink}
        settings |= {"num_samples": 20, "operator": operator, "teacher": "mixture"}
        return attach(copy.deepcopy(stock), **settings).train()

    ranged, arrived, seen = attached((0.5, 1.0), (0.3, 0.9), shrink=0.5), {}, set()
    for key, selector in ranged.stts.items():
        selector.scorer.register_forward_pre_hook(
            lambda scorer, args, key=key: arrived.update({key: args[0].shape[1:4]})
        )
    for fraction in (0.0, 0.1, 0.2, 0.3, 0.4):
        set_progress(ranged, fraction)
        ranged.zero_grad()
        found = run(ranged, clips)
        (count,), window = selections(ranged)["time_0"].shape[1:], selections(ranged)["space_1"][0]
        _, height, width = arrived["space_1"]
        shares = (count / arrived["time_0"][0], window[2].item() ** 2 / (height * width))
        alone = attached(*(min(share + 1e-3, 1.0) for share in shares))
        set_progress(alone, fraction)
        assert_same(found, run(alone, clips))
        seen.add((count, window[2].item()))
    assert len(seen) > 1


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    scale = max(grad.abs().max() for grad in theirs[1].values() if grad is not None).item()
    for name, grad in theirs[1].items():
        if grad is None:
            assert ours[1][name] is None, name
        else:
            # What moves all scores alike is normalised away: that gradient is rounding alone.
            slack = scale * (1e-4 if name.endswith("network.score.4.bias") else 1e-5)
            torch.testing.assert_close(ours[1][name], grad, rtol=1e-4, atol=slack, msg=name)
