"""All replacements: the one table of what is replaced in which library.

SlowFast's entries are added by ``pyslowfast/fused.py``, the only file that knows its modules.
"""

from collections.abc import Callable

from torch import nn

from stts_slowfast.fused import pytorchvideo, torchvision, video_swin
from stts_slowfast.fused.replacement import Replacement

# Attention modules; they are replaced first, since a block is fused only around fused attention.
SUBMODULES: list[type[Replacement]] = [
    torchvision.TorchvisionAttention,
    video_swin.SwinAttention,
    pytorchvideo.PyTorchVideoAttention,
]
BLOCKS: list[type[Replacement]] = [torchvision.TorchvisionBlock, pytorchvideo.PyTorchVideoBlock]
# By model: the norm that reads the last block's tokens, if the model keeps only the cls token.
FINAL_NORMS: list[Callable[[nn.Module], nn.Module | None]] = [
    torchvision.final_norm,
    pytorchvideo.final_norm,
]
