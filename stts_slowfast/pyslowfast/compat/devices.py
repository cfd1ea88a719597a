"""What SlowFast takes for granted about its devices."""

import contextlib

from stts_slowfast.pyslowfast.compat import switched_off


@contextlib.contextmanager
def quiet_synchronize(cfg):
    """While a job or an epoch runs on a CPU, ``torch.cuda.synchronize()``, which SlowFast calls
    after every iteration, does nothing; on a machine with CUDA it does what it does."""
    import torch

    if cfg.NUM_GPUS or "cuda_synchronize" in switched_off() or torch.cuda.is_available():
        yield
        return
    stock = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = stock
