"""The post-import hooks, on a throw-away package that has the modules of SlowFast they wait for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

# A package with SlowFast's names and none of its dependencies.
SLOWFAST = {
    "slowfast/__init__.py": "",
    "slowfast/config/__init__.py": "",
    "slowfast/config/defaults.py": """
from fvcore.common.config import CfgNode
_C = CfgNode({"NUM_GPUS": 1})
def get_cfg():
    return _C.clone()
def assert_and_infer_cfg(cfg):
    return cfg
""",
    "slowfast/models/__init__.py": """
from .build import MODEL_REGISTRY, build_model
from .video_model_builder import ResNet
""",
    "slowfast/models/build.py": """
from fvcore.common.registry import Registry
MODEL_REGISTRY = Registry("MODEL")
def build_model(cfg): return MODEL_REGISTRY.get(cfg.MODEL.MODEL_NAME)(cfg)
""",
    "slowfast/models/video_model_builder.py": """
import torch
from .build import MODEL_REGISTRY
@MODEL_REGISTRY.register()
class ResNet(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
""",
    "slowfast/models/optimizer.py": """
def construct_optimizer(model, cfg): ...
def get_epoch_lr(cur_epoch, cfg): return 1.0
def set_lr(optimizer, new_lr): ...
""",
    "slowfast/utils/__init__.py": "",
    "slowfast/utils/checkpoint.py": """
def load_checkpoint(path_to_checkpoint, model): return 0
def load_test_checkpoint(cfg, model): ...
def normal_to_sub_bn(checkpoint_sd, model_sd): ...
""",
    "slowfast/utils/logging.py": """
def log_json_stats(stats, output_dir=None): print(stats)
""",
    "tools/run_net.py": "from vision.fair.slowfast.tools.train_net import train",
    "tools/train_net.py": "def train(config): return 'trained'",
}


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name, text in SLOWFAST.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


UNINSTALLED = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != "stts_slowfast_autoload"]
"""


def python(code: str, checkout: Path, **env: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that finds the checkout and this package."""
    path = os.pathsep.join([str(checkout), str(REPO)])
    # Whether or not this package's entry point is installed, `import torch` does not call it, and
    # the .pth file beside it has done nothing.
    quiet = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": path, **env}
    code = f"{UNINSTALLED}{code}"
    return subprocess.run([sys.executable, "-c", code], env=quiet, capture_output=True, text=True)


def output(code: str, checkout: Path, **env: str) -> str:
    done = python(code, checkout, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PRINT_NODE = "from slowfast.config.defaults import get_cfg; print('STTS' in get_cfg())"


def test_hooks_run_when_slowfast_is_imported_later(checkout):
    assert output(f"import stts_slowfast.pyslowfast; {PRINT_NODE}", checkout) == "True"


def test_hooks_run_when_slowfast_was_imported_before(checkout):
    code = f"import slowfast.config.defaults; import stts_slowfast.pyslowfast; {PRINT_NODE}"
    assert output(code, checkout) == "True"


def test_a_module_that_imports_torch_first_gets_its_hooks_when_it_is_complete(checkout):
    (checkout / "slowfast/utils/logging.py").write_text(
        # As `import torch` does with the entry point, in the middle of a module of SlowFast.
        "import stts_slowfast.pyslowfast\ndef log_json_stats(stats, output_dir=None): ..."
    )
    code = """
from slowfast.utils.logging import log_json_stats
assert not hasattr(log_json_stats, "original")
import slowfast.utils.checkpoint
print(hasattr(log_json_stats, "original"))
"""
    done = python(code, checkout)
    assert done.stdout.strip() == "True" and "failed" not in done.stderr, done.stderr


def test_autoload_is_switched_off_by_the_environment(checkout):
    code = f"import stts_slowfast.pyslowfast; {PRINT_NODE}"
    assert output(code, checkout, STTS_AUTOLOAD="0") == "False"


def test_every_function_is_wrapped_once(checkout):
    code = """
import stts_slowfast.pyslowfast
from stts_slowfast.pyslowfast import autoload, plugin
autoload.register(); autoload._registered = False; autoload.register()
import slowfast.config.defaults as defaults, slowfast.models.optimizer as optimizer
import slowfast.utils.logging as log, slowfast.utils.checkpoint as checkpoint
from slowfast.models import build_model
for function in (optimizer.construct_optimizer, optimizer.get_epoch_lr, optimizer.set_lr,
                 log.log_json_stats, checkpoint.load_checkpoint, build_model,
                 checkpoint.load_test_checkpoint, defaults.assert_and_infer_cfg):
    wrappers = []
    while hasattr(function, "original"):
        wrappers.append(function.wrapper)
        function = function.original
    assert len(wrappers) == len(set(wrappers)) > 0, wrappers
"""
    output(code, checkout)


def test_the_registry_holds_and_hands_out_what_was_registered(checkout):
    code = """
import pickle, copy
import stts_slowfast.pyslowfast
from fvcore.common.registry import Registry
from slowfast.models import MODEL_REGISTRY, ResNet
found = MODEL_REGISTRY.get("ResNet")
assert found is ResNet and issubclass(found, ResNet) and copy.deepcopy(found) is ResNet
assert pickle.loads(pickle.dumps(found)) is ResNet
assert type(MODEL_REGISTRY) is Registry and not hasattr(MODEL_REGISTRY.get, "original")
assert pickle.loads(pickle.dumps(MODEL_REGISTRY)).get("ResNet") is ResNet
MODEL_REGISTRY.register(type("TimeSformer", (), {}))  # of the user's own, whatever ours are called
print(sorted(name for name, _ in MODEL_REGISTRY))
"""
    assert output(code, checkout) == "['ResNet', 'TimeSformer']"


def test_vision_package_is_the_checkout(checkout):
    code = """
import stts_slowfast.pyslowfast, slowfast
from vision.fair.slowfast.tools.train_net import train
print(train(None))
"""
    done = python(code, checkout)
    assert done.stdout.strip() == "trained"
    assert done.stderr == ""


def test_a_real_vision_package_comes_first(checkout):
    (checkout / "vision").mkdir()
    (checkout / "vision" / "__init__.py").write_text("mine = 'mine'")
    assert output("import stts_slowfast.pyslowfast, slowfast, vision; print(vision.mine)", checkout)


@pytest.mark.parametrize("switch", ["0", "-vision_imports", "-decoder, -vision_imports"])
def test_patches_are_switched_off_by_the_environment(checkout, switch):
    code = "import stts_slowfast.pyslowfast, slowfast; import vision.fair.slowfast"
    done = python(code, checkout, STTS_COMPAT=switch)
    assert "No module named 'vision'" in done.stderr
    assert "stts_slowfast:" not in done.stderr


def test_one_line_lists_all_patches_if_requested(checkout):
    code = "import stts_slowfast.pyslowfast, slowfast.config.defaults; import vision.fair.slowfast"
    assert python(code, checkout).stderr == ""
    message = python(code, checkout, STTS_COMPAT_VERBOSE="1").stderr
    assert message.count("\n") == 1
    assert "patched SlowFast in memory: vision_imports, prefetch_key (STTS_COMPAT=-NAME" in message


@pytest.mark.parametrize("word", ["-decode", "decoder", "-decoder,-bad"])
def test_a_switch_that_names_no_patch_is_refused_on_one_line(checkout, word):
    wrong = word.rpartition(",")[2]
    code = f"import stts_slowfast.pyslowfast; {PRINT_NODE}"
    done = python(code, checkout, STTS_COMPAT=word)
    assert done.stdout.strip() == "True"  # a run without selection goes its way
    assert done.stderr.count("\n") == 1
    assert f"STTS_COMPAT is {word!r}, but {wrong!r} switches nothing off: use 0 for" in done.stderr
    code = "import stts_slowfast.pyslowfast.autoload as a, slowfast; print(a.failed_hooks())"
    assert "check_switch failed" in output(code, checkout, STTS_COMPAT=word)


def test_a_failing_hook_is_logged_and_does_not_stop_the_import(checkout):
    (checkout / "slowfast/config/defaults.py").write_text("def get_cfg(): return 'stock'")
    code = "import stts_slowfast.pyslowfast; from slowfast.config.defaults import get_cfg"
    done = python(f"{code}; print(get_cfg())", checkout)
    assert done.stdout.strip() == "stock"
    assert "stts_slowfast: plugin.add_config failed on slowfast.config.defaults" in done.stderr


def test_an_incomplete_package_is_one_line_and_slowfast_runs(checkout):
    """A partial upgrade: a file that most hooks need cannot be imported."""
    code = (
        "import sys; sys.modules['stts_slowfast.hosts'] = None; import stts_slowfast.pyslowfast; "
        f"import slowfast.models, slowfast.models.optimizer; {PRINT_NODE}"
    )
    done = python(code, checkout)
    assert done.stdout.strip() == "False", done.stderr
    assert done.stderr.count("stts_slowfast:") == 1, done.stderr


ENTRY = "import stts_slowfast_autoload; stts_slowfast_autoload.register(); print('alive')"


@pytest.mark.parametrize("broken", ["wrapt", "stts_slowfast", "stts_slowfast.pyslowfast.autoload"])
def test_what_torch_calls_never_fails(checkout, broken):
    missing = f"import sys; sys.modules[{broken!r}] = None; {ENTRY}"
    done = python(missing, checkout)
    assert (done.stdout.strip(), done.stderr) == ("alive", "")
    done = python(f"{missing}; import slowfast, slowfast.config", checkout)
    assert done.stdout.strip() == "alive" and done.stderr.count("\n") == 1
    assert "stts_slowfast: SlowFast runs without it (ModuleNotFoundError: " in done.stderr


def test_nothing_heavy_is_imported_without_slowfast(checkout):
    code = """
import sys
import stts_slowfast.pyslowfast.autoload
print([name for name in ("torch", "av", "numpy", "fvcore", "lightning_fabric")
       if name in sys.modules])
"""
    assert output(code, checkout) == "[]"


def test_a_missing_package_is_explained(checkout):
    (checkout / "slowfast/models/__init__.py").write_text("from detectron2.layers import ROIAlign")
    (checkout / "detectron2").mkdir()
    (checkout / "detectron2" / "__init__.py").write_text("")
    done = python("import stts_slowfast.pyslowfast, slowfast.models", checkout)
    assert "No module named 'detectron2.layers'" in done.stderr
    assert "https://github.com/facebookresearch/detectron2" in done.stderr.splitlines()[-1]


def test_detectron2_finds_its_files_without_pkg_resources(checkout):
    (checkout / "detectron2" / "model_zoo").mkdir(parents=True)
    (checkout / "detectron2" / "__init__.py").write_text("")
    (checkout / "detectron2" / "model_zoo" / "__init__.py").write_text(
        "import pkg_resources\n"
        "path = pkg_resources.resource_filename('detectron2.model_zoo', 'configs/a.yaml')\n"
    )
    code = """
import sys, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "pkg_resources" else find_spec(name, *a)
import stts_slowfast.pyslowfast, slowfast, detectron2.model_zoo
print(detectron2.model_zoo.path)
"""
    assert output(code, checkout).endswith("detectron2/model_zoo/configs/a.yaml")
