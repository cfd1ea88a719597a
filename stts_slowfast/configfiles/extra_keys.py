"""Keys that both engines add to nodes of SlowFast's config, with their defaults and ranges.

The guest reads this file at ``import torch``: it imports nothing.
"""

EXTRA_KEYS = {
    # Seconds that opening or reading a video may take; 0 for no limit.
    "DATA": {"READ_TIMEOUT": 120.0},
    # Test although some videos cannot be read: they count as wrong.
    "TEST": {"ALLOW_MISSING": False},
    # Type of MIXED_PRECISION; empty: float16 on GPUs, bfloat16 on the CPU (standalone only).
    "TRAIN": {"MIXED_PRECISION_DTYPE": ""},
}

EXTRA_RANGES = {
    "DATA.READ_TIMEOUT": "[0, 1e6]",
    "TRAIN.MIXED_PRECISION_DTYPE": ["", "float16", "bfloat16"],
}
