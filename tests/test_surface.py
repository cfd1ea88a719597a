"""The public surface: what users' code, configs, scripts and files rely on; none of it may be lost.

``fixtures/surface.yaml`` holds it. Additions are free and need no entry; whoever removes or renames
an entry breaks somebody's work, and needs an alias that warns for one release instead.
"""

import configparser
import importlib
import os
import re
import signal
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import simplejson
import torch
import yaml
from fvcore.common.config import CfgNode

import stts_slowfast as stts
from stts_slowfast.configfiles.values import flatten
from stts_slowfast.tools import cli

ROOT = Path(__file__).parents[1]
SURFACE = yaml.safe_load((Path(__file__).parent / "fixtures" / "surface.yaml").read_text())


def test_public_names_are_there():
    assert set(SURFACE["names"]) <= set(stts.__all__)
    assert all(callable(getattr(stts, name)) for name in SURFACE["names"])


@pytest.mark.parametrize("path", SURFACE["documented_paths"])
def test_documented_paths_are_importable(path):
    module, _, name = path.rpartition(".")
    if name == "SelectionCallback":
        pytest.importorskip("transformers", reason="transformers is not installed")
    assert hasattr(importlib.import_module(module), name)


def test_config_keys_keep_their_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("{}\n")
    found = dict(flatten(stts.load_config(str(path))))
    assert {key: found.get(key, "lost") for key in SURFACE["config"]} == SURFACE["config"]
    node = CfgNode()
    stts.add_stts_config(node)
    ours = {key: value for key, value in SURFACE["config"].items() if key.startswith("STTS.")}
    assert ours.items() <= dict(flatten(node)).items()


@pytest.mark.parametrize("registry", SURFACE["registries"])
def test_registered_names_stay(registry):
    module, _, name = registry.rpartition(".")
    known = [key for key, _ in getattr(importlib.import_module(module), name)]
    assert set(SURFACE["registries"][registry]) <= set(known)


def test_commands_stay():
    assert set(SURFACE["commands"]) <= set(cli.COMMANDS)


@pytest.mark.parametrize("command", SURFACE["commands"])
def test_options_of_a_command_stay(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lost = [word for word in SURFACE["commands"][command] if not _said(word, text)]
    assert not lost


def _said(word, text):
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)


def test_entry_points_stay():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for group, names in SURFACE["entry_points"].items():
        lines = setup["options.entry_points"][group].strip().splitlines()
        found = dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines)
        assert set(names) <= set(found)
        for target in found.values():
            module, _, name = target.partition(":")
            assert callable(getattr(importlib.import_module(module), name))


def attached(**arguments):
    """A small torchvision MViT with a selector of each kind."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    from torchvision.models.video.mvit import MSBlockConfig

    width, heads = 16, 1
    setting = [
        MSBlockConfig(heads, width, width, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2])
        for _ in range(2)
    ]
    size = {"spatial_size": (32, 32), "temporal_size": 8, "block_setting": setting}
    model = torchvision.models.video.MViT(
        **size, residual_pool=False, residual_with_cls_embed=True, rel_pos_embed=False,
        proj_after_attn=False, num_classes=5,
    )  # fmt: skip
    return stts.attach(model, time={0: 0.5}, space={1: 0.5}, **arguments)


def test_arguments_of_attach_are_the_nodes_keys():
    defaults = {
        re.sub(r"^(TIME|SPACE)\.", r"\1_", key.removeprefix("STTS.")).lower(): value
        for key, value in SURFACE["config"].items()
        if key.startswith("STTS.") and not re.search(r"ENABLE|BLOCKS|KEEP", key)
    }
    model = attached(**defaults).eval()
    model(torch.randn(2, 3, 8, 32, 32))
    found = {key: list(kept.shape) for key, kept in stts.selections(model).items()}
    assert found == SURFACE["selections"]


def test_parameters_of_scorers_keep_their_names():
    names = attached().state_dict()
    for selector in ("time_0", "space_1"):
        for name in SURFACE["scorer_parameters"]:
            assert f"stts.{selector}.{name}" in names
    assert sum(name.startswith("stts.") for name in names) == 2 * len(SURFACE["scorer_parameters"])


def test_optimizer_groups_keep_their_keys():
    model = attached()
    groups = stts.param_groups([{"params": list(model.parameters()), "weight_decay": 0.1}], model)
    assert all({"params", "weight_decay", "backbone"} <= set(group) for group in groups)
    assert {group["backbone"] for group in groups} == {True, False}


# --- a run of the standalone runner, stopped once -------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of two short epochs on four small videos."""
    folder = tmp_path_factory.mktemp("run")
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    lines = []
    for number, image in enumerate(pixels):
        with av.open(str(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            for _ in range(8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{number}.mp4 {number}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(lines))
    tree = yaml.safe_load((ROOT / "tests" / "slowfast" / "tiny.yaml").read_text())
    tree["DATA"] |= {"PATH_TO_DATA_DIR": str(folder), "PATH_PREFIX": str(folder)}
    tree["DATA"] |= {"SAMPLING_RATE": 1, "TRAIN_JITTER_SCALES": [32, 32]}
    tree |= {"OUTPUT_DIR": str(folder / "out"), "DATA_LOADER": {"NUM_WORKERS": 0}}
    tree["STTS"]["ENABLE"] = True
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def runs():
    """What :func:`finished` gave, so that it runs once, yet under the fixtures of each test."""
    return {}


@pytest.fixture
def finished(config, runs):
    """Folder of a run, and the statuses with which it was stopped by SIGTERM and resumed."""
    if not runs:
        runs["finished"] = stopped_and_resumed(config)
    return runs["finished"]


def stopped_and_resumed(config):
    folder = config.parent / "out"
    words = ["run", "--engine", "standalone", "--cfg", str(config), "--opts", "SOLVER.MAX_EPOCH"]

    def stop():
        while not list(folder.glob("checkpoints/checkpoint_epoch_00001.pyth")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    stopped = cli.main([*words, "1000"])
    last = max(int(path.stem[-5:]) for path in folder.glob("checkpoints/checkpoint_epoch_*.pyth"))
    return folder, stopped, cli.main([*words, str(last + 1)])


def test_a_checkpoint_keeps_its_keys(finished):
    folder, *_ = finished
    path = max(folder.glob("checkpoints/checkpoint_epoch_*.pyth"))
    checkpoint = torch.load(path, weights_only=True)
    assert set(SURFACE["checkpoint"]) <= set(checkpoint)
    groups = checkpoint["optimizer_state"]["param_groups"]
    assert all(set(SURFACE["optimizer_groups"]) <= set(group) for group in groups)
    assert isinstance(checkpoint["cfg"], str) and checkpoint["epoch"] >= 1


def test_json_stats_keep_their_keys(finished):
    folder, *_ = finished
    text = (folder / "stdout.log").read_text()
    found = {}
    for line in re.findall(r"json_stats: (.*)", text):
        stats = simplejson.loads(line)
        found.setdefault(stats.get("_type") or stats.get("split"), stats)
    for kind, keys in SURFACE["json_stats"].items():
        assert set(keys) <= set(found[kind]), kind


def test_exit_codes_stay(finished, config, monkeypatch, capsys):
    _, stopped, resumed = finished
    found = {"stopped by SIGTERM": stopped, "done": resumed}
    found["the user's mistake"] = cli.main(["run", "--cfg", "gone.yaml"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--cfg", str(config), "--no-such-option"])
    found["no such option"] = stop.value.code
    runner = importlib.import_module(cli.COMMANDS["run"][0])
    for what, error in (("our fault", KeyError), ("Ctrl-C", KeyboardInterrupt)):

        def fail(args, error=error):
            raise error

        monkeypatch.setattr(runner, "main", fail)
        found[what] = cli.main(["run", "--cfg", str(config)])
    assert found == SURFACE["exit_codes"]
