"""Reads what a run left in its OUTPUT_DIR, of either engine: config, json_stats, costs, study."""

import json
import os
import re
from dataclasses import dataclass, field

import yaml

from stts_slowfast.checkpoints import read_checkpoint
from stts_slowfast.checkpoints.names import latest_first
from stts_slowfast.configfiles.values import flatten

_LINE = re.compile(r"json_stats: (\{.*\})")
# "GFLOPs: 0.1 per clip", "params: 3.4 M" of ours; "Flops: 0.1 G", "Params: 3,400,000" of SlowFast.
_GFLOPS = re.compile(r"(?:GFLOPs: ([\d.e+-]+) per clip|Flops: ([\d.,e+-]+) G)")
_PARAMS = re.compile(r"(?:params: ([\d.]+) M|Params: ([\d,]+))")


@dataclass
class Output:
    """A run.

    Attributes:
        folder, name: where it lies, and what the page calls it.
        config: key -> value, from its last checkpoint; empty where there is none.
        checkpoint: that file's path.
        stats: its json_stats, in order.
        gflops, params: of one clip in 1e9 multiply-adds; in millions.
        study: the rows of a study.json in the folder.
    """

    folder: str
    name: str
    config: dict = field(default_factory=dict)
    checkpoint: str | None = None
    stats: list[dict] = field(default_factory=list)
    gflops: float | None = None
    params: float | None = None
    study: list[dict] = field(default_factory=list)

    def curve(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Epochs and values of the lines ``_type`` ``kind``; the last where one comes twice."""
        values = {}
        for line in self.stats:
            if line.get("_type") == kind and key in line:
                values[float(str(line["epoch"]).partition("/")[0])] = float(line[key])
        epochs = sorted(values)
        return epochs, [values[epoch] for epoch in epochs]

    def final(self, key: str) -> float | None:
        """A number of the last test; None if there was none, or its list had no labels."""
        found = [line.get(key) for line in self.stats if line.get("split") == "test_final"]
        return float(found[-1]) if found and found[-1] is not None else None


def read_output(folder: str) -> Output:
    """Reads an OUTPUT_DIR of ``stts run`` or SlowFast, or the OUT of ``stts study``.

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: where there is nothing of a run in it.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder}")
    output = Output(folder, os.path.basename(os.path.abspath(folder)))
    logs = [os.path.join(folder, name) for name in ("json_stats.log", "stdout.log")]
    texts = [_text(path) for path in logs]
    # SlowFast's json_stats.log has its epochs; the last lines of its tests are in stdout.log alone.
    told = _stats(texts[1])
    output.stats = (_stats(texts[0]) or told) + [
        line for line in told if line.get("split") == "test_final"
    ]
    for name, pattern in (("gflops", _GFLOPS), ("params", _PARAMS)):
        setattr(output, name, _number(pattern, texts[1], name))
    output.checkpoint = last_checkpoint(folder)
    if output.checkpoint:
        output.config = _config(output.checkpoint)
    if text := _text(os.path.join(folder, "study.json")):
        output.study = json.loads(text)
    if not (output.stats or output.checkpoint or output.study):
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


def config_diff(outputs: list[Output]) -> dict[str, list]:
    """Keys whose values are not the same in all runs that have a config; a value for each run."""
    keys = sorted(set().union(*(output.config for output in outputs)))
    skip = ("OUTPUT_DIR", "SHARD_ID")
    found = {}
    for key in keys:
        values = [output.config.get(key) for output in outputs]
        known = [value for value, output in zip(values, outputs) if output.config]
        if key not in skip and any(value != known[0] for value in known):
            found[key] = values
    return found


def _text(path: str) -> str:
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _stats(text: str) -> list[dict]:
    lines = []
    for match in _LINE.finditer(text):
        try:
            lines.append(json.loads(match[1]))
        except ValueError:  # the end of a run that was killed
            continue
    return lines


def _number(pattern: re.Pattern, text: str, name: str) -> float | None:
    found = pattern.findall(text)
    if not found:
        return None
    ours, slowfast = found[-1]
    if ours:
        return float(ours)
    number = float(slowfast.replace(",", ""))
    return number / 1e6 if name == "params" else number


def _config(path: str) -> dict:
    text = read_checkpoint(path).get("cfg")
    return dict(flatten(yaml.safe_load(text) or {})) if isinstance(text, str) else {}
