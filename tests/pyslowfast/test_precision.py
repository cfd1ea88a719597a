"""Mixed precision of SlowFast's loop, as it asks for it: through torch.cuda.amp."""

import pytest
import torch
from fvcore.common.config import CfgNode

from stts_slowfast.pyslowfast import distributed, precision


def config(mixed=True, dtype="bfloat16", gpus=0):
    train = {"MIXED_PRECISION": mixed, "MIXED_PRECISION_DTYPE": dtype}
    return CfgNode({"TRAIN": train, "NUM_GPUS": gpus})


def train(cfg):
    """What ``train_net.py`` does with a model of one linear layer."""
    layer = torch.nn.Linear(4, 4)
    scaler = torch.cuda.amp.GradScaler(enabled=cfg.TRAIN.MIXED_PRECISION)
    with torch.cuda.amp.autocast(enabled=cfg.TRAIN.MIXED_PRECISION):
        out = layer(torch.ones(1, 4))
    scaler.scale(out.sum()).backward()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return out.dtype, scaler.state_dict(), layer.bias.grad


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_bfloat16_is_what_the_loop_gets_while_a_job_runs():
    stock = torch.cuda.amp.autocast, torch.cuda.amp.GradScaler
    dtype, state, gradient = distributed.run_job(train, config())
    assert dtype is torch.bfloat16 and state == {}
    assert torch.equal(gradient, torch.ones(4))  # not scaled
    assert (torch.cuda.amp.autocast, torch.cuda.amp.GradScaler) == stock
    for other in (config(mixed=False), config(dtype="")):
        assert distributed.run_job(train, other)[0] is torch.float32


def test_other_types_are_refused_before_the_job():
    for cfg, message in (
        (config(dtype="half"), "MIXED_PRECISION_DTYPE is 'half': use one of"),
        (config(dtype="float16"), "'float16' and NUM_GPUS is 0, .* use 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.run_job(lambda cfg: pytest.fail("ran"), cfg)
    with precision.autocast(config(dtype="float16", gpus=1)):
        assert "lambda" not in torch.cuda.amp.autocast.__name__
