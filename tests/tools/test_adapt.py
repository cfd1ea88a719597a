"""``stts adapt`` writes a checkpoint that the other commands load, and reports on other videos."""

import json

import pytest
import torch

from stts_slowfast import adaptation, build_model, load_config
from stts_slowfast.checkpoints import read_checkpoint, save_checkpoint
from stts_slowfast.standalone import engine
from stts_slowfast.tools import adapt, cli
from stts_slowfast.tools.demo import make_data

KEEP = ["STTS.TIME.KEEP", "[[0.25,0.5]]", "STTS.SPACE.BLOCKS", "[]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten videos, a config of a small MViT, and a checkpoint without scorers."""
    folder = tmp_path_factory.mktemp("adapt")
    make_data.write_dataset(str(folder), "needle", 10, 4, seed=0)
    keys = make_data.config(str(folder), 0)
    keys["DATA_LOADER"]["NUM_WORKERS"], keys["TRAIN"]["BATCH_SIZE"] = 0, 4
    make_data.write_config(str(folder / "config.yaml"), keys)
    cfg = load_config(str(folder / "config.yaml"))
    save_checkpoint(str(folder / "plain.pyth"), build_model(cfg), cfg, 1)
    lines = (folder / "train.csv").read_text().splitlines()
    (folder / "films.txt").write_text("".join(f"{line.split()[0]}\n" for line in lines))
    return folder


def run(folder, out, *more, films="films.txt"):
    words = ["adapt", "--cfg", str(folder / "config.yaml"), "--out", str(out), "--steps", "2"]
    words += ["--checkpoint", str(folder / "plain.pyth"), "--films", str(folder / films)]
    return cli.main([*words, *more])


def test_what_was_adapted_is_loaded_by_other_commands(folder, tmp_path, capsys):
    assert run(folder, tmp_path, "--opts", *KEEP) == 0
    report = json.loads((tmp_path / "adapt.json").read_text())
    assert report["films"] == 8 and report["test_films"] == 2 and report["steps"] == 2
    assert {row["budget"] for row in report["rows"]} == {
        "time_0 0.25",
        "time_0 0.353553",
        "time_0 0.5",
    }
    printed = capsys.readouterr().out
    assert "| time_0 0.25 | before |" in printed and "| time_0 0.5 | after |" in printed
    assert "2 videos that were not adapted to" in printed and "2 steps in " in printed

    path = str(tmp_path / "adapted.pyth")
    assert "stts.time_0.scorer.network.embed.1.weight" in read_checkpoint(path)["model_state"]
    opts = ["STTS.ENABLE", True, "STTS.TIME.KEEP", [0.25], "STTS.SPACE.BLOCKS", []]
    opts = [*opts, "STTS.SPACE.KEEP", [], "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = load_config(str(folder / "config.yaml"), [*opts, "TEST.CHECKPOINT_FILE_PATH", path])
    assert engine.test(cfg)["num_videos"] == 4
    more = ["--checkpoint", path, "--time", "0.25", "--space", "--both", "--scorers", "learned"]
    study = ["study", "--fidelity", "--cfg", str(folder / "config.yaml"), *more]
    films = ["--films", str(folder / "films.txt"), "--out", str(tmp_path / "study")]
    assert cli.main([*study, *films, "--opts", *KEEP]) == 0
    rows = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [row["scorer"] for row in rows] == ["all", "learned"] and rows[0]["kl"] == 0


def test_the_backbone_adapts_if_asked(folder, tmp_path, capsys):
    before = read_checkpoint(str(folder / "plain.pyth"))["model_state"]
    (folder / "others").mkdir()
    for path in (folder / "videos").glob("test_*"):
        (folder / "others" / path.name).write_bytes(path.read_bytes())
    for words in ((), ("--backbone", "--force")):
        films = ["--test-films", str(folder / "others")]
        assert run(folder, tmp_path, *films, *words, "--opts", *KEEP) == 0
        state = read_checkpoint(str(tmp_path / "adapted.pyth"))["model_state"]
        same = all(torch.equal(state[name], before[name]) for name in before)
        assert same == (not words)
    assert run(folder, tmp_path, "--opts", *KEEP) == 2
    assert "adapted.pyth already exists" in capsys.readouterr().err


def test_every_fifth_film_is_compared_on(folder):
    cfg = load_config(str(folder / "config.yaml"))
    films, tested = adapt.split_films(cfg, str(folder / "films.txt"), None)
    assert [path[-8:-4] for path in tested] == ["0004", "0009"]
    assert len(films) == 8 and not set(films) & set(tested)
    cfg.TEST.NUM_SPATIAL_CROPS = 3
    views = [adapt.test_config(cfg, count).TEST.NUM_ENSEMBLE_VIEWS for count in (2, 40, 500)]
    assert views == [8, 3, 1] and adapt.test_config(cfg, 2).TEST.NUM_SPATIAL_CROPS == 1


def row(when, kl):
    return {"when": when, "budget": "time_0 0.5", "kl": kl}


def test_a_better_scorer_without_weights_is_named():
    found = adapt.Adaptation(rows=[row("before", 3.0), row("uniform", 0.5), row("after", 1.0)])
    assert adapt.advice(found) == (
        "without training these scorers agree better with all tokens: time_0 0.5: uniform"
    )
    found.rows[2] = row("after", 0.4)
    assert adapt.advice(found) == ""
    found.rows[0] = row("before", 0.3)
    assert adapt.advice(found).startswith(
        "the adaptation made the model worse at time_0 0.5: give more"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--films", "nowhere"], "nowhere does not exist"),
        (["--checkpoint", "nowhere.pyth"], "checkpoint nowhere.pyth does not exist"),
        (["--opts", "STTS.TIME.KEEP", "[0.01]"], "STTS.TIME.KEEP 0.01 leaves no frame"),
        (["--opts", *KEEP, "STTS.TIME.SCORER", "uniform"], "nothing would learn"),
        (["--opts", "STTS.TIME.BLOCKS", "[]", "STTS.SPACE.BLOCKS", "[]"], "nothing is selected"),
    ],
)
def test_mistakes_show_before_anything_is_learned(folder, tmp_path, capsys, more, message):
    assert run(folder, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "more"])
def test_a_file_in_place_of_the_folder_shows_before_anything_is_learned(
    folder, tmp_path, capsys, below
):
    (tmp_path / "out").write_text("")
    assert run(folder, tmp_path / "out" / below, "--opts", *KEEP) == 2
    assert f"{tmp_path / 'out'} is a file, not a folder" in capsys.readouterr().err


def test_one_film_leaves_none_to_compare_on(folder, tmp_path, capsys):
    (folder / "one.txt").write_text("train_0000.mp4\n")
    assert run(folder, tmp_path, films="one.txt") == 2
    assert "has one video: give two at least, or --test-films" in capsys.readouterr().err


def test_an_interrupted_adaptation_keeps_what_it_has_learned(folder, tmp_path, capsys, monkeypatch):
    learn = adaptation._Adapter.learn

    def interrupted(self, *arguments):
        learn(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(adaptation._Adapter, "learn", interrupted)
    assert run(folder, tmp_path, "--opts", *KEEP) == 130
    path = tmp_path / "adapted.pyth"
    assert f"interrupted: wrote {path}" in capsys.readouterr().out
    assert "stts.time_0.scorer.network.embed.1.weight" in read_checkpoint(path)["model_state"]


def test_videos_that_were_adapted_to_are_not_compared_on(folder, tmp_path, capsys):
    films = ["--test-films", str(folder / "films.txt")]
    assert run(folder, tmp_path, *films, "--opts", *KEEP) == 2
    assert "10 videos are in both --films and --test-films" in capsys.readouterr().err


def test_films_of_which_none_can_be_read_are_refused(folder, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "bad" / name).write_bytes(b"no video")
    assert run(folder, tmp_path, "--test-films", str(tmp_path / "bad"), "--opts", *KEEP) == 2
    assert "none of the 2 videos can be read" in capsys.readouterr().err
