"""``stts bench``: rows are read right, measured in turn, and told truthfully."""

import json

import pytest
import torch

from stts_slowfast.fused.attention import AttentionView
from stts_slowfast.tools import bench, cli


@pytest.fixture
def config(tmp_path, tiny_cfg):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return path


def test_row_reads_name_file_and_keys():
    row = bench.parse_row("small=a/b.yaml,STTS.ENABLE=False,STTS.TIME.KEEP=[0.5, 0.4],A.B=(1,2)")
    assert (row.name, row.config) == ("small", "a/b.yaml")
    assert row.opts == ["STTS.ENABLE", "False", "STTS.TIME.KEEP", "[0.5, 0.4]", "A.B", "(1,2)"]
    assert bench.parse_row("a/b.yaml").name == "b"
    with pytest.raises(ValueError, match=r"'STTS\.ENABLE' is no KEY=VALUE"):
        bench.parse_row("a.yaml,STTS.ENABLE")


@pytest.mark.parametrize(("enable", "fused"), [(True, True), (True, False), (False, True)])
def test_row_says_what_is_built(config, enable, fused):
    row = bench.parse_row(f"{config},STTS.ENABLE={enable},STTS.FUSED_ATTENTION={fused}")
    model, shape = bench.build(row, "cpu")
    assert shape == (3, 8, 32, 32)
    assert hasattr(model, "stts") is enable
    assert any(isinstance(m, AttentionView) for m in model.modules()) is fused


def test_whole_run(config, tmp_path, capsys):
    report, picture = tmp_path / "out.json", tmp_path / "out.png"
    stock = f"stock={config},STTS.ENABLE=False,STTS.FUSED_ATTENTION=False"
    words = ["bench", stock, f"ours={config},STTS.ENABLE=True", "--batch-size", "1"]
    words += ["--repeats", "2", "--json", str(report), "--plot", str(picture)]
    words += ["--modes", "train"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["model", "---", "stock", "ours"]
    rows = json.loads(report.read_text())["rows"]
    assert [len(row["seconds"]["train"]) for row in rows] == [2, 2]
    # At the least the weights' gradients live at a time.
    assert all(row["memory"]["train"] > 4 * row["parameters"] for row in rows)
    assert rows[1]["gflops"] < rows[0]["gflops"]
    assert rows[1]["parameters"] > rows[0]["parameters"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_clip_lengths_are_compared_with_their_own_first_row(config, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    rows = [f"a={config},STTS.ENABLE=False", f"b={config},STTS.ENABLE=True"]
    options = ["--frames", "8", "16", "--modes", "eval", "--repeats", "1", "--no-memory"]
    options += ["--json", str(numbers)]
    assert cli.main(["bench", *rows, "--batch-size", "1", *options]) == 0
    cells = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2].strip() for row in cells] == ["8", "8", "16", "16"]
    assert [row[6].strip() for row in cells][::2] == ["1.00", "1.00"]
    report = json.loads(numbers.read_text())
    assert [row["frames"] for row in report["rows"]] == [8, 8, 16, 16]
    # Every length has its own measurements.
    assert [len(row["seconds"]["eval"]) for row in report["rows"]] == [1, 1, 1, 1]


def test_table_gives_medians_and_ratios():
    stock = bench.Row("stock", "", seconds={"eval": [1.0, 2.0, 4.0]}, memory={"eval": 2**30})
    ours = bench.Row("ours", "", seconds={"eval": [0.5, 0.5, 9.0]}, memory={"eval": 2**28})
    lines = bench.table([stock, ours], batch_size=2).splitlines()
    assert "| 1.000 ± 0.375 | 1.00 | 1.00 | 1.00 |" in lines[2]
    assert "| 4.00 | 0.25 | 0.25 |" in lines[3]


def test_memory_is_the_most_that_lives_at_a_time():
    def step():
        first = torch.zeros(1000, dtype=torch.float64)
        del first
        second = torch.zeros(500, dtype=torch.float64)
        return second + 1

    assert 8000 <= bench.peak_memory(step, "cpu") < 9000


def cli_args(config, *words):
    import argparse

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(config), *words])


def test_options_that_exclude_each_other(config, capsys):
    assert cli.main(["bench", str(config), "--cuda-graph"]) == 2
    assert "--cuda-graph needs --device cuda" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph_replays_the_model(config):
    row = bench.parse_row(f"{config},STTS.ENABLE=True")
    args = cli_args(config, "--device", "cuda", "--cuda-graph")
    model, shape = bench.build(row, "cuda")
    bench.make_step(model, shape, "eval", args)()
    torch.cuda.synchronize()
