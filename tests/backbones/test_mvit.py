import pytest
import torch
from torchvision.models.video import mvit_v1_b, mvit_v2_s

from stts_slowfast import backbones
from stts_slowfast.backbones.mvit import block_settings
from stts_slowfast.checkpoints import load_weights
from stts_slowfast.hooks import attach
from stts_slowfast.scorers import minmax_normalize
from stts_slowfast.standalone.config import get_cfg


@pytest.mark.parametrize("name", ["slowfast_mvit_v1", "slowfast_mvit_v2"])
def test_equals_slowfasts(golden, name):
    case = golden(name)
    model = backbones.build(case.cfg()).eval()
    loaded = load_weights(model, case.weights)
    assert not loaded.missing and not loaded.unexpected and not loaded.mismatched
    probs = model(case["input"]).softmax(dim=1)
    torch.testing.assert_close(probs, case["probs"], atol=1e-5, rtol=0)


def test_equals_the_authors_with_selection(golden, tiny_cfg):
    case = golden("official_stts_mvit")
    model = attach(backbones.build(case.cfg()), tiny_cfg.STTS).eval()
    loaded = load_weights(model, case.weights)
    assert not loaded.missing and not loaded.unexpected and not loaded.mismatched
    scores = {}
    for key, selector in model.stts.items():
        selector.scorer.register_forward_hook(
            lambda module, args, out, key=key: scores.update({key: minmax_normalize(out)})
        )
    probs = model(case["input"]).softmax(dim=1)
    torch.testing.assert_close(probs, case["probs"], atol=1e-6, rtol=0)
    for key, theirs in (
        ("time_0", "time_score_predictor.0"),
        ("space_2", "space_score_predictor.0"),
    ):
        torch.testing.assert_close(scores[key], case[f"scores/{theirs}"], atol=1e-5, rtol=0)


def full_size(version):
    cfg = get_cfg()
    cfg.MODEL.MODEL_NAME, cfg.MODEL.ARCH = "MViT", "mvit"
    cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE = 16, 224, 224
    cfg.DATA.INPUT_CHANNEL_NUM = [3]
    mvit = cfg.MVIT
    mvit.PATCH_PADDING, mvit.POOL_KVQ_KERNEL, mvit.SEP_POS_EMBED = [1, 3, 3], [3, 3, 3], True
    mvit.POOL_KV_STRIDE_ADAPTIVE, mvit.DROPPATH_RATE = [1, 8, 8], 0.2
    stages = [1, 3, 14]
    mvit.DIM_MUL = mvit.HEAD_MUL = [[block, 2.0] for block in stages]
    mvit.POOL_Q_STRIDE = [[block, 1, 2, 2] for block in stages]
    if version == 2:
        mvit.USE_ABS_POS, mvit.REL_POS_SPATIAL, mvit.REL_POS_TEMPORAL = False, True, True
        mvit.DIM_MUL_IN_ATT = mvit.RESIDUAL_POOLING = True
        side = [2 if block in stages else 1 for block in range(16)]
        mvit.POOL_Q_STRIDE = [[block, 1, s, s] for block, s in enumerate(side)]
    return cfg


@pytest.mark.parametrize("version, build", [(1, mvit_v1_b), (2, mvit_v2_s)])
def test_slowfasts_config_makes_torchvisions_architecture(version, build):
    with torch.device("meta"):
        ours, theirs = backbones.build(full_size(version)), build()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_grids_are_those_that_arrive(tiny_cfg):
    seen = []
    for cfg in (tiny_cfg, full_size(2)):
        with torch.device("meta"):
            model = backbones.build(cfg)
        seen.clear()
        for block in model.blocks:
            block.register_forward_pre_hook(lambda block, args: seen.append(tuple(args[1])))
        size = cfg.DATA.TRAIN_CROP_SIZE
        model(torch.empty(1, 3, cfg.DATA.NUM_FRAMES, size, size, device="meta"))
        assert seen == backbones.block_grids(cfg)


def test_kernels_follow_strides_if_none_is_given(tiny_cfg):
    tiny_cfg.MVIT.POOL_KVQ_KERNEL = None
    setting = block_settings(tiny_cfg)[1]
    assert setting.stride_q == [1, 2, 2] and setting.kernel_q == [1, 3, 3]


@pytest.mark.parametrize(
    "key, value",
    [
        ("MVIT.MODE", "avg"),
        ("MVIT.NORM_STEM", True),
        ("MVIT.LAYER_SCALE_INIT_VALUE", 0.1),
        ("MVIT.DIM_MUL", [[2]]),
        ("MVIT.POOL_Q_STRIDE", [[99, 1, 2, 2]]),
        ("MVIT.POOL_Q_STRIDE", [[1, 2, 2]]),
        ("MVIT.SEP_POS_EMBED", False),
        ("MVIT.REL_POS_SPATIAL", True),
        ("MVIT.REV.ENABLE", True),
        ("DATA.TEST_CROP_SIZE", 64),
        ("DATA.INPUT_CHANNEL_NUM", [1]),
        ("DATA.NUM_FRAMES", 7),
        ("DATA.TRAIN_CROP_SIZE", 30),
        ("MVIT.PATCH_PADDING", [1, 0, 3]),
    ],
)
def test_what_torchvision_cannot_express_is_named(tiny_cfg, key, value):
    node, _, name = key.rpartition(".")
    target = tiny_cfg
    for part in node.split("."):
        target = target[part]
    target[name] = value
    if key == "DATA.TRAIN_CROP_SIZE":
        tiny_cfg.DATA.TEST_CROP_SIZE = value
    with pytest.raises(ValueError, match=key.split(".")[-1] if "REV" not in key else key):
        backbones.build(tiny_cfg)


def test_an_unknown_model_is_named(tiny_cfg):
    tiny_cfg.MODEL.MODEL_NAME = "SlowFast"
    with pytest.raises(ValueError, match=r"MODEL.MODEL_NAME is 'SlowFast': use one of .*MViT"):
        backbones.build(tiny_cfg)
