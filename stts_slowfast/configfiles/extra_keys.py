"""Keys that both engines add to nodes of SlowFast's config, with their defaults and ranges.

The guest reads this file at ``import torch``: it imports nothing.
"""

EXTRA_KEYS = {
    # Seconds that opening or reading a video may take; 0 for no limit.
    "DATA": {"READ_TIMEOUT": 120.0},
    # Precision of float32 matrix products on GPUs, as torch.set_float32_matmul_precision: highest
    # (float32) or high (TF32, several times as fast, with 10 bits of mantissa). Empty: PyTorch's
    # own, highest unless the environment variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is 1. Whatever
    # it is, convolutions use TF32 by PyTorch's default (torch.backends.cudnn.allow_tf32).
    "MODEL": {"FLOAT32_MATMUL_PRECISION": ""},
    "TEST": {
        # Test although some videos cannot be read: they count as wrong.
        "ALLOW_MISSING": False,
        # Validate and test in float32, bfloat16 or float16: under autocast, with weights cast once.
        # Scores are always float32.
        "PRECISION": "float32",
        # Validate and test with torch.compile in this mode: default, reduce-overhead (CUDA graphs,
        # for small batches on a GPU) or max-autotune. Empty: not compiled. Compiling takes minutes.
        "COMPILE": "",
    },
    # Type of MIXED_PRECISION; empty: float16 on GPUs, bfloat16 on the CPU (standalone only).
    "TRAIN": {"MIXED_PRECISION_DTYPE": ""},
}

EXTRA_RANGES = {
    "DATA.READ_TIMEOUT": "[0, 1e6]",
    "MODEL.FLOAT32_MATMUL_PRECISION": ["", "highest", "high", "medium"],
    "TEST.COMPILE": ["", "default", "reduce-overhead", "max-autotune"],
    "TEST.PRECISION": ["float32", "bfloat16", "float16"],
    "TRAIN.MIXED_PRECISION_DTYPE": ["", "float16", "bfloat16"],
}
