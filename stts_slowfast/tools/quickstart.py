"""``stts quickstart``: watch selection being learned, from video files to a table and a picture.

Writes videos (`makedata`), trains a small MViT on all tokens, fine-tunes it with learned
selection, and tests both, and uniform and random selection of as many tokens in the model of the
first training. Training and testing are those of ``stts run``; its config files stay in
OUT/configs.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stts_slowfast import selections
from stts_slowfast.standalone import engine
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.standalone.defaults import load_config
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.resume import load_for_test
from stts_slowfast.tools import makedata, visualize
from stts_slowfast.tools.filmstrip import draw

KIND = "square"
NAMES = ("all", "learned", "uniform", "random")
KEEP_TIME = 0.25  # 2 of 8 frames of tokens
KEEP_SPACE = 0.25  # a window of 4 x 4 of 8 x 8 tokens


@dataclass(frozen=True)
class Size:
    """How much work: videos, and epochs of the two trainings."""

    num_train: int
    num_test: int
    epochs_all: int
    epochs_learned: int


FULL = Size(512, 256, 10, 12)
SMOKE = Size(320, 64, 12, 8)


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
    makedata.write_dataset(data_dir, KIND, size.num_train, size.num_test, args.seed)
    write_configs(args.out, size, args.seed)
    for name in NAMES:  # no more: there may be other runs beside them
        shutil.rmtree(os.path.join(args.out, "runs", name), ignore_errors=True)
    results = [run(args.out, name) for name in NAMES]
    results_path = os.path.join(args.out, "results.json")
    with open(results_path, "w") as file:
        json.dump(results, file, indent=1)
    picture = os.path.join(args.out, "filmstrip.png")
    draw_picture(args.out, picture)
    print_table(results)
    print(f"table    {results_path}\npicture  {picture}\nvideos   {data_dir}")
    print(f"configs  {os.path.join(args.out, 'configs')}, each for: stts run --cfg FILE")
    print(f"done in {time.perf_counter() - start:.0f} s")
    return check(results) if args.smoke else 0


# ---- configs --------------------------------------------------------------------------------


def write_configs(out: str, size: Size, seed: int) -> None:
    """Writes ``OUT/configs/NAME.yaml`` for the four ``NAMES``: files as ``stts run`` takes them."""
    os.makedirs(os.path.join(out, "configs"), exist_ok=True)
    for name in NAMES:
        config = makedata.config(os.path.join(out, "data"), KIND, seed)
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
        makedata.write_config(_config_path(out, name), config)


def _stts(scorer: str) -> dict:
    return {
        "ENABLE": True,
        "TIME": {"BLOCKS": [0], "KEEP": [KEEP_TIME], "SCORER": scorer},
        "SPACE": {"BLOCKS": [0], "KEEP": [KEEP_SPACE], "SCORER": scorer, "STRIDE": 1},
        # With few frames to tell apart, more noise: else what scores low at first is never tried.
        "SIGMA": 0.5,
        "FREEZE_BACKBONE_EPOCHS": 1.0,
    }


def _config_path(out: str, name: str) -> str:
    return os.path.join(out, "configs", f"{name}.yaml")


def _checkpoint(out: str, name: str, epochs: int) -> str:
    return os.path.join(out, "runs", name, "checkpoints", f"checkpoint_epoch_{epochs:05d}.pyth")


# ---- runs -----------------------------------------------------------------------------------


class KeptFrames:
    """Sums up, while a model is tested, how many of the frames that show the class it kept."""

    def __init__(self, cfg, truth: dict[str, makedata.Truth]):
        self.cfg, self.truth = cfg, truth
        self.videos = ClipDataset(cfg, "test").videos
        self.kept = self.shown = 0

    def __call__(self, split: str, model, batch) -> None:
        kept = selections(model)
        for item, index in enumerate(batch[2].tolist()):
            shown = shown_frames(self.cfg, self.truth[os.path.basename(self.videos[index].path)])
            self.kept += len(shown & set(visualize.kept_regions(self.cfg, kept, item)))
            self.shown += len(shown)


def run(out: str, name: str) -> dict:
    """Trains where the config says so, and tests; returns a row of results.json."""
    cfg = load_config(_config_path(out, name))
    print(f"\n== {name}: stts run --cfg {_config_path(out, name)}", flush=True)
    if cfg.TRAIN.ENABLE:
        engine.train(cfg)
    watch = KeptFrames(cfg, makedata.read_truth(cfg.DATA.PATH_TO_DATA_DIR))
    tested = engine.test(cfg, watch=watch if cfg.STTS.ENABLE else None)
    return {
        "name": name,
        "top1": round(tested["top1_acc"], 2),
        "frames_kept": round(watch.kept / watch.shown, 4) if cfg.STTS.ENABLE else 1.0,
        "gflops": round(tested["gflops"], 5),
        "clips_per_s": round(tested["clips_per_s"], 1),
    }


def shown_frames(cfg, truth: makedata.Truth) -> set[int]:
    """The frames of tokens that show the class: those with a frame of pixels that does."""
    step = cfg.DATA.SAMPLING_RATE * cfg.MVIT.PATCH_STRIDE[0]
    return {frame // step for frame in truth.frames}


# ---- what is told ---------------------------------------------------------------------------


def draw_picture(out: str, path: str, num_videos: int = 4) -> None:
    """Draws the first test videos of several classes as the learned selection sees them."""
    cfg = load_config(_config_path(out, "learned"))
    model = build_model(cfg)
    load_for_test(cfg, model)
    truth = makedata.read_truth(cfg.DATA.PATH_TO_DATA_DIR)
    strips = []
    for name in sorted(name for name in truth if name.startswith("test"))[:num_videos]:
        clip = visualize.read_clip(cfg, os.path.join(cfg.DATA.PATH_PREFIX, name))
        seen = visualize.look(cfg, model, clip)
        title = f"{name}, class {truth[name].label}: {visualize.predicted(seen.probs, None)}"
        shown = shown_frames(cfg, truth[name])
        strips.append(visualize.make_strip(cfg, clip, seen, title, sorted(shown)))
    draw(strips, path)


def print_table(results: Sequence[dict]) -> None:
    """The rows of results.json as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What selection keeps, and what it costs", title_justify="left")
    table.add_column("tokens")
    for column in ("top-1 %", "true frames kept %", "GFLOPs / clip", "clips / s"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            row["name"],
            f"{row['top1']:.1f}",
            f"{100 * row['frames_kept']:.1f}",
            f"{row['gflops']:.4f}",
            f"{row['clips_per_s']:.0f}",
        )
    Console().print(table)


def check(results: Sequence[dict]) -> int:
    """1, and a sentence, where learned selection does not beat random in accuracy and in frames."""
    learned, other = (next(r for r in results if r["name"] == n) for n in ("learned", "random"))
    failed = [key for key in ("top1", "frames_kept") if not learned[key] > other[key]]
    for key in failed:
        print(f"FAILED: learned {key} {learned[key]} does not beat random's {other[key]}")
    return int(bool(failed))
