"""The old path of ``hosts.token_sequence.TokenSequenceHost``; it is removed in 0.4."""

import warnings

from stts_slowfast.hosts.token_sequence import TokenSequenceHost as TokensAlone

__all__ = ["TokensAlone"]

warnings.warn(
    "stts_slowfast.hosts.tokens_alone.TokensAlone is now "
    "stts_slowfast.hosts.token_sequence.TokenSequenceHost",
    FutureWarning,
    stacklevel=2,
)
