"""``stts study --fidelity`` compares with all tokens, also on videos without labels."""

import csv
import json

import pytest

from stts_slowfast import build_model, load_config
from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.tools import cli
from stts_slowfast.tools.demo import make_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos, a config of a small MViT, and a checkpoint without scorers."""
    folder = tmp_path_factory.mktemp("fidelity")
    make_data.write_dataset(str(folder), "needle", 4, 6, seed=0)
    keys = make_data.config(str(folder), 0)
    keys["DATA_LOADER"]["NUM_WORKERS"] = 0
    make_data.write_config(str(folder / "config.yaml"), keys)
    cfg = load_config(str(folder / "config.yaml"))
    save_checkpoint(str(folder / "plain.pyth"), build_model(cfg), cfg, 1)
    return folder


def words(folder, out, *more):
    words = ["study", "--cfg", str(folder / "config.yaml"), "--out", str(out)]
    return [*words, "--checkpoint", str(folder / "plain.pyth"), *more]


def test_fidelity_needs_no_labels(folder, tmp_path, capsys):
    """The row of all tokens agrees with itself; a resumed study compares with the same."""
    films = tmp_path / "films.txt"
    lines = (folder / "test.csv").read_text().splitlines()
    films.write_text("".join(f"{line.split()[0]}\n" for line in lines))
    more = ["--time", "0.25", "--space", "--both", "--scorers", "uniform", "--fidelity"]
    command = words(folder, tmp_path, *more, "--films", str(films))
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    everything, uniform = json.loads((tmp_path / "study.json").read_text())
    assert everything["top1"] is None and everything["top1_agreement"] == 100
    assert everything["kl"] == 0 and everything["features_cosine"] == pytest.approx(1)
    assert uniform["kl"] > 0 and uniform["logits_cosine"] < 1 and uniform["clips_per_s"] > 0
    head, _, first, second = printed.splitlines()[:4]
    assert head.startswith("| row | top1_agreement | kl |") and "top1 |" not in head
    assert first.startswith("| all | 100 |") and second.startswith("| time0.25-uniform |")
    with open(tmp_path / "study.csv") as file:
        assert float(next(csv.DictReader(file))["top1_agreement"]) == 100
    (tmp_path / "rows" / "time0.25-uniform-seed0.json").unlink()
    assert cli.main(command) == 0
    again = json.loads((tmp_path / "study.json").read_text())[1]
    assert {**again, "clips_per_s": 0} == {**uniform, "clips_per_s": 0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fidelity", "--train"], "compares the checkpoint with itself"),
        (["--films", "films"], "--films are videos without labels: add --fidelity"),
        (["--fidelity", "--scorers", "oracle"], "oracle reads labels"),
        (["--fidelity", "--films", "nowhere"], "nowhere does not exist"),
        (["--fidelity", "--opts", "TEST.COMPILE", "default"], "reads features inside it"),
    ],
)
def test_mistakes_with_films_show_at_once(folder, tmp_path, capsys, more, message):
    assert cli.main(words(folder, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
