"""``stts export`` writes models that select for themselves and compute the same."""

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from stts_slowfast.backbones.timesformer import TimeSformer
from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.fused import fuse_model
from stts_slowfast.hooks import attach
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools import cli, export


@pytest.fixture
def config(tmp_path, tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return path


@pytest.fixture
def model(tiny_cfg):
    """Relative positions, fused attention, scorers that tell frames and windows apart."""
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.MVIT.USE_ABS_POS = False
    tiny_cfg.MVIT.REL_POS_SPATIAL = tiny_cfg.MVIT.REL_POS_TEMPORAL = True
    tiny_cfg.MVIT.RESIDUAL_POOLING = True
    model = build_model(tiny_cfg)
    for parameter in model.stts.parameters():
        nn.init.normal_(parameter, std=0.3)
    fuse_model(model, True, True)
    return model


def test_exported_program_selects_by_its_input(model, tmp_path):
    path = tmp_path / "model.pt2"
    clips = torch.randn(2, 3, 8, 32, 32)
    assert export.export(model, clips, str(path)) < 1e-5
    program = torch.export.load(path).module()
    kept = set()
    for _ in range(4):
        clips = torch.randn(2, 3, 8, 32, 32) * torch.rand(1, 1, 8, 1, 1)
        with torch.no_grad():
            torch.testing.assert_close(program(clips), model(clips), rtol=1e-4, atol=1e-5)
        kept.add(tuple(model.stts["time_0"].kept.flatten().tolist()))
    assert len(kept) > 1


def test_onnx_computes_the_same(model, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    assert export.export(model, torch.randn(1, 3, 8, 32, 32), str(path)) < 1e-4
    assert path.stat().st_size > 0


def test_onnx_merges_single_tokens(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sizes = {"img_size": 16, "num_frames": 4, "patch_size": 4, "embed_dim": 16, "depth": 2}
    model = TimeSformer(**sizes, num_heads=2, num_classes=3, attention_type="joint_space_time")
    attach(model, time={0: 0.5}, tokens={1: 0.4}, tokens_rest="merge")
    for parameter in model.stts.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert export.export(model, torch.randn(2, 3, 4, 16, 16), str(tmp_path / "model.onnx")) < 1e-4


def test_command_line(config, tmp_path, tiny_cfg, capsys):
    weights, out = tmp_path / "checkpoint_loading.pyth", tmp_path / "model.pt2"
    save_checkpoint(str(weights), build_model(tiny_cfg), tiny_cfg, 0)
    words = ["export", "--cfg", str(config), "--out", str(out), "--checkpoint", str(weights)]
    assert cli.main([*words, "--batch-size", "2"]) == 0
    assert "clips (2, 3, 8, 32, 32), logits differ by at most" in capsys.readouterr().out
    assert torch.export.load(out).module()(torch.randn(2, 3, 8, 32, 32)).shape[0] == 2


def test_weights_are_those_that_the_config_tests(config, tmp_path, tiny_cfg):
    weights, out = tmp_path / "checkpoint_loading.pyth", tmp_path / "model.pt2"
    model = build_model(tiny_cfg).eval()
    save_checkpoint(str(weights), model, tiny_cfg, 0)
    words = ["export", "--cfg", str(config), "--out", str(out), "--opts"]
    assert cli.main([*words, "TEST.CHECKPOINT_FILE_PATH", str(weights)]) == 0
    clips = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        exported = torch.export.load(out).module()(clips)
        torch.testing.assert_close(exported, model(clips), rtol=1e-4, atol=1e-5)


def test_unknown_kind_of_file(config, capsys):
    assert cli.main(["export", "--cfg", str(config), "--out", "model.tflite"]) == 2
    assert "write a .pt2 (torch.export) or an .onnx file" in capsys.readouterr().err


def test_a_wrong_export_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="differ from the model's"):
        export.export(model, torch.randn(1, 3, 8, 32, 32), str(tmp_path / "model.pt2"))


def test_nothing_is_left_of_a_model_that_computes_something_else(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match=r"model\.pt2 gives logits that differ"):
        export.export(model, torch.randn(1, 3, 8, 32, 32), str(tmp_path / "model.pt2"))
    assert list(tmp_path.glob("*model*")) == []


def test_a_full_disk_is_one_line(config, tmp_path, capsys, monkeypatch):
    def full(path, data):
        path.open("wb").write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main(["export", "--cfg", str(config), "--out", str(tmp_path / "model.pt2")]) == 2
    said = capsys.readouterr().err
    assert "model.pt2 was not written: it needs" in said and said.count("\n") == 1
    assert "more than" not in said, "the size is known"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_nothing_is_written_over_unasked(config, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    out.write_text("mine")
    words = ["export", "--cfg", str(config), "--out", str(out)]
    assert cli.main(words) == 2
    assert "already exists: choose another path, or add --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert cli.main([*words, "--force"]) == 0


def test_scorers_that_were_never_trained_are_not_exported(config, tmp_path, tiny_cfg, capsys):
    tiny_cfg.STTS.ENABLE = False
    save_checkpoint(tmp_path / "base.pyth", build_model(tiny_cfg), tiny_cfg, 0)
    out = str(tmp_path / "model.pt2")
    words = ["--out", out, "--checkpoint", str(tmp_path / "base.pyth")]
    assert cli.main(["export", "--cfg", str(config), *words]) == 2
    assert "has no trained scorers" in capsys.readouterr().err
