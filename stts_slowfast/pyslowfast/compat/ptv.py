"""pytorchvideo's datasets (``ptvkinetics``, ``ptvssv2``, ``ptvcharades``) in SlowFast's loops."""

import inspect

from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.compat.tools import is_tool_file
from stts_slowfast.pyslowfast.patching import wrap

# Functions of tools/, and their argument for the loader.
LOOPS = {"train_epoch": "train_loader", "eval_epoch": "val_loader", "perform_test": "test_loader"}


@patch("ptv_datasets")
def patch_loops(tool) -> bool:
    """The loops of ``tools/`` unpack five items, but these batches have four."""
    path = getattr(tool, "__file__", None)
    if not (is_tool_file(path, "train_net") or is_tool_file(path, "test_net")):
        return False
    for name in LOOPS:
        if hasattr(tool, name):
            wrap(tool, name, _add_times)
    return False  # it has no effect on other loaders


@patch("ptv_datasets")
def patch_backend(ptv_datasets) -> bool:
    """``DATA.DECODING_BACKEND torchvision`` is PyAV, if torchvision's operators for it are gone."""
    import torch

    if hasattr(torch.ops.video_reader, "read_video_from_memory"):
        return False
    wrap(ptv_datasets, "LabeledVideoDataset", _decode_by_pyav, everywhere=False)
    return True


def _decode_by_pyav(dataset, *args, **kwargs):
    if kwargs.get("decoder") == "torchvision":
        kwargs["decoder"] = "pyav"
    return dataset(*args, **kwargs)


def _add_times(loop, *args, **kwargs):
    call = inspect.signature(loop).bind(*args, **kwargs)
    name = LOOPS[loop.__name__]
    if is_ptv_dataset(getattr(call.arguments[name], "dataset", None)):
        call.arguments[name] = WithTimes(call.arguments[name])
    return loop(*call.args, **call.kwargs)


def is_ptv_dataset(dataset) -> bool:
    """Whether a dataset is one of ``slowfast/datasets/ptv_datasets.py``."""
    name = f"{type(dataset).__module__}.{type(dataset).__name__}"
    return name == "slowfast.datasets.ptv_datasets.PTVDatasetWrapper"


class WithTimes:
    """A loader that adds the clips' times to batches without them, as zeros."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        import torch

        for batch in self.loader:
            inputs, labels, index, *rest = batch
            time = () if len(rest) > 1 else (torch.zeros(len(labels), 1, 3),)
            yield (inputs, labels, index, *time, *rest)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)
