"""Measures the STTS authors' code beside this one at the same configurations, step by step in turn.

    git clone https://github.com/wangjk666/STTS
    pip install einops            # and what their code needs besides; detectron2 only if installed
    OMP_NUM_THREADS=1 python projects/stts/benchmarks/authors.py STTS/MViT results/authors.json

Batches of one clip, in core-seconds: other work on the machine has little effect.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from stts_slowfast.annealing import update_schedule
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.bench.command import machine, timed

# Their config, and the one of this repository.
ROWS = {
    "T0_0.9-S4_0.9": ("t0_0.9_s4_0.9", "STTS_MVIT_B_16x4_T0_0.9_S4_0.9"),
    "T0_0.5-S4_0.7": ("t0_0.5_s4_0.7", "STTS_MVIT_B_16x4_T0_0.5_S4_0.7"),
}
SIGMA = 0.05


def import_theirs(root: Path):
    """Their module of the model, without the models of the package that import much else."""
    sys.path.insert(0, str(root))
    package = types.ModuleType("slowfast.models")
    package.__path__ = [str(root / "slowfast" / "models")]
    sys.modules["slowfast.models"] = package
    installed = "detectron2" in sys.modules or importlib.util.find_spec("detectron2")
    for name in ("detectron2", "detectron2.layers"):  # of heads for detection
        if not installed:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].ROIAlign = None
    return importlib.import_module("slowfast.models.mvit")


def build_theirs(root: Path, config: str) -> torch.nn.Module:
    mvit = import_theirs(root)
    from slowfast.config.defaults import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(root / "configs" / "Kinetics" / f"{config}.yaml"))
    cfg.NUM_GPUS = 0
    torch.Tensor.cuda = lambda tensor: tensor  # which it calls whatever NUM_GPUS is
    model = mvit.MViT(cfg)
    model.sigma = SIGMA
    return model


def build_ours(config: str) -> torch.nn.Module:
    model = build_model(load_config(f"configs/Kinetics/{config}.yaml", []))
    update_schedule(model, 0.5)  # a sigma of 0.05, and no budget annealing
    return model


def make_steps(model: torch.nn.Module, as_list: bool) -> dict:
    clips, labels = torch.randn(1, 3, 16, 224, 224), torch.zeros(1, dtype=torch.long)

    @torch.no_grad()
    def evaluate():
        model.eval()
        model([clips] if as_list else clips)

    def train():
        model.train()
        F.cross_entropy(model([clips] if as_list else clips), labels).backward()
        model.zero_grad(set_to_none=True)

    return {"eval": evaluate, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the folder MViT of their repository")
    parser.add_argument("json", help="file to write every number to")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for name, (theirs, ours) in ROWS.items():
        steps = {
            "theirs": make_steps(build_theirs(args.root, theirs), as_list=True),
            "ours": make_steps(build_ours(ours), as_list=False),
        }
        row = {"name": name, "seconds": {who: {"eval": [], "train": []} for who in steps}}
        rows.append(row)
        for repeat in range(1 + args.repeats):
            for who, of_mode in steps.items():
                for mode, step in of_mode.items():
                    seconds = timed(step, "cpu", core_seconds=True)
                    if repeat:
                        row["seconds"][who][mode].append(seconds)
            print(name, repeat, row["seconds"], flush=True)
            write_json(args.json, {**machine("cpu"), "batch_size": 1, "rows": rows})


if __name__ == "__main__":
    main()
