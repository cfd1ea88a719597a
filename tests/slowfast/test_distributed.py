"""Two shards of one process each, or two processes of torchrun's, through the stock launcher over
loopback, are one run."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def logs(checkout, videos, tmp_path_factory) -> list[str]:
    """What each of two shards printed, that trained for an epoch and tested."""
    from stts_slowfast.pyslowfast import launch

    folder = tmp_path_factory.mktemp("shards")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"tcp://localhost:{free.getsockname()[1]}"
    env = {**launch.environment(launch.find_launcher()), "OMP_NUM_THREADS": "1"}
    processes = []
    for shard in "01":
        words = [sys.executable, "-m", launch.__name__, launch.find_launcher(), "--cfg", str(TINY)]
        words += ["--num_shards", "2", "--shard_id", shard, "--init_method", meet, "--opts"]
        words += ["DATA.PATH_TO_DATA_DIR", str(videos), "OUTPUT_DIR", str(folder / shard)]
        words += ["STTS.ENABLE", "True", "SOLVER.MAX_EPOCH", "1", "TEST.SAVE_RESULTS_PATH", "p.pkl"]
        with open(folder / f"{shard}.log", "w") as out:
            processes.append(subprocess.Popen(words, env=env, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [(folder / f"{shard}.log").read_text() for shard in "01"]
    assert codes == [0, 0], texts[0][-3000:] + texts[1][-3000:]
    return [*texts, folder]


def stats(log: str, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in re.findall(r"json_stats: (\{.*\})", log)]
    return [line for line in lines if kind in (line.get("_type"), line.get("split"))]


def test_one_checkpoint_is_written_by_shard_0(logs):
    *_, folder = logs
    name = "checkpoints/checkpoint_epoch_00001.pyth"
    saved = torch.load(folder / "0" / name, weights_only=True)
    assert not (folder / "1" / name).exists()
    assert not any(key.startswith("module.") for key in saved["model_state"])
    assert "NUM_GPUS: 0" in saved["cfg"]


def test_the_shards_share_the_videos_and_what_they_find(logs):
    first, _, _ = logs
    # 13 videos in batches of 4: three iterations alone, one if each of two has seven.
    assert len(stats(first, "train_iter_")) == 1
    (final,) = stats(first, "test_final")
    assert 0 <= float(final["top1_acc"]) <= 100
    # Views of all videos came to shard 0: a lost one would be warned of.
    assert "clip count" not in first


def test_processes_of_torchrun_are_one_run(checkout, videos, tmp_path):
    from stts_slowfast.pyslowfast import launch

    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += ["tools/run_net.py", "--cfg", str(TINY), "--opts", "OUTPUT_DIR", str(tmp_path)]
    words += ["DATA.PATH_TO_DATA_DIR", str(videos), "STTS.ENABLE", "True", "SOLVER.MAX_EPOCH", "1"]
    env = {**launch.environment(launch.find_launcher()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=checkout, env=env, capture_output=True, text=True, timeout=240)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    # 13 videos in batches of 4 on the machine, 2 a process: 3 iterations, said once.
    assert [line["iter"] for line in stats(log, "train_iter_")] == ["1/3", "2/3", "3/3"]
    assert len(stats(log, "val_epoch")) == len(stats(log, "test_final")) == 1
    saved = torch.load(tmp_path / "checkpoints/checkpoint_epoch_00001.pyth", weights_only=True)
    assert not any(key.startswith("module.") for key in saved["model_state"])
    assert "NUM_GPUS: 0" in saved["cfg"] and "NUM_SHARDS: 1" in saved["cfg"]


BOTH = """
import sys, torch, torch.distributed as dist
from slowfast.config.defaults import get_cfg
from slowfast.models import build_model, optimizer as optim
from slowfast.utils.misc import launch_job

def train(cfg):
    torch.manual_seed(cfg.RNG_SEED)
    model = build_model(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    drawn = torch.rand(1)
    optim.set_lr(optimizer, optim.get_epoch_lr(0.0, cfg))
    data = torch.Generator().manual_seed(cfg.SHARD_ID)
    for _ in range(2):
        optimizer.zero_grad()
        clips = torch.randn(2, 3, 8, 32, 32, generator=data)
        model([clips]).square().sum().backward()
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    draws = [torch.empty(1) for _ in range(2)]
    dist.all_gather(draws, drawn)
    print(cfg.NUM_GPUS > 1, bool(cfg.NUM_GPUS), cfg.NUM_GPUS * cfg.NUM_SHARDS,
          torch.equal(*both), draws[0].item() != draws[1].item())

cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.NUM_GPUS, cfg.NUM_SHARDS, cfg.SHARD_ID = 0, 2, int(sys.argv[2])
cfg.STTS.ENABLE = True
launch_job(cfg, "file://" + sys.argv[3], train)
"""


def test_weights_are_equal_and_noise_is_not(checkout, tmp_path):
    from stts_slowfast.pyslowfast import launch

    (tmp_path / "both.py").write_text("import stts_slowfast.pyslowfast\n" + BOTH)
    env = {**launch.environment(launch.find_launcher()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "both.py"), str(TINY)]
    processes = [
        subprocess.Popen(
            [*command, shard, str(tmp_path / "meet")],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for shard in "01"
    ]  # fmt: skip
    for process in processes:
        out, _ = process.communicate(timeout=200)
        assert "True False 2 True True" in out, out
