"""The report is one page without other files; it has the runs' numbers, and fits a phone."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stts_slowfast import build_model, load_config
from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.checkpoints.io import save
from stts_slowfast.standalone import engine
from stts_slowfast.tools import cli
from stts_slowfast.tools.demo import make_data
from stts_slowfast.tools.report import command, run_log

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
VOID = {"meta", "img", "br", "link"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output folders of a baseline, of a run with selection, and of a study."""
    folder = tmp_path_factory.mktemp("report")
    make_data.write_dataset(str(folder), "needle", 32, 8, seed=0)
    keys = make_data.config(str(folder), 0)
    keys["DATA_LOADER"]["NUM_WORKERS"] = 0
    keys["SOLVER"].update(MAX_EPOCH=2, WARMUP_EPOCHS=0.0)
    keys["STTS"] = {"TIME": {"BLOCKS": [0], "KEEP": [0.5]}, "SPACE": {"BLOCKS": []}}
    make_data.write_config(str(folder / "config.yaml"), keys)
    for name, enable in (("all <tokens> $x$", False), ("_half & half", True)):
        opts = ["STTS.ENABLE", enable, "OUTPUT_DIR", str(folder / name)]
        cfg = load_config(str(folder / "config.yaml"), opts)
        engine.train(cfg)
        engine.test(cfg)
    words = ["study", "--cfg", str(folder / "config.yaml"), "--out", str(folder / "study")]
    words += ["--checkpoint", run_log.last_checkpoint(str(folder / "all <tokens> $x$"))]
    words += ["--time", "0.5", "--space", "--both", "--scorers", "uniform"]
    assert cli.main(words) == 0
    return [str(folder / name) for name in ("all <tokens> $x$", "_half & half", "study")]


@pytest.fixture(scope="module")
def path(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert cli.main(["report", *folders, "--strips", "2", "--out", str(path)]) == 0
    return path


class Page(html.parser.HTMLParser):
    """Text, headings, table rows and images; fails if tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.headings, self.rows, self.images = [], [], [], [], []
        self.outside = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs)
        assert tag not in ("script", "link", "iframe", "object")
        self.outside += [attrs[key] for key in ("src", "href") if key in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if not self.open:
            return
        if self.open[-1] in ("h2", "h3"):
            self.headings.append(data)
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_page_is_whole_and_needs_nothing_else(path):
    text = path.read_text()
    page = Page(text)
    assert page.outside and all(source.startswith("data:image/") for source in page.outside)
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text and 'name="viewport"' in text
    sections = ["Results", "Study", "What is kept", "Film strips", "Curves", "Configurations"]
    assert [name for name in page.headings if name in sections] == sections


def test_page_says_what_the_runs_left(path, folders):
    page = Page(path.read_text())
    rows = {row[0]: row[1:] for row in page.rows if row}
    for folder, name in zip(folders, ("all <tokens> $x$", "_half & half")):
        (final,) = (line for line in stats_lines(folder) if "top1_acc" in line)
        assert rows[name][0] == f"{float(final['top1_acc']):.4g}"
    assert float(rows["_half & half"][3]) < float(rows["all <tokens> $x$"][3])  # GFLOPs
    assert rows["STTS.ENABLE"] == ["False", "True"]
    assert "MVIT.DEPTH" not in rows and "OUTPUT_DIR" not in rows
    with open(f"{folders[2]}/study.json") as file:
        study = json.load(file)
    assert rows["time0.5-uniform"][0] == f"{study[1]['top1']:.4g}"
    alts = [image["alt"] for image in page.images]
    assert "accuracy against GFLOPs" in alts and "what was kept of some test videos" in alts
    assert "training loss" in alts and "validation top-1 error (%)" in alts


def stats_lines(folder):
    lines = Path(folder, "json_stats.log").read_text().splitlines()
    return [json.loads(line.partition("json_stats: ")[2]) for line in lines]


def test_strips_that_cannot_be_drawn_leave_the_page(folders, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(folders[1], folder)
    run = run_log.read_output(str(folder))
    opts = ["STTS.ENABLE", True, "DATA.PATH_PREFIX", "/nowhere"]
    cfg = load_config(str(Path(folders[1]).parent / "config.yaml"), opts)
    save_checkpoint(run.checkpoint, build_model(cfg), cfg, 1)
    assert cli.main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text())
    assert any("not drawn: " in words and "/nowhere" in words for words in page.words)
    assert cli.main(["report", str(folder)]) == 2
    assert "report.html already exists" in capsys.readouterr().err
    assert cli.main(["report", str(folder), "--force"]) == 0


def test_a_run_over_a_range_of_budgets_is_drawn_at_its_high_end(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "copy")
    run = run_log.read_output(str(tmp_path / "copy"))
    opts = ["STTS.ENABLE", True, "STTS.TIME.KEEP", [[0.25, 0.9]]]
    cfg = load_config(str(Path(folders[1]).parent / "config.yaml"), opts)
    save_checkpoint(run.checkpoint, build_model(cfg), cfg, 1)
    assert cli.main(["report", str(tmp_path / "copy")]) == 0
    page = Page((tmp_path / "copy" / "report.html").read_text())
    assert "what was kept of some test videos" in [image["alt"] for image in page.images]


def test_folders_without_a_run_are_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no json_stats.log, checkpoint or study.json" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "gone")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_folder_without_run_json_has_its_cost_counted(folders, tmp_path):
    """As a run inside SlowFast leaves it, or a version of this package before 0.2."""
    before = run_log.read_output(folders[1])
    shutil.copytree(folders[1], tmp_path / "copy")
    (tmp_path / "copy" / "run.json").unlink()
    run = run_log.read_output(str(tmp_path / "copy"))
    assert run.gflops == pytest.approx(before.gflops) and run.params == before.params > 0
    assert run.final("top1_acc") == pytest.approx(before.final("top1_acc"), abs=0.01)
    assert {key: value for key, value in run.config.items() if before.config[key] != value} == {}


def test_a_model_of_slowfast_alone_has_a_config_and_no_cost(tmp_path):
    path = tmp_path / "checkpoints" / "checkpoint_epoch_00001.pyth"
    path.parent.mkdir()
    cfg = "MODEL:\n  MODEL_NAME: X3D\n  ARCH: x3d\n"
    save({"model_state": {}, "epoch": 0, "cfg": cfg}, str(path))
    run = run_log.read_output(str(tmp_path))
    assert run.config == {"MODEL.MODEL_NAME": "X3D", "MODEL.ARCH": "x3d"}
    assert (run.gflops, run.params) == (None, None)


def test_lines_of_slowfast_are_read(tmp_path):
    (tmp_path / "stdout.log").write_text(
        '[01/01][INFO] logging.py: 97: json_stats: {"split": "test_iter", "cur_iter": "1"}\n'
        '[01/01] json_stats: {"split": "test_final", "top1_acc": "71.25", "top5_acc": "90.00"}\n'
    )
    (tmp_path / "json_stats.log").write_text(
        'json_stats: {"_type": "val_epoch", "epoch": "1/2", "top1_err": 60.0}\n'
        'json_stats: {"_type": "val_epoch", "epoch": "2/2", "top1_err": 40.0}\n'
        'json_stats: {"_type": "val_epoch", "epoch": "2/2", "top1_err": 30.0}\n'
        'json_stats: {"_type": "val_epo'
    )
    run = run_log.read_output(str(tmp_path))
    assert run.curve("val_epoch", "top1_err") == ([1, 2], [60, 30])
    assert run.final("top1_acc") == 71.25 and run.final("top5_acc") == 90
    (tmp_path / "checkpoints").mkdir()
    for number in (9, 10):
        (tmp_path / "checkpoints" / f"checkpoint_epoch_{number:05d}.pyth").touch()
    assert run_log.last_checkpoint(str(tmp_path)).endswith("00010.pyth")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_without_scrolling_sideways(path, tmp_path, width):
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"]
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [*browser, f"--screenshot={shot}", path.as_uri()], capture_output=True, timeout=180
    )
    assert shot.is_file(), done.stderr.decode()[-500:]
    image = np.array(Image.open(shot).convert("L"))
    assert image.shape[1] == width
    assert (image[:1200] < 128).mean() > 0.005  # there is something on it
    assert (image[:, -8:] > 250).all()  # and nothing touches the right border
    # Asked of the page itself, by a copy that may run a line of script.
    probe = "<script>document.title = document.documentElement.scrollWidth - innerWidth</script>"
    copy = tmp_path / "probe.html"
    text = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text())
    copy.write_text(text.replace("</body>", f"{probe}</body>"))
    done = subprocess.run(
        [*browser, "--dump-dom", copy.as_uri()], capture_output=True, timeout=180, text=True
    )
    assert int(re.search(r"<title>(-?\d+)</title>", done.stdout)[1]) <= 0


def test_page_escapes_names_and_leaves_out_empty_sections():
    text = command.render(title="<b>", results=[["<i>", 1.23456, None]])
    assert "<b>" not in text and "<i>" not in text
    assert "<td>1.235</td><td></td>" in text and "<h2>Curves" not in text


@pytest.mark.parametrize("package", ["jinja2", "pandas"])
def test_a_missing_package_is_one_line(folders, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["report", folders[2], "--out", str(tmp_path / "page.html")]) == 2
    line = f"this needs {package}, which is not installed: pip install 'stts-slowfast[tools]'"
    assert line in capsys.readouterr().err
