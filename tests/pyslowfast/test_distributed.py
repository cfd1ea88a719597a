"""ForcedMultiProcessCount as NUM_GPUS in a run of shards, and refused process counts."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import yaml
from fvcore.common.config import CfgNode

from stts_slowfast.pyslowfast import distributed, run_state, torchrun
from stts_slowfast.pyslowfast.distributed import ForcedMultiProcessCount


@pytest.mark.parametrize("given", [0, 1])
def test_a_forced_process_count_is_greater_than_one(given):
    number = ForcedMultiProcessCount(given)
    assert number > 1 and not number <= 1  # are there other processes?
    assert bool(number) == bool(given) and (number > 0) == bool(given)  # is there a GPU?
    assert number == given and number != 1 - given
    # Batches of one machine, processes of the run.
    assert (8 / max(1, number), 8 / max(number, 1), number * 2, 4 // number) == (8, 8, 2, 4)
    assert str(number) == repr(number) == str(given)
    for copied in (copy.deepcopy(number), pickle.loads(pickle.dumps(number))):
        assert copied > 1 and copied == given


def test_a_forced_process_count_is_the_number_of_processes_of_its_machine():
    number = ForcedMultiProcessCount(0, 2)
    assert number > 1 and not number and number == 0
    assert (8 / max(1, number), number * 3, str(number)) == (4, 6, "0")
    copied = pickle.loads(pickle.dumps(number))
    assert copied * 3 == 6 and copied == 0


def test_a_checkpoints_config_holds_the_plain_number():
    cfg = CfgNode({"NUM_GPUS": 0})
    cfg.NUM_GPUS = ForcedMultiProcessCount(0)
    assert yaml.safe_load(cfg.dump()) == {"NUM_GPUS": 0}


@pytest.fixture
def launch_job():
    misc = SimpleNamespace(launch_job=lambda cfg, init_method, func, daemon: func(cfg=cfg))
    distributed.wrap_launch_job(misc)
    return misc.launch_job


def test_a_shard_that_the_run_does_not_have_is_refused(launch_job):
    cfg = CfgNode({"NUM_GPUS": 0, "NUM_SHARDS": 2, "SHARD_ID": 2, "STTS": {"ENABLE": True}})
    with pytest.raises(ValueError, match="--shard_id is 2: with --num_shards 2 it is one of 0 to"):
        launch_job(cfg=cfg, init_method="", func=print)


def test_one_shard_is_left_to_slowfast(launch_job):
    def train(cfg):
        return run_state.current_job().job, type(cfg.NUM_GPUS)

    cfg = CfgNode({"NUM_GPUS": 0, "NUM_SHARDS": 1, "SHARD_ID": 0})
    assert launch_job(cfg, "", train) == ("train", int)
    assert run_state.current_job() is None


def test_shards_of_a_run_without_stts_stay_separate_runs(launch_job):
    cfg = CfgNode({"NUM_GPUS": 0, "NUM_SHARDS": 2, "SHARD_ID": 7, "STTS": {"ENABLE": False}})
    assert launch_job(cfg, "", lambda cfg: type(cfg.NUM_GPUS)) is int


# ---- processes that torchrun started --------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """``started(rank, world, local_rank, local_world)``: as torchrun starts a process."""

    def start(*numbers):
        for name, number in zip(torchrun.VARIABLES, numbers):
            monkeypatch.setenv(name, str(number))

    for name in torchrun.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return start


def config(**keys):
    keys = {"NUM_GPUS": 0, "NUM_SHARDS": 1, "SHARD_ID": 0, "STTS": {"ENABLE": True}, **keys}
    return CfgNode(keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"NUM_GPUS": 8},
            r"NUM_GPUS is 8, but torchrun .*set NUM_GPUS 2 \(0 for the CPU",
        ),
        ({"NUM_GPUS": 1}, r"NUM_GPUS is 1, but torchrun started 2 .*set NUM_GPUS 2"),
        ({"NUM_SHARDS": 4}, r"--num_shards is 4 .*processes on 2 machines: leave both out"),
    ],
)
def test_configs_that_say_otherwise_than_torchrun_are_refused(launch_job, started, keys, message):
    started(3, 4, 1, 2)
    with pytest.raises(ValueError, match=message):
        launch_job(config(**keys), "", print)


def test_machines_of_torchrun_are_shards(started):
    cfg = config()
    torchrun.set_shards(cfg)
    assert (cfg.NUM_SHARDS, cfg.SHARD_ID) == (1, 0)
    started(3, 4, 1, 2)
    torchrun.set_shards(cfg)
    assert (cfg.NUM_SHARDS, cfg.SHARD_ID) == (2, 1)
    torchrun.check_process_counts(cfg, torchrun.current_process())
    for other in (config(NUM_GPUS=1), config(STTS={"ENABLE": False})):
        torchrun.set_shards(other)
        assert other.NUM_SHARDS == 1


def test_torchrun_is_left_to_slowfast_without_stts_or_with_one_process(launch_job, started):
    started(1, 2, 1, 2)
    off = config(STTS={"ENABLE": False}, NUM_GPUS=1)
    assert launch_job(off, "", lambda cfg: type(cfg.NUM_GPUS)) is int
    started(0, 1, 0, 1)
    assert launch_job(config(NUM_GPUS=4), "", lambda cfg: cfg.NUM_GPUS) == 4


def test_runs_of_stts_run_use_stts(launch_job, started, monkeypatch):
    started(1, 2, 1, 2)
    monkeypatch.setenv("STTS_RUN", "1")
    with pytest.raises(ValueError, match="torchrun started 2"):
        launch_job(config(STTS={"ENABLE": False}, NUM_GPUS=1), "", print)
