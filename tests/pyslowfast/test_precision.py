"""Mixed precision of SlowFast's loop, as it asks for it: through torch.cuda.amp."""

import pytest
import torch
from fvcore.common.config import CfgNode

from stts_slowfast.pyslowfast import distributed, loops, precision


def config(mixed=True, dtype="bfloat16", gpus=0, **test):
    train = {"MIXED_PRECISION": mixed, "MIXED_PRECISION_DTYPE": dtype, "ENABLE": False}
    model = {"FLOAT32_MATMUL_PRECISION": ""}
    return CfgNode({"TRAIN": train, "TEST": test, "MODEL": model, "NUM_GPUS": gpus})


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
    for cfg, message in (
        (config(PRECISION="bf16"), "TEST.PRECISION is 'bf16': use one of float32, bfloat16"),
        (config(COMPILE="fast"), "TEST.COMPILE is 'fast': use one of '', default, reduce-overhead"),
    ):
        for start in (lambda cfg: distributed.run_job(print, cfg), precision.evaluating):
            with pytest.raises(ValueError, match=message):
                start(cfg, None) if start is precision.evaluating else start(cfg)
    cfg = config(COMPILE="default")
    cfg.DETECTION = CfgNode({"ENABLE": True})
    with pytest.raises(ValueError, match=r"TEST.COMPILE is 'default' and DETECTION.ENABLE is True"):
        precision.check_keys(cfg)
    with precision.autocast(config(dtype="float16", gpus=1)):
        assert "lambda" not in torch.cuda.amp.autocast.__name__


def perform_test(loader, model, meter, cfg):
    return model(loader)


@torch.no_grad()
def test_evaluations_run_in_the_precision_that_the_config_sets():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    weight = model[0].weight
    types = []
    model[0].register_forward_hook(lambda m, args, out: types.append((m.weight.dtype, out.dtype)))
    for cfg in (config(), config(PRECISION="bfloat16")):
        out = loops._evaluate(perform_test, torch.ones(1, 4), model, None, cfg=cfg)
        assert out.dtype is torch.float32 and model[0].weight is weight
    assert types == [(torch.float32,) * 2, (torch.bfloat16,) * 2]


def test_a_job_sets_the_precision_of_matrix_products_while_it_runs():
    before, cfg = torch.get_float32_matmul_precision(), config(mixed=False)
    cfg.MODEL.FLOAT32_MATMUL_PRECISION = "high"
    seen = distributed.run_job(lambda cfg: torch.get_float32_matmul_precision(), cfg)
    assert (seen, torch.get_float32_matmul_precision()) == ("high", before)


def test_strict_float32_on_a_gpu_is_logged(caplog):
    with caplog.at_level("INFO", "stts_slowfast"):
        for cfg in (config(), config(gpus=1, PRECISION="bfloat16"), config(gpus=1)):
            precision.log_strict_float32(cfg)
    (message,) = caplog.messages
    assert message.endswith(
        "faster: MODEL.FLOAT32_MATMUL_PRECISION high, or TEST.PRECISION bfloat16"
    )
