"""The same weights in SlowFast and in the standalone runner, and checkpoints both ways."""

import pytest
import torch

from stts_slowfast import checkpoints
from stts_slowfast.standalone.config import get_cfg as standalone_cfg
from stts_slowfast.standalone.model import build_model

V2 = [
    *("MVIT.USE_ABS_POS", False, "MVIT.REL_POS_SPATIAL", True, "MVIT.REL_POS_TEMPORAL", True),
    *("MVIT.RESIDUAL_POOLING", True, "MVIT.DIM_MUL_IN_ATT", True),
]
VERSIONS = pytest.mark.parametrize("version", [(), V2], ids=["MViT", "MViTv2"])
SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        ("STTS.FUSED_ATTENTION", False),
        ("STTS.FUSED_ATTENTION", True),
        ("STTS.FUSED_ATTENTION", True, "STTS.TRUE_DISTANCES", False),
    ],
    ids=["explicit", "fused", "stretched"],
)


def twins(get_cfg, build, *opts):
    """SlowFast's model and ours, of one config; SlowFast's with weights that are not near zero."""
    torch.manual_seed(0)
    cfg = get_cfg("STTS.ENABLE", True, *opts)
    ours = standalone_cfg()
    ours.merge_from_other_cfg(common(cfg, ours))
    theirs = build(cfg)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return theirs, build_model(ours), cfg, ours


def common(cfg, ours):
    """What both configs know."""
    node = ours.clone()
    for key, value in ours.items():
        if key in cfg:  # what only we have keeps its default
            node[key] = common(cfg[key], value) if isinstance(value, type(ours)) else cfg[key]
    return node


def same_outputs(theirs, ours):
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        probabilities = theirs.eval()([clip])
        logits = ours.eval()(clip)
    assert probabilities.std() > 1e-3
    torch.testing.assert_close(logits.softmax(1), probabilities, rtol=0, atol=1e-5)
    for key, selector in theirs.stts.items():
        assert torch.equal(selector.kept, ours.stts[key].kept)


@VERSIONS
@SETTINGS
def test_slowfast_and_standalone_agree(get_cfg, build, version, settings):
    theirs, ours, *_ = twins(get_cfg, build, *version, *settings)
    loaded = checkpoints.load_weights(ours, theirs.state_dict())
    assert not loaded.missing and not loaded.unexpected
    same_outputs(theirs, ours)


@VERSIONS
def test_slowfasts_checkpoints_load_in_the_standalone_runner(get_cfg, build, version, tmp_path):
    import slowfast.utils.checkpoint as cu
    from slowfast.models.optimizer import construct_optimizer

    theirs, ours, cfg, _ = twins(get_cfg, build, *version)
    optimizer = construct_optimizer(theirs, cfg)
    path = cu.save_checkpoint(str(tmp_path), theirs, optimizer, 3, cfg)
    loaded = checkpoints.load_weights(ours, path)
    assert not loaded.missing and not loaded.unexpected
    assert checkpoints.read_checkpoint(path)["epoch"] == 3
    same_outputs(theirs, ours)


@VERSIONS
def test_standalone_checkpoints_load_in_slowfast(get_cfg, build, version, tmp_path, capsys):
    import slowfast.utils.checkpoint as cu

    theirs, ours, _, ours_cfg = twins(get_cfg, build, *version)
    path = str(tmp_path / "checkpoint_epoch_00004.pyth")
    checkpoints.save_checkpoint(path, ours, ours_cfg, epoch=3)
    assert cu.load_checkpoint(path, theirs, data_parallel=False) == 3
    printed = capsys.readouterr().out
    assert "missing keys: []" in printed and "unexpected keys: []" in printed
    same_outputs(theirs, ours)


def test_a_baseline_checkpoint_starts_a_run_with_selection(get_cfg, build, tmp_path, capsys):
    import slowfast.utils.checkpoint as cu
    from slowfast.models.optimizer import construct_optimizer

    cfg = get_cfg()
    baseline = build(cfg)
    path = cu.save_checkpoint(str(tmp_path), baseline, construct_optimizer(baseline, cfg), 0, cfg)
    cfg = get_cfg("STTS.ENABLE", True)
    model = build(cfg)
    optimizer = construct_optimizer(model, cfg)
    epoch = cu.load_checkpoint(path, model, False, optimizer, epoch_reset=True)
    assert epoch == -1  # training starts with the first epoch
    printed = capsys.readouterr().out
    assert "missing keys: ['stts.time_0" in printed and "unexpected keys: []" in printed
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in baseline.state_dict().items())
