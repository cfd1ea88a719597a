"""A study measures each row once, as ``stts run`` does, and resumes after a stop."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stts_slowfast import build_model, load_config, load_weights
from stts_slowfast.checkpoints import read_checkpoint, save_checkpoint
from stts_slowfast.standalone import engine
from stts_slowfast.tools import cli, run
from stts_slowfast.tools.demo import make_data
from stts_slowfast.tools.study import command as study_command
from stts_slowfast.tools.study import rows as study_rows
from stts_slowfast.video import Video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos, a config with both selections, and a checkpoint with and one without scorers."""
    folder = tmp_path_factory.mktemp("study")
    make_data.write_dataset(str(folder), "needle", 32, 16, seed=0)
    keys = make_data.config(str(folder), 0)
    keys["STTS"] = {"TIME": {"BLOCKS": [0]}, "SPACE": {"BLOCKS": [0], "STRIDE": 1}}
    keys["DATA_LOADER"]["NUM_WORKERS"] = 0
    make_data.write_config(str(folder / "config.yaml"), keys)
    for name, enable in (("scorers.pyth", True), ("plain.pyth", False)):
        cfg = load_config(str(folder / "config.yaml"), ["STTS.ENABLE", enable])
        save_checkpoint(str(folder / name), build_model(cfg), cfg, 1)
    return folder


def words(folder, out, *more, checkpoint="scorers.pyth"):
    words = ["study", "--cfg", str(folder / "config.yaml"), "--out", str(out)]
    return [*words, "--checkpoint", str(folder / checkpoint), *more]


SMALL = ("--time", "0.5", "--space", "--both", "0.25x0.25", "--seeds", "2")


def test_rows_are_budgets_by_scorers_and_seeds(folder, tmp_path, capsys):
    scorers = ["--scorers", "learned", "uniform", "random"]
    assert cli.main(words(folder, tmp_path, *SMALL, *scorers)) == 0
    results = json.loads((tmp_path / "study.json").read_text())
    assert [row["name"] for row in results] == [
        "all-seed0",
        *(
            f"{budget}-{name}"
            for budget in ("time0.5", "time0.25-space0.25")
            for name in ("learned-seed0", "uniform-seed0", "random-seed0", "random-seed1")
        ),
    ]
    everything, half, quarter = (results[number] for number in (0, 1, 5))
    assert quarter["gflops"] < half["gflops"] < everything["gflops"]
    assert everything["frames_kept"] == [1] * 8 and everything["frame_recall"] == 1
    for row in results:
        assert 0 <= row["top1"] <= row["top5"] <= 100 and row["clips_per_s"] > 0
        assert sum(row["frames_kept"]) == pytest.approx(8 * (row["time"] or 1), abs=1e-2)
    uniform, first, second = results[2:5]
    assert uniform["frames_kept"] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert first["frames_kept"] != second["frames_kept"]
    inside = results[6]["tokens_kept"]  # the middle 4x4 of 8x8
    assert [row[4] for row in inside] == [0, 0, 1, 1, 1, 1, 0, 0]
    with open(tmp_path / "study.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in results]
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| time0.5-learned |" in printed and "±" in printed
    assert str(tmp_path / "study.csv") in printed


def test_a_checkpoint_of_ranges_is_tested_at_each_budget(folder, tmp_path):
    opts = ["STTS.TIME.KEEP", [[0.25, 0.9]], "STTS.SPACE.KEEP", [[0.25, 1.0]]]
    cfg = load_config(str(folder / "config.yaml"), ["STTS.ENABLE", True, *opts])
    save_checkpoint(str(folder / "ranges.pyth"), build_model(cfg), cfg, 1)
    more = ("--time", "0.25", "0.5", "--space", "--both", "0.25x0.25", "--scorers", "learned")
    command = words(folder, tmp_path, *more, "--opts", *map(str, opts), checkpoint="ranges.pyth")
    assert cli.main(command) == 0
    results = json.loads((tmp_path / "study.json").read_text())
    kept = [sum(row["frames_kept"]) for row in results]
    assert kept == pytest.approx([8, 2, 4, 2], abs=1e-2)


def test_rows_of_frames_and_single_tokens_up_to_the_oracle(folder, tmp_path):
    keys = make_data.config(str(folder), 0, model="vit")
    keys["STTS"] = {"SPACE": {"BLOCKS": []}, "TOKENS": {"BLOCKS": [1]}}
    keys["DATA_LOADER"]["NUM_WORKERS"] = 0
    make_data.write_config(str(tmp_path / "vit.yaml"), keys)
    cfg = load_config(str(tmp_path / "vit.yaml"), ["STTS.ENABLE", False])
    save_checkpoint(str(tmp_path / "vit.pyth"), build_model(cfg), cfg, 1)
    command = ["study", "--cfg", str(tmp_path / "vit.yaml"), "--out", str(tmp_path)]
    command += ["--checkpoint", str(tmp_path / "vit.pyth"), "--time", "--scorers", "oracle"]
    assert cli.main([*command, "--tokens", "0.25", "--both", "0.5x0.25"]) == 0
    rows = json.loads((tmp_path / "study.json").read_text())
    assert [(row["name"], row["dimension"]) for row in rows] == [
        ("all-seed0", "none"),
        ("tokens0.25-oracle-seed0", "tokens"),
        ("time0.5-tokens0.25-oracle-seed0", "time+tokens"),
    ]
    everything, tokens, both = rows
    assert everything["gflops"] > tokens["gflops"] > both["gflops"]
    assert sum(map(sum, tokens["tokens_kept"])) < 32 and tokens["clips_per_s"] is None


def test_a_row_is_what_stts_run_tests(folder, tmp_path):
    more = ("--time", "0.5", "--space", "--both", "--scorers", "learned")
    assert cli.main(words(folder, tmp_path, *more)) == 0
    row = json.loads((tmp_path / "study.json").read_text())[1]
    path = str(folder / "scorers.pyth")
    opts = ["TEST.CHECKPOINT_FILE_PATH", path, "OUTPUT_DIR", str(tmp_path), "STTS.ENABLE", True]
    opts += ["STTS.TIME.KEEP", [0.5], "STTS.SPACE.KEEP", [1.0]]
    tested = engine.test(load_config(str(folder / "config.yaml"), opts))
    assert tested["top1_acc"] == pytest.approx(row["top1"], abs=1e-2)
    assert tested["top5_acc"] == pytest.approx(row["top5"], abs=1e-2)


def test_a_row_that_is_done_is_not_done_again(folder, tmp_path, monkeypatch):
    measured = []

    def count(cfg, row, *rest):
        measured.append(row.name)
        return whole(cfg, row, *rest)

    whole = study_command.measure
    monkeypatch.setattr(study_command, "measure", count)
    more = ("--time", "0.5", "--space", "--both", "--scorers", "uniform")
    assert cli.main(words(folder, tmp_path, *more)) == 0
    before = json.loads((tmp_path / "study.json").read_text())
    assert measured == ["all-seed0", "time0.5-uniform-seed0"]
    (tmp_path / "rows" / "all-seed0.json").unlink()
    assert cli.main(words(folder, tmp_path, *more)) == 0
    assert measured[2:] == ["all-seed0"]
    assert json.loads((tmp_path / "study.json").read_text())[1] == before[1]
    # Another checkpoint, or another config: another result.
    assert cli.main(words(folder, tmp_path, *more, checkpoint="plain.pyth")) == 0
    assert len(measured) == 5
    opts = ("--opts", "STTS.TRUE_DISTANCES", "False")
    assert cli.main(words(folder, tmp_path, *more, *opts, checkpoint="plain.pyth")) == 0
    assert len(measured) == 7


def test_learned_rows_need_weights(folder, tmp_path, capsys):
    more = ("--time", "0.5", "--space", "--both", "--scorers", "learned", "uniform")
    assert cli.main(words(folder, tmp_path, *more, checkpoint="plain.pyth")) == 0
    results = json.loads((tmp_path / "study.json").read_text())
    assert [row["scorer"] for row in results] == ["all", "uniform"]
    printed = capsys.readouterr().err
    assert (
        "skipped time0.5-learned-seed0:" in printed and "has no weights for stts.time_0" in printed
    )


def test_train_fine_tunes_every_row_by_the_recipe(folder, tmp_path, capsys):
    more = ["--time", "0.5", "--space", "--both", "--scorers", "learned", "--seeds", "1", "--train"]
    recipe = ["--recipe", "SOLVER.MAX_EPOCH", "1", "SOLVER.BASE_LR", "1e-2"]
    recipe += ["STTS.FREEZE_BACKBONE_EPOCHS", "0.0", "SOLVER.WARMUP_EPOCHS", "0.0"]
    assert cli.main(words(folder, tmp_path, *more, *recipe, checkpoint="plain.pyth")) == 0
    results = json.loads((tmp_path / "study.json").read_text())
    assert [(row["scorer"], row["trained"]) for row in results] == [
        *(("all", False), ("all", True), ("learned", True)),
    ]
    for row in results[1:]:
        (run,) = (tmp_path / "runs").glob(f"{row['name']}-*")
        assert (run / "checkpoints" / "checkpoint_epoch_00001.pyth").is_file()
        assert not (run / "checkpoints" / "checkpoint_epoch_00002.pyth").exists()
        assert '"train_epoch"' in (run / "json_stats.log").read_text()
    assert "json_stats" not in capsys.readouterr().out


def test_rows_read_each_video_once(folder, tmp_path, monkeypatch):
    opened = []

    class Counting(Video):
        def __init__(self, path, *more, **keys):
            opened.append(os.path.basename(path))
            super().__init__(path, *more, **keys)

    monkeypatch.setattr("stts_slowfast.video.frame_cache.Video", Counting)
    more = ["--time", "0.5", "--space", "--both", "--scorers", "uniform", "--seeds", "2", "--train"]
    recipe = ["--recipe", "SOLVER.MAX_EPOCH", "2", "SOLVER.WARMUP_EPOCHS", "0.0"]
    assert cli.main(words(folder, tmp_path, *more, *recipe, checkpoint="plain.pyth")) == 0
    names = {f"train_{number:04d}.mp4" for number in range(32)}
    names |= {f"test_{number:04d}.mp4" for number in range(16)}
    # Once for its frame index, and once for its frames.
    assert set(opened) == names and set(map(opened.count, names)) == {2}


def test_another_recipe_trains_again(folder, tmp_path):
    more = ["--time", "--space", "--both", "--seeds", "1", "--train", "--recipe"]
    more += ["SOLVER.MAX_EPOCH", "1", "SOLVER.WARMUP_EPOCHS", "0.0", "SOLVER.BASE_LR"]
    for rate in ("1e-2", "1e-3", "1e-3"):
        assert cli.main(words(folder, tmp_path, *more, rate, checkpoint="plain.pyth")) == 0
    paths = (tmp_path / "runs").glob("all-trained-seed0-*/checkpoints/checkpoint_epoch_00001.pyth")
    one, other = (read_checkpoint(path)["model_state"]["head.projection.weight"] for path in paths)
    assert not one.equal(other)


def test_a_row_depends_on_the_content_of_its_lists_not_on_their_path(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    more = ("--time", "--space", "--both")
    opts = ["DATA.PATH_TO_DATA_DIR", str(data), "DATA.PATH_PREFIX", str(data / "videos")]

    def rows(*opts):
        assert cli.main(words(folder, tmp_path / "out", *more, "--opts", *opts)) == 0
        return json.loads((tmp_path / "out" / "study.json").read_text())

    before = rows()
    assert rows(*opts) == before  # clips_per_s, too
    lines = (data / "test.csv").read_text().splitlines(keepends=True)
    wrong = [line.replace(" 1", " 2") if line.endswith(" 1\n") else line for line in lines]
    (data / "test.csv").write_text("".join(wrong))
    assert rows(*opts) != before


@pytest.fixture
def spoilt(folder, tmp_path):
    """``spoilt(edit)``: the data with an edited test list; ``--opts`` words for it."""

    def make(edit):
        data = tmp_path / "data"
        shutil.copytree(folder, data)
        lines = (data / "test.csv").read_text().splitlines()
        (data / "test.csv").write_text("\n".join(edit(lines)) + "\n")
        opts = ["DATA.PATH_TO_DATA_DIR", str(data), "DATA.PATH_PREFIX", str(data / "videos")]
        return ["--opts", *opts]

    return make


def test_unreadable_videos_are_refused_or_counted(folder, tmp_path, spoilt, capsys):
    """As by ``stts run``; and nothing else of a row is taken from their black clips."""
    out = tmp_path / "out"
    more = ["--time", "0.5", "--space", "--both", "--scorers", "uniform"]
    opts = spoilt(lambda lines: ["gone.mp4 0", *lines[1:]])
    assert cli.main(words(folder, out, *more, *opts)) == 2
    printed = capsys.readouterr().err
    assert "1 of the test videos cannot be read" in printed and "gone.mp4" in printed
    assert not (out / "study.json").exists()
    opts += ["TEST.ALLOW_MISSING", "True"]
    assert cli.main(words(folder, out, *more, *opts)) == 0
    assert "1 of the test videos cannot be read, and count as wrong" in capsys.readouterr().out
    rows = json.loads((out / "study.json").read_text())
    assert cli.main(words(folder, tmp_path / "rest", *more, *spoilt_rest(opts))) == 0
    rest = json.loads((tmp_path / "rest" / "study.json").read_text())
    for row, readable in zip(rows, rest):
        assert (row["unreadable"], row["damaged"]) == (1, 0)
        assert row["top1"] == pytest.approx(row["top1_readable"] * 15 / 16, abs=1e-2)
        assert row["top1_readable"] == pytest.approx(readable["top1"], abs=1e-2)
        for key in ("agreement", "frames_kept", "tokens_kept", "frame_recall", "box_recall"):
            assert row[key] == readable[key]
    with open(out / "study.csv") as file:
        assert [row["unreadable"] for row in csv.DictReader(file)] == ["1", "1"]


def spoilt_rest(opts):
    """The same list without its first line."""
    path = Path(opts[2], "test.csv")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    return opts


def test_a_study_needs_labels(folder, tmp_path, spoilt, capsys):
    opts = spoilt(lambda lines: [lines[0].split()[0], *lines[1:]])
    assert cli.main(words(folder, tmp_path / "out", "--scorers", "uniform", *opts)) == 2
    assert "has videos without a label" in capsys.readouterr().err


def test_a_study_refuses_outputs_that_are_not_finite(folder, tmp_path, capsys):
    checkpoint = read_checkpoint(folder / "plain.pyth")
    checkpoint["model_state"]["norm.weight"][0] = float("inf")
    cfg = load_config(str(folder / "config.yaml"), ["STTS.ENABLE", False])
    model = build_model(cfg)
    load_weights(model, checkpoint)
    save_checkpoint(str(folder / "inf.pyth"), model, cfg, 1)
    more = ("--time", "--space", "--both")
    assert cli.main(words(folder, tmp_path / "out", *more, checkpoint="inf.pyth")) == 2
    printed = capsys.readouterr().err
    assert "test_0000.mp4 are not finite: the weights norm.weight have" in printed
    assert not (tmp_path / "out" / "study.json").exists()


def test_shares_of_several_blocks_leave_the_budget(folder):
    opts = ["STTS.TIME.BLOCKS", [0, 1], "STTS.TIME.KEEP", [1.0, 1.0]]
    cfg = load_config(str(folder / "config.yaml"), opts)
    node = study_rows.row_config(cfg, study_rows.StudyRow(0.25, None, "uniform")).STTS
    assert node.TIME.KEEP == [0.5, 0.5] and node.SPACE.BLOCKS == []
    assert cfg.STTS.TIME.KEEP == [1.0, 1.0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--time", "0.01"], "STTS.TIME.KEEP 0.01 leaves no frame"),
        (["--both", "0.5"], "--both 0.5: give shares such as"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--scorers", "best"], "'best'"),
        (["--time", "0.5", "--opts", "STTS.TIME.BLOCKS", "[]"], "STTS.TIME.BLOCKS is empty: name"),
        (["--opts", "MVIT.EMBED_DIM", "16"], "does not fit this model"),
        (["--opts", "MVIT.DEPTH", "2"], "belongs to a larger model"),
        (["--opts", "MODEL.NUM_CLASSES", "5"], "does not fit this config's model"),
        (["--checkpoint", "nowhere.pyth"], "checkpoint nowhere.pyth does not exist"),
        (["--checkpoint", "."], "checkpoint . is a folder: name a file in it or, if"),
    ],
)
def test_mistakes_show_before_anything_is_measured(folder, tmp_path, capsys, more, message):
    scorers = [] if "--scorers" in more else ["--scorers", "learned"]
    assert cli.main(words(folder, tmp_path / "out", *scorers, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model", "epochs"), [("mvit", "1"), ("timesformer", "2")])
def test_script_of_the_table_asks_for_what_the_commands_take(tmp_path, model, epochs):
    """Its words, with commands that only write down how they were called."""
    script = Path(__file__).parents[3] / "projects" / "stts" / "selection.sh"
    fake = tmp_path / "bin" / "stts"
    fake.parent.mkdir()
    fake.write_text(
        '#!/usr/bin/env bash\n(IFS="|"; echo "$*" >> "$CALLS")\n'
        f'[ "$1" = make-data ] && exec {sys.executable} -m stts_slowfast "$@"\n'
        '[ "$1" = run ] && mkdir -p "$DATA/run_$MODELS/checkpoints" && '
        'touch "$DATA/run_$MODELS/checkpoints/checkpoint_epoch_0000"{1,2}.pyth && '
        """echo '{"split": "test_final", "top1_acc": "'"$TOP1"'.00"}' >> """
        '"$DATA/run_$MODELS/json_stats.log"\nexit 0\n'
    )
    fake.chmod(0o755)
    env = {**os.environ, "CALLS": str(tmp_path / "calls"), "DATA": str(tmp_path / "t" / "motion")}
    env |= {"KINDS": "motion", "MODELS": model, "TRAIN": "8", "TEST": "8", "EPOCHS": "1"}
    env |= {"PATH": f"{fake.parent}:{env['PATH']}", "SEEDS": "2", "TOP1": "90"}
    env["PYTHONPATH"] = str(script.parents[3])
    for _ in range(2):
        subprocess.run(["bash", str(script), str(tmp_path / "t")], env=env, check=True)
    calls = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["make-data", "run", "study", "run", "study"]
    parsed = {}
    for name, module in (("run", run), ("study", study_command)):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parsed[name] = parser.parse_args(next(call for call in calls if call[0] == name)[1:])
    assert parsed["run"].opts[:2] == ["SOLVER.MAX_EPOCH", epochs]
    load_config(parsed["run"].cfg[0], parsed["run"].opts)
    args = parsed["study"]
    assert args.checkpoint.endswith("checkpoint_epoch_00002.pyth") and args.train
    cfg = load_config(args.cfg, [*args.opts, *args.recipe])
    is_divided = model == "timesformer"  # attends over time at one position
    assert is_divided == cfg.STTS.SPACE.SHARED
    assert cfg.STTS.FREEZE_BACKBONE_EPOCHS == 0.5 and cfg.STTS.TEACHER == "both"
    rows = study_rows.plan_rows(cfg, args)
    assert len(rows) == 1 + 2 + 3 * (2 + 2 + 3 * 2)

    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "t")],
        env={**env, "TOP1": "25"},
        check=True,
        text=True,
        capture_output=True,
    )
    assert done.stdout == f"skipped: {model} on motion, because all tokens reach 25%\n"
    assert (tmp_path / "calls").read_text().splitlines()[-1].startswith("run|")
