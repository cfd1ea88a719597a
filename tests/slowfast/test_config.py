"""The config nodes in SlowFast's defaults, and its ways to override them."""

import argparse

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
    path.write_text("STTS:\n  ENABLE: True\n  TIME:\n    KEEP: [0.8]\n  SIGMA: 0.2\n")
    opts = ["STTS.SIGMA", "0.3", "STTS.SPACE.BLOCKS", "[]", "OUTPUT_DIR", str(tmp_path)]
    args = argparse.Namespace(opts=opts, num_shards=1, shard_id=0)
    cfg = assert_and_infer_cfg(load_config(args, str(path)))
    assert cfg.STTS.ENABLE is True
    assert (cfg.STTS.TIME.KEEP, cfg.STTS.SIGMA, cfg.STTS.SPACE.BLOCKS) == ([0.8], 0.3, [])


def test_a_misspelt_key_is_an_error(get_cfg):
    with pytest.raises(AssertionError, match=r"STTS\.TIME\.KEPT"):
        get_cfg("STTS.TIME.KEPT", [0.5])
