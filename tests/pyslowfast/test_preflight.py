"""Each hook fails or never runs, in turn: the run stops if STTS.ENABLE is True, and only then."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from stts_slowfast.pyslowfast import autoload, plugin, preflight

REPO = Path(__file__).parents[2]
# A file under several names has the same ones.
HOOKS = list(dict.fromkeys(itertools.chain(*autoload.HOOKS.values())))

# A package with SlowFast's names, which a run passes in SlowFast's order.
SLOWFAST = {
    "detectron2/__init__.py": "",
    "detectron2/model_zoo/__init__.py": "",
    "slowfast/__init__.py": "",
    "slowfast/config/__init__.py": "",
    "slowfast/config/defaults.py": """
from fvcore.common.config import CfgNode
_C = CfgNode({"NUM_GPUS": 0, "NUM_SHARDS": 1, "RNG_SEED": 0, "MODEL": {"MODEL_NAME": "Transformer"},
              "TRAIN": {"ENABLE": True, "MIXED_PRECISION": False},
              "MASK": {"ENABLE": False}, "DETECTION": {"ENABLE": False},
              "MVIT": {"REV": {"ENABLE": False}}, "SOLVER": {"LAYER_DECAY": 1.0, "BASE_LR": 0.1},
              "DATA": {}, "TEST": {"ENABLE": True},
              "MULTIGRID": {"LONG_CYCLE": False, "SHORT_CYCLE": False}})
def get_cfg():
    return _C.clone()
def assert_and_infer_cfg(cfg):
    return cfg
""",
    "slowfast/datasets/__init__.py": "",
    "slowfast/datasets/rand_augment.py": """
class AugmentOp:
    def __call__(self, images): ...
""",
    "slowfast/datasets/utils.py": """
def aug_frame(cfg, frames): ...
def _frame_to_list_img(frames): ...
def _list_img_to_frames(images): ...
""",
    "slowfast/datasets/build.py": "def build_dataset(dataset_name, cfg, split): ...",
    "slowfast/datasets/decoder.py": """
class io: _read_video_from_memory = None
def decode(backend="pyav"): ...
def pyav_decode(): start_end_delta_time = 0
def torchvision_decode(): ...
""",
    "slowfast/models/__init__.py": """
from .build import MODEL_REGISTRY, build_model
from .video_model_builder import Transformer
""",
    "slowfast/models/build.py": """
from fvcore.common.registry import Registry
MODEL_REGISTRY = Registry("MODEL")
def build_model(cfg, gpu_id=None):
    return MODEL_REGISTRY.get(cfg.MODEL.MODEL_NAME)(cfg)
""",
    "slowfast/models/attention.py": """
class MultiScaleAttention: ...
class MultiScaleBlock: ...
""",
    "slowfast/models/video_model_builder.py": """
from torch import nn
from .build import MODEL_REGISTRY
from . import attention
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
    def forward(self, x, thw):
        return self.norm1(x), thw
@MODEL_REGISTRY.register()
class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(5)])
""",
    "slowfast/models/optimizer.py": """
import torch
def construct_optimizer(model, cfg):
    return torch.optim.SGD(model.parameters(), lr=cfg.SOLVER.BASE_LR)
def get_epoch_lr(cur_epoch, cfg): return 1.0
def set_lr(optimizer, new_lr): ...
""",
    # Patches are switched off here, so what they are for need not be there.
    "slowfast/datasets/kinetics.py": """
from slowfast.datasets import decoder
class Kinetics:
    def __getitem__(self, index): ...
    def _frame_to_list_img(self, frames): ...
    def _list_img_to_frames(self, images): ...
""",
    "slowfast/datasets/loader.py": "",
    "slowfast/datasets/ptv_datasets.py": "",
    "slowfast/models/ptv_model_builder.py": "",
    "slowfast/utils/__init__.py": "",
    "slowfast/utils/meters.py": """
class TestMeter:
    def update_stats(self, preds, labels, clip_ids): ...
    def finalize_metrics(self, ks=(1, 5)): ...
""",
    "slowfast/utils/parser.py": "",
    "slowfast/visualization/utils.py": "",
    "slowfast/utils/checkpoint.py": """
def load_checkpoint(path_to_checkpoint, model): return 0
def load_test_checkpoint(cfg, model): ...
def normal_to_sub_bn(checkpoint_sd, model_sd): ...
""",
    "slowfast/utils/logging.py": "def log_json_stats(stats, output_dir=None): ...",
    "slowfast/utils/misc.py": """
def launch_job(cfg, init_method, func, daemon=False):
    func(cfg=cfg)

def check_nan_losses(loss): ...
""",
    "slowfast/visualization/__init__.py": "",
    "slowfast/visualization/tensorboard_vis.py": """
class TensorboardWriter:
    def add_scalars(self, data_dict, global_step=None): ...
    def plot_eval(self, preds, labels, global_step=None): ...
    def plot_weights_and_activations(self, weight_activation_dict): ...
""",
    "tools/train_net.py": "",
    "tools/test_net.py": "",
}

MODULES = [
    name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in SLOWFAST
]

# Runs as `child` in a process forked for each way to fail: importing torch takes seconds, and what
# the hooks import a third of one.
RUNS = f"""
import contextlib, importlib, io, json, os, sys, traceback
import torch, wrapt
import stts_slowfast.hooks
import stts_slowfast.backbones
from stts_slowfast.pyslowfast import autoload

for function in {HOOKS!r}:
    importlib.import_module("stts_slowfast.pyslowfast." + function.rpartition(".")[0])
assert "slowfast" not in sys.modules

def child(function, how, enable):
    if how == "fails":
        for functions in autoload.HOOKS.values():
            functions[:] = [f"broken.{{f}}" if f == function else f for f in functions]
    else:
        register = wrapt.register_post_import_hook
        wrapt.register_post_import_hook = lambda hook, name: (
            None if hook.args == (function,) else register(hook, name))
    autoload.register_hooks()
    stages = {{}}
    def stage(name, run):
        try:
            run()
            stages[name] = ""
        except Exception as error:
            stages[name] = f"{{type(error).__name__}}: {{error}}"
    for name in {MODULES!r}:
        importlib.import_module(name)
    from slowfast.config.defaults import assert_and_infer_cfg, get_cfg
    from slowfast.models import build_model
    from slowfast.models.optimizer import construct_optimizer
    from slowfast.utils.misc import launch_job
    cfg = get_cfg()
    if enable:
        stage("opts", lambda: cfg.merge_from_list(["STTS.ENABLE", True]))
    stage("config", lambda: assert_and_infer_cfg(cfg))
    stage("launch", lambda: launch_job(cfg, "", lambda cfg: None))
    stage("build", lambda: build_model(cfg))
    from slowfast.models.video_model_builder import Transformer
    stage("optimizer", lambda: construct_optimizer(Transformer(cfg), cfg))
    return stages

for function in {HOOKS!r}:
    for how in ("fails", "never ran"):
        for enable in (True, False):
            read, write = os.pipe()
            if os.fork() == 0:
                errors = io.StringIO()
                try:
                    with contextlib.redirect_stderr(errors):
                        stages = child(function, how, enable)
                except BaseException:
                    stages = {{"child": traceback.format_exc()}}
                stages["stderr"] = errors.getvalue()
                os.write(write, json.dumps(stages).encode())
                os._exit(0)
            os.close(write)
            with open(read) as file:
                print(json.dumps([function, how, enable, json.load(file)]), flush=True)
            os.wait()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """What happened at each stage, by hook, how it fared, and STTS.ENABLE."""
    folder = tmp_path_factory.mktemp("checkout")
    for name, text in SLOWFAST.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPO)])}
    env |= {"STTS_AUTOLOAD": "0", "STTS_COMPAT": "0"}  # hooks are registered in the children
    done = subprocess.run(
        [sys.executable, "-c", RUNS], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(function, how, enable): stages for function, how, enable, stages in lines}


def test_every_hook_runs_if_none_fails(runs):
    # Of another hook's failure this one tells: all others have run.
    message = runs["training.wrap_log", "fails", True]["build"]
    assert message.count(" failed (") == 1 and "never ran" not in message


@pytest.mark.parametrize("how", ["fails", "never ran"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_run_with_selection_stops_if_a_hook_does_not_run(runs, hook, how):
    stages = runs[hook, how, True]
    assert "child" not in stages, stages["child"]
    name = f"broken.{hook} failed" if how == "fails" else f"{hook} never ran"
    if hook == "plugin.add_config":  # then SlowFast does not know the key
        assert "STTS is set" in stages["opts"] and name in stages["opts"]
        return
    # Every stage but the hook's own tells of it.
    own = {
        "plugin.wrap_build_model": {"build"},
        "preflight.wrap_config": {"config"},
        "distributed.wrap_launch_job": {"launch"},
        "training.wrap_optimizer": {"optimizer"},
    }
    every = {"config", "launch", "build", "optimizer"}
    silent = {stage for stage in every if not stages[stage]}
    assert silent == own.get(hook, set())
    for stage in every - silent:
        assert name in stages[stage] and "set STTS.ENABLE False" in stages[stage]


@pytest.mark.parametrize("how", ["fails", "never ran"])
@pytest.mark.parametrize("hook", HOOKS)
def test_without_selection_a_failing_hook_is_a_warning(runs, hook, how):
    stages = runs[hook, how, False]
    assert [stages[name] for name in ("config", "launch", "build", "optimizer")] == [""] * 4
    assert (f"stts_slowfast: broken.{hook} failed on" in stages["stderr"]) == (how == "fails")


def test_an_optimizer_wants_the_selectors_of_its_config(registry, cfg):
    cfg.STTS.ENABLE = False
    model = registry.get("Transformer")(cfg)
    preflight.check_selectors(model, cfg)
    cfg.STTS.ENABLE = True
    with pytest.raises(RuntimeError, match=r"requires .* time_0, space_1, but .* has none"):
        preflight.check_selectors(model, cfg)
    model = registry.get("Transformer")(cfg)
    preflight.check_selectors(nn.DataParallel(model), cfg)
    cfg.STTS.SPACE.BLOCKS = [0]
    with pytest.raises(RuntimeError, match="space_0, but this Transformer has time_0, space_1"):
        preflight.check_selectors(model, cfg)


def test_a_model_built_past_the_registry_is_refused(registry, cfg):
    cfg.NUM_GPUS = 0
    assert list(registry.get("Transformer")(cfg, gpu_id=None).stts) == ["time_0", "space_1"]
    stock = registry.get("Transformer").__wrapped__
    past = SimpleNamespace(build_model=lambda cfg: stock(cfg))
    plugin.wrap_build_model(past)
    with pytest.raises(RuntimeError, match="has none: build it with this config"):
        past.build_model(cfg)
