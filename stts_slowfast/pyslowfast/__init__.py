"""The guest inside SlowFast; importing it does what PyTorch does at ``import torch``.

PyTorch 2.5 and newer finds ``autoload.register`` by its entry point. With an older one, write
``import stts_slowfast.pyslowfast`` above the imports of ``tools/run_net.py``, or start it with
``stts run``.
"""

from stts_slowfast.pyslowfast import autoload

autoload.register()
