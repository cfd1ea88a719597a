"""``stts bench``: rows are parsed, measured in turn, and reported."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stts_slowfast.evaluation import LAYERS, evaluating
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.tools import cli
from stts_slowfast.tools.bench import checks, command, spec
from stts_slowfast.tools.bench import loader as bench_loader
from stts_slowfast.tools.bench.published import TABLE, Published, published
from stts_slowfast.tools.demo import make_data


@pytest.fixture
def config(tmp_path, tiny_cfg):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg.dump())
    return path


def test_row_reads_name_file_and_keys():
    row = spec.parse_row("small=a/b.yaml,STTS.ENABLE=False,STTS.TIME.KEEP=[0.5, 0.4],A.B=(1,2)")
    assert (row.name, row.config) == ("small", "a/b.yaml")
    assert row.opts == ["STTS.ENABLE", "False", "STTS.TIME.KEEP", "[0.5, 0.4]", "A.B", "(1,2)"]
    assert spec.parse_row("a/b.yaml").name == "b"
    with pytest.raises(ValueError, match=r"'STTS\.ENABLE' is no KEY=VALUE"):
        spec.parse_row("a.yaml,STTS.ENABLE")


@pytest.mark.parametrize(("enable", "fused"), [(True, True), (True, False), (False, True)])
def test_row_says_what_is_built(config, enable, fused):
    row = spec.parse_row(f"{config},STTS.ENABLE={enable},STTS.FUSED_ATTENTION={fused}")
    model, shapes = spec.build(row, "cpu")
    assert shapes == {"train": (3, 8, 32, 32), "eval": (3, 8, 32, 32)}
    assert hasattr(model, "stts") is enable
    assert any(isinstance(m, AttentionReplacement) for m in model.modules()) is fused


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
    assert [row[8].strip() for row in cells][::2] == ["1.00", "1.00"]
    report = json.loads(numbers.read_text())
    assert [row["frames"] for row in report["rows"]] == [8, 8, 16, 16]
    # Every length has its own measurements.
    assert [len(row["seconds"]["eval"]) for row in report["rows"]] == [1, 1, 1, 1]


@pytest.mark.parametrize("repeats", ["1", "2"])  # ended while training, or before that
def test_an_interrupted_run_keeps_what_it_measured(config, tmp_path, monkeypatch, capsys, repeats):
    numbers, times = tmp_path / "numbers.json", iter([1.0] * 3)

    def timed(step, device, core_seconds):
        assert core_seconds
        for seconds in times:
            return seconds
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "timed", timed)
    words = ["bench", f"a={config}", f"b={config}", "--warmup", "0", "--repeats", repeats]
    assert cli.main([*words, "--core-seconds", "--json", str(numbers)]) == 130
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["seconds"] for row in rows] == [{"eval": [1.0]}] * 2
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "eval clips/s" in head and "train" not in head
    assert [line.split("|")[1].strip() for line in lines] == ["a", "b"]


def test_table_gives_medians_and_ratios():
    stock = spec.BenchSpec("stock", "", seconds={"eval": [1.0, 2.0, 4.0]}, memory={"eval": 2**30})
    ours = spec.BenchSpec("ours", "", seconds={"eval": [0.5, 0.5, 9.0]}, memory={"eval": 2**28})
    lines = command.table([stock, ours], batch_size=2).splitlines()
    assert "| 1.000 ± 0.375 | 1.00 | 1.00 | 1.00 |" in lines[2]
    assert "| 4.00 | 0.25 | 0.25 |" in lines[3]
    ours.memory = {}  # the run ended before
    assert "GiB" not in command.table([stock, ours], batch_size=2)


def test_core_seconds_are_those_of_the_process(monkeypatch):
    clocks = {"process_time": iter([1.0, 3.0]).__next__, "perf_counter": iter([5.0, 9.0]).__next__}
    monkeypatch.setattr(command, "time", SimpleNamespace(**clocks))
    assert command.timed(lambda: None, "cpu", core_seconds=True) == 2
    assert command.timed(lambda: None, "cpu") == 4


def test_memory_is_the_most_that_lives_at_a_time():
    def step():
        first = torch.zeros(1000, dtype=torch.float64)
        del first
        second = torch.zeros(500, dtype=torch.float64)
        return second + 1

    assert 8000 <= command.peak_memory(step, "cpu") < 9000


def cli_args(config, *words):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(config), *words])


def test_options_that_exclude_each_other(config, capsys):
    assert cli.main(["bench", str(config), "--cuda-graph"]) == 2
    assert "--cuda-graph needs --device cuda" in capsys.readouterr().err
    for other in ("--data", "--end-to-end"):
        assert cli.main(["bench", str(config), "--core-seconds", other]) == 2
        assert "--core-seconds is for models on --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data --dtype bfloat16", "--dtype has no effect with --data: leave it out"),
        ("--data --compile", "--compile has no effect with --data"),
        ("--data --batch-size 4", "--batch-size has no effect with --data"),
        ("--data --no-memory", "--no-memory has no effect with --data"),
        ("--data --device cuda", "--device has no effect with --data"),
        ("--end-to-end --modes train", "--modes has no effect with --end-to-end"),
        ("--end-to-end --dtype bfloat16", "with --end-to-end: set TEST.PRECISION in the rows"),
        ("--end-to-end --batches 3", "--batches has no effect with --end-to-end"),
        ("--workers 2", "--workers is of a loader: add --data or --end-to-end"),
        ("--batches 3", "--batches is of a loader: add --data"),
        (
            "--cast-weights --dtype bfloat16 --modes train",
            "--cast-weights is of evaluation: add ev",
        ),
        ("--compile-mode reduce-overhead", "--compile-mode needs --compile"),
        ("--repeats 0", "--repeats is 0: use 1 or more"),
        ("--warmup -1", "--warmup is -1: use 0 or more"),
        ("--batch-size 0", "--batch-size is 0: use 1 or more"),
        ("--frames 8 0", "--frames is 8 0: use 1 or more"),
        ("--threads 0", "--threads is 0: use 1 or more"),
        ("--modes eval eval", "--modes is eval eval: name each once"),
        ("--frames 8 8", "--frames is 8 8: name each once"),
    ],
)
def test_an_option_without_effect_is_refused_before_a_config_is_read(words, message, capsys):
    assert cli.main(["bench", "no-such-file.yaml", *words.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "words", "message"),
    [
        ("TEST.PRECISION=bfloat16", "", "use --dtype bfloat16 --cast-weights, or TEST.PRECISION="),
        ("TEST.COMPILE=reduce-overhead", "", "use --compile --compile-mode reduce-overhead, or"),
        ("TRAIN.MIXED_PRECISION=True", "", "use --dtype bfloat16 or float16, or TRAIN.MIXED_PREC"),
        ("MODEL.FLOAT32_MATMUL_PRECISION=high", "", "'' in stock, 'high' in b, but rows that are"),
        (
            "TEST.COMPILE=slow",
            "",
            "TEST.COMPILE is 'slow': use one of '', default, reduce-overhead",
        ),
    ],
)
def test_a_key_that_steps_do_not_follow_is_refused(config, capsys, key, words, message):
    assert cli.main(["bench", f"stock={config}", f"b={config},{key}", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_keys_that_agree_with_the_options_or_the_modes_are_accepted(config):
    keys = ["TEST.PRECISION=bfloat16", "TEST.COMPILE=default", "TRAIN.MIXED_PRECISION=True"]
    cfg = spec.read_config(spec.parse_row(",".join([str(config), *keys])))
    words = ["--dtype", "bfloat16", "--cast-weights", "--compile"]
    checks.keys_of_steps(cli_args(config, *words))(cfg)
    with pytest.raises(ValueError, match=r"TEST\.COMPILE is 'default', but an option"):
        checks.keys_of_steps(cli_args(config, *words, "--compile-mode", "max-autotune"))(cfg)
    checks.keys_of_steps(cli_args(config, "--dtype", "float16", "--modes", "train"))(cfg)


def test_float32_products_have_the_precision_of_all_rows(config, monkeypatch):
    found, timed = set(), command.timed

    def watched(*args):
        found.add(torch.get_float32_matmul_precision())
        return timed(*args)

    monkeypatch.setattr(command, "timed", watched)
    words = ["--modes", "eval", "--repeats", "1", "--warmup", "0", "--no-memory"]
    key = "MODEL.FLOAT32_MATMUL_PRECISION=medium"
    assert cli.main(["bench", *[f"{n}={config},{key}" for n in "ab"], *words]) == 0
    assert found == {"medium"} and torch.get_float32_matmul_precision() == "highest"


def test_steps_are_compiled_in_the_mode_of_the_option(config, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **words: calls.append(words) or model)
    for words in ([], ["--compile-mode", "reduce-overhead"]):
        args = cli_args(config, "--compile", *words)
        command.make_step(torch.nn.Identity(), (3, 1, 1, 1), "eval", args)
    assert [each["mode"] for each in calls] == ["default", "reduce-overhead"]


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_as_in_an_evaluation_by_test_precision(config):
    """One cast less for each weight and bias of a linear or convolutional layer; the outputs are
    those of both engines' evaluation."""
    row, casts, outputs = spec.parse_row(f"{config},STTS.ENABLE=True"), [], []
    model, shapes = spec.build(row, "cpu")
    ways = [cli_args(config, "--dtype", "bfloat16", *more) for more in ([], ["--cast-weights"])]
    for args in ways:
        torch.manual_seed(0)
        step = command.make_step(model, shapes["eval"], "eval", args)
        with command.cast_weights([model], "eval", args), Casts() as counter:
            outputs.append(step())
        casts.append(counter.count)
    layers = len([m for m in model.modules() if type(m) in LAYERS])
    assert casts[0] - casts[1] > layers - 10  # those of scorers are in float32
    torch.manual_seed(0)
    clips = torch.randn(2, *shapes["eval"])
    with torch.no_grad(), evaluating(model.eval(), "bfloat16", ""):
        assert torch.equal(outputs[1], model(clips))
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_training_step_has_gradients_beside_weights_that_are_cast(config, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    words = ["bench", str(config), "--dtype", "bfloat16", "--cast-weights", "--json", str(path)]
    assert cli.main([*words, "--repeats", "1", "--warmup", "0"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["seconds"].keys() == row["memory"].keys() == {"eval", "train"}
    # The originals are kept: both copies are in memory.
    assert row["memory"]["eval"] > 5 * row["parameters"]
    assert cli.main(["bench", str(config), "--cast-weights"]) == 2
    assert "--cast-weights needs --dtype bfloat16 or float16" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph_replays_the_model(config):
    row = spec.parse_row(f"{config},STTS.ENABLE=True")
    args = cli_args(config, "--device", "cuda", "--cuda-graph")
    model, shapes = spec.build(row, "cuda")
    command.capture(command.make_step(model, shapes["eval"], "eval", args))()
    torch.cuda.synchronize()


def test_memory_of_a_cuda_graph_is_that_of_its_capture(config, monkeypatch):
    """A replay allocates nothing."""

    def capture(step):
        step()
        return lambda: None

    monkeypatch.setattr(command, "capture", capture)
    memory = {}
    for words in ([], ["--cuda-graph"]):
        row = spec.parse_row(str(config))
        command.measure([row], cli_args(config, "--modes", "eval", "--repeats", "1", *words))
        memory[len(words)] = row.memory["eval"] - 4 * row.parameters
    assert memory[1] >= memory[0] > 0


# ---- rows that are compared -----------------------------------------------------------------


def test_all_rows_that_cannot_be_built_are_named_before_anything_is_measured(config, capsys):
    rows = [str(config), f"odd={config},MVIT.DEPTH=-1", f"none={config},MODEL.MODEL_NAME=Nothing"]
    assert cli.main(["bench", *rows]) == 2
    out, err = capsys.readouterr()
    assert "row odd cannot be built by standalone: " in err
    assert "row none cannot be built by standalone: MODEL.MODEL_NAME is 'Nothing'" in err
    assert "GFLOPs" not in out + err.replace("stts: error", "")


def test_table_counts_views_and_names_what_was_published():
    stock = spec.BenchSpec("stock", "", gflops=2.0, views=(10, 3), seconds={"eval": [1.0]})
    ours = spec.BenchSpec("ours", "", gflops=1.0, views=(5, 1), seconds={"eval": [1.0]})
    assert "published" not in command.table([stock, ours], 1)
    stock.published = Published(77.0, "a zoo", (5, 1))
    ours.published = Published(76.6, "a paper")
    head, _, first, second = command.table([stock, ours], 1).splitlines()
    assert "| views | GFLOPs / video | published top-1 |" in head
    assert "| 2.00 | 10 x 3 | 60.00 | 77.0 of 5 x 1 (a zoo) |" in first  # its own views
    assert "| 1.00 | 5 x 1 | 5.00 | 76.6 (a paper) |" in second


@pytest.fixture
def checkout(tmp_path):
    """A checkout of SlowFast, as far as it is looked at."""
    root = tmp_path / "checkout"
    (root / "slowfast" / "config").mkdir(parents=True)
    (root / "slowfast" / "config" / "defaults.py").touch()
    (root / "MODEL_ZOO.md").write_text("| config | top1 |\n| - | - |\n| Kinetics/MINE | 99.9 |\n")
    return root


def top1(root, name, dataset, views=None):
    path = root / "configs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    found = published(str(path), dataset, views)
    return found and found.top1


def test_published_numbers_are_of_the_very_config_and_dataset(checkout, tmp_path):
    assert top1(checkout, "Kinetics/MVITv2_S_16x4", "kinetics") == 81.0
    assert top1(checkout, "SSv2/MVITv2_S_16x4", "ssv2") == 68.2
    assert top1(checkout, "Kinetics/MVITv2_S_16x4", "ssv2") is None
    assert top1(checkout, "Kinetics/pytorchvideo/X3D_M", "ptvkinetics") == 75.94
    assert top1(checkout, "Kinetics/c2/SLOWFAST_8x8_R50", "kinetics") == 77.0
    for name in ("Kinetics/SLOWFAST_8x8_R50", "Kinetics/MINE", "Charades/SLOWFAST_16x8_R50"):
        assert top1(checkout, name, "kinetics") is None
    # Files of the same name elsewhere are anybody's.
    assert top1(tmp_path, "Kinetics/MVITv2_S_16x4", "kinetics") is None


def test_of_several_results_the_one_of_these_views_is_named(checkout):
    name = "Kinetics/X3D_M"
    assert top1(checkout, name, "kinetics", (10, 1)) == 75.1
    assert [top1(checkout, name, "kinetics", views) for views in ((10, 3), (1, 1))] == [76.2] * 2


def test_ours_have_the_papers_numbers_if_there_are_any():
    found = published("STTS_MVIT_B_16x4_T0_0.5_S4_0.7", "kinetics")
    assert (found.top1, found.gflops, found.views) == (76.6, 23.3, None)
    assert published("SSv2/STTS_MVIT_B_16x4_T0_0.9_S4_0.9", "ssv2") is None
    assert published("STTS_SWIN_T_32x2_T0_0.9", "kinetics") is None


def test_every_published_number_is_of_a_config_that_there_is():
    configs = Path(__file__).parents[3] / "configs"
    ours = [name for name in TABLE if Path(name).name.startswith("STTS_")]
    assert len(ours) == 10 and all((configs / f"{name}.yaml").is_file() for name in ours)
    for results in (each for by_dataset in TABLE.values() for each in by_dataset.values()):
        assert results and len({each.views for each in results}) == len(results)


def test_a_changed_config_has_no_published_number(config, monkeypatch):
    monkeypatch.setattr(spec, "published", lambda *args: Published(70.0, "a zoo"))
    rows = [spec.parse_row(f"{config}{keys}") for keys in ("", ",STTS.ENABLE=True")]
    for row in rows:
        spec.build(row, "cpu")
    assert [row.published for row in rows] == [Published(70.0, "a zoo"), None]


# ---- loaders and whole tests ----------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A config of 16 training and 8 test videos, with 2 views of each."""
    folder = tmp_path_factory.mktemp("videos")
    make_data.write_dataset(str(folder), "needle", 16, 8, seed=0)
    keys = make_data.config(str(folder), 0)
    keys["TRAIN"]["BATCH_SIZE"] = 4
    keys["TEST"].update(BATCH_SIZE=5, NUM_ENSEMBLE_VIEWS=2)
    make_data.write_config(str(folder / "config.yaml"), keys)
    return folder / "config.yaml"


def test_loader_is_measured_alone(videos, tmp_path, capsys):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "data.png"
    words = ["bench", f"a={videos}", "--data", "--batches", "2", "--workers", "0", "1"]
    assert cli.main([*words, "--json", str(numbers), "--plot", str(picture)]) == 0
    rows = json.loads(numbers.read_text())
    assert [(row["split"], row["workers"], row["clips"]) for row in rows] == [
        *(("train", 0, 8), ("train", 1, 8), ("test", 0, 10), ("test", 1, 10)),
    ]
    for row in rows:
        views = 2 if row["split"] == "test" else 1
        assert row["clips / s"] == pytest.approx(views * row["videos / s"])
        assert (row["core-ms / clip"] is None) is (row["workers"] == 1)
    assert "| a | train | 0 | 8 |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_whole_test_is_split_into_waiting_and_computing(videos, tmp_path, monkeypatch, capsys):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "test.png"
    words = ["bench", f"a={videos}", f"b={videos},TEST.NUM_ENSEMBLE_VIEWS=1", "--end-to-end"]
    assert cli.main([*words, "--json", str(numbers), "--plot", str(picture)]) == 0
    rows = json.loads(numbers.read_text())
    assert [(row["row"], row["videos"]) for row in rows] == [("a", 8), ("b", 8)]
    for row in rows:
        assert min(row["waiting s"], row["computing s"]) > 0
        assert row["seconds"] == pytest.approx(row["waiting s"] + row["computing s"])
        assert row["videos / s"] == pytest.approx(8 / row["seconds"])
    assert "| a | 0 | 8 |" in capsys.readouterr().out and picture.is_file()


def test_an_interrupted_test_keeps_what_it_measured(videos, tmp_path, monkeypatch, capsys):
    times, numbers = iter([(1.0, 2.0)]), tmp_path / "numbers.json"

    def run_test(*args):
        for each in times:
            return each
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_loader, "run_test", run_test)
    words = ["bench", f"a={videos}", f"b={videos}", "--end-to-end", "--json", str(numbers)]
    assert cli.main(words) == 130
    assert [row["seconds"] for row in json.loads(numbers.read_text())] == [3.0]
    assert "| a | 0 | 8 | 3 |" in capsys.readouterr().out


def test_a_whole_test_runs_in_the_precision_of_its_row(videos, monkeypatch):
    def run_test(row, loader, model, device):
        half = torch.is_autocast_enabled("cpu")
        return 1.0 + half, 1.0 + (torch.get_float32_matmul_precision() == "high")

    monkeypatch.setattr(bench_loader, "run_test", run_test)
    keys = "TEST.PRECISION=bfloat16,MODEL.FLOAT32_MATMUL_PRECISION=high"
    rows = [spec.parse_row(f"{videos},{keys}"), spec.parse_row(f"{videos}")]
    found = list(
        (each["waiting s"], each["computing s"])
        for each in bench_loader.measure_tests(rows, cli_args(videos, "--end-to-end"))
    )
    assert found == [(2.0, 2.0), (1.0, 1.0)]


def test_waiting_is_what_the_loader_takes(videos):
    class Clock:
        now = 0.0

    clock = Clock()

    def loader():
        for _ in range(3):
            clock.now += 5
            yield (torch.zeros(2, 3, 1, 2, 2),)
        clock.now += 1

    def model(clips):
        clock.now += 2
        return clips

    row = spec.BenchSpec("a", str(videos), engine="slowfast")
    times = bench_loader.run_test(row, loader(), model, "cpu", lambda: clock.now)
    assert times == (16, 6)


def test_data_that_cannot_be_read_is_named_first(videos, capsys):
    rows = [str(videos), f"gone={videos},DATA.PATH_TO_DATA_DIR=/nowhere"]
    assert cli.main(["bench", *rows, "--data"]) == 2
    assert "row gone has data that cannot be read by standalone: " in capsys.readouterr().err
