"""Checkpoints that SlowFast's loader is asked for: what is refused, by key and way out."""

import re
from types import SimpleNamespace

import pytest
import torch

from stts_slowfast.pyslowfast import run_state, weights


@pytest.fixture
def load():
    """SlowFast's ``load_checkpoint``, in short; returns what it was asked to load into."""

    def load_checkpoint(
        path_to_checkpoint, model, data_parallel=True, optimizer=None, scaler=None,
        inflation=False, convert_from_caffe2=False, epoch_reset=False,
        clear_name_pattern=(), image_init=False,
    ):  # fmt: skip
        return "loaded"

    checkpoint = SimpleNamespace(load_checkpoint=load_checkpoint)
    weights.wrap_load_checkpoint(checkpoint)
    return checkpoint.load_checkpoint


@pytest.fixture
def saved(registry, cfg, tmp_path):
    """``saved(*opts)``: the path of a checkpoint of a model with these options."""

    def save(*opts, epoch=0) -> str:
        then = cfg.clone()
        then.merge_from_list(list(opts))
        model = registry.get("Transformer")(then)
        groups = [{"params": [p]} for p in model.parameters()]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        path = tmp_path / f"{abs(hash(opts))}.pyth"
        state = {"model_state": model.state_dict(), "optimizer_state": optimizer.state_dict()}
        torch.save({"epoch": epoch, "cfg": then.dump(), **state}, path)
        return str(path)

    return save


def optimizer_of(model):
    return torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9)


def test_testing_without_trained_scorers_is_refused(load, saved, registry, cfg):
    model = registry.get("Transformer")(cfg)
    path = saved("STTS.ENABLE", False)
    with pytest.raises(ValueError, match="has no trained scorers"):
        load(path, model, False)
    assert not weights.is_trained(model)
    assert load(saved(), model, False) == "loaded"
    assert weights.is_trained(model)


def test_a_file_with_scorers_is_refused_where_selection_is_off(load, saved, registry, cfg):
    path = saved()
    cfg.STTS.ENABLE = False
    model = registry.get("Transformer")(cfg)
    with (
        pytest.raises(ValueError, match=r"set STTS\.ENABLE True"),
        run_state.started(cfg, load),
    ):
        load(path, model, False)
    model.cfg = cfg  # as SlowFast's MViT has it
    with pytest.raises(ValueError, match=r"set STTS\.ENABLE True"):
        load(path, model, False)


def test_fine_tuning_with_an_optimizer_of_other_groups_names_the_key(load, saved, registry, cfg):
    path = cfg.TRAIN.CHECKPOINT_FILE_PATH = saved("STTS.ENABLE", False)
    model = registry.get("Transformer")(cfg)
    with pytest.raises(ValueError, match=r"STTS.ENABLE False became True.*CHECKPOINT_EPOCH_RESET"):
        load(path, model, False, optimizer_of(model))
    assert load(path, model, False, optimizer_of(model), epoch_reset=True) == "loaded"


def test_resuming_with_changed_scorers_names_the_key(load, saved, registry, cfg):
    path = saved()
    cfg.STTS.SPACE.SCORER = "uniform"
    model = registry.get("Transformer")(cfg)
    told = re.escape("STTS.SPACE.SCORER learned became uniform; set it back, or choose another")
    with pytest.raises(ValueError, match=told):
        load(path, model, False, optimizer_of(model))


def test_a_run_that_is_what_it_was_goes_on(load, saved, registry, cfg):
    model = registry.get("Transformer")(cfg)
    assert load(saved(), model, False, optimizer_of(model)) == "loaded"


def test_files_that_cannot_be_read_are_left_to_slowfast(load, registry, cfg, tmp_path):
    (tmp_path / "odd.pkl").write_bytes(b"caffe2")
    assert load(str(tmp_path / "odd.pkl"), registry.get("Transformer")(cfg), False) == "loaded"
