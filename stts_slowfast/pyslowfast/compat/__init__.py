"""What SlowFast needs to run on today's PyTorch, torchvision and PyAV, mended in memory.

Each obstacle is one function, called after the module that has it was imported. It looks whether
the obstacle is there, and says on one line what it mended. ``STTS_COMPAT=0`` switches all off.
"""

import functools
import multiprocessing
import os
import sys

# What each mend is for, for `stts doctor`.
MENDS = {
    "vision_imports": "vision.fair.slowfast means the checkout",
    "ava_evaluation": "ava_evaluation is found in the checkout",
    "prefetch_key": "the key PREFETCH of configs/SSv2/MVITv2_*.yaml is passed over",
    "pkg_resources": "detectron2.model_zoo finds its files without pkg_resources",
    "decoder": "DATA.DECODING_BACKEND pyav and torchvision decode with PyAV",
    "bad_videos": "videos that cannot be read are named, written down and count as wrong",
    "cuda_synchronize": "torch.cuda.synchronize() does nothing on a CPU run",
    "mt_adamw": "SOLVER.OPTIMIZING_METHOD mt_adamw finds its optimizer",
    "ava_test": "AVA's meter takes the end of a test iteration once",
    "visualization": "tools/visualization.py gets the batches that it unpacks",
    "activations": "tools/visualization.py shows the tokens of a transformer's block",
    "layer_weights": "tools/visualization.py draws the weights of layers of any sizes",
    "load_config": "tools/benchmark.py reads --cfg",
    "demo": "the demo crops videos to a square for MViT",
    "ptv_mvit": "MODEL_NAME PTVMViT builds with MVIT.POOL_KV_STRIDE_ADAPTIVE",
}

# Packages that SlowFast imports, that no mend can replace, and how to get them.
REMEDIES = {
    "detectron2": "SlowFast needs detectron2 for every model, and it is not on PyPI: install it "
    "from https://github.com/facebookresearch/detectron2",
    "pytorchvideo": "SlowFast needs names that pytorchvideo's release 0.1.5 lacks: install it "
    "from https://github.com/facebookresearch/pytorchvideo",
}
GUIDE = "'Beside SlowFast' in projects/stts/README.md"

_told = set()


def mend(function):
    """Makes a mend out of ``function(module) -> whether it mended something``."""
    name = function.__name__.removeprefix("mend_")

    @functools.wraps(function)
    def guarded(module) -> bool:
        if os.environ.get("STTS_COMPAT") == "0" or not function(module):
            return False
        # Children of a multi-GPU run, and a DataLoader's workers, would only repeat it.
        if name not in _told and multiprocessing.current_process().name == "MainProcess":
            print(f"stts_slowfast: mended {name}: {MENDS[name]}", file=sys.stderr)
        _told.add(name)
        return True

    return guarded
