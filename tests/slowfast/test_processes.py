"""The plugin in processes of its own: spawned, under DDP, and switched off.

PyTorch loads this package by its entry point, which the scripts do not rely on otherwise.
"""

import importlib.metadata
import json
from pathlib import Path

import pytest

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module", autouse=True)
def installed():
    points = importlib.metadata.entry_points(group="torch.backends")
    if "stts_slowfast" not in {point.name for point in points}:
        pytest.skip("stts-slowfast is not installed, so import torch does not load it")


BUILD = f"""
import json, sys
import torch
from slowfast.config.defaults import get_cfg
from slowfast.models import build_model
from slowfast.models import optimizer as optim

def make_cfg(*opts):
    cfg = get_cfg()
    text = open({str(TINY)!r}).read()
    if "STTS" not in cfg:  # SlowFast without us
        text = text[: text.index("STTS:")]
    cfg.merge_from_other_cfg(cfg.load_cfg(text))
    cfg.merge_from_list(list(opts))
    return cfg
"""

DDP = f"""{BUILD}
import torch.distributed as dist
from stts_slowfast.pyslowfast.checkpoint_loading import mark_pretrained

def child(rank, folder):
    dist.init_process_group("gloo", f"file://{{folder}}/store", rank=rank, world_size=2)
    cfg = make_cfg("STTS.ENABLE", True, "STTS.FREEZE_BACKBONE_EPOCHS", 0.5)
    torch.manual_seed(0)
    model = build_model(cfg)
    before = [p.detach().clone() for p in model.parameters()]
    # As build_model wraps it for several GPUs.
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    cfg.NUM_GPUS = 2  # construct_optimizer looks into the wrapper
    optimizer = optim.construct_optimizer(model, cfg)
    mark_pretrained(model)  # as load_checkpoint does
    torch.manual_seed(rank)
    computed = []
    for step in range(3):
        optim.set_lr(optimizer, optim.get_epoch_lr(step / 3, cfg))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model([torch.randn(2, 3, 8, 32, 32)]), torch.randint(0, 8, (2,)))
        loss.backward()
        computed.append(all(p.grad is not None for p in model.module.blocks.parameters()))
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    stats = {{"stts": list(model.module.stts), "same": torch.equal(*both), "changed": all(changed),
              "loss": loss.item(), "computed": computed,
              "sigma": [s.sigma for s in model.module.stts.values()]}}
    open(folder + f"/{{rank}}", "w").write(json.dumps(stats))

if __name__ == "__main__":
    torch.multiprocessing.spawn(child, args=(sys.argv[1],), nprocs=2)
"""


@pytest.fixture(scope="module")
def ranks(python, tmp_path_factory) -> list[dict]:
    """What each of two spawned processes found out."""
    folder = tmp_path_factory.mktemp("ddp")
    python(folder / "ddp.py", DDP, str(folder))
    return [json.loads((folder / str(rank)).read_text()) for rank in (0, 1)]


def test_spawned_children_see_the_plugin(ranks):
    assert [rank["stts"] for rank in ranks] == [["time_0", "space_2"]] * 2


def test_two_processes_with_ddp_stay_in_step(ranks):
    first, second = ranks
    assert first["same"] and first["changed"]
    # For half an epoch the backbone is frozen, and DDP does not wait for its gradients.
    assert first["computed"] == [False, False, True]
    assert first["loss"] != second["loss"]  # each had data of its own
    assert first["sigma"] == second["sigma"] == pytest.approx([0.1 * (1 - 2 / 3 / 2)] * 2)


DISABLED = f"""{BUILD}
import hashlib
cfg = make_cfg()
torch.manual_seed(0)
model = build_model(cfg)
optimizer = optim.construct_optimizer(model, cfg)
rates = []
for step in range(3):
    optim.set_lr(optimizer, optim.get_epoch_lr(step / 3, cfg))
    rates += [group["lr"] for group in optimizer.param_groups]
    optimizer.zero_grad()
    model([torch.randn(2, 3, 8, 32, 32)]).square().sum().backward()
    optimizer.step()
digest = hashlib.sha256()
for name, value in model.state_dict().items():
    digest.update(name.encode() + value.numpy().tobytes())
groups = [sorted(key for key in group if key != "params") for group in optimizer.param_groups]
print(json.dumps({{"stts": "STTS" in cfg, "weights": digest.hexdigest(), "rates": rates,
                   "groups": groups, "modules": str(model)}}))
"""


def test_switched_off_it_changes_nothing(python, tmp_path):
    def run(**env):
        return json.loads(python(tmp_path / "off.py", DISABLED, **env).splitlines()[-1])

    without, disabled = run(STTS_AUTOLOAD="0"), run()
    assert (without.pop("stts"), disabled.pop("stts")) == (False, True)
    assert without == disabled
