"""SlowFast's own models with selectors: every stock recipe, the refusals, detection."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

import stts_slowfast as stts
from stts_slowfast import backbones
from stts_slowfast.pyslowfast import launch


def stock_recipes() -> list[str]:
    """The MViT YAMLs of Kinetics and SSv2, and the fine-tuning ones of masked_ssl."""
    try:
        launcher = launch.find_launcher()
    except FileNotFoundError:
        launcher = None
    if launcher is None:
        return []
    configs = Path(launcher).parents[1] / "configs"
    paths = [*configs.glob("Kinetics/MVIT*"), *configs.glob("SSv2/MVIT*")]
    paths += configs.glob("masked_ssl/*_FT.yaml")
    return sorted(str(path.relative_to(configs.parent)) for path in paths)


def reduce(cfg) -> None:
    """Few pixels, frames and channels, in the recipe's own number of blocks and strides."""
    image = cfg.DATA.NUM_FRAMES == 1
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = 64
    cfg.DATA.NUM_FRAMES = 1 if image else 8
    cfg.MVIT.EMBED_DIM = 8 * cfg.MVIT.NUM_HEADS
    cfg.MODEL.NUM_CLASSES = 7
    cfg.STTS.ENABLE = True
    cfg.STTS.TIME.KEEP = [0.75]
    cfg.STTS.NUM_SAMPLES = 20
    if image:
        cfg.STTS.TIME.BLOCKS = []


def inputs_for(cfg, batch: int = 2) -> list[torch.Tensor]:
    frames = () if cfg.DATA.NUM_FRAMES == 1 else (cfg.DATA.NUM_FRAMES,)
    size = cfg.DATA.TRAIN_CROP_SIZE
    return [torch.randn(batch, 3, *frames, size, size)]


def test_there_are_stock_recipes(checkout):
    assert len(stock_recipes()) >= 13


@pytest.mark.parametrize("recipe", stock_recipes())
def test_stock_recipes_train_and_evaluate_with_selection(get_cfg, build, recipe):
    torch.manual_seed(0)
    cfg = get_cfg(stock=recipe)
    if cfg.MODEL.ACT_CHECKPOINT and importlib.util.find_spec("fairscale") is None:
        cfg.MODEL.ACT_CHECKPOINT = False
    reduce(cfg)
    model = build(cfg)
    arrived = []
    model.blocks[-1].register_forward_hook(lambda block, args, out: arrived.append(out[1]))
    model.train()
    assert model(inputs_for(cfg)).shape == (2, 7)
    model(inputs_for(cfg)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert not without  # find_unused_parameters=False
    model.eval()
    with torch.no_grad():
        probabilities = model(inputs_for(cfg))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    kept = stts.selections(model)
    image = cfg.DATA.NUM_FRAMES == 1
    assert list(kept) == (["space_4"] if image else ["time_0", "space_4"])
    frames = int(arrived[-1][0])
    assert frames == (1 if image else 3)  # 4 token frames, three quarters kept
    assert kept["space_4"].shape == (2 * frames, 4)


def test_each_selector_is_logged_when_the_model_is_built(get_cfg, build, caplog):
    with caplog.at_level(logging.INFO):
        build(get_cfg("STTS.ENABLE", True))
    lines = [r.message for r in caplog.records if r.message.startswith("STTS ")]
    assert lines == [
        "STTS time_0: learned frames before block 0, keep 0.5, 4x8x8 -> 2x8x8, 256 -> 128 tokens",
        "STTS space_2: learned window before block 2, keep 0.6, 2x8x8 -> 2x6x6, 128 -> 72 tokens",
    ]


def test_fewer_tokens_cost_fewer_operations(get_cfg, build):
    from slowfast.utils.misc import get_model_stats

    stock, guest = (get_cfg("STTS.ENABLE", enable) for enable in (False, True))
    flops = [get_model_stats(build(cfg), cfg, "flop", True) for cfg in (stock, guest)]
    assert 0.2 < flops[1] / flops[0] < 0.7


@pytest.mark.parametrize(
    ("stock", "opts", "message"),
    [
        ("configs/Kinetics/REV_MVIT_B_16x4_CONV.yaml", [], "MVIT.REV.ENABLE is True"),
        ("configs/Kinetics/SLOWFAST_4x16_R50.yaml", [], "'SlowFast' is not a video transformer"),
        ("configs/Kinetics/C2D_8x8_R50.yaml", [], "'ResNet' is not a video transformer"),
        ("configs/Kinetics/X3D_XS.yaml", [], "'X3D' is not a video transformer"),
        ("configs/Kinetics/pytorchvideo/X3D_XS.yaml", [], "'PTVX3D' is not a video transformer"),
        ("configs/Kinetics/pytorchvideo/C2D_8x8_R50.yaml", [], "'PTVResNet' is not a video"),
        ("configs/contrastive_ssl/linear_k400_Slow_8x8_R50_syn0.yaml", [], "'ResNet' is not a"),
        ("configs/ImageNet/MVITv2_T.yaml", [], r"one token frame arrives.*TIME.BLOCKS \[\]"),
        ("configs/masked_ssl/k400_MVITv2_S_16x4_MaskFeat_PT.yaml", [], "MASK.ENABLE is True"),
        (None, ["MULTIGRID.SHORT_CYCLE", True], "MULTIGRID.SHORT_CYCLE is True"),
        (None, ["DETECTION.ENABLE", True], "STTS.SPACE.BLOCKS is"),
        (None, ["STTS.TIME.KEEP", [0.1]], "STTS.TIME.KEEP 0.1 leaves no frame"),
        (None, ["STTS.TIME.BLOCKS", [7]], "STTS.TIME.BLOCKS names block 7"),
    ],
)
def test_what_cannot_be_selected_is_refused(get_cfg, build, stock, opts, message):
    cfg = get_cfg("STTS.ENABLE", True, *opts, stock=stock)
    with pytest.raises(ValueError, match=message):
        build(cfg)


@pytest.mark.parametrize("name", ["TimeSformer", "VideoSwin"])
def test_our_families_are_in_the_registry(get_cfg, build, name):
    opts = (
        "TIMESFORMER.EMBED_DIM 24 TIMESFORMER.NUM_HEADS 2 TIMESFORMER.DEPTH 3 "
        "TIMESFORMER.PATCH_SIZE 8 VIDEO_SWIN.EMBED_DIM 12 VIDEO_SWIN.DEPTHS [1,1,1,1] "
        "VIDEO_SWIN.NUM_HEADS [1,2,2,2] VIDEO_SWIN.WINDOW_SIZE [2,4,4] STTS.SPACE.BLOCKS [1] "
        "STTS.ENABLE True"
    )
    cfg = get_cfg("MODEL.MODEL_NAME", name, *opts.split())
    model = build(cfg)
    clips = inputs_for(cfg)
    torch.testing.assert_close(model.eval()(clips).sum(1), torch.ones(2))
    model.train()(clips).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    from slowfast.models.optimizer import construct_optimizer

    groups = construct_optimizer(model, cfg).param_groups
    assert {group["backbone"] for group in groups} == {True, False}

    cfg.SOLVER.LAYER_DECAY = 0.5
    groups = construct_optimizer(model, cfg).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["layer_decay"] for group in groups for p in group["params"]}
    assert set(decay) == set(names.values()) and len(decay) == sum(len(g["params"]) for g in groups)
    depth = 3 if name == "TimeSformer" else 4
    layer = backbones.family_of(cfg).layer
    assert decay == {n: 0.5 ** (depth + 1 - layer(n, depth)) for n in decay}
    assert decay["patch_embed.proj.weight"] == 0.5 ** (depth + 1)
    assert decay["head.weight"] == 1.0 == decay["stts.space_1.scorer.network.embed.0.weight"]


@pytest.mark.parametrize("name", ["TimeSformer", "VideoSwin"])
def test_our_families_recompute_and_train_the_head_alone(get_cfg, build, name):
    opts = (
        "TIMESFORMER.EMBED_DIM 24 TIMESFORMER.NUM_HEADS 2 TIMESFORMER.DEPTH 3 "
        "TIMESFORMER.PATCH_SIZE 8 VIDEO_SWIN.EMBED_DIM 12 VIDEO_SWIN.DEPTHS [1,1,1,1] "
        "VIDEO_SWIN.NUM_HEADS [1,2,2,2] VIDEO_SWIN.WINDOW_SIZE [2,4,4] STTS.ENABLE False "
        "TIMESFORMER.DROPPATH_RATE 0.0 VIDEO_SWIN.DROPPATH_RATE 0.0 MODEL.DROPOUT_RATE 0.0"
    )
    cfg = get_cfg("MODEL.MODEL_NAME", name, "MODEL.ACT_CHECKPOINT", True, *opts.split())
    model, clips = build(cfg).train(), inputs_for(cfg)
    runs = []
    inner = model.blocks[0].norm1 if name == "TimeSformer" else model.features[0][0].norm1
    inner.register_forward_hook(lambda *_: runs.append(1))
    model(clips).square().sum().backward()
    assert len(runs) == 2, "once forward, once for the backward pass"

    cfg.MODEL.DETACH_FINAL_FC = True
    model = build(cfg).train()
    model(clips).square().sum().backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learned == {"head.weight", "head.bias"}
    from slowfast.models.optimizer import construct_optimizer

    groups = construct_optimizer(model, cfg).param_groups
    assert sum(len(group["params"]) for group in groups) == 2


# ---- detection ------------------------------------------------------------------------------


def detection_cfg(get_cfg, *opts):
    return get_cfg("DETECTION.ENABLE", True, "DETECTION.SPATIAL_SCALE_FACTOR", 8,
                   "DETECTION.ROI_XFORM_RESOLUTION", 3, "MODEL.HEAD_ACT", "sigmoid",
                   "STTS.SPACE.BLOCKS", [], *opts)  # fmt: skip


BOXES = torch.tensor([[0.0, 2, 2, 20, 20], [1.0, 8, 0, 31, 31], [1.0, 0, 0, 12, 31]])


def test_detection_pools_over_the_frames_left(get_cfg, build):
    cfg = detection_cfg(get_cfg, "STTS.ENABLE", True)
    model = build(cfg)
    clips = inputs_for(cfg)
    pooled = []
    model.head.s0_tpool.register_forward_hook(lambda m, args, out: pooled.append((args[0], out)))
    assert model.eval()(clips, BOXES).shape == (3, 8)
    features, mean = pooled[0]
    assert features.shape[2] == 2  # half of 4
    torch.testing.assert_close(mean, features.mean(2, keepdim=True))
    model.train()(clips, BOXES).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("stts"))


def test_detection_that_keeps_every_frame_is_stock(get_cfg, build):
    torch.manual_seed(0)
    stock = build(detection_cfg(get_cfg)).eval()
    guest = build(detection_cfg(get_cfg, "STTS.ENABLE", True, "STTS.TIME.KEEP", [1.0])).eval()
    guest.load_state_dict(stock.state_dict(), strict=False)
    clips = inputs_for(stock.cfg)
    with torch.no_grad():
        torch.testing.assert_close(guest(clips, BOXES), stock(clips, BOXES))


def test_a_model_of_the_users_own_may_have_the_name_of_one_of_ours(python, checkout, tmp_path):
    """It may be registered after the config was read, and says nothing of us."""
    done = python(
        tmp_path / "late.py",
        """
import contextlib, io, pickle, sys
import torch
import stts_slowfast.pyslowfast
from slowfast.models import MODEL_REGISTRY, build_model
from slowfast.config.defaults import assert_and_infer_cfg, get_cfg

cfg = get_cfg()
cfg.NUM_GPUS, cfg.MODEL.MODEL_NAME = 0, "VideoSwin"
with contextlib.redirect_stderr(io.StringIO()) as message:
    cfg = assert_and_infer_cfg(cfg)

    @MODEL_REGISTRY.register()
    class VideoSwin(torch.nn.Linear):
        def __init__(self, cfg):
            super().__init__(2, 2)

    model = build_model(cfg)
print(type(model) is VideoSwin, "stts" in message.getvalue())
""",
    )
    assert done.split()[-2:] == ["True", "False"]
