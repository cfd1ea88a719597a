"""The standalone model: a backbone, and selectors if the config asks for them."""

from torch import nn

from stts_slowfast import backbones
from stts_slowfast.checkpoints import load_pretrained
from stts_slowfast.fused import fuse_model
from stts_slowfast.hooks import attach


def build_model(cfg) -> nn.Module:
    """Builds the model of a config, with random weights or ``TIMESFORMER.PRETRAINED_MODEL``'s.

    Args:
        cfg: from :func:`load_config`.

    Returns:
        A model that maps float clips ``(B, 3, NUM_FRAMES, CROP, CROP)`` to logits
        ``(B, NUM_CLASSES)`` in training and evaluation; with selectors in ``model.stts`` if
        ``STTS.ENABLE``.

    Raises:
        FileNotFoundError: if there is no file of pretrained weights.
        ValueError: if the model cannot be built, naming the key.
    """
    model = backbones.build(cfg)
    load_pretrained(model, cfg)
    if cfg.STTS.ENABLE:
        attach(model, cfg.STTS, backbones.block_grids(cfg))
    elif cfg.STTS.FUSED_ATTENTION:
        fuse_model(model, True, cfg.STTS.TRUE_DISTANCES)
    return model
