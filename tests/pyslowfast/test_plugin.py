"""The wrapped registry, the refusals, the optimizer and the log, on stand-ins for SlowFast."""

from types import SimpleNamespace

import pytest
import torch
from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from stts_slowfast import hooks
from stts_slowfast.pyslowfast import plugin, weights
from stts_slowfast.standalone.defaults import get_cfg


class Block(nn.Module):
    """Tokens in, tokens out, as SlowFast's blocks have it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)

    def forward(self, x, thw):
        return self.norm1(x), thw


class Transformer(nn.Module):
    """Two blocks over 4 frames of 6x6 tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8), Block(8)])

    def forward(self, x):
        thw = [4, 6, 6]
        for block in self.blocks:
            x, thw = block(x, thw)
        return x


class ConvNet(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3)


@pytest.fixture
def registry():
    registry = Registry("MODEL")
    registry.register(Transformer)
    registry.register(ConvNet)
    plugin.wrap_models(SimpleNamespace(MODEL_REGISTRY=registry))
    return registry


@pytest.fixture
def cfg():
    cfg = get_cfg()
    for node, values in {
        "MASK": {"ENABLE": False},
        "MULTIGRID": {"LONG_CYCLE": False, "SHORT_CYCLE": False},
        "DETECTION": {"ENABLE": False},
    }.items():
        if node not in cfg:
            cfg[node] = CfgNode(values)
    cfg.MODEL.MODEL_NAME = "Transformer"
    cfg.STTS.ENABLE = True
    cfg.STTS.TIME.KEEP = [0.5]
    cfg.STTS.SPACE.BLOCKS = [1]
    return cfg


def test_built_models_get_their_selectors(registry, cfg):
    model = registry.get("Transformer")(cfg)
    assert list(model.stts) == ["time_0", "space_1"]
    assert model.eval()(torch.randn(2, 4 * 36, 8)).shape == (2, 2 * 25, 8)


def test_disabled_models_are_stock(registry, cfg):
    cfg.STTS.ENABLE = False
    model = registry.get("Transformer")(cfg)
    assert type(model) is Transformer
    assert not hasattr(model, "stts")
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_configs_without_the_node_build_stock_models(registry, cfg, optim):
    del cfg["STTS"]
    model = registry.get("Transformer")(cfg)
    assert not hasattr(model, "stts")
    assert "backbone" not in optim.construct_optimizer(model, cfg).param_groups[0]


def test_registered_classes_stay_classes(registry, cfg):
    assert isinstance(registry.get("Transformer")(cfg), registry.get("Transformer"))
    assert issubclass(Transformer, registry.get("Transformer"))
    assert registry.get("Transformer").__name__ == "Transformer"


def test_models_registered_later_are_wrapped_too(registry, cfg):
    registry.register(type("Late", (Transformer,), {}))
    assert hasattr(registry.get("Late")(cfg), "stts")


def test_wrapping_twice_wraps_once(registry, cfg):
    plugin.wrap_models(SimpleNamespace(MODEL_REGISTRY=registry))
    assert list(registry.get("Transformer")(cfg).stts) == ["time_0", "space_1"]


def test_a_model_without_blocks_is_refused(registry, cfg):
    cfg.MODEL.MODEL_NAME = "ConvNet"
    with pytest.raises(ValueError, match=r"MODEL.MODEL_NAME 'ConvNet'.*has no blocks"):
        registry.get("ConvNet")(cfg)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("MASK.ENABLE", "MASK.ENABLE False"),
        ("MVIT.REV.ENABLE", "MVIT.REV.ENABLE False"),
        ("MULTIGRID.LONG_CYCLE", "MULTIGRID.LONG_CYCLE False"),
        ("MULTIGRID.SHORT_CYCLE", "MULTIGRID.SHORT_CYCLE False"),
        ("DETECTION.ENABLE", r"STTS.SPACE.BLOCKS \[\]"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(registry, cfg, key, remedy):
    cfg.merge_from_list([key, True])
    cfg.MODEL.MODEL_NAME = "MViT"
    with pytest.raises(ValueError, match=f"{key} is True.*{remedy}.*STTS.ENABLE False"):
        registry.get("Transformer")(cfg)


def test_nothing_is_refused_where_selection_is_off(registry, cfg):
    cfg.merge_from_list(["MASK.ENABLE", True, "STTS.ENABLE", False])
    registry.get("Transformer")(cfg)


def test_our_families_answer_as_slowfast_models(registry, cfg):
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
    plugin.pool_over_frames_left(head)
    torch.testing.assert_close(head.s0_tpool(features), before)
    few = features[:, :, :3]
    torch.testing.assert_close(head.s0_tpool(few), few.mean(2, keepdim=True))


# ---- optimizer, schedule, log ---------------------------------------------------------------


@pytest.fixture
def optim(monkeypatch):
    """SlowFast's optimizer module, in short."""

    def construct_optimizer(model, cfg):
        params = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": params, "layer_decay": 0.5}], lr=cfg.SOLVER.BASE_LR)

    def set_lr(optimizer, new_lr):
        for group in optimizer.param_groups:
            group["lr"] = new_lr * group["layer_decay"]

    monkeypatch.setattr(plugin, "_now", {})
    module = SimpleNamespace(
        construct_optimizer=construct_optimizer,
        get_epoch_lr=lambda cur_epoch, cfg: cfg.SOLVER.BASE_LR,
        set_lr=set_lr,
    )
    plugin.wrap_optimizer(module)
    plugin.wrap_optimizer(module)
    return module


def step(optim, optimizer, epoch, cfg):
    optim.set_lr(optimizer, optim.get_epoch_lr(epoch, cfg))


def test_scorers_and_backbone_have_their_own_rates_and_sigma_decays(registry, cfg, optim):
    cfg.merge_from_list(["SOLVER.MAX_EPOCH", 10, "SOLVER.BASE_LR", 0.8])
    model = registry.get("Transformer")(cfg)
    weights.note_trained(model)
    optimizer = optim.construct_optimizer(model, cfg)
    assert [group["backbone"] for group in optimizer.param_groups] == [True, False]
    step(optim, optimizer, 1.5, cfg)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0, 0.4])
    assert model.stts["time_0"].sigma.item() == pytest.approx(0.085)
    step(optim, optimizer, 5.0, cfg)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.04, 0.4])
    assert model.stts["space_1"].sigma.item() == pytest.approx(0.05)


def test_sigma_reaches_the_model_inside_ddp(registry, cfg, optim):
    wrapped = nn.DataParallel(registry.get("Transformer")(cfg))
    optimizer = optim.construct_optimizer(wrapped, cfg)
    step(optim, optimizer, cfg.SOLVER.MAX_EPOCH / 2, cfg)
    assert wrapped.module.stts["time_0"].sigma.item() == pytest.approx(0.05)


def test_disabled_optimizers_are_stock(registry, cfg, optim):
    cfg.STTS.ENABLE = False
    optimizer = optim.construct_optimizer(registry.get("Transformer")(cfg), cfg)
    step(optim, optimizer, 0.0, cfg)
    (group,) = optimizer.param_groups
    assert "backbone" not in group
    assert group["lr"] == cfg.SOLVER.BASE_LR * 0.5


@pytest.mark.parametrize("trained", [True, False])
def test_a_resumed_run_is_held_back_as_it_was(registry, cfg, optim, trained):
    model = registry.get("Transformer")(cfg)
    if trained:
        weights.note_trained(model)
    first = optim.construct_optimizer(model, cfg)
    step(optim, first, 0.0, cfg)
    state = first.state_dict()
    model = registry.get("Transformer")(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    optimizer.load_state_dict(state)
    weights.note_trained(model)
    step(optim, optimizer, 0.0, cfg)
    assert (optimizer.param_groups[0]["lr"] == 0.0) == trained
    assert set(state) == {"state", "param_groups"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_is_trained_once_a_checkpoint_was_loaded_into_it(wrapped):
    checkpoint = SimpleNamespace(load_checkpoint=lambda path, model, data_parallel=True: 7)
    weights.wrap_load_checkpoint(checkpoint)
    model = nn.Linear(1, 1)
    outer = nn.DataParallel(model) if wrapped else model
    assert not weights.is_trained(outer)
    assert checkpoint.load_checkpoint("x.pyth", outer, wrapped) == 7
    assert weights.is_trained(outer) and weights.is_trained(model)


def test_the_line_says_once_where_a_run_starts_from(registry, cfg, optim, caplog):
    caplog.set_level("INFO")
    optimizer = optim.construct_optimizer(model := registry.get("Transformer")(cfg), cfg)
    for epoch in (0.0, 0.5):
        step(optim, optimizer, epoch, cfg)
    assert caplog.text.count("from random weights: everything learns") == 1
    del model


def test_training_lines_gain_sigma_and_the_backbone_rate(registry, cfg, optim):
    lines = []
    log = SimpleNamespace(log_json_stats=lambda stats, output_dir=None: lines.append(stats))
    plugin.wrap_log(log)
    log.log_json_stats({"_type": "train_iter_"})
    model = registry.get("Transformer")(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    epoch = cfg.SOLVER.MAX_EPOCH / 2
    step(optim, optimizer, epoch, cfg)
    stats = {"_type": "train_epoch"}
    log.log_json_stats(stats, output_dir="x")
    log.log_json_stats({"_type": "val_epoch"})
    assert stats == {"_type": "train_epoch"}
    assert lines[0] == {"_type": "train_iter_"}
    assert float(lines[1]["sigma"]) == pytest.approx(0.05)
    assert float(lines[1]["backbone_lr"]) == pytest.approx(cfg.SOLVER.BASE_LR)
    assert lines[2] == {"_type": "val_epoch"}
