"""Accuracies that were published for configs: SlowFast's, its projects', and the STTS paper's.

``published.csv`` has a line for each result of one file on one dataset, as the table named in
``source`` states it. Configs that no table names have none, however much they resemble one that
has.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from stts_slowfast.configfiles.files import CONFIGS, find_config


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        top1: in percent.
        source: the table that states it.
        views: clips and crops of a video, such as (5, 1); None if the table does not state them.
        gflops: multiply-adds of one view, in 1e9, as published; None if the table has none.
    """

    top1: float
    source: str
    views: tuple[int, int] | None = None
    gflops: float | None = None


def _read_table() -> dict[str, dict[str, list[Published]]]:
    table: dict[str, dict[str, list[Published]]] = {}
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            views = (int(line["clips"]), int(line["crops"])) if line["clips"] else None
            gflops = float(line["gflops"]) if line["gflops"] else None
            result = Published(float(line["top1"]), line["source"], views, gflops)
            table.setdefault(line["config"], {}).setdefault(line["dataset"], []).append(result)
    return table


# By the config's path below `configs`, then by TEST.DATASET. Several results differ in views.
TABLE = _read_table()


def published(config: str, dataset: str, views: tuple[int, int] | None = None) -> Published | None:
    """The result published for a config file on a dataset; None if there is none.

    Args:
        config: a file in SlowFast's checkout or one that comes with this package, or its name.
        dataset: ``TEST.DATASET``.
        views: clips and crops; of several results the one with as many is preferred.
    """
    results = TABLE.get(_name(config), {}).get(dataset, [])
    return next((result for result in results if result.views == views), next(iter(results), None))


def _name(config: str) -> str:
    """``Kinetics/MVIT_B_16x4_CONV`` for a file in either's ``configs``; "" for other files."""
    path = Path(find_config(config)).resolve()
    for folder in path.parents:
        is_checkout = (
            folder.name == "configs" and (folder.parent / "slowfast/config/defaults.py").is_file()
        )
        if is_checkout or folder == CONFIGS.resolve():
            return path.relative_to(folder).with_suffix("").as_posix()
    return ""
