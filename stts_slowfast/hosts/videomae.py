"""VideoMAE of transformers: no cls token, the grid is the config's, each layer takes only tokens.

Its head reads the mean of the kept tokens, or (``use_mean_pooling`` False) the first one.
"""

from stts_slowfast.hosts.hf_video import HFVideoHost


class VideoMAE(HFVideoHost):
    """``VideoMAEModel`` and ``VideoMAEForVideoClassification``."""

    classes = ("VideoMAEModel", "VideoMAEForVideoClassification")
