"""Reads what a run of either engine left in its OUTPUT_DIR.

Config, cost and test result are in ``run.json``, epochs in ``json_stats.log``, a study's rows in
``study.json``. A folder without ``run.json`` (a run inside SlowFast) has the config in its last
checkpoint, from which the cost is counted, and its test result among the ``json_stats`` lines of
``stdout.log``.
"""

import json
import os
import re
from dataclasses import dataclass, field

import torch
import yaml

from stts_slowfast.checkpoints.io import read_checkpoint
from stts_slowfast.checkpoints.names import latest_first
from stts_slowfast.configfiles.values import flatten
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools.inspection import stored_config

_STATS_LINE = re.compile(r"json_stats: (\{.*\})")


@dataclass
class RunOutput:
    """What is known of a run.

    Attributes:
        folder, name: its OUTPUT_DIR, and what the page calls it.
        config: key -> value; empty if the folder has none.
        checkpoint: path of the checkpoint of the latest epoch.
        stats: the json_stats of its epochs, in order.
        test: ``top1_acc`` and ``top5_acc`` of the last test, as far as it ended and has labels.
        gflops, params: multiply-adds of one clip in 1e9; parameters in millions.
        study: the rows of a study.json in the folder.
    """

    folder: str
    name: str
    config: dict = field(default_factory=dict)
    checkpoint: str | None = None
    stats: list[dict] = field(default_factory=list)
    test: dict = field(default_factory=dict)
    gflops: float | None = None
    params: float | None = None
    study: list[dict] = field(default_factory=list)

    def curve(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Epochs and values of the lines of ``_type`` ``kind``; the last value of each epoch."""
        values = {}
        for line in self.stats:
            if line.get("_type") == kind and key in line:
                values[float(str(line["epoch"]).partition("/")[0])] = float(line[key])
        epochs = sorted(values)
        return epochs, [values[epoch] for epoch in epochs]

    def final(self, key: str) -> float | None:
        """A number of the last test; None if there was none, or its list had no labels."""
        value = self.test.get(key)
        return None if value is None else float(value)


def read_output(folder: str) -> RunOutput:
    """Reads an OUTPUT_DIR of ``stts run`` or SlowFast, or the OUT of ``stts study``.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds nothing of a run.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}")
    output = RunOutput(folder, os.path.basename(os.path.abspath(folder)))
    output.checkpoint = last_checkpoint(folder)
    output.stats = _read_stats(os.path.join(folder, "json_stats.log"))
    if record := _read_json(os.path.join(folder, "run.json")):
        output.config = dict(flatten(record["config"]))
        output.gflops, output.params = record["gflops"], record["params"] / 1e6
        output.test = record["results"].get("test", {})
    else:
        _read_without_record(output)
    output.study = _read_json(os.path.join(folder, "study.json")) or []
    if not (output.stats or output.test or output.checkpoint or output.study):
        raise ValueError(
            f"{folder} holds no json_stats.log, checkpoint or study.json: name the OUTPUT_DIR of a "
            "run, or the --out of stts study"
        )
    return output


def last_checkpoint(folder: str) -> str | None:
    """The checkpoint of the latest epoch in an OUTPUT_DIR."""
    folder = os.path.join(folder, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = latest_first(names, task=None, mid_epoch=False)
    return os.path.join(folder, names[0]) if names else None


def config_diff(outputs: list[RunOutput]) -> dict[str, list]:
    """Keys whose values differ between runs that have a config: key -> a value for each run."""
    differing = {}
    for key in sorted(set().union(*(output.config for output in outputs))):
        values = [output.config.get(key) for output in outputs]
        known = [value for value, output in zip(values, outputs) if output.config]
        if key not in ("OUTPUT_DIR", "SHARD_ID") and any(value != known[0] for value in known):
            differing[key] = values
    return differing


def _read_without_record(output: RunOutput) -> None:
    # SlowFast writes the result of a test only to stdout.log.
    lines = _read_stats(os.path.join(output.folder, "stdout.log"))
    output.stats = output.stats or lines
    tests = [line for line in output.stats + lines if line.get("split") == "test_final"]
    output.test = tests[-1] if tests else {}
    if not output.checkpoint:
        return
    text = read_checkpoint(output.checkpoint).get("cfg")
    if isinstance(text, str):
        output.config = dict(flatten(yaml.safe_load(text) or {}))
        output.gflops, output.params = _count_cost(output.checkpoint)


def _count_cost(checkpoint: str) -> tuple[float | None, float | None]:
    """GFLOPs of one clip and millions of parameters; None for models that only SlowFast has."""
    try:
        cfg = stored_config(checkpoint)
        model, size = build_model(cfg), cfg.DATA.TEST_CROP_SIZE
        gflops = count_gflops(model, torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, size, size))
    except (ValueError, OSError, RuntimeError):  # the page is about more than its cost
        return None, None
    return gflops, sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _read_json(path: str):
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _read_stats(path: str) -> list[dict]:
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    lines = []
    for match in _STATS_LINE.finditer(text):
        try:
            lines.append(json.loads(match[1]))
        except ValueError:  # the end of a run that was killed
            continue
    return lines
