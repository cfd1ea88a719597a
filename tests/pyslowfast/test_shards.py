"""The number that stands for NUM_GPUS in a run of shards, and what is refused."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import yaml
from fvcore.common.config import CfgNode

from stts_slowfast.pyslowfast import run_state, shards
from stts_slowfast.pyslowfast.shards import OneOfMany


@pytest.mark.parametrize("given", [0, 1])
def test_one_of_many_answers_what_slowfast_asks(given):
    number = OneOfMany(given)
    assert number > 1 and not number <= 1  # are there other processes?
    assert bool(number) == bool(given) and (number > 0) == bool(given)  # is there a GPU?
    assert number == given and number != 1 - given
    # Batches of one machine, processes of the run.
    assert (8 / max(1, number), 8 / max(number, 1), number * 2, 4 // number) == (8, 8, 2, 4)
    assert str(number) == repr(number) == str(given)
    for copied in (copy.deepcopy(number), pickle.loads(pickle.dumps(number))):
        assert copied > 1 and copied == given


def test_a_checkpoints_config_holds_the_plain_number():
    cfg = CfgNode({"NUM_GPUS": 0})
    cfg.NUM_GPUS = OneOfMany(0)
    assert yaml.safe_load(cfg.dump()) == {"NUM_GPUS": 0}


@pytest.fixture
def launch_job():
    misc = SimpleNamespace(launch_job=lambda cfg, init_method, func, daemon: func(cfg=cfg))
    shards.wrap_launch_job(misc)
    return misc.launch_job


def test_a_shard_that_the_run_does_not_have_is_refused(launch_job):
    cfg = CfgNode({"NUM_GPUS": 0, "NUM_SHARDS": 2, "SHARD_ID": 2, "STTS": {"ENABLE": True}})
    with pytest.raises(ValueError, match="--shard_id is 2: with --num_shards 2 it is one of 0 to"):
        launch_job(cfg=cfg, init_method="", func=print)


def test_one_shard_is_left_to_slowfast(launch_job):
    def train(cfg):
        return run_state.running().job, type(cfg.NUM_GPUS)

    cfg = CfgNode({"NUM_GPUS": 0, "NUM_SHARDS": 1, "SHARD_ID": 0})
    assert launch_job(cfg, "", train) == ("train", int)
    assert run_state.running() is None


def test_shards_of_a_run_without_us_stay_runs_of_their_own(launch_job):
    cfg = CfgNode({"NUM_GPUS": 0, "NUM_SHARDS": 2, "SHARD_ID": 7, "STTS": {"ENABLE": False}})
    assert launch_job(cfg, "", lambda cfg: type(cfg.NUM_GPUS)) is int
