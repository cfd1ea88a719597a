"""Config keys of SlowFast's own files that its defaults no longer know."""

from stts_slowfast.pyslowfast.compat import patch


@patch("prefetch_key")
def patch_prefetch_key(defaults) -> bool:
    """The key ``PREFETCH`` of SlowFast's own ``configs/SSv2/MVITv2_*.yaml``, an error since it left
    ``_C``: it is passed over."""
    config = defaults._C
    if "PREFETCH" in config or config.key_is_deprecated("PREFETCH"):
        return False
    config.register_deprecated_key("PREFETCH")
    return True
