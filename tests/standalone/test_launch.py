"""Several processes are one run, however they are started; and their errors come back."""

import multiprocessing
import pickle
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch

from stts_slowfast.standalone import engine, launch
from stts_slowfast.standalone.signals import SignalState


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(*processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def by_spawn(run):
    return finish(run.start("--processes", "2"))


def by_shards(run):
    run.cfg.TRAIN.BATCH_SIZE //= 2  # of one machine
    words = "--num_shards", "2", "--init_method", f"tcp://localhost:{free_port()}"
    outputs = finish(*[run.start(*words, "--shard_id", str(shard)) for shard in (0, 1)])
    assert "json_stats" in outputs[0] and "json_stats" not in outputs[1]


def by_torchrun(run):
    words = "--nproc_per_node", "2", "--master_port", str(free_port())
    finish(run.start(launcher=[sys.executable, "-m", "torch.distributed.run", *words]))


def by_slurm(run):
    def task(rank):
        says = {"STEP_ID": 0, "NTASKS": 2, "NNODES": 1, "PROCID": rank, "LOCALID": rank}
        says = {f"SLURM_{name}": str(value) for name, value in says.items()}
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        return run.start(**says, **address)

    port = str(free_port())
    finish(task(0), task(1))


@pytest.fixture
def alone(plain_run, tmp_path):
    """The run, and what it gives in one process."""
    cfg = plain_run.cfg
    cfg.TRAIN.BATCH_SIZE, cfg.TEST.ENABLE, cfg.TEST.SAVE_RESULTS_PATH = 6, True, "results.pkl"
    # Adam would make much of gradients that are zero but for rounding.
    cfg.SOLVER.OPTIMIZING_METHOD, cfg.SOLVER.BASE_LR = "sgd", 1e-2
    cfg.OUTPUT_DIR = str(tmp_path / "alone")
    engine.train(cfg)
    engine.test(cfg)
    expected = results(plain_run)
    cfg.OUTPUT_DIR = str(tmp_path / "together")
    return plain_run, expected


def results(run):
    iterations = run.json_stats("train_iter_")
    assert [s["iter"] for s in iterations] == ["1/1"] * 2
    predictions, labels = pickle.loads((run.folder / "results.pkl").read_bytes())
    assert labels.tolist() == [number % 6 for number in range(run.num_videos)]
    for stats in run.json_stats("val_epoch"):
        wrong = float(stats["top1_err"]) * run.num_videos / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-4)  # every video once, none twice
    losses = torch.tensor([[s["loss"], s["grad_norm"]] for s in iterations])
    return {"losses": losses, "predictions": predictions}


@pytest.mark.parametrize("start", [by_spawn, by_shards, by_torchrun, by_slurm])
def test_two_processes_train_and_test_as_one_does(alone, start):
    """The same losses for the same global batch; each view of each video counts exactly once."""
    run, expected = alone
    start(run)
    torch.testing.assert_close(results(run), expected, rtol=1e-5, atol=3e-5)


def test_two_processes_tell_of_the_same_unreadable_videos(plain_run):
    """Whichever of them met a video; two here, one of each process."""
    run, cfg = plain_run, plain_run.cfg
    videos, cfg.DATA.PATH_PREFIX = cfg.DATA.PATH_PREFIX, ""
    cfg.TRAIN.ENABLE, cfg.TEST.ENABLE = False, True
    cfg.DATA.PATH_TO_DATA_DIR = str(run.tmp_path)
    names = [f"{videos}/{number}.mp4" for number in range(4)] + ["gone.mp4", "lost.mp4"]
    lines = [f"{name} {number % 6}\n" for number, name in enumerate(names)]
    (run.tmp_path / "test.csv").write_text("".join(lines))
    refused = run.start("--processes", "2")
    said = refused.communicate(timeout=300)[0]
    assert refused.returncode and "2 of the test videos cannot be read" in said, said
    assert "gone.mp4: No such" in said and "lost.mp4: No such" in said
    assert run.json_stats("test_final") == []
    cfg.TEST.ALLOW_MISSING = True
    result = engine.test(cfg)
    assert result["unreadable"] == 2
    assert result["top5_acc"] == pytest.approx(result["top5_acc_readable"] * 4 / 6)
    by_spawn(run)
    alone, together = run.json_stats("test_final")
    assert together == alone and alone["unreadable"] == 2
    records = (run.folder / "bad_videos.jsonl").read_text().splitlines()
    assert len(records) == 2  # each once, over both processes and all three runs


LOOK = """
import os, sys, torch
from stts_slowfast import selections
from stts_slowfast.standalone import engine, launch
from stts_slowfast.standalone.signals import SignalState
from stts_slowfast.standalone.config import load_config

def watch(split, model, batch):
    if split == "train":
        rank = torch.distributed.get_rank()
        halves = all(torch.equal(p.grad, p.grad.half().float()) for p in model.parameters())
        frames = selections(model)["time_0"].shape[1]
        line = f"LOOK {rank} {torch.initial_seed()} {halves} {frames}\\n"
        os.write(1, line.encode())  # in one piece

if __name__ == "__main__":
    engine.train(load_config(sys.argv[1]), processes=2, watch=watch)
"""


def look(run):
    """(rank, seed, whether all gradients are float16 numbers, kept frames) of every step of two
    processes."""
    script = run.tmp_path / "look.py"
    script.write_text(LOOK)
    command = [sys.executable, str(script), str(run.write())]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr
    # Anywhere: the other process may have written half a line just then.
    looks = re.findall(r"LOOK (\d+) (\d+) (True|False) (\d+)\n", output.stdout)
    return [(int(rank), int(seed), halves == "True", int(frames))
            for rank, seed, halves, frames in looks]  # fmt: skip


def test_processes_draw_apart_and_average_in_float16_if_asked(run):
    run.cfg.MODEL.FP16_ALLREDUCE, run.cfg.MIXUP.ENABLE = True, False
    run.cfg.STTS.TIME.KEEP = [[0.25, 1.0]]
    seen = look(run)
    assert sorted(rank for rank, *_ in seen) == [0] * 8 + [1] * 8
    assert len({seed for _, seed, *_ in seen}) == 16
    assert all(halves for _, _, halves, _ in seen)
    first, second = ([frames for number, *_, frames in seen if number == rank] for rank in (0, 1))
    assert first == second and len(set(first)) > 1  # but the budget is one for all of them


def test_gradients_are_averaged_in_full_by_default(run):
    run.cfg.MIXUP.ENABLE = False
    assert not any(halves for _, _, halves, _ in look(run))


FAIL = """
import sys
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.launch import launch

class Odd(Exception):
    def __init__(self, number, text):
        super().__init__(text)
        self.hook = lambda: number

def job(cfg, fabric, stop, error):
    if fabric.global_rank == 1:
        raise {
            "odd": Odd(1, "cannot be pickled"),
            "key": KeyboardInterrupt(),
            "exit": SystemExit(3),
            "value": ValueError("fix this"),
        }[error]
    import time; time.sleep(300)

if __name__ == "__main__":
    try:
        launch(job, load_config(sys.argv[1]), processes=2, error=sys.argv[2])
    except BaseException as error:
        print("GOT", type(error).__name__, error, flush=True)
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("value", "GOT ValueError fix this"),
        ("odd", "GOT RuntimeError Odd: cannot be pickled"),
        ("key", "GOT KeyboardInterrupt"),
        ("exit", "GOT SystemExit 3"),
    ],
)
def test_whatever_ends_a_process_comes_back_at_once(run, error, said):
    script = run.tmp_path / "fail.py"
    script.write_text(FAIL)
    command = [sys.executable, str(script), str(run.write()), error]
    output = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert said in output.stdout, output


def _answer_to_sigusr1(ready, writer):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    ready.send(True)
    signal.sigwait([signal.SIGUSR1])
    writer.send_bytes(pickle.dumps("checkpoint"))


@pytest.mark.parametrize(
    ("save", "number", "results", "exitcode"),
    [(True, 0, {0: "checkpoint"}, 0), (False, signal.SIGINT, {}, -signal.SIGTERM)],
)
def test_the_command_relays_signals_to_its_processes(save, number, results, exitcode):
    context = multiprocessing.get_context("fork")
    started, ready = context.Pipe(duplex=False)
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_answer_to_sigusr1, args=(ready, writer))
    child.start()
    writer.close()
    assert started.recv()
    signals = SignalState()
    signals.save, signals.number = save, number
    assert launch._wait([child], [reader], signals) == (results, "")
    assert child.exitcode == exitcode and not signals.save
