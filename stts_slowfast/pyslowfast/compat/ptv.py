"""Datasets of pytorchvideo (``ptvkinetics``, ``ptvssv2``, ``ptvcharades``), on which SlowFast's own
loops fail."""

import functools
import inspect

from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.compat.tools import is_a_tool
from stts_slowfast.pyslowfast.patching import is_wrapped, wrap

# Functions of tools/, and what they call the loader.
LOOPS = {"train_epoch": "train_loader", "eval_epoch": "val_loader", "perform_test": "test_loader"}


@patch("ptv_datasets")
def patch_loops(tool) -> bool:
    """Batches of four things, of which the loops of ``tools/`` unpack five."""
    path = getattr(tool, "__file__", None)
    if not (is_a_tool(path, "train_net") or is_a_tool(path, "test_net")):
        return False
    for name in LOOPS:
        if hasattr(tool, name):
            wrap(tool, name, _with_time)
    return False  # nothing is patched before such a loader comes


@patch("ptv_datasets")
def patch_backend(ptv_datasets) -> bool:
    """``DATA.DECODING_BACKEND torchvision``, if torchvision's operators for it are gone."""
    import torch

    stock = ptv_datasets.LabeledVideoDataset
    if hasattr(torch.ops.video_reader, "read_video_from_memory") or is_wrapped(stock):
        return False

    @functools.wraps(stock, updated=())
    def dataset(*args, **kwargs):
        if kwargs.get("decoder") == "torchvision":
            kwargs["decoder"] = "pyav"
        return stock(*args, **kwargs)

    dataset.stock = dataset.wrapper = stock
    ptv_datasets.LabeledVideoDataset = dataset  # there alone: pytorchvideo's own stays
    return True


def _with_time(loop, *args, **kwargs):
    call = inspect.signature(loop).bind(*args, **kwargs)
    name = LOOPS[loop.__name__]
    if is_pytorchvideos(getattr(call.arguments[name], "dataset", None)):
        call.arguments[name] = WithTime(call.arguments[name])
    return loop(*call.args, **call.kwargs)


def is_pytorchvideos(dataset) -> bool:
    """Whether a dataset is one of ``slowfast/datasets/ptv_datasets.py``."""
    name = f"{type(dataset).__module__}.{type(dataset).__name__}"
    return name == "slowfast.datasets.ptv_datasets.PTVDatasetWrapper"


class WithTime:
    """A loader whose batches have the times of clips, which pytorchvideo does not give, as 0."""

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
