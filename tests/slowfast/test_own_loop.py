"""A loop of the user's own: `build_model`, `construct_optimizer` and a scheduler of PyTorch's."""

import warnings

import pytest
import torch


def frames_of(model) -> list:
    """The number of frames that each forward pass hands to the last block, in order."""
    arrived = []
    model.blocks[-1].register_forward_hook(lambda block, args, out: arrived.append(int(args[1][0])))
    return arrived


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("trains", [True, False])
def test_a_loop_without_set_lr_keeps_what_the_config_says_and_warns_once(
    get_cfg, build, seed, trains
):
    """Budgets that shrink, the default, need a schedule: without one KEEP holds, for any seed."""
    from slowfast.models import optimizer as optim

    cfg = get_cfg("STTS.ENABLE", True, "STTS.TIME.KEEP", [0.25], "STTS.SPACE.BLOCKS", [])
    cfg.merge_from_list(["DATA.NUM_FRAMES", 16, "RNG_SEED", seed, "TRAIN.ENABLE", trains])
    assert cfg.STTS.SHRINK > 0
    torch.manual_seed(seed)
    model = build(cfg).train()
    optimizer = optim.construct_optimizer(model, cfg)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    arrived, before = frames_of(model), [p.clone() for p in model.stts.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model([torch.randn(2, 3, 16, 32, 32)]).square().sum().backward()
            optimizer.step()
            scheduler.step()
    assert arrived == [2, 2, 2]  # of 8
    assert [selector.sigma for selector in model.stts.values()] == [cfg.STTS.SIGMA]
    message = [str(one.message) for one in caught if "without a schedule" in str(one.message)]
    assert len(message) == 1 and "set_progress(model, fraction)" in message[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.stts.parameters(), strict=True))
