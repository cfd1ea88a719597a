"""Lightning Fabric and nothing else of Lightning, so that a run starts two seconds sooner.

The package ``lightning`` imports its Trainer too; and Fabric asks for torchmetrics' version by
importing it, which loads transformers if that is installed. Fabric uses neither.
"""

import sys

_hidden = sys.modules.setdefault("torchmetrics", None) is None
try:
    from lightning_fabric import Fabric, __version__, seed_everything
    from lightning_fabric.plugins import MixedPrecision, Precision
    from lightning_fabric.plugins.environments import (
        ClusterEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )
    from lightning_fabric.strategies import DDPStrategy
finally:
    if _hidden:
        del sys.modules["torchmetrics"]

__all__ = ["Fabric", "MixedPrecision", "Precision", "__version__", "seed_everything"]
__all__ += ["ClusterEnvironment", "DDPStrategy", "SLURMEnvironment", "TorchElasticEnvironment"]
