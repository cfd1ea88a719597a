"""``stts convert``: checkpoints between formats, and the authors' YAML into ours."""

import argparse

import pytest
import torch
import yaml

from stts_slowfast.checkpoints import load_weights, read_checkpoint, save_checkpoint
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools import convert


def run(*argv):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.main(parser.parse_args([str(word) for word in argv]))


def write_yaml(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


# What the keys of the authors' released YAML look like, at a tiny size.
AUTHORS = {
    "TRAIN": {"ENABLE": False, "FINETUNE": True, "DATASET": "kinetics"},
    "DATA": {
        "PATH_PREFIX": "path_to_your_dataset",
        "NUM_FRAMES": 8,
        "TRAIN_CROP_SIZE": 32,
        "TEST_CROP_SIZE": 32,
        "INPUT_CHANNEL_NUM": [3],
    },
    "MVIT": {
        "DEPTH": 4,
        "EMBED_DIM": 16,
        "PATCH_KERNEL": "(3, 7, 7)",
        "PATCH_STRIDE": "(2, 4, 4)",
        "PATCH_PADDING": "(1, 3, 3)",
        "SEP_POS_EMBED": True,
        "SIGMA": 0.1,
        "TIME_PRUNING_LOC": [0],
        "TIME_LEFT_RATIO": [0.5],
        "TIME_SCORE": "tpool",
        "SPACE_PRUNING_LOC": [2],
        "SPACE_LEFT_RATIO": [0.7367],
        "SPACE_SCORE": "spatch",
    },
    "SOLVER": {"BASE_LR": 0.0001, "WARMUP_EPOCHS": 3.0, "BACKBONE_LR": 0.1, "MAX_EPOCH": 20},
    "MODEL": {"ARCH": "mvit", "MODEL_NAME": "MViT", "NUM_CLASSES": 11},
}


def without(tree, node, *keys):
    return {**tree, node: {k: v for k, v in tree[node].items() if k not in keys}}


def test_authors_yaml_becomes_ours(tmp_path, capsys):
    source = write_yaml(tmp_path / "t0_0.5_s4_0.7.yaml", AUTHORS)
    assert run("--config", source, tmp_path / "ours.yaml") == 0
    cfg = load_config(str(tmp_path / "ours.yaml"))
    stts = cfg.STTS
    assert stts.ENABLE and stts.SIGMA == 0.1 and stts.SIGMA_DECAY == "linear"
    assert stts.SHRINK == 0.0  # theirs keeps as little from the first iteration on
    assert stts.OPERATOR == "perturbed"
    assert (stts.TIME.BLOCKS, stts.TIME.KEEP, stts.TIME.SCORER) == ([0], [0.5], "learned")
    assert (stts.SPACE.BLOCKS, stts.SPACE.KEEP, stts.SPACE.SCORER) == ([2], [0.7367], "learned")
    assert stts.BACKBONE_LR == 0.1
    assert stts.FREEZE_BACKBONE_EPOCHS == 3.0 and cfg.SOLVER.WARMUP_EPOCHS == 0.0
    assert cfg.TRAIN.CHECKPOINT_EPOCH_RESET and not cfg.TRAIN.ENABLE
    assert cfg.DATA.PATH_PREFIX == ""
    build_model(cfg)
    printed = capsys.readouterr().out
    assert "WARMUP_EPOCHS became STTS.FREEZE_BACKBONE_EPOCHS" in printed
    assert "PATH_PREFIX was the placeholder" in printed


def test_keys_left_out_have_the_authors_defaults():
    tree = without(AUTHORS, "MVIT", "SIGMA", "SPACE_PRUNING_LOC", "TIME_LEFT_RATIO")
    tree, _ = convert.convert_config(without(tree, "SOLVER", "BACKBONE_LR"))
    assert tree["STTS"]["SIGMA"] == 0.05
    assert tree["STTS"]["SPACE"]["BLOCKS"] == []
    assert tree["STTS"]["TIME"]["KEEP"] == [0.5]
    assert tree["STTS"]["BACKBONE_LR"] == 0.01


def test_without_finetuning_everything_learns_at_one_rate():
    tree, notes = convert.convert_config({**AUTHORS, "TRAIN": {"FINETUNE": False}})
    assert tree["STTS"]["BACKBONE_LR"] == 1.0
    assert tree["STTS"]["FREEZE_BACKBONE_EPOCHS"] == 0.0
    assert any("FINETUNE was False" in note for note in notes)


def test_the_given_tree_is_left_as_it_is():
    before = yaml.safe_dump(AUTHORS)
    convert.convert_config(AUTHORS)
    assert yaml.safe_dump(AUTHORS) == before


def test_other_yaml_is_refused(tmp_path):
    source = write_yaml(tmp_path / "baseline.yaml", {"MVIT": {"DEPTH": 4}})
    with pytest.raises(ValueError, match=r"neither MVIT\.TIME_PRUNING_LOC"):
        run("--config", source, tmp_path / "ours.yaml")
    assert not (tmp_path / "ours.yaml").exists()
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist"):
        run("--config", tmp_path / "gone.yaml", tmp_path / "ours.yaml")


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"MVIT": 3}, r"MVIT is 3: it must hold KEY: VALUE lines"),
        ({"MVIT": {"TIME_PRUNING_LOC": [0]}, "SOLVER": None}, r"SOLVER is None"),
        ({"MVIT": {"TIME_PRUNING_LOC": [0], "TIME_SCORE": [1]}}, r"MVIT\.TIME_SCORE is \[1\]"),
        (
            {"MVIT": {"TIME_PRUNING_LOC": [0]}, "SOLVER": {"WARMUP_EPOCHS": "x"}},
            r"SOLVER\.WARMUP_EPOCHS is 'x'",
        ),
    ],
)
def test_nonsense_in_their_yaml_is_named(tree, message):
    with pytest.raises(ValueError, match=message):
        convert.convert_config(tree)


@pytest.mark.parametrize("text", ["a: [", "text", "MVIT: 3", "- 1"])
def test_a_stored_config_that_cannot_be_read_is_passed_over(golden, tmp_path, text):
    weights = golden("slowfast_mvit_v1").weights
    torch.save({"model_state": weights, "cfg": text}, tmp_path / "in.pyth")
    run(tmp_path / "in.pyth", tmp_path / "out.pyth")
    assert torch.load(tmp_path / "out.pyth")["model_state"].keys() == weights.keys()


def test_authors_checkpoint_becomes_slowfasts(golden, tiny_cfg, tmp_path, capsys):
    case = golden("official_stts_mvit")
    source, target = tmp_path / "authors.pyth", tmp_path / "ours.pyth"
    their_cfg = yaml.safe_dump({"MVIT": {"TIME_PRUNING_LOC": [0], "SPACE_PRUNING_LOC": [2]}})
    torch.save({"model_state": case.weights, "cfg": their_cfg, "epoch": 19}, source)
    run(source, target)
    assert "recognised as an STTS authors' MViT" in capsys.readouterr().out

    tiny_cfg.STTS.ENABLE = True
    direct, converted = build_model(tiny_cfg).eval(), build_model(tiny_cfg).eval()
    load_weights(direct, case.weights)
    loaded = load_weights(converted, target)
    assert loaded.format == "a SlowFast MViT"
    assert not loaded.missing + loaded.unexpected + loaded.mismatched
    with torch.no_grad():
        assert torch.equal(converted(case["input"]), direct(case["input"]))


def test_checkpoint_goes_there_and_back(golden, tmp_path):
    weights = golden("official_stts_mvit").weights
    torch.save({"model_state": weights}, tmp_path / "authors.pyth")
    run(tmp_path / "authors.pyth", tmp_path / "ours.pyth")
    run(tmp_path / "ours.pyth", tmp_path / "back.pyth", "--to", "authors")
    back = torch.load(tmp_path / "back.pyth", weights_only=True)["model_state"]
    assert list(back) == list(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("name", "to", "first"),
    [
        ("slowfast_mvit_v1", "torchvision", "pos_encoding.class_token"),
        ("videoswin", "torchvision", "patch_embed.proj.weight"),
        ("timesformer_divided_space_time", "timesformer", "model.cls_token"),
    ],
)
def test_targets_have_their_own_names(golden, tmp_path, name, to, first):
    torch.save({"state_dict": golden(name).weights}, tmp_path / "in.pth")
    run(tmp_path / "in.pth", tmp_path / "out.pth", "--to", to)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert next(iter(written.get("model_state", written))) == first


def test_what_is_missing_and_left_over_is_listed(golden, tmp_path, capsys):
    tree, _ = convert.convert_config(AUTHORS)
    tree["MVIT"] = {**tree["MVIT"], "DEPTH": 2}
    tree["STTS"]["SPACE"]["BLOCKS"], tree["STTS"]["SPACE"]["KEEP"] = [], []
    cfg = write_yaml(tmp_path / "model.yaml", tree)
    torch.save(dict(golden("official_stts_mvit").weights), tmp_path / "in.pyth")
    run(tmp_path / "in.pyth", tmp_path / "out.pyth", "--cfg", cfg)
    printed = capsys.readouterr().out
    assert "not renamed: space_score_predictor.0.score_network" in printed
    assert "unexpected: blocks.3.norm1.weight" in printed


def test_a_format_without_such_a_form_is_named(golden, tmp_path):
    torch.save(golden("timesformer_joint_space_time").weights, tmp_path / "in.pyth")
    with pytest.raises(ValueError, match=r"a TimeSformer, which has no torchvision form: use slow"):
        run(tmp_path / "in.pyth", tmp_path / "out.pyth", "--to", "torchvision")


def test_unknown_files_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "in.pyth")
    with pytest.raises(ValueError, match=r"no known format has parameters such as fc\.weight"):
        run(tmp_path / "in.pyth", tmp_path / "out.pyth")
    with pytest.raises(FileNotFoundError, match="gone"):
        run(tmp_path / "gone.pyth", tmp_path / "out.pyth")


def test_out_is_made_but_never_written_over_unasked(golden, tmp_path, capsys):
    source = tmp_path / "in.pyth"
    torch.save(golden("slowfast_mvit_v1").weights, source)
    out = tmp_path / "new" / "out.pyth"
    run(source, out)
    with pytest.raises(FileExistsError, match=r"out\.pyth already exists: .* --force"):
        run(source, out)
    run(source, out, "--force")
    whole = source.read_bytes()
    for target in (source, "/dev/null", tmp_path):
        with pytest.raises(ValueError, match=r"would overwrite|special file|is a folder"):
            run(source, target, "--force")
    assert source.read_bytes() == whole


def test_what_a_run_needs_to_go_on_is_named_when_it_is_lost(golden, tiny_cfg, tmp_path, capsys):
    model = build_model(tiny_cfg)
    save_checkpoint(tmp_path / "in.pyth", model, tiny_cfg, 3, {"state": {}})
    run(tmp_path / "in.pyth", tmp_path / "out.pyth", "--to", "torchvision")
    assert (
        "dropped: epoch, optimizer_state, cfg, stts: a run cannot resume" in capsys.readouterr().out
    )


def test_safetensors_both_ways(golden, tiny_cfg, tmp_path):
    pytest.importorskip("safetensors")
    weights = golden("official_stts_mvit").weights
    torch.save({"model_state": weights, "cfg": "A: 1"}, tmp_path / "in.pyth")
    run(tmp_path / "in.pyth", tmp_path / "there.safetensors")
    there = read_checkpoint(tmp_path / "there.safetensors")
    assert there["pool_norm_eps"] == 1e-5 and there["cfg"] == "A: 1"
    run(tmp_path / "there.safetensors", tmp_path / "back.pyth", "--to", "authors")
    back = read_checkpoint(tmp_path / "back.pyth")["model_state"]
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)
