"""The old path of ``integrations.transformers_trainer``; it is removed in 0.4."""

import warnings

from stts_slowfast.integrations.transformers_trainer import SelectionCallback

__all__ = ["SelectionCallback"]

warnings.warn(
    "stts_slowfast.standalone.trainer is now stts_slowfast.integrations.transformers_trainer",
    FutureWarning,
    stacklevel=2,
)
