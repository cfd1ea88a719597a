"""SlowFast's loops evaluate in the precision that the config sets, and compiled."""

import pytest
import torch


@pytest.fixture
def test_net(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(checkout / "tools"))  # as running a launcher there does
    import test_net

    return test_net


def batches(count: int = 3) -> list:
    """Two clips of a video each; the last batch has one."""
    torch.manual_seed(0)
    clips = torch.randn(2 * count - 1, 3, 8, 32, 32)
    numbers = torch.arange(len(clips))
    split = zip(clips.split(2), numbers.split(2))
    return [([part], index % 8, index, torch.zeros(len(part)), {}) for part, index in split]


def predictions(test_net, model, cfg) -> torch.Tensor:
    from slowfast.utils.meters import TestMeter

    loader = batches()
    meter = TestMeter(5, 1, cfg.MODEL.NUM_CLASSES, len(loader), False, "sum")
    return test_net.perform_test(loader, model, meter, cfg).video_preds


@pytest.mark.parametrize("enabled", [True, False])
def test_a_test_runs_as_the_config_sets(get_cfg, build, test_net, monkeypatch, enabled):
    graphs, compile_graph = [], torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, mode, dynamic: compile_graph(
            function, backend=lambda graph, _: graphs.append(mode) or graph, dynamic=dynamic
        ),
    )
    cfg = get_cfg("STTS.ENABLE", enabled, "TRAIN.ENABLE", False)
    model = build(cfg)
    weights, seen = {name: p.data_ptr() for name, p in model.named_parameters()}, []
    layer = model.blocks[1].mlp.fc1
    plain = predictions(test_net, model, cfg)
    cfg.TEST.PRECISION = "bfloat16"
    handle = layer.register_forward_hook(lambda m, *_: seen.append(m.weight.dtype))
    half = predictions(test_net, model, cfg)
    handle.remove()
    assert seen == [torch.bfloat16] * 3 and not graphs
    assert 0 < (half - plain).abs().max() < 0.02
    cfg.TEST.PRECISION, cfg.TEST.COMPILE = "float32", "reduce-overhead"
    compiled = predictions(test_net, model, cfg)
    assert graphs and set(graphs) == {"reduce-overhead"}
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert weights == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert torch.equal(predictions(test_net, model, get_cfg("STTS.ENABLE", enabled)), plain)
