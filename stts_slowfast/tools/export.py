"""``stts export``: an evaluation model with its selection, for torch.export or ONNX."""

import argparse
import warnings
from pathlib import Path

import torch
from torch import nn

from stts_slowfast.tools.cli import add_opts

# By how much the logits of an exported model may differ from the model's, as a share of the
# largest one.
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts export``."""
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config of the model")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file to write: .pt2 (torch.export) or .onnx"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights; without, random ones")
    parser.add_argument("--batch-size", type=int, default=1, help="clips in a batch, fixed")
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Exports the model, runs what was written, and compares.

    Raises:
        ValueError: for an unknown kind of file, packages that are missing, and an exported model
            that computes something else than the model.
    """
    from stts_slowfast.standalone.defaults import load_config
    from stts_slowfast.standalone.model import build_model

    if Path(args.out).suffix not in (".pt2", ".onnx"):
        raise ValueError(f"--out {args.out}: write a .pt2 (torch.export) or an .onnx file")
    cfg = load_config(args.cfg, args.opts)
    model = build_model(cfg)
    if args.checkpoint:
        from stts_slowfast.checkpoints import load_weights

        print(f"{args.checkpoint}: {load_weights(model, args.checkpoint)}")
    size = cfg.DATA.TRAIN_CROP_SIZE
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(args.batch_size, 3, cfg.DATA.NUM_FRAMES, size, size, generator=generator)
    difference = export(model, clips, args.out)
    print(f"{args.out}: clips {tuple(clips.shape)}, logits differ by at most {difference:.1e}")
    return 0


def export(model: nn.Module, clips: torch.Tensor, path: str) -> float:
    """Writes ``model`` in evaluation mode for inputs of the shape of ``clips``.

    Args:
        model: a standalone model on the CPU; maps ``(B, 3, T, H, W)`` to ``(B, classes)``.
        clips: an example batch. Shapes are fixed to it; what is selected depends on the input.
        path: ``.pt2`` for ``torch.export``, ``.onnx`` for ONNX.

    Returns:
        By how much the logits of what was written differ from the model's at most, on another
        batch than the example.

    Raises:
        ValueError: where they differ by more than ``TOLERANCE``, and for missing packages.
    """
    model.eval()
    other = clips.flip(0).roll(1, dims=2) * 0.5
    with torch.no_grad(), warnings.catch_warnings():
        # Selectors remember what they kept, an exported program has no use for it.
        warnings.filterwarnings("ignore", "The tensor attributes .*kept")
        expected = model(other)
        if Path(path).suffix == ".onnx":
            logits = _onnx(model, clips, other, path)
        else:
            torch.export.save(torch.export.export(model, (clips,)), path)
            logits = torch.export.load(path).module()(other)
    difference = (logits - expected).abs().max().item()
    if difference > TOLERANCE * max(1.0, expected.abs().max().item()):
        raise ValueError(f"{path} gives logits that differ from the model's by {difference:.1e}")
    return difference


def _onnx(model: nn.Module, clips: torch.Tensor, other: torch.Tensor, path: str) -> torch.Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx's translator
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install 'stts-slowfast[export]'") from error
    torch.onnx.export(
        model,
        (clips,),
        path,
        input_names=["clips"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"clips": other.numpy()})[0])
