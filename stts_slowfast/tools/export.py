"""``stts export``: an evaluation model with its selection, for torch.export or ONNX."""

import argparse
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from stts_slowfast.checkpoints.io import atomic_write, check_output_path, save_bytes
from stts_slowfast.plugins import require
from stts_slowfast.tools.cli import add_checkpoint, add_opts

# By how much the logits of an exported model may differ from the model's, as a share of the
# largest one.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts export``."""
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config of the model")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file to write: .pt2 (torch.export) or .onnx"
    )
    add_checkpoint(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="clips in a batch, fixed")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Exports the model, runs what was written, and compares.

    Raises:
        ValueError: for an unknown kind of file, packages that are missing, and an exported model
            that computes something else than the model.
    """
    from stts_slowfast.standalone.checkpointing import load_for_test
    from stts_slowfast.standalone.config import load_config
    from stts_slowfast.standalone.model import build_model

    if Path(args.out).suffix not in (".pt2", ".onnx"):
        raise ValueError(f"--out {args.out}: write a .pt2 (torch.export) or an .onnx file")
    sources = [path for path in (args.cfg, args.checkpoint) if path]
    check_output_path(args.out, args.force, sources)
    cfg = load_config(args.cfg, args.opts)
    if args.checkpoint:
        cfg.TEST.CHECKPOINT_FILE_PATH = args.checkpoint
    model = build_model(cfg)
    load_for_test(cfg, model)
    size = cfg.DATA.TRAIN_CROP_SIZE
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(args.batch_size, 3, cfg.DATA.NUM_FRAMES, size, size, generator=generator)
    difference = export(model, clips, args.out, args.force, sources)
    print(f"{args.out}: clips {tuple(clips.shape)}, logits differ by at most {difference:.1e}")
    return 0


def export(
    model: nn.Module,
    clips: torch.Tensor,
    path: str,
    overwrite: bool = True,
    sources: Sequence[str] = (),
) -> float:
    """Writes ``model`` in evaluation mode for inputs of the shape of ``clips``.

    Args:
        model: a standalone model on the CPU; maps ``(B, 3, T, H, W)`` to ``(B, classes)``.
        clips: an example batch. Shapes are fixed to it; what is selected depends on the input.
        path: ``.pt2`` for ``torch.export``, ``.onnx`` for ONNX.
        overwrite, sources: see :func:`atomic_write`.

    Returns:
        By how much the logits of what was written differ from the model's at most, on another
        batch than the example.

    Raises:
        ValueError: where they differ by more than ``TOLERANCE``, and for missing packages; nothing
            is written then.
    """
    model.eval()
    other = clips.flip(0).roll(1, dims=2) * 0.5
    make, run = (_onnx, _run_onnx) if Path(path).suffix == ".onnx" else (_pt2, _run_pt2)
    with torch.no_grad(), warnings.catch_warnings():
        # Selectors remember what they kept, an exported program has no use for it.
        warnings.filterwarnings("ignore", "The tensor attributes .*kept")
        expected = model(other)
        data = make(model, clips)
        logits = run(data, other)
    difference = (logits - expected).abs().max().item()
    if difference > TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ValueError(f"{path} gives logits that differ from the model's by {difference:.1e}")
    atomic_write(path, lambda partial: save_bytes(data, partial), overwrite, sources)
    return difference


# Both are made in memory: PyTorch's writer of files aborts the interpreter where the disk is full.


def _pt2(model: nn.Module, clips: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (clips,)), buffer)
    return buffer.getvalue()


def _run_pt2(data: bytes, clips: torch.Tensor) -> torch.Tensor:
    return torch.export.load(io.BytesIO(data)).module()(clips)


def _onnx(model: nn.Module, clips: torch.Tensor) -> bytes:
    require("onnxruntime")
    require("onnxscript")  # torch.onnx's translator
    names = {"input_names": ["clips"], "output_names": ["logits"]}
    program = torch.onnx.export(model, (clips,), dynamo=True, verbose=False, **names)
    return program.model_proto.SerializeToString()


def _run_onnx(data: bytes, clips: torch.Tensor) -> torch.Tensor:
    runtime = require("onnxruntime")
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"clips": clips.numpy()})[0])
