"""Measures every file in configs/ and writes README.md's model zoo, beside published numbers.

    python projects/stts/model_zoo.py [CONFIG ...]

Without arguments it measures all of them (some minutes on a CPU) and writes the page; with
arguments it only prints their rows.
"""

import sys
from pathlib import Path

import torch

from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools.bench.published import TABLE, Published

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("README.md")
# The zoo is between these two lines of the page.
START, END = "<!-- model zoo -->\n", "<!-- end of model zoo -->\n"

# The configurations with selection, and the notes that explain their rows.
SELECTION = {
    "Kinetics/RECOMMENDED_MVIT_B_16x4_T0_0.9_S4_0.9": "h",
    "Kinetics/RECOMMENDED_MVITv2_S_16x4_T0_0.9_S4_0.9": "h",
    "Kinetics/RECOMMENDED_VIT_B_16x4_T0_0.9_S4_0.9": "h",
    "Kinetics/RECOMMENDED_TIMESFORMER_8x32_T1_0.9_S4_0.9": "h",
    "Kinetics/RECOMMENDED_SWIN_T_32x2_T0_0.5": "h",
    "Kinetics/STTS_MVIT_B_16x4_T0_0.9_S4_0.9": "",
    "Kinetics/STTS_MVIT_B_16x4_T0_0.8_S4_0.9": "",
    "Kinetics/STTS_MVIT_B_16x4_T0_0.6_S4_0.9": "a",
    "Kinetics/STTS_MVIT_B_16x4_T0_0.5_S4_0.7": "a",
    "Kinetics/STTS_MVIT_B_16x4_T0_0.4_S4_0.6": "a",
    "Kinetics/STTS_MVIT_B_32x3_T0_0.9_S6_0.9": "c",
    "Kinetics/STTS_MVITv2_S_16x4_T0_0.9_S4_0.9": "c",
    "Kinetics/STTS_VIT_B_16x4_T0_0.9_S4_0.9": "c",
    "Kinetics/STTS_TIMESFORMER_8x32_T0_0.9_S4_0.9": "c",
    "Kinetics/STTS_TIMESFORMER_96x4_T0_0.5_S4_0.9": "c",
    **{f"Kinetics/STTS_SWIN_B_32x2_T0_{keep}": "b" for keep in (0.9, 0.8, 0.6, 0.5, 0.4)},
    **{
        f"Kinetics/STTS_SWIN_{size}_32x2_T0_{keep}": "c"
        for size in "ST"
        for keep in (0.9, 0.8, 0.6, 0.5, 0.4)
    },
    "SSv2/STTS_MVIT_B_16x4_T0_0.9_S4_0.9": "d",
    "SSv2/STTS_MVITv2_S_16x4_T0_0.9_S4_0.9": "d",
    "SSv2/STTS_TIMESFORMER_8_T0_0.9_S4_0.9": "c",
}

# The backbones without selection: name, a config to build it from, published top-1 (%), GFLOPs of
# one view and millions of parameters, notes.
BACKBONES = [
    ("MViT-B 16x4", "Kinetics/STTS_MVIT_B_16x4_T0_0.9_S4_0.9", 78.4, 70.5, 36.6, ""),
    ("MViT-B 32x3", "Kinetics/STTS_MVIT_B_32x3_T0_0.9_S6_0.9", 80.4, None, None, "e"),
    ("MViTv2-S 16x4", "Kinetics/STTS_MVITv2_S_16x4_T0_0.9_S4_0.9", 81.0, 64, 34.5, ""),
    ("ViT-B 16x4", "Kinetics/STTS_VIT_B_16x4_T0_0.9_S4_0.9", 81.3, 180, 87, ""),
    ("TimeSformer 8x32", "Kinetics/STTS_TIMESFORMER_8x32_T0_0.9_S4_0.9", 77.9, 197, 121.4, "f"),
    ("TimeSformer-L 96x4", "Kinetics/STTS_TIMESFORMER_96x4_T0_0.5_S4_0.9", 80.6, 2380, 121.4, "f"),
    ("Video Swin-T 32x2", "Kinetics/STTS_SWIN_T_32x2_T0_0.9", 78.8, 87.9, 28, ""),
    ("Video Swin-S 32x2", "Kinetics/STTS_SWIN_S_32x2_T0_0.9", 80.6, 165.9, 50, ""),
    ("Video Swin-B 32x2", "Kinetics/STTS_SWIN_B_32x2_T0_0.9", 82.7, 281.6, 88, "g"),
    ("MViT-B 16x4, SSv2", "SSv2/STTS_MVIT_B_16x4_T0_0.9_S4_0.9", 64.7, 70.5, 36.6, ""),
    ("MViTv2-S 16x4, SSv2", "SSv2/STTS_MVITv2_S_16x4_T0_0.9_S4_0.9", 68.2, 64, 34.4, ""),
    ("TimeSformer 8, SSv2", "SSv2/STTS_TIMESFORMER_8_T0_0.9_S4_0.9", 59.1, 197, 121.4, "f"),
]

HEAD = """## Model zoo

Written by `python projects/stts/model_zoo.py`. **Published** columns are what the methods' authors
state. **Measured** columns are counted here, on the model that the configuration builds: GFLOPs of
one view (billions of multiply-adds, fvcore, scorers included) and millions of parameters. No
accuracy in these tables was measured by this project.

"""

NOTES = """
Where the numbers differ, and other remarks:

- **a** The released code of STTS, with the keep ratios of its released configs, gives our counts:
  38.46, 26.95 and 18.46 GFLOPs with fvcore. The paper does not state how 38.1, 23.3 and 12.1 were
  counted.
- **b** The released code of STTS, with the keep ratios of its released configs, gives our counts
  to every digit shown (261.51, 241.09, 220.68, 210.47, 102.47 with fvcore). Attention windows span
  8 token frames: 14, 12, 10 and 9 kept frames are padded to 16 inside attention, which then counts
  as much as with 16; 6 frames make one window of 6. `STTS.FUSED_ATTENTION` computes no padding, and
  is not counted. The paper does not state how its numbers were counted.
- **c** The paper of STTS has no such row. The file lists the choices of this project.
- **d** The paper reports Something-Something v2, but its configs were not released. Keep ratios
  are those of the Kinetics headline point, and no published number is shown.
- **e** Top-1 is that of SlowFast's MVIT_B_32x3_CONV, whose 24 blocks this config builds. SlowFast
  states no GFLOPs for it. The MViT paper's Kinetics-400 row of that name (80.2, 170 GFLOPs) has 16
  blocks.
- **f** GFLOPs are computed from the paper's TFLOPs per video (0.59 and 7.14), a third of it per
  view. Top-1 is that of the released models, which were trained again after the paper. Parameters
  are the paper's for one model with any number of frames and classes.
- **g** Pre-trained on ImageNet-21K.
- **h** The recommended recipe, which has no published numbers. The other configs have the paper's
  recipe.
"""


def measure(name: str, enable: bool) -> tuple[float, float]:
    """GFLOPs of one view and millions of parameters of ``configs/{name}.yaml``."""
    cfg = load_config(str(ROOT / "configs" / f"{name}.yaml"), ["STTS.ENABLE", enable])
    model = build_model(cfg).eval()
    size = cfg.DATA.TRAIN_CROP_SIZE
    with torch.no_grad():
        gflops = count_gflops(model, torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, size, size))
    return gflops, sum(p.numel() for p in model.parameters()) / 1e6


def cell(value: float | None, digits: int | None = None) -> str:
    """A table cell, with as many digits after the point if given."""
    if value is None:
        return "–"
    return f"{value:g}" if digits is None else f"{value:.{digits}f}"


def selection_row(name: str) -> str:
    """The row of a configuration with selection."""
    (result,) = TABLE.get(name, {}).get("kinetics", (Published(None, ""),))
    gflops, params = measure(name, True)
    cells = [
        f"[{name}](../../configs/{name}.yaml)",
        cell(result.top1, 1),
        cell(result.gflops),
    ]
    return " | ".join(["", *cells, cell(gflops, 2), cell(params, 2), SELECTION[name], ""]).strip()


def backbone_row(row: tuple) -> str:
    """The row of a backbone without selection."""
    name, config, top1, published, millions, notes = row
    gflops, params = measure(config, False)
    cells = [
        name,
        cell(top1, 1),
        cell(published),
        cell(gflops, 2),
        cell(millions),
    ]
    return " | ".join(["", *cells, cell(params, 2), notes, ""]).strip()


def page() -> str:
    """The page with its model zoo measured again."""
    lines = ["### Backbones without selection\n"]
    lines.append(
        "| backbone | top-1, published | GFLOPs, published | GFLOPs, measured "
        "| params (M), published | params (M), measured | notes |"
    )
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in BACKBONES:
        lines.append(log_row(backbone_row(row)))
    lines.append("\n### With selection\n")
    lines.append(
        "| configuration | top-1, published | GFLOPs, published | GFLOPs, measured "
        "| params (M), measured | notes |"
    )
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name in SELECTION:
        lines.append(log_row(selection_row(name)))
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    return before + START + HEAD + "\n".join(lines) + "\n" + NOTES + END + after


def log_row(row: str) -> str:
    """Prints a row to stderr, as progress."""
    print(row, file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    if sys.argv[1:]:
        for path in sys.argv[1:]:
            print(
                selection_row(
                    str(Path(path).resolve().relative_to(ROOT / "configs").with_suffix(""))
                )
            )
    else:
        PAGE.write_text(page())
