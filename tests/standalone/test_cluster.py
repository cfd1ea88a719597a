"""Which process of a run this is, by what torchrun, Slurm or the command line say."""

import socket

import pytest

from stts_slowfast.standalone.cluster import INIT_METHOD, open_rendezvous, resolve_processes
from stts_slowfast.standalone.config import get_cfg

TORCHRUN = {
    "RANK": 3,
    "WORLD_SIZE": 4,
    "LOCAL_RANK": 1,
    "LOCAL_WORLD_SIZE": 2,
    "MASTER_ADDR": "first",
    "MASTER_PORT": 29500,
}
SLURM = {
    "SLURM_STEP_ID": 0,
    "SLURM_PROCID": 3,
    "SLURM_LOCALID": 1,
    "SLURM_NTASKS": 4,
    "SLURM_NNODES": 2,
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_ID": 123,
}


@pytest.fixture
def cfg(monkeypatch):
    for name in (*TORCHRUN, *SLURM, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    cfg = get_cfg()
    cfg.NUM_GPUS = 0
    return cfg


def places(cfg, **keywords):
    return [
        (p.rank, p.world, p.local_index, p.local_world, p.host, p.port)
        for p in resolve_processes(cfg, **keywords)
    ]


def say(monkeypatch, environment, **changes):
    for name, value in {**environment, **changes}.items():
        monkeypatch.setenv(name, str(value))


def test_alone(cfg):
    assert places(cfg) == [(0, 1, 0, 1, "localhost", 9999)]


def test_gpus_have_a_process_each(cfg):
    cfg.NUM_GPUS = 2
    (first, second) = places(cfg)
    assert (first[:4], second[:4]) == ((0, 2, 0, 2), (1, 2, 1, 2))
    found = resolve_processes(cfg)
    store = open_rendezvous(found)  # two runs on a machine do not meet by chance
    assert [place.port for place in found] == [store.port] * 2 and store.port != 9999
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("localhost", store.port))
    with pytest.raises(ValueError, match=r"--processes is 3 and NUM_GPUS is 2"):
        places(cfg, processes=3)


def test_machines_by_hand(cfg):
    cfg.NUM_SHARDS, cfg.SHARD_ID = 2, 1
    assert places(cfg, init_method="tcp://first:1234", processes=2) == [
        (2, 4, 0, 2, "first", 1234),
        (3, 4, 1, 2, "first", 1234),
    ]
    with pytest.raises(ValueError, match=r"tcp://host:port"):
        places(cfg, init_method="file:///x")


def test_torchrun(cfg, monkeypatch):
    say(monkeypatch, TORCHRUN)
    assert places(cfg) == [(3, 4, 1, 2, "first", 29500)]
    assert (cfg.NUM_SHARDS, cfg.SHARD_ID) == (2, 1)


def test_torchrun_and_other_options_contradict(cfg, monkeypatch):
    say(monkeypatch, TORCHRUN)
    cfg.NUM_GPUS = 8
    with pytest.raises(ValueError, match=r"2 processes were started .* NUM_GPUS is 8"):
        places(cfg)
    cfg.NUM_GPUS, cfg.NUM_SHARDS = 0, 2
    with pytest.raises(ValueError, match=r"torchrun started 4 processes and --num_shards is 2"):
        places(cfg)
    say(monkeypatch, TORCHRUN, LOCAL_WORLD_SIZE=1)
    cfg.NUM_GPUS, cfg.NUM_SHARDS = 8, 1
    with pytest.raises(ValueError, match=r"--nproc_per_node"):
        places(cfg)


def test_slurm_with_a_task_for_each_gpu(cfg, monkeypatch):
    say(monkeypatch, SLURM)
    assert places(cfg) == [(3, 4, 1, 2, "node7", 20123)]
    assert (cfg.NUM_SHARDS, cfg.SHARD_ID) == (2, 1)
    say(monkeypatch, SLURM, SLURM_NTASKS=5)
    with pytest.raises(ValueError, match=r"5 tasks on 2 nodes: .*--ntasks-per-node"):
        places(get_cfg())


def test_slurm_with_a_task_for_each_node(cfg, monkeypatch):
    say(monkeypatch, SLURM, SLURM_PROCID=1, SLURM_LOCALID=0, SLURM_NTASKS=2)
    cfg.NUM_GPUS = 2
    assert places(cfg) == [(2, 4, 0, 2, "node7", 20123), (3, 4, 1, 2, "node7", 20123)]


def test_the_command_line_comes_before_slurm(cfg, monkeypatch):
    say(monkeypatch, SLURM)
    cfg.NUM_SHARDS, cfg.SHARD_ID = 2, 1
    assert places(cfg) == [(1, 2, 0, 1, "localhost", 9999)]


def test_a_batch_script_is_no_task(cfg, monkeypatch):
    say(monkeypatch, SLURM, SLURM_PROCID=0)
    monkeypatch.delenv("SLURM_STEP_ID")
    assert places(cfg, init_method=INIT_METHOD) == [(0, 1, 0, 1, "localhost", 9999)]
