import pytest
import torch

from stts_slowfast import backbones
from stts_slowfast.checkpoints import (
    load_weights,
    mvit_from_slowfast,
    mvit_to_slowfast,
    read_checkpoint,
    save_checkpoint,
)
from stts_slowfast.hooks import attach
from stts_slowfast.standalone.model import build_model


@pytest.mark.parametrize("name", ["slowfast_mvit_v1", "slowfast_mvit_v2"])
def test_names_go_to_torchvision_and_back(golden, name):
    weights = golden(name).weights
    there = mvit_from_slowfast(weights)
    back = mvit_to_slowfast(there)
    assert not set(there) & set(weights) - {
        k for k in weights if "norm" in k or "qkv" in k or "rel_pos" in k
    }
    assert list(back) == list(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_written_files_are_slowfasts(golden, tiny_cfg, tmp_path):
    case = golden("slowfast_mvit_v1")
    tiny_cfg.STTS.ENABLE = True
    model = build_model(tiny_cfg).eval()
    load_weights(model, case.weights)
    path = tmp_path / "checkpoint_epoch_00003.pyth"
    save_checkpoint(path, model, tiny_cfg, 2, {"state": {}}, {"scale": 2.0})
    checkpoint = read_checkpoint(path)
    assert checkpoint["epoch"] == 2 and checkpoint["scaler_state"] == {"scale": 2.0}
    assert "DEPTH: 4" in checkpoint["cfg"]
    state = checkpoint["model_state"]
    assert {k for k in state if not k.startswith("stts.")} == set(case.weights)
    assert all(torch.equal(state[k], v) for k, v in case.weights.items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    other = build_model(tiny_cfg).eval()
    loaded = load_weights(other, path)
    assert loaded.format == "a SlowFast MViT" and not loaded.missing + loaded.unexpected
    assert torch.equal(other(case["input"]), model(case["input"]))


def test_a_baseline_starts_a_run_with_selection(golden, tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    loaded = load_weights(build_model(tiny_cfg), golden("slowfast_mvit_v1").weights)
    assert loaded.missing and all(key.startswith("stts.") for key in loaded.missing)
    assert not loaded.unexpected


def test_authors_norms_are_set_and_survive_saving(golden, tiny_cfg, tmp_path):
    case = golden("official_stts_mvit")
    tiny_cfg.STTS.ENABLE = True
    model = build_model(tiny_cfg).eval()
    loaded = load_weights(model, case.weights)
    assert loaded.format == "an STTS authors' MViT"
    assert "eps 1e-05" in str(loaded)
    save_checkpoint(tmp_path / "ours.pyth", model, tiny_cfg, 0)
    other = build_model(tiny_cfg).eval()
    load_weights(other, tmp_path / "ours.pyth")
    assert torch.equal(other(case["input"]), model(case["input"]))
    load_weights(other, golden("slowfast_mvit_v1").weights)
    assert {m.eps for n, m in other.named_modules() if n.endswith("norm_act.0")} == {1e-6}


def test_authors_selectors_without_a_place_are_left_over(golden, tiny_cfg):
    loaded = load_weights(backbones.build(tiny_cfg), golden("official_stts_mvit").weights)
    assert loaded.unexpected and all("score_predictor" in key for key in loaded.unexpected)


def test_authors_selectors_go_to_the_configured_block(golden, tiny_cfg):
    tiny_cfg.STTS.TIME.BLOCKS, tiny_cfg.STTS.SPACE.BLOCKS = [0], [3]
    model = attach(backbones.build(tiny_cfg), tiny_cfg.STTS)
    weights = golden("official_stts_mvit").weights
    assert not load_weights(model, weights).missing
    theirs = weights["space_score_predictor.0.score_network.out_conv.4.weight"]
    assert torch.equal(model.stts["space_3"].scorer.network.score[4].weight, theirs)


def test_another_head_is_reported_and_left(golden, tiny_cfg):
    tiny_cfg.MODEL.NUM_CLASSES = 5
    loaded = load_weights(backbones.build(tiny_cfg), golden("slowfast_mvit_v1").weights)
    assert len(loaded.mismatched) == 2
    assert "head.1.weight (11, 32), the model's is (5, 32)" in loaded.mismatched


def test_ddp_prefixes_are_taken_off(golden, tiny_cfg):
    weights = {f"module.{k}": v for k, v in golden("slowfast_mvit_v1").weights.items()}
    assert not load_weights(backbones.build(tiny_cfg), {"model_state": weights}).missing


def test_broken_files_are_named(tiny_cfg, tmp_path):
    model = backbones.build(tiny_cfg)
    with pytest.raises(FileNotFoundError, match=r"gone.pyth does not exist"):
        load_weights(model, tmp_path / "gone.pyth")
    whole = tmp_path / "whole.pyth"
    save_checkpoint(whole, model, tiny_cfg, 0)
    cut = tmp_path / "cut.pyth"
    cut.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut.pyth cannot be read as a checkpoint"):
        load_weights(model, cut)
    torch.save([1, 2], tmp_path / "list.pyth")
    with pytest.raises(ValueError, match=r"list.pyth holds a list"):
        load_weights(model, tmp_path / "list.pyth")
    with pytest.raises(ValueError, match="no parameters"):
        load_weights(model, {"epoch": 3})
    with pytest.raises(ValueError, match="no parameter of it fits this MViT"):
        load_weights(model, {"fc.weight": torch.zeros(2, 2)})


def test_a_failed_write_leaves_the_old_file(tiny_cfg, tmp_path, monkeypatch):
    model = backbones.build(tiny_cfg)
    path = tmp_path / "checkpoint.pyth"
    save_checkpoint(path, model, tiny_cfg, 0)

    def interrupted(checkpoint, file):
        with open(file, "wb") as f:
            f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model, tiny_cfg, 1)
    assert read_checkpoint(path)["epoch"] == 0
