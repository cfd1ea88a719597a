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
from stts_slowfast.tools.cli import add_checkpoint, add_config, add_force, add_opts, read_config
from stts_slowfast.tools.inspection import load_trained_model

# Largest difference between the logits of the exported model and the model, as a share of the
# largest logit.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts export``."""
    add_config(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file to write: .pt2 (torch.export) or .onnx"
    )
    add_checkpoint(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="clips in a batch, fixed")
    add_force(parser)
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Exports the model, runs what was written, and compares.

    Raises:
        ValueError: for an unknown file ending, a missing package, or an exported model whose
            logits differ from the model's.
    """
    if Path(args.out).suffix not in (".pt2", ".onnx"):
        raise ValueError(f"--out {args.out}: write a .pt2 (torch.export) or an .onnx file")
    sources = [path for path in (args.cfg, args.checkpoint) if path]
    check_output_path(args.out, args.force, sources)
    cfg = read_config(args)
    model = load_trained_model(cfg)
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
        The largest difference between the logits of the exported model and the model, on another
        batch than the example.

    Raises:
        ValueError: if they differ by more than ``TOLERANCE``, or a package is missing; nothing is
            written then.
    """
    model.eval()
    other = clips.flip(0).roll(1, dims=2) * 0.5
    make, run = (_onnx, _run_onnx) if Path(path).suffix == ".onnx" else (_pt2, _run_pt2)
    with torch.no_grad(), warnings.catch_warnings():
        # Selectors store what they kept; the exported program does not need it.
        warnings.filterwarnings("ignore", "The tensor attributes .*kept")
        expected = model(other)
        data = make(model, clips)
        logits = run(data, other)
    difference = (logits - expected).abs().max().item()
    if difference > TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ValueError(f"{path} gives logits that differ from the model's by {difference:.1e}")
    atomic_write(path, lambda partial: save_bytes(data, partial), overwrite, sources)
    return difference


# Both are built in memory: PyTorch's file writer aborts the interpreter if the disk is full.


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
