"""``stts quickstart``: watch selection being learned, from video files to a table and a picture.

Writes videos (`makedata`), trains a small MViT on all tokens, fine-tunes it with learned
selection, and tests both, and uniform and random selection of as many tokens in the model of the
first training. Training and testing are those of ``stts run``; its config files stay in
OUT/configs.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from stts_slowfast import selections
from stts_slowfast.checkpoints.names import checkpoint_name
from stts_slowfast.standalone import engine
from stts_slowfast.standalone.checkpointing import load_for_test
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools.demo import make_data
from stts_slowfast.tools.report.command import write_report
from stts_slowfast.tools.report.run_log import read_output
from stts_slowfast.tools.study.command import StudyRow, quiet_logs
from stts_slowfast.tools.study.evaluate import CoverageStats, find_truth, shown_boxes
from stts_slowfast.tools.study.results import write_results
from stts_slowfast.tools.visualize import read_clip
from stts_slowfast.visualization import (
    FULL_FRAME,
    draw,
    inspect_clip,
    kept_regions,
    make_film_strip_row,
    predicted,
)

KIND = "clutter"
NAMES = ("all", "learned", "uniform", "random")
KEEP = 0.25  # a window of 4 x 4 of 8 x 8 tokens


@dataclass(frozen=True)
class Size:
    """How much work: videos, and epochs of the two trainings."""

    num_train: int
    num_test: int
    epochs_all: int
    epochs_learned: int


FULL = Size(1024, 256, 6, 3)
SMOKE = Size(512, 64, 8, 6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts quickstart``."""
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="of videos and training")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a shorter one, which fails where learned selection does not beat random",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the whole job; returns 1 where ``--smoke`` finds learned no better than random."""
    start = time.perf_counter()
    size = SMOKE if args.smoke else FULL
    data_dir = os.path.join(args.out, "data")
    print(f"writing {size.num_train + size.num_test} videos to {data_dir}", flush=True)
    make_data.write_dataset(data_dir, KIND, size.num_train, size.num_test, args.seed)
    write_configs(args.out, size, args.seed)
    for name in NAMES:  # no more: there may be other runs beside them
        shutil.rmtree(os.path.join(args.out, "runs", name), ignore_errors=True)
    # On a terminal each run shows a bar; its lines are in its stdout.log either way.
    with quiet_logs() if sys.stdout.isatty() else contextlib.nullcontext():
        results = [run(args.out, name) for name in NAMES]
    write_results(args.out, results)
    picture, page = (os.path.join(args.out, name) for name in ("filmstrip.png", "report.html"))
    draw_picture(args.out, picture)
    runs = [os.path.join(args.out, "runs", name) for name in NAMES]
    outputs = [read_output(folder) for folder in (*runs, args.out)]
    write_report(page, outputs, 4, "Quickstart: selection learned on real video")
    print_table(results)
    print(
        f"table    {os.path.join(args.out, 'study.csv')}\npicture  {picture}\nvideos   {data_dir}"
    )
    print(f"configs  {os.path.join(args.out, 'configs')}, each for: stts run --cfg FILE")
    print(f"done in {time.perf_counter() - start:.0f} s; all of it in one page, to open: {page}")
    return check(results) if args.smoke else 0


# ---- configs --------------------------------------------------------------------------------


def write_configs(out: str, size: Size, seed: int) -> None:
    """Writes ``OUT/configs/NAME.yaml`` for the four ``NAMES``: files as ``stts run`` takes them."""
    os.makedirs(os.path.join(out, "configs"), exist_ok=True)
    for name in NAMES:
        config = make_data.config(os.path.join(out, "data"), seed)
        config["OUTPUT_DIR"] = os.path.join(out, "runs", name)
        trained = _checkpoint(out, "all", size.epochs_all)
        if name == "all":
            config["SOLVER"]["MAX_EPOCH"] = size.epochs_all
        else:
            config["STTS"] = _stts(name)
        if name == "learned":
            config["SOLVER"].update(BASE_LR=1e-3, MAX_EPOCH=size.epochs_learned, WARMUP_EPOCHS=0.0)
            config["TRAIN"].update(CHECKPOINT_FILE_PATH=trained, CHECKPOINT_EPOCH_RESET=True)
        if name in ("uniform", "random"):
            config["TRAIN"]["ENABLE"] = False
            config["TEST"]["CHECKPOINT_FILE_PATH"] = trained
        make_data.write_config(_config_path(out, name), config)


def _stts(scorer: str) -> dict:
    return {
        "ENABLE": True,
        "TIME": {"BLOCKS": [], "KEEP": []},
        "SPACE": {"BLOCKS": [0], "KEEP": [KEEP], "SCORER": scorer, "STRIDE": 1},
        "FREEZE_BACKBONE_EPOCHS": 0.5,
    }


def _config_path(out: str, name: str) -> str:
    return os.path.join(out, "configs", f"{name}.yaml")


def _checkpoint(out: str, name: str, epochs: int) -> str:
    return os.path.join(out, "runs", name, "checkpoints", checkpoint_name(epochs))


# ---- runs -----------------------------------------------------------------------------------


class Watch:
    """Sums up, while a model is tested, which frames and places it kept."""

    def __init__(self, cfg):
        self.cfg, self.places = cfg, CoverageStats.of(cfg)
        self.videos = ClipDataset(cfg, "test").videos
        self.whole = dict.fromkeys(range(len(self.places.frames)), FULL_FRAME)

    def __call__(self, split: str, model, batch) -> None:
        kept = selections(model) if self.cfg.STTS.ENABLE else None
        for item, index in enumerate(batch[2].tolist()):
            name = os.path.basename(self.videos[index].path)
            regions = self.whole if kept is None else kept_regions(self.cfg, kept, item)
            self.places.add(self.cfg, regions, name)


def run(out: str, name: str) -> dict:
    """Trains where the config says so, and tests; returns a row as `stts study` writes them."""
    cfg = load_config(_config_path(out, name))
    print(f"\n== {name}: stts run --cfg {_config_path(out, name)}", flush=True)
    if cfg.TRAIN.ENABLE:
        engine.train(cfg)
    watch = Watch(cfg)
    tested = engine.test(cfg, watch=watch)
    share = KEEP if cfg.STTS.ENABLE else None
    row = StudyRow(None, share, name, trained=name == "learned", seed=cfg.RNG_SEED)
    return {
        "name": row.name,
        "dimension": row.dimension,
        **asdict(row),
        "top1": round(tested["top1_acc"], 2),
        "top5": round(tested["top5_acc"], 2),
        "gflops": round(tested["gflops"], 5),
        "clips_per_s": round(tested["clips_per_s"], 1),
        "agreement": None,
        **watch.places.summary(),
    }


# ---- what is told ---------------------------------------------------------------------------


def draw_picture(out: str, path: str, num_videos: int = 4) -> None:
    """Draws the first test videos of several classes as the learned selection sees them."""
    cfg = load_config(_config_path(out, "learned"))
    model = build_model(cfg)
    load_for_test(cfg, model)
    truth = find_truth(cfg)
    strips = []
    for name in sorted(name for name in truth if name.startswith("test"))[:num_videos]:
        clip = read_clip(cfg, os.path.join(cfg.DATA.PATH_PREFIX, name))
        seen = inspect_clip(cfg, model, clip)
        title = f"{name}, class {truth[name].label}: {predicted(seen.probs, None)}"
        shown = sorted(shown_boxes(cfg, truth[name]))
        strips.append(make_film_strip_row(cfg, clip, seen, title, shown))
    draw(strips).savefig(path)


def print_table(results: Sequence[dict]) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What selection keeps, and what it costs", title_justify="left")
    table.add_column("tokens")
    for column in ("top-1 %", "object kept %", "GFLOPs / clip", "clips / s"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            row["scorer"],
            f"{row['top1']:.1f}",
            f"{100 * row['box_recall']:.1f}",
            f"{row['gflops']:.4f}",
            f"{row['clips_per_s']:.0f}",
        )
    Console().print(table)


def check(results: Sequence[dict]) -> int:
    """1, and a sentence, where learned selection does not beat random in accuracy and in place."""
    learned, other = (next(r for r in results if r["scorer"] == n) for n in ("learned", "random"))
    failed = [key for key in ("top1", "box_recall") if not learned[key] > other[key]]
    for key in failed:
        print(f"FAILED: learned {key} {learned[key]} does not beat random's {other[key]}")
    return int(bool(failed))
