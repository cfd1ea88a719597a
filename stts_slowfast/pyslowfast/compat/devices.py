"""What SlowFast takes for granted about its devices."""

import functools

from stts_slowfast.pyslowfast.compat import mend


@mend
def mend_cuda_synchronize(video_model_builder) -> bool:
    """``torch.cuda.synchronize()`` after every iteration, whatever ``NUM_GPUS`` is."""
    import torch

    if torch.cuda.is_available() or hasattr(torch.cuda.synchronize, "stock"):
        return False

    @functools.wraps(torch.cuda.synchronize)
    def synchronize(device=None) -> None:
        return None

    synchronize.stock = torch.cuda.synchronize
    torch.cuda.synchronize = synchronize
    return True
