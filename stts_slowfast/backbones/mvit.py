"""MViT and MViTv2: torchvision's, built from SlowFast's MVIT, DATA and MODEL nodes.

With parameters renamed one to one (``mvit_state_dict.py``) it computes what SlowFast's does.
"""

from torch import nn
from torchvision.models.video.mvit import MSBlockConfig, MViT

from stts_slowfast.backbones import mvit_state_dict, vit
from stts_slowfast.backbones.family import FAMILIES, Family

# Keys of which torchvision's MViT has one value.
_FIXED = {
    "MODE": "conv",
    "POOL_FIRST": False,
    "CLS_EMBED_ON": True,
    "PATCH_2D": False,
    "MLP_RATIO": 4.0,
    "QKV_BIAS": True,
    "NORM": "layernorm",
    "NORM_STEM": False,
    "DROPOUT_RATE": 0.0,
    "SEPARATE_QKV": False,
    "USE_MEAN_POOLING": False,
    "USE_FIXED_SINCOS_POS": False,
    "LAYER_SCALE_INIT_VALUE": 0.0,
}

# Keys with entries for blocks, and the fields of an entry.
_ENTRIES = {
    "DIM_MUL": ("block", "factor"),
    "HEAD_MUL": ("block", "factor"),
    "POOL_Q_STRIDE": ("block", "t", "h", "w"),
    "POOL_KV_STRIDE": ("block", "t", "h", "w"),
}


def build(cfg) -> MViT | vit.ViT:
    """MViT (arXiv 2104.11227), MViTv2 (arXiv 2112.01526) or a plain ViT, with random weights.

    Returns:
        torchvision's ``MViT``, or our ``ViT`` if nothing is pooled: clips
        ``(B, 3, NUM_FRAMES, CROP, CROP)`` to logits ``(B, NUM_CLASSES)``.

    Raises:
        ValueError: for a setting of the ``MVIT`` node that torchvision's MViT does not have.
    """
    if vit.is_plain_vit(cfg):  # which torchvision's MViT does not have
        return vit.build(cfg)
    mvit = cfg.MVIT
    _check(cfg)
    model = MViT(
        spatial_size=(cfg.DATA.TRAIN_CROP_SIZE,) * 2,
        temporal_size=cfg.DATA.NUM_FRAMES,
        block_setting=block_settings(cfg),
        residual_pool=mvit.RESIDUAL_POOLING,
        residual_with_cls_embed=False,
        rel_pos_embed=not mvit.USE_ABS_POS,
        proj_after_attn=mvit.DIM_MUL_IN_ATT,
        dropout=cfg.MODEL.DROPOUT_RATE,
        stochastic_depth_prob=mvit.DROPPATH_RATE,
        num_classes=cfg.MODEL.NUM_CLASSES,
        patch_embed_kernel=tuple(mvit.PATCH_KERNEL),
        patch_embed_stride=tuple(mvit.PATCH_STRIDE),
        patch_embed_padding=tuple(mvit.PATCH_PADDING),
    )
    projection = model.head[1]
    projection.weight.data.mul_(mvit.HEAD_INIT_SCALE)
    projection.bias.data.mul_(mvit.HEAD_INIT_SCALE)
    if mvit.REL_POS_ZERO_INIT:
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                nn.init.zeros_(parameter)
    return model


def block_grids(cfg) -> list[tuple[int, int, int]]:
    """The token grid that arrives at each block: the patches, divided by the query strides."""
    if vit.is_plain_vit(cfg):
        return vit.block_grids(cfg)
    size = cfg.DATA.TRAIN_CROP_SIZE
    strides = list(cfg.MVIT.PATCH_STRIDE)
    strides = [1, *strides] if cfg.MVIT.PATCH_2D else strides
    grid = tuple(a // b for a, b in zip((cfg.DATA.NUM_FRAMES, size, size), strides))
    grids = []
    for stride in _per_block(cfg.MVIT.POOL_Q_STRIDE, cfg.MVIT.DEPTH):
        grids.append(grid)
        if stride:
            grid = tuple(-(-a // b) for a, b in zip(grid, stride))
    return grids


def block_settings(cfg) -> list[MSBlockConfig]:
    """SlowFast's multipliers, kernels and strides, for each block."""
    mvit = cfg.MVIT
    depth = mvit.DEPTH
    dim_mul = {int(block): factor for block, factor in mvit.DIM_MUL}
    head_mul = {int(block): factor for block, factor in mvit.HEAD_MUL}
    strides_q = _per_block(mvit.POOL_Q_STRIDE, depth)
    strides_kv = _kv_strides(mvit, strides_q)
    heads, width = mvit.NUM_HEADS, mvit.EMBED_DIM
    settings = []
    for block in range(depth):
        heads = _scaled(heads, head_mul.get(block, 1.0), 1)
        # MViTv2 widens in the attention of a stage's first block, MViT in the MLP before it.
        at = block if mvit.DIM_MUL_IN_ATT else block + 1
        width_out = _scaled(width, dim_mul.get(at, 1.0), _scaled(heads, head_mul.get(at, 1.0), 1))
        settings.append(
            MSBlockConfig(
                num_heads=heads,
                input_channels=width,
                output_channels=width_out,
                kernel_q=_kernel(mvit.POOL_KVQ_KERNEL, strides_q[block]),
                kernel_kv=_kernel(mvit.POOL_KVQ_KERNEL, strides_kv[block]),
                stride_q=strides_q[block],
                stride_kv=strides_kv[block],
            )
        )
        width = width_out
    return settings


def _per_block(entries, depth: int) -> list[list[int]]:
    """``[[block, t, h, w], ...]`` as one ``[t, h, w]`` per block, empty for the others."""
    strides = [[] for _ in range(depth)]
    for block, *stride in entries:
        strides[block] = list(stride)
    return strides


def _kv_strides(mvit, strides_q: list[list[int]]) -> list[list[int]]:
    if mvit.POOL_KV_STRIDE_ADAPTIVE is None:
        return _per_block(mvit.POOL_KV_STRIDE, mvit.DEPTH)
    stride = list(mvit.POOL_KV_STRIDE_ADAPTIVE)
    strides = []
    for stride_q in strides_q:
        if stride_q:
            stride = [max(kv // q, 1) for kv, q in zip(stride, stride_q)]
        strides.append(stride)
    return strides


def _kernel(kernel, stride: list[int]) -> list[int]:
    if not stride:
        return []
    return list(kernel) if kernel is not None else [s + 1 if s > 1 else s for s in stride]


def _scaled(width: int, factor: float, divisor: int) -> int:
    """``width * factor`` rounded to a multiple of ``divisor``, never down by more than a tenth."""
    target = width * factor
    rounded = max(1, int(target + divisor / 2) // divisor * divisor)
    return int(rounded + divisor if rounded < 0.9 * target else rounded)


def _check(cfg) -> None:
    mvit = cfg.MVIT
    for key, value in _FIXED.items():
        if mvit[key] != value:
            raise ValueError(
                f"MVIT.{key} is {mvit[key]!r}, but torchvision's MViT only has {value!r}: "
                "set it, or run inside SlowFast"
            )
    for key, names in _ENTRIES.items():
        # The width and the heads may change after the last block, as in SlowFast's configs.
        last = mvit.DEPTH if len(names) == 2 else mvit.DEPTH - 1
        for entry in mvit[key]:
            if len(entry) != len(names) or not 0 <= entry[0] <= last:
                raise ValueError(
                    f"MVIT.{key} holds {list(entry)}: give [{', '.join(names)}], the block "
                    f"from 0 to {last}"
                )
    if mvit.REV.ENABLE:
        raise ValueError("MVIT.REV.ENABLE is True, but a reversible MViT has no torchvision form")
    if mvit.USE_ABS_POS == mvit.REL_POS_SPATIAL or mvit.REL_POS_SPATIAL != mvit.REL_POS_TEMPORAL:
        raise ValueError(
            f"MVIT.USE_ABS_POS is {mvit.USE_ABS_POS}, REL_POS_SPATIAL {mvit.REL_POS_SPATIAL} and "
            f"REL_POS_TEMPORAL {mvit.REL_POS_TEMPORAL}, but torchvision's MViT has only "
            "absolute positions, or only relative ones in space and time: run inside SlowFast"
        )
    if mvit.USE_ABS_POS and not mvit.SEP_POS_EMBED:
        raise ValueError(
            "MVIT.SEP_POS_EMBED is False, but torchvision's MViT keeps positions of space and "
            "time apart: set it, or run inside SlowFast"
        )
    if cfg.DATA.TRAIN_CROP_SIZE != cfg.DATA.TEST_CROP_SIZE:
        raise ValueError(
            f"DATA.TRAIN_CROP_SIZE is {cfg.DATA.TRAIN_CROP_SIZE} but DATA.TEST_CROP_SIZE is "
            f"{cfg.DATA.TEST_CROP_SIZE}: MViT needs them equal"
        )
    if list(cfg.DATA.INPUT_CHANNEL_NUM)[:1] != [3]:
        raise ValueError(
            f"DATA.INPUT_CHANNEL_NUM is {list(cfg.DATA.INPUT_CHANNEL_NUM)}: torchvision's MViT "
            "takes [3]"
        )
    sizes = {
        "DATA.NUM_FRAMES": (cfg.DATA.NUM_FRAMES, mvit.PATCH_STRIDE[0]),
        "DATA.TRAIN_CROP_SIZE": (cfg.DATA.TRAIN_CROP_SIZE, mvit.PATCH_STRIDE[1]),
    }
    for key, (size, stride) in sizes.items():
        if size % stride:
            raise ValueError(f"{key} is {size}: MVIT.PATCH_STRIDE needs a multiple of {stride}")
    for size, stride, kernel, padding in zip(
        (cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TRAIN_CROP_SIZE),
        mvit.PATCH_STRIDE,
        mvit.PATCH_KERNEL,
        mvit.PATCH_PADDING,
    ):
        if (size + 2 * padding - kernel) // stride + 1 != size // stride:
            raise ValueError(
                f"MVIT.PATCH_KERNEL {list(mvit.PATCH_KERNEL)} with PATCH_PADDING "
                f"{list(mvit.PATCH_PADDING)} and PATCH_STRIDE {list(mvit.PATCH_STRIDE)} does not "
                f"make {size // stride} patches of {size}: pad by half the kernel"
            )


FAMILIES.register(
    Family(
        "MViT",
        build,
        block_grids,
        models=(MViT, vit.ViT),
        formats=mvit_state_dict.FORMATS,
        from_slowfast=mvit_state_dict.from_slowfast,
        to_slowfast=mvit_state_dict.to_slowfast,
        metadata={"pool_norm_eps": mvit_state_dict.EPS_TODAY},
        read_metadata=mvit_state_dict.read_metadata,
        set_metadata=mvit_state_dict.set_metadata,
    )
)
