import pytest
import torch
from torch import nn

from stts_slowfast.checkpoints import save_checkpoint, slowfast_state, validate_checkpoint
from stts_slowfast.standalone.checkpointing import load_for_test
from stts_slowfast.standalone.model import build_model

PATH = "runs/trained.pyth"


class AsInSlowFast(nn.Module):
    """Stands for SlowFast's own model: its names, and a loader that renames nothing."""

    def __init__(self, model):
        super().__init__()
        self.state = slowfast_state(model)

    def state_dict(self):
        return dict(self.state)


def standalone(model):
    return model


both = pytest.mark.parametrize("wrap", [standalone, AsInSlowFast, nn.DataParallel])


def build(cfg, **changes):
    cfg = cfg.clone()
    cfg.STTS.ENABLE = True
    for key, value in changes.items():
        node, _, leaf = key.rpartition("__")
        target = cfg.STTS
        for name in filter(None, node.split("__")):
            target = target[name]
        target[leaf] = value
    return cfg, build_model(cfg)


def file_of(model):
    return {"epoch": 3, "model_state": slowfast_state(model)}


def refused(model, state, cfg, purpose, *parts):
    with pytest.raises(ValueError) as caught:
        validate_checkpoint(model, state, cfg, purpose, PATH)
    for part in (PATH, *parts):
        assert part in str(caught.value), str(caught.value)


@both
def test_a_models_own_file_passes(tiny_cfg, wrap):
    cfg, model = build(tiny_cfg)
    for purpose in ("test", "finetune", "resume"):
        validate_checkpoint(wrap(model), file_of(model), cfg, purpose, PATH)


@both
def test_learned_scorers_that_the_file_lacks_stop_a_test(tiny_cfg, wrap):
    cfg, model = build(tiny_cfg)
    baseline = file_of(build(tiny_cfg, TIME__BLOCKS=[], SPACE__BLOCKS=[])[1])
    for purpose in ("test", "resume"):
        keys = ("STTS.TIME.SCORER", "STTS.SPACE.SCORER", "STTS.ENABLE False", "uniform")
        refused(wrap(model), baseline, cfg, purpose, "no trained scorers", *keys)
    validate_checkpoint(wrap(model), baseline, cfg, "finetune", PATH)


@both
def test_only_the_dimension_that_lacks_scorers_is_named(tiny_cfg, wrap):
    cfg, model = build(tiny_cfg)
    state = file_of(build(tiny_cfg, SPACE__BLOCKS=[])[1])
    refused(wrap(model), state, cfg, "test", "STTS.SPACE.SCORER", "STTS.SPACE.BLOCKS []")
    with pytest.raises(ValueError) as caught:
        validate_checkpoint(wrap(model), state, cfg, "test", PATH)
    assert "STTS.TIME" not in str(caught.value)


@both
@pytest.mark.parametrize("scorer", ["uniform", "random"])
def test_scorers_without_weights_need_none(tiny_cfg, wrap, scorer):
    cfg, model = build(tiny_cfg, TIME__SCORER=scorer, SPACE__SCORER=scorer)
    for blocks in ([0], []):
        trained = build(tiny_cfg, TIME__BLOCKS=blocks, SPACE__BLOCKS=[])[1]
        validate_checkpoint(wrap(model), file_of(trained), cfg, "test", PATH)


@both
def test_a_file_with_scorers_is_not_tested_without_selection(tiny_cfg, wrap):
    _, trained = build(tiny_cfg)
    tiny_cfg.STTS.ENABLE = False
    model = build_model(tiny_cfg)
    parts = ("STTS.ENABLE is False", "STTS.TIME.BLOCKS [0]", "STTS.SPACE.BLOCKS [2]", "KEEP [1.0]")
    for purpose in ("test", "resume"):
        refused(wrap(model), file_of(trained), tiny_cfg, purpose, *parts)
    validate_checkpoint(wrap(model), file_of(trained), tiny_cfg, "finetune", PATH)


@both
def test_other_blocks_than_trained_with_are_named(tiny_cfg, wrap):
    _, trained = build(tiny_cfg)
    cfg, model = build(tiny_cfg, SPACE__BLOCKS=[3])
    refused(wrap(model), file_of(trained), cfg, "test", "STTS.SPACE.BLOCKS is [3]", "with [2]")
    cfg, model = build(tiny_cfg, SPACE__BLOCKS=[])
    refused(wrap(model), file_of(trained), cfg, "test", "STTS.SPACE.BLOCKS is []", "KEEP [1.0]")
    validate_checkpoint(wrap(model), file_of(trained), cfg, "finetune", PATH)


@both
def test_missing_blocks_stop_everything(tiny_cfg, wrap):
    cfg, model = build(tiny_cfg)
    state = file_of(model)
    names = [key for key in state["model_state"] if key.startswith("blocks.3.")]
    for key in names:
        del state["model_state"][key]
    for purpose in ("test", "finetune", "resume"):
        refused(wrap(model), state, cfg, purpose, f"{len(names)} of its", "blocks.3.", "missing")


@both
def test_a_larger_models_file_stops_everything(tiny_cfg, wrap):
    cfg, model = build(tiny_cfg)
    state = file_of(model)
    state["model_state"]["blocks.9.norm1.weight"] = torch.zeros(3)
    for purpose in ("test", "finetune", "resume"):
        refused(wrap(model), state, cfg, purpose, "larger model", "blocks.9.norm1.weight")


@both
def test_another_width_of_a_block_is_named_with_both_shapes(tiny_cfg, wrap):
    cfg, model = build(tiny_cfg)
    state = file_of(model)
    state["model_state"]["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    refused(wrap(model), state, cfg, "finetune", "(7,) in the file")


@both
def test_a_head_for_other_classes_may_be_fine_tuned_but_not_tested(tiny_cfg, wrap):
    cfg, model = build(tiny_cfg)
    state = file_of(model)
    state["model_state"]["head.projection.weight"] = torch.zeros(5, 32)
    state["model_state"]["head.projection.bias"] = torch.zeros(5)
    refused(wrap(model), state, cfg, "test", "MODEL.NUM_CLASSES", "(5, 32) in the file")
    validate_checkpoint(wrap(model), state, cfg, "finetune", PATH)


def test_positions_that_slowfasts_loader_resamples_are_its_business(tiny_cfg):
    cfg, model = build(tiny_cfg)
    state = file_of(model)
    state["model_state"]["pos_embed_temporal"] = torch.zeros(1, 9, 16)
    validate_checkpoint(AsInSlowFast(model), state, cfg, "test", PATH)
    refused(model, state, cfg, "test", "(9, 16) in the file")  # our loader does not


def test_names_that_slowfasts_loader_would_not_find_say_how_to_convert(tiny_cfg, golden):
    cfg, model = build(tiny_cfg)
    torchvisions = model.state_dict()
    validate_checkpoint(model, torchvisions, cfg, "test", PATH)
    baseline = {k: v for k, v in torchvisions.items() if not k.startswith("stts.")}
    refused(AsInSlowFast(model), baseline, cfg, "finetune", "torchvision", f"stts convert {PATH}")
    authors = golden("official_stts_mvit").weights
    refused(AsInSlowFast(model), authors, cfg, "test", "authors", f"stts convert {PATH}")


def test_names_are_cleared_before_they_are_looked_at(tiny_cfg):
    cfg, model = build(tiny_cfg)
    state = {f"trunk.{k}": v for k, v in slowfast_state(model).items()}
    refused(AsInSlowFast(model), state, cfg, "finetune", "does not fit this model")
    cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN = ("trunk.",)
    validate_checkpoint(AsInSlowFast(model), state, cfg, "finetune", PATH)


def test_without_selection_slowfast_is_left_alone(tiny_cfg):
    tiny_cfg.STTS.ENABLE = False
    model = AsInSlowFast(build_model(tiny_cfg))
    validate_checkpoint(model, {"other": torch.zeros(1)}, tiny_cfg, "test", PATH)


def test_an_image_model_may_start_a_timesformer(tiny_cfg, golden):
    tiny_cfg.MODEL.MODEL_NAME = "TimeSformer"
    tiny_cfg.DATA.NUM_FRAMES, tiny_cfg.DATA.TRAIN_CROP_SIZE = 4, 32
    node = tiny_cfg.TIMESFORMER
    node.PATCH_SIZE, node.EMBED_DIM, node.DEPTH, node.NUM_HEADS = 8, 32, 3, 4
    cfg, model = build(tiny_cfg, SPACE__BLOCKS=[])
    weights = dict(golden("timesformer_space_only").weights)
    validate_checkpoint(model, weights, cfg, "finetune", PATH)
    del weights["blocks.1.attn.qkv.weight"]
    refused(model, weights, cfg, "finetune", "blocks.1.attn.qkv.weight")


def test_the_runner_looks_before_it_tests(tiny_cfg, tmp_path):
    _, baseline = build(tiny_cfg, TIME__BLOCKS=[], SPACE__BLOCKS=[])
    cfg, model = build(tiny_cfg)
    cfg.TEST.CHECKPOINT_FILE_PATH = str(tmp_path / "baseline.pyth")
    save_checkpoint(cfg.TEST.CHECKPOINT_FILE_PATH, baseline, cfg, 0)
    with pytest.raises(ValueError, match=r"baseline\.pyth has no trained scorers"):
        load_for_test(cfg, model)


def test_an_unknown_purpose_is_named(tiny_cfg):
    with pytest.raises(ValueError, match="use test, finetune or resume"):
        validate_checkpoint(build(tiny_cfg)[1], {}, tiny_cfg, "look", PATH)
