"""Models as they are built, and the refusals, on stand-ins for SlowFast."""

import pytest
import torch
from torch import nn

from stts_slowfast import hooks
from stts_slowfast.hosts import modules_with_selectors
from stts_slowfast.pyslowfast import plugin
from tests.pyslowfast.conftest import MODEL_REGISTRY


def test_built_models_get_their_selectors(registry, cfg):
    model = registry.get("Transformer")(cfg)
    assert list(model.stts) == ["time_0", "space_1"]
    assert model.eval()(torch.randn(2, 4 * 36, 8)).shape == (2, 2 * 25, 8)


def test_disabled_models_are_stock(registry, cfg):
    cfg.STTS.ENABLE = False
    model = registry.get("Transformer")(cfg)
    assert type(model).__name__ == "Transformer"
    assert not hasattr(model, "stts")
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_a_submodule_from_the_registry_has_its_selectors_once(registry, cfg):
    class Wrapper(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.net = MODEL_REGISTRY.get("Transformer")(cfg)
            assert not hasattr(self.net, "stts")

        def forward(self, x):
            return self.net(x)

    registry.register(Wrapper)
    cfg.MODEL.MODEL_NAME = "Wrapper"
    model = registry.get("Wrapper")(cfg)
    assert len(modules_with_selectors(model)) == 1
    assert model.eval()(torch.randn(2, 4 * 36, 8)).shape == (2, 2 * 25, 8)


def test_two_models_with_blocks_are_refused(registry, cfg):
    class Twins(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.one, self.two = (MODEL_REGISTRY.get("Transformer")(cfg) for _ in range(2))

    registry.register(Twins)
    cfg.MODEL.MODEL_NAME = "Twins"
    with pytest.raises(ValueError, match=r"'Twins' has 2 modules with blocks \(one, two\)"):
        registry.get("Twins")(cfg)


def test_selectors_are_there_before_the_model_is_moved_or_wrapped(registry, cfg):
    def build_model(cfg, gpu_id=None, *, keyed=1):
        model = MODEL_REGISTRY.get(cfg.MODEL.MODEL_NAME)(cfg)
        assert list(model.stts) == ["time_0", "space_1"]
        return nn.DataParallel(model), gpu_id, keyed

    copied = plugin._with_selectors(build_model)
    model, *rest = copied(cfg, 3, keyed=4)
    assert rest == [3, 4] and list(model.module.stts) == ["time_0", "space_1"]
    assert build_model.__globals__ is globals()


def test_a_model_without_blocks_is_refused(registry, cfg):
    cfg.MODEL.MODEL_NAME = "ConvNet"
    with pytest.raises(ValueError, match=r"MODEL.MODEL_NAME 'ConvNet' is not a video transf"):
        registry.get("ConvNet")(cfg)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("MASK.ENABLE", "MASK.ENABLE False"),
        ("MVIT.REV.ENABLE", "MVIT.REV.ENABLE False"),
        ("MULTIGRID.LONG_CYCLE", "MULTIGRID.LONG_CYCLE False"),
        ("MULTIGRID.SHORT_CYCLE", "MULTIGRID.SHORT_CYCLE False"),
        ("DETECTION.ENABLE", r"STTS.SPACE.BLOCKS \[\]"),
        ("MODEL.DETACH_FINAL_FC", r"STTS.TIME.SCORER and STTS.SPACE.SCORER; set MODEL.DETACH"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(registry, cfg, key, remedy):
    cfg.merge_from_list([key, True])
    cfg.MODEL.MODEL_NAME = "MViT"
    with pytest.raises(ValueError, match=f"{key} is True.*{remedy}.*STTS.ENABLE False"):
        registry.get("Transformer")(cfg)


def test_nothing_is_refused_if_selection_is_off(registry, cfg):
    cfg.merge_from_list(["MASK.ENABLE", True, "STTS.ENABLE", False])
    registry.get("Transformer")(cfg)


def test_our_families_return_what_slowfasts_models_return(registry, cfg):
    opts = (
        "MODEL.MODEL_NAME TimeSformer MODEL.NUM_CLASSES 5 DATA.NUM_FRAMES 4 "
        "DATA.TRAIN_CROP_SIZE 32 DATA.TEST_CROP_SIZE 32 TIMESFORMER.EMBED_DIM 24 "
        "TIMESFORMER.NUM_HEADS 2 TIMESFORMER.DEPTH 3 TIMESFORMER.PATCH_SIZE 8"
    )
    cfg.merge_from_list(opts.split())
    model = registry.get("TimeSformer")(cfg)
    clip = torch.randn(2, 3, 4, 32, 32)
    model.eval()
    assert not model.backbone.training
    probabilities = model([clip])
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    torch.testing.assert_close(probabilities, model.backbone(clip).softmax(1))
    assert set(hooks.selections(model)) == {"time_0", "space_1"}
    model.train()
    model([clip]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    names = set(model.state_dict())
    assert names == set(model.backbone.state_dict())
    assert {"cls_token", "blocks.0.norm1.weight"} <= names
    assert "pos_embed" in model.no_weight_decay()


def test_our_families_refuse_detection(registry, cfg):
    cfg.merge_from_list(["MODEL.MODEL_NAME", "VideoSwin", "DETECTION.ENABLE", True])
    cfg.STTS.SPACE.BLOCKS = []
    with pytest.raises(ValueError, match=r"DETECTION.ENABLE is True.*VideoSwin has no RoI head"):
        registry.get("VideoSwin")(cfg)


def test_roi_pooling_averages_the_frames_left():
    head = nn.Module()
    head.s0_tpool = nn.AvgPool3d([4, 1, 1], stride=1)
    features = torch.randn(2, 3, 4, 5, 5)
    before = head.s0_tpool(features)
    plugin.make_roi_pool_adaptive(head)
    torch.testing.assert_close(head.s0_tpool(features), before)
    few = features[:, :, :3]
    torch.testing.assert_close(head.s0_tpool(few), few.mean(2, keepdim=True))
