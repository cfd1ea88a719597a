"""Checkpoints that SlowFast's loader refuses with this package, naming the key and the remedy."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stts_slowfast.pyslowfast import checkpoint_loading, run_state


@pytest.fixture
def load():
    """SlowFast's ``load_checkpoint``, in short; returns the epoch."""

    def load_checkpoint(
        path_to_checkpoint, model, data_parallel=True, optimizer=None, scaler=None,
        inflation=False, convert_from_caffe2=False, epoch_reset=False,
        clear_name_pattern=(), image_init=False,
    ):  # fmt: skip
        if convert_from_caffe2:
            model.load_state_dict({}, strict=False)
            return -1
        with opened.get(path_to_checkpoint, lambda: open(path_to_checkpoint, "rb"))() as file:
            state = torch.load(file, map_location="cpu")
        own = model.state_dict()
        theirs = checkpoint.normal_to_sub_bn(state["model_state"], own)
        fits = {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
        model.load_state_dict(fits, strict=False)
        if "epoch" in state and not epoch_reset:
            if optimizer:
                optimizer.load_state_dict(state["optimizer_state"])
            return state["epoch"]
        return -1

    opened = {}  # files that are no local paths
    checkpoint = SimpleNamespace(
        load_checkpoint=load_checkpoint, normal_to_sub_bn=lambda state, own: state, opened=opened
    )
    checkpoint_loading.wrap_load_checkpoint(checkpoint)
    checkpoint.load_checkpoint.opened = opened
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
    assert not checkpoint_loading.is_pretrained(model)
    assert load(saved(), model, False) == 0
    assert checkpoint_loading.is_pretrained(model)


def test_a_file_with_scorers_is_refused_if_selection_is_off(load, saved, registry, cfg):
    path = saved()
    cfg.STTS.ENABLE = False
    model = registry.get("Transformer")(cfg)
    with (
        pytest.raises(ValueError, match=r"set STTS\.ENABLE True"),
        run_state.enter_job(cfg, load),
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
    assert load(path, model, False, optimizer_of(model), epoch_reset=True) == -1


def test_resuming_with_changed_scorers_names_the_key(load, saved, registry, cfg):
    path = saved()
    cfg.STTS.SPACE.SCORER = "uniform"
    model = registry.get("Transformer")(cfg)
    message = re.escape(
        "STTS.SPACE.SCORER learned became uniform; change it back, or choose another"
    )
    with pytest.raises(ValueError, match=message):
        load(path, model, False, optimizer_of(model))


def test_an_unchanged_run_is_resumed(load, saved, registry, cfg):
    model = registry.get("Transformer")(cfg)
    assert load(saved(), model, False, optimizer_of(model)) == 0


# ---- what SlowFast reads, however it does -----------------------------------------------------


def test_old_files_are_checked(load, saved, registry, cfg):
    path = saved("STTS.ENABLE", False)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="has no trained scorers"):
        load(path, registry.get("Transformer")(cfg), False)


def test_files_with_pickled_extras_are_checked(load, saved, registry, cfg, monkeypatch):
    path = saved("STTS.ENABLE", False)
    torch.save({**torch.load(path), "note": SimpleNamespace()}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="has no trained scorers"):
        load(path, registry.get("Transformer")(cfg), False)


def test_remote_files_are_checked(load, saved, registry, cfg):
    path = saved("STTS.ENABLE", False)
    load.opened["s3://bucket/a.pyth"] = partial(open, path, "rb")
    with pytest.raises(ValueError, match=r"s3://bucket/a\.pyth has no trained scorers"):
        load("s3://bucket/a.pyth", registry.get("Transformer")(cfg), False)


def test_scorers_that_got_no_weights_are_not_tested(load, registry, cfg):
    model = registry.get("Transformer")(cfg)
    with pytest.raises(ValueError, match=r"no weights were loaded for \d+ parameters of the scor"):
        load("blobs.pkl", model, False, convert_from_caffe2=True)
    assert not checkpoint_loading.is_pretrained(model)
    cfg.STTS.TIME.SCORER = cfg.STTS.SPACE.SCORER = "uniform"
    assert load("blobs.pkl", registry.get("Transformer")(cfg), False, convert_from_caffe2=True)


def test_a_truncated_checkpoint_is_named_with_the_one_before(load, saved, registry, cfg, tmp_path):
    first, last = (tmp_path / f"checkpoint_epoch_0000{n}.pyth" for n in (1, 2))
    whole = Path(saved()).read_bytes()
    first.write_bytes(whole)
    last.write_bytes(whole[: len(whole) // 2])
    model = registry.get("Transformer")(cfg)
    message = f"{last} cannot be read .* move it away to resume from {first}"
    with pytest.raises(RuntimeError, match=message):
        load(str(last), model, False, optimizer_of(model))
    cfg.STTS.ENABLE = False
    model = registry.get("Transformer")(cfg)
    with pytest.raises(Exception, match=r"^(?!.*move it away)"):
        load(str(last), model, False, optimizer_of(model))


def test_the_weights_of_a_wrapped_model_are_checked_by_its_own_names(load, registry, cfg, tmp_path):
    def wrapped(cfg):
        model = torch.nn.Module()
        model.trunk = registry.get("Transformer")(cfg)
        checkpoint_loading.register_config(model, cfg)
        return model

    path = str(tmp_path / "wrapped.pyth")
    torch.save({"epoch": 3, "model_state": wrapped(cfg).state_dict()}, path)
    assert load(path, wrapped(cfg), False) == 3
    off = cfg.clone()
    off.STTS.ENABLE = False
    torch.save({"epoch": 3, "model_state": wrapped(off).state_dict()}, path)
    with pytest.raises(ValueError, match="has no trained scorers"):
        load(path, wrapped(cfg), False)


def test_a_model_may_call_anything_its_cfg(load, saved, registry, cfg):
    path = saved("STTS.ENABLE", False)
    cfg.STTS.ENABLE = False
    for other in (object(), 3, {"STTS": 1}):
        model = registry.get("Transformer")(cfg)
        model.cfg = other
        assert load(path, model, False) == 0
