import pytest
from fvcore.common.config import CfgNode
from yacs.config import CfgNode as YacsNode

from stts_slowfast import scorers, topk
from stts_slowfast.config import (
    add_stts_config,
    selection_plan,
    validate_stts,
)

MVIT_B = [(8, 56, 56), *[(8, 28, 28)] * 2, *[(8, 14, 14)] * 11, *[(8, 7, 7)] * 2]


@pytest.fixture
def node():
    cfg = CfgNode()
    add_stts_config(cfg)
    return cfg.STTS


@pytest.mark.parametrize("kind", [CfgNode, YacsNode])
def test_adding_twice_keeps_what_was_set(kind):
    cfg = kind()
    add_stts_config(cfg)
    assert isinstance(cfg.STTS.TIME, kind) and cfg.STTS.ENABLE is False
    cfg.STTS.SIGMA = 0.3
    add_stts_config(cfg)
    assert cfg.STTS.SIGMA == 0.3
    cfg.merge_from_list(["STTS.TIME.KEEP", "[0.5]", "STTS.ENABLE", "True"])
    assert cfg.STTS.TIME.KEEP == [0.5] and cfg.STTS.ENABLE


def test_defaults_are_the_papers_headline_point(node):
    validate_stts(node, 16, MVIT_B)
    assert selection_plan(node, MVIT_B) == {
        "time_0": ((8, 56, 56), (7, 56, 56)),
        "space_4": ((7, 14, 14), (7, 13, 13)),
    }


def test_of_ranges_the_plan_is_what_the_high_ends_do(node):
    alone = selection_plan(node, MVIT_B)
    node.TIME.KEEP, node.SPACE.KEEP = [[0.25, 0.9]], [[0.5, 0.9]]
    validate_stts(node, 16, MVIT_B)
    assert selection_plan(node, MVIT_B) == alone


def test_a_range_is_read_from_a_command_line_and_a_file(tmp_path):
    cfg = CfgNode()
    add_stts_config(cfg)
    cfg.merge_from_list(["STTS.TIME.KEEP", "[[0.25, 0.9]]"])
    assert cfg.STTS.TIME.KEEP == [[0.25, 0.9]]
    (tmp_path / "a.yaml").write_text(cfg.dump())
    again = CfgNode()
    add_stts_config(again)
    again.merge_from_file(str(tmp_path / "a.yaml"))
    assert again.STTS.TIME.KEEP == [[0.25, 0.9]]


def test_plan_follows_the_strides_after_a_window(node):
    node.SPACE.BLOCKS, node.SPACE.KEEP = [4, 14], [0.7367, 0.5]
    assert selection_plan(node, MVIT_B)["space_14"] == ((7, 6, 6), (7, 4, 4))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("TIME.KEEP", [0.5, 0.6], r"STTS.TIME.KEEP has 2 values but STTS.TIME.BLOCKS has 1"),
        ("SPACE.BLOCKS", [4, 4], r"STTS.SPACE.(KEEP|BLOCKS)"),
        ("TIME.BLOCKS", [16], r"STTS.TIME.BLOCKS names block 16: the model's blocks are 0 to 15"),
        ("TIME.BLOCKS", [-1], r"names block -1"),
        ("TIME.BLOCKS", ["0"], r"names block '0'"),
        ("TIME.KEEP", [0.0], r"STTS.TIME.KEEP holds 0.0"),
        ("SPACE.KEEP", [1.5], r"STTS.SPACE.KEEP holds 1.5"),
        ("SPACE.BLOCKS", 4, r"STTS.SPACE.BLOCKS is 4: give a list"),
        ("TIME.KEEP", 0.5, r"STTS.TIME.KEEP is 0.5: give a list"),
        ("NUM_SAMPLES", 2.5, r"STTS.NUM_SAMPLES is 2.5: give a whole number"),
        ("SIGMA", "0.1", r"STTS.SIGMA is '0.1'"),
        ("SPACE.KEEP", ["most"], r"STTS.SPACE.KEEP holds 'most'"),
        (
            "TIME.KEEP",
            [0.25, 0.9],
            r"KEEP has 2 values .* a list in it, \[\[0.25, 0.9\]\]",
        ),
        ("TIME.KEEP", [[0.9, 0.5]], r"holds \[0.9, 0.5\]: .* a range of shares is \[low, high\]"),
        ("TIME.KEEP", [[0.5, 1.1]], r"STTS.TIME.KEEP holds \[0.5, 1.1\]"),
        ("SPACE.KEEP", [[0.5]], r"STTS.SPACE.KEEP holds \[0.5\]"),
        ("SPACE.KEEP", [[True, True]], r"STTS.SPACE.KEEP holds \[True, True\]"),
        ("TIME.KEEP", [[0.1, 0.9]], r"STTS.TIME.KEEP 0.1 leaves no frame of the 8 frames"),
        ("SPACE.KEEP", [[0.001, 0.9]], r"STTS.SPACE.KEEP 0.001 leaves no window of the 14x14"),
        ("TIME.SCORER", "learnt", r"STTS.TIME.SCORER is 'learnt': use one of learned, uniform"),
        (
            "SPACE.SCORER",
            "chance",
            r"STTS.SPACE.SCORER is 'chance': .*learned, uniform, random, ch",
        ),
        ("OPERATOR", "soft", r"STTS.OPERATOR is 'soft': use one of perturbed, subset"),
        ("SPACE.SHARED", 1, r"STTS.SPACE.SHARED is 1: give True or False"),
        ("GRADIENT", "full", r"STTS.GRADIENT is 'full': use one of exact, diagonal"),
        ("SIGMA_DECAY", "cosine", r"STTS.SIGMA_DECAY is 'cosine': use one of linear, constant"),
        ("SIGMA", -0.1, r"STTS.SIGMA is -0.1"),
        ("SIGMA", float("nan"), r"STTS.SIGMA is nan"),
        ("SIGMA", float("inf"), r"STTS.SIGMA is inf: give at most"),
        ("NUM_SAMPLES", 10**400, r"STTS.NUM_SAMPLES is 10+: give at most"),
        ("BACKBONE_LR", 1e308, r"STTS.BACKBONE_LR is 1e\+308: give at most"),
        ("SHRINK", 1.5, r"STTS.SHRINK is 1.5: give at most 1"),
        ("SHRINK", -0.5, r"STTS.SHRINK is -0.5"),
        ("SHRINK", float("nan"), r"STTS.SHRINK is nan"),
        ("NUM_SAMPLES", 0, r"STTS.NUM_SAMPLES is 0"),
        ("BACKBONE_LR", -1.0, r"STTS.BACKBONE_LR is -1.0"),
        ("FREEZE_BACKBONE_EPOCHS", -1.0, r"STTS.FREEZE_BACKBONE_EPOCHS is -1.0"),
        ("SPACE.STRIDE", -1, r"STTS.SPACE.STRIDE is -1"),
        ("SPACE.STRIDE", 0.5, r"STTS.SPACE.STRIDE is 0.5"),
        ("TIME.KEEP", [0.1], r"STTS.TIME.KEEP 0.1 leaves no frame of the 8 frames .* block 0"),
        ("SPACE.KEEP", [0.001], r"STTS.SPACE.KEEP 0.001 leaves no window of the 14x14 tokens"),
    ],
)
def test_what_is_wrong_is_named(node, key, value, message):
    target, _, name = key.rpartition(".")
    (node[target] if target else node)[name] = value
    with pytest.raises(ValueError, match=message):
        validate_stts(node, 16, MVIT_B)


def test_duplicate_blocks_are_named(node):
    node.SPACE.BLOCKS, node.SPACE.KEEP = [4, 4], [0.9, 0.9]
    with pytest.raises(ValueError, match=r"STTS.SPACE.BLOCKS is \[4, 4\]: name each block once"):
        validate_stts(node, 16)


def test_the_advised_share_is_enough(node):
    node.SPACE.KEEP = [0.001]
    with pytest.raises(ValueError, match="keep at least") as error:
        validate_stts(node, 16, MVIT_B)
    node.SPACE.KEEP = [float(str(error.value).split()[-1])]
    validate_stts(node, 16, MVIT_B)


def test_a_single_frame_can_only_be_kept(node):
    with pytest.raises(
        ValueError, match=r"one token frame arrives at block 0.*set STTS\.TIME\.BLOCKS \[\]$"
    ):
        validate_stts(node, 16, [(1, 14, 14)] * 16)


def test_an_empty_list_switches_a_dimension_off(node):
    node.TIME.BLOCKS, node.SPACE.BLOCKS = [], []
    validate_stts(node, 16, MVIT_B)
    assert selection_plan(node, MVIT_B) == {}


@pytest.mark.parametrize(
    "registry, key", [(scorers.SCORERS, "TIME.SCORER"), (topk.OPERATORS, "OPERATOR")]
)
def test_what_others_register_is_known_by_name(node, registry, key):
    def theirs():
        pass

    target, _, leaf = key.rpartition(".")
    (node[target] if target else node)[leaf] = "theirs"
    with pytest.raises(ValueError, match=f"STTS.{key} is 'theirs'"):
        validate_stts(node, 16)
    registry.register(theirs)
    try:
        validate_stts(node, 16)
    finally:
        del registry._obj_map["theirs"]


def test_whole_numbers_are_numbers(node):
    node.SIGMA, node.FREEZE_BACKBONE_EPOCHS, node.BACKBONE_LR = 0, 0, 1
    validate_stts(node, 16)


@pytest.mark.parametrize("key", ["TEACHER", "SPACE.SHARED", "TOKENS"])
def test_a_node_without_a_key_is_refused(node, key):
    *parent, leaf = key.split(".")
    del (node[parent[0]] if parent else node)[leaf]
    with pytest.raises(ValueError, match=rf"has no STTS.{key}.*: make it with add_stts_config"):
        validate_stts(node, 16)
