"""The rows of ``stts bench``: how they are specified, and their models."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from stts_slowfast.tools.bench.published import Published, published

ENGINES = ("standalone", "slowfast")
Result = TypeVar("Result")


@dataclass
class BenchSpec:
    """A model to measure, and its results.

    Attributes:
        name: of its row in the table.
        config: a YAML file.
        opts: KEY VALUE pairs on top of it.
        engine: builds the model; one of ``ENGINES``.
        frames: frames of a clip; None for the config's.
        parameters: number of parameters.
        gflops: multiply-adds of one clip in evaluation, in 1e9, as fvcore counts them.
        views: clips and crops of a video in testing, such as (10, 3).
        published: result published for this config, if nothing in it was changed.
        matmul_precision: ``MODEL.FLOAT32_MATMUL_PRECISION``.
        seconds: by mode, the time of every measured step of one batch.
        memory: by mode, peak bytes of the model's and one step's tensors.
    """

    name: str
    config: str
    opts: list[str] = field(default_factory=list)
    engine: str = "standalone"
    frames: int | None = None
    parameters: int = 0
    gflops: float = 0.0
    views: tuple[int, int] = (1, 1)
    published: Published | None = None
    matmul_precision: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


def parse_row(text: str, engine: str = "standalone") -> BenchSpec:
    """Reads ``[NAME=]FILE[,KEY=VALUE...]``; commas inside brackets belong to a value.

    Raises:
        ValueError: if a key has no value.
    """
    first, *pairs = re.split(r",(?![^\[(]*[\])])", text)
    name, _, config = first.rpartition("=")
    opts = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"row {text!r}: {pair!r} is no KEY=VALUE")
        opts += [key.strip(), value.strip()]
    return BenchSpec(name or Path(config).stem, config, opts, engine)


def read_config(row: BenchSpec):
    """The config of a row, as its engine reads it."""
    frames = [] if row.frames is None else ["DATA.NUM_FRAMES", row.frames]
    opts = [*row.opts, *frames]
    if row.engine == "slowfast":
        from stts_slowfast.pyslowfast import bench

        return bench.read_config(row.config, opts)
    from stts_slowfast.standalone.config import load_config

    return load_config(row.config, opts)


def build(
    row: BenchSpec, device: str, check: Callable = lambda cfg: None
) -> tuple[nn.Module, dict[str, torch.Size]]:
    """The model of a row, with random weights, and by mode the shape of one clip; sets ``views``,
    ``published``, ``matmul_precision`` and ``parameters`` of the row. ``check`` may refuse its
    config."""
    cfg = read_config(row)
    check(cfg)
    torch.manual_seed(0)
    if row.engine == "slowfast":
        from stts_slowfast.pyslowfast import bench

        model = bench.build(cfg)
    else:
        from stts_slowfast.standalone.model import build_model

        model = build_model(cfg)
    row.matmul_precision = getattr(cfg.MODEL, "FLOAT32_MATMUL_PRECISION", "")
    row.views = (cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS)
    if not row.opts and row.frames is None:
        row.published = published(row.config, cfg.TEST.DATASET, row.views)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {"train": cfg.DATA.TRAIN_CROP_SIZE, "eval": cfg.DATA.TEST_CROP_SIZE}
    shapes = {
        mode: torch.Size((3, cfg.DATA.NUM_FRAMES, side, side)) for mode, side in sizes.items()
    }
    return model.to(device), shapes


def build_all(
    rows: list[BenchSpec], device: str, check: Callable = lambda cfg: None
) -> list[tuple[nn.Module, dict[str, torch.Size]]]:
    """The models of all rows, whose configs ``check`` may refuse.

    Raises:
        ValueError: naming every row that cannot be built, and why.
    """
    return map_rows(rows, lambda row: build(row, device, check), "cannot be built")


def map_rows(
    rows: Sequence[BenchSpec], function: Callable[[BenchSpec], Result], failure: str
) -> list[Result]:
    """Calls ``function`` on all rows, before anything is measured.

    Raises:
        ValueError: naming every row that failed, and why.
    """
    results, failed = [], []
    for row in rows:
        try:
            results.append(function(row))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            failed.append(f"row {row.name} {failure} by {row.engine}: {reason}")
    if failed:
        raise ValueError("; ".join(failed))
    return results
