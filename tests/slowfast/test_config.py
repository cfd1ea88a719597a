"""The config nodes in SlowFast's defaults, and its ways to override them."""

import argparse
import pickle

import pytest


def test_the_node_has_our_defaults(checkout):
    from fvcore.common.config import CfgNode
    from slowfast.config.defaults import get_cfg

    from stts_slowfast.config import add_stts_config

    ours = CfgNode()
    add_stts_config(ours)
    assert get_cfg().STTS == ours.STTS
    assert get_cfg().STTS.ENABLE is False
    assert "ATTENTION_TYPE" in get_cfg().TIMESFORMER
    assert "DEPTHS" in get_cfg().VIDEO_SWIN


def test_yaml_and_opts_override_the_node(checkout, tmp_path):
    from slowfast.config.defaults import assert_and_infer_cfg
    from slowfast.utils.parser import load_config

    path = tmp_path / "run.yaml"
    text = "STTS:\n  ENABLE: True\n  TIME:\n    KEEP: [0.8]\n  SIGMA: 0.2\n"
    path.write_text(f"MODEL:\n  MODEL_NAME: MViT\n{text}")
    opts = ["STTS.SIGMA", "0.3", "STTS.SPACE.BLOCKS", "[]", "OUTPUT_DIR", str(tmp_path)]
    args = argparse.Namespace(opts=opts, num_shards=1, shard_id=0)
    cfg = assert_and_infer_cfg(load_config(args, str(path)))
    assert cfg.STTS.ENABLE is True
    assert (cfg.STTS.TIME.KEEP, cfg.STTS.SIGMA, cfg.STTS.SPACE.BLOCKS) == ([0.8], 0.3, [])


@pytest.mark.parametrize(
    ("line", "opts", "message"),
    [
        ("TIME: {KEPE: [0.5]}", ["STTS.TIME.KEPE", "[0.5]"], r"did you mean STTS.TIME.KEEP\?"),
        ("TIME: {KEEP: 0.5}", ["STTS.TIME.KEEP", "0.5"], r"takes a list, such as \[0.9\]"),
        ("SIGMA: much", ["STTS.SIGMA", "much"], "it takes a number, such as 0.2"),
        ("TIME: 3", ["STTS.TIME", "3"], "give one of STTS.TIME.BLOCKS, STTS.TIME.KEEP"),
    ],
)
def test_mistakes_get_the_nearest_key_and_an_example(get_cfg, tmp_path, line, opts, message):
    with pytest.raises(ValueError, match=message):
        get_cfg(*opts)
    path = tmp_path / "run.yaml"
    path.write_text(f"STTS:\n  {line}\n")
    with pytest.raises(ValueError, match=f"in {path}.*{message}"):
        get_cfg().merge_from_file(str(path))


def test_whole_numbers_are_numbers(get_cfg, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("STTS:\n  SIGMA: 0\n  TIME:\n  SPACE:\n    KEEP: [1]\nNUM_GPUS: 0\n")
    cfg = get_cfg("STTS.FREEZE_BACKBONE_EPOCHS", "0", "VIDEO_SWIN.DROPPATH_RATE", 0)
    cfg.merge_from_file(str(path))
    values = (cfg.STTS.SIGMA, cfg.STTS.FREEZE_BACKBONE_EPOCHS, cfg.VIDEO_SWIN.DROPPATH_RATE)
    assert values == (0.0, 0.0, 0.0) and all(type(value) is float for value in values)
    assert cfg.STTS.TIME.BLOCKS == [0] and cfg.STTS.SPACE.KEEP == [1]


def test_a_node_given_twice_is_refused(get_cfg, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("STTS:\n  ENABLE: True\nRNG_SEED: 1\nSTTS:\n  SIGMA: 0.1\n")
    with pytest.raises(ValueError, match=r"STTS is given twice .* lines 1 and 4"):
        get_cfg().merge_from_file(str(path))


def test_a_file_without_our_keys_is_read_by_yacs(get_cfg, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("TRAIN:\n  BATCH_SIZE: 7\nRNG_SEED: 1\nTRAIN:\n  EVAL_PERIOD: 3\n")
    cfg = get_cfg()
    cfg.merge_from_file(path)
    assert (cfg.TRAIN.EVAL_PERIOD, cfg.RNG_SEED) == (3, 1)
    path.write_text(path.read_text() + "STTS:\n  SIGMA: 0\n")
    with pytest.raises(ValueError, match="TRAIN is given twice"):
        get_cfg().merge_from_file(path)


def test_a_copy_reads_as_the_config_does_and_a_pickle_is_slowfasts_own(get_cfg):
    from fvcore.common.config import CfgNode

    cfg = get_cfg().clone()
    cfg.merge_from_list(["STTS.SIGMA", "1"])
    assert cfg.STTS.SIGMA == 1.0
    cfg.freeze()
    assert cfg.clone().is_frozen()
    pickled = pickle.loads(pickle.dumps(cfg))
    assert type(pickled) is CfgNode and pickled == cfg and pickled.is_frozen()
    assert b"stts_slowfast" not in pickle.dumps(cfg)


def test_a_node_of_a_forks_own_is_read_as_yacs_reads_it(get_cfg):
    from fvcore.common.config import CfgNode

    cfg = get_cfg()
    cfg.TIMESFORMER = CfgNode({"ATTN": "divided"})
    cfg.merge_from_list(["TIMESFORMER.ATTN", "joint"])
    cfg.merge_from_other_cfg(CfgNode({"TIMESFORMER": {"ATTN": "space"}}))
    assert cfg.TIMESFORMER == {"ATTN": "space"}


def test_a_text_that_looks_like_a_number_stays_one(get_cfg, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("TIMESFORMER:\n  PRETRAINED_MODEL: '2024'\n")
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    assert cfg.TIMESFORMER.PRETRAINED_MODEL == "2024"
    assert get_cfg("TIMESFORMER.PRETRAINED_MODEL", "2025").TIMESFORMER.PRETRAINED_MODEL == "2025"


def test_the_standalone_runner_knows_every_key_with_its_default(checkout):
    from slowfast.config import defaults

    from stts_slowfast.configfiles.values import all_keys
    from stts_slowfast.standalone.config import get_cfg

    def at(node, key):
        for name in key.split("."):
            if name not in node:
                return "passed over" if node.is_new_allowed() else "unknown"
            node = node[name]
        return list(node) if isinstance(node, tuple) else node

    theirs, ours = defaults.get_cfg(), get_cfg()
    keys = list(all_keys(theirs))
    assert len(keys) > 300
    wrong = [key for key in keys if at(ours, key) not in (at(theirs, key), "passed over")]
    assert not wrong


def test_slowfasts_own_keys_are_read_by_yacs(get_cfg):
    with pytest.raises(ValueError, match="Type mismatch"):
        get_cfg("SOLVER.BASE_LR", "1")
    with pytest.raises(AssertionError, match=r"Non-existent key: SOLVER\.BASE"):
        get_cfg("SOLVER.BASE", "1.0")
