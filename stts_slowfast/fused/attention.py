"""Fused, exact pooling attention for the MViT blocks of torchvision and SlowFast.

What is different from the stock modules, and never what they compute:

* ``scaled_dot_product_attention`` instead of ``softmax(q k^T) v``: no (queries x keys) matrix.
* Decomposed relative positions ride in extra channels: beside a query its products with the
  tables, beside a key the one-hot of its place, so that their inner product is the position term.
* Tokens stay channels-last from the projection to the attention; the pooling convolution takes
  all heads, and keys and values, at once.
* Normalised tokens and an MLP's hidden layer are not kept for the backward pass, or once.
* Where the pooling stride skips tokens, keys and values are only projected where they are read.
"""

import torch
from torch import Tensor, arange, cat, einsum, eye, jit, nn
from torch.nn import functional as F
from torchvision.models.video.mvit import MultiscaleBlock, MViT
from torchvision.ops import MLP

from stts_slowfast.fused import cpu as kernels
from stts_slowfast.hosts import find_blocks


def fuse_attention(model: nn.Module, true_distances: bool = True) -> int:
    """Replaces the pooling attention of a model's MViT blocks by fused ones, in place.

    The blocks around it are replaced along with it where that is exact. Parameters and buffers
    stay the same objects under the same names. Attention that cannot be fused exactly
    (pooling before the projection, unshared convolutions, norms other than LayerNorm) stays as it
    is. Call it after ``attach``; calling it again starts afresh.

    Args:
        model: any model with torchvision's ``MultiscaleAttention`` or SlowFast's
            ``MultiScaleAttention`` in it.
        true_distances: after a selection, read the tables of relative positions at the true
            distances between the tokens that are left: of the kept frames of each clip, and of
            the neighbours inside a window. False stretches the tables over what is left, as the
            stock modules do for any smaller input. Without selection it makes no difference.

    Returns:
        How many attention modules were replaced.
    """
    unfuse_attention(model)
    upstream = _upstream(model) if true_distances else {}
    reader = _cls_reader(model)
    last = find_blocks(model)[-1] if reader is not None else None
    count = 0
    for parent, name, child in _children(model):
        for kind in (_TorchvisionAttention, _SlowFastAttention):
            if kind.fits(child):
                parent._modules[name] = kind(child, upstream.get(child, ()))
                count += 1
        if _PatchProjection.fits(parent, name):
            parent._modules[name] = _PatchProjection(child)
        if name == "pool_skip":
            holder, name = (parent, name) if isinstance(child, nn.MaxPool3d) else (child, "pool")
            if _SkipPool.fits(getattr(holder, name, None)):
                holder._modules[name] = _SkipPool(getattr(holder, name))
    for parent, name, child in _children(model):
        for kind in (_TorchvisionBlock, _SlowFastBlock):
            if kind.fits(child):
                parent._modules[name] = kind(child, reader if child is last else None)
    return count


def unfuse_attention(model: nn.Module) -> None:
    """Puts the stock modules back, the very objects that ``fuse_attention`` replaced."""
    for parent, name, child in _children(model):
        if isinstance(child, (_View, _SkipPool)):
            child.stock.training = child.training
            parent._modules[name] = child.stock


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
    ]


def _upstream(model: nn.Module) -> dict[nn.Module, tuple]:
    """Each module of a block, to the selectors that run in front of that block or earlier."""
    selectors = getattr(model, "stts", None)
    if not isinstance(selectors, nn.ModuleDict):
        return {}
    return {
        module: tuple(selector for selector in selectors.values() if selector.block <= number)
        for number, block in enumerate(find_blocks(model))
        for module in block.modules()
    }


def _cls_reader(model: nn.Module) -> nn.Module | None:
    """What reads the tokens of a model's last block, if it then drops all but the cls token."""
    if type(model) is MViT:
        return model.norm
    if _name_in_slowfast(model) != "models.video_model_builder.MViT":
        return None
    all_tokens = model.enable_detection or model.use_mean_pooling or model.enable_rev
    return model.norm if model.cls_embed_on and not all_tokens else None


def _name_in_slowfast(module: nn.Module) -> str:
    """Its class with the path inside the package ``slowfast``, however that is imported."""
    kind = type(module)
    return f"{kind.__module__.rpartition('slowfast.')[2]}.{kind.__name__}"


class _View(nn.Module):
    """A second view of a stock module: same attributes, parameters and children."""

    def __init__(self, stock: nn.Module, **more):
        super().__init__()
        # Shared dictionaries: what happens to one happens to the other, and a copy copies both.
        self.__dict__.update(stock.__dict__)
        self.__dict__.update(stock=stock, **more)


class FusedAttention(_View):
    """A second view of a stock attention module: same attributes, parameters and children.

    Args:
        stock: the module to stand in for.
        selectors: the token selectors in front of it, earliest first; empty to treat the arriving
            grid as whole, whatever it says of where it comes from.

    Shapes: tokens ``(B, [1+]T*H*W, C)`` and ``(T, H, W)`` in; tokens and their grid out.
    """

    def __init__(self, stock: nn.Module, selectors: tuple[nn.Module, ...] = ()):
        super().__init__(stock, selectors=selectors)

    def forward(self, x: Tensor, thw, norm: nn.LayerNorm | None = None, cls_alone: bool = False):
        """As the stock module's.

        Args:
            norm: what the tokens still have to be normalised by, if anything (for
                ``kernels.in_pieces(x)``).
            cls_alone: let the cls token alone ask, and return it alone: ``(B, 1, C)``.
        """
        folded = self.tables() != (None, None, None)
        if jit.is_tracing() and not (folded and self.selectors):
            # fvcore counts by tracing, and then finds the operators of the stock module.
            return self.stock.forward(x if norm is None else norm(x), thw)
        q, k, v, q_thw, k_thw = self._project(x, tuple(thw), norm, cls_alone)
        scale, channels = self.softmax_scale(), q.shape[3]
        query, key, value = q, k, v
        if folded:
            query, key, value = self._fold(q, k * scale, v, thw, q_thw, k_thw)
            scale = 1.0
        out = _attend(query, key, value, scale)[..., :channels]  # (B, N, heads, D)
        residual = self.residual()
        if residual == "all":
            out = out + q
        elif residual == "patches" and not cls_alone:
            # One pass and no copy: the cls token's share of the residual is multiplied by zero.
            patches = (arange(q.shape[1], device=q.device) > 0).to(out.dtype)
            out = out.addcmul(q.to(out.dtype), patches[:, None, None])
        return self.output(out.flatten(2)), type(thw)(q_thw)

    def _project(self, x: Tensor, thw: tuple, norm: nn.LayerNorm | None, cls_alone: bool):
        """Pooled queries, keys and values ``(B, N, heads, D)``, and the grids of both."""
        to_q, to_kv = self.projections()
        (pool_q, norm_q), (pool_k, norm_k), (pool_v, norm_v) = self.pools()
        if cls_alone:
            q = kernels.linear(x[:, :1], *to_q, norm)
            q_thw = thw
        else:
            q, q_thw = self._pooled(x, thw, norm, to_q, [pool_q])
        kv, k_thw = self._pooled(x, thw, norm, to_kv, [pool_k, pool_v])
        q, k, v = (self._heads(t) for t in (q, *kv.chunk(2, dim=2)))
        norms = (norm_q, norm_k, norm_v)
        q, k, v = (t if norm is None else norm(t) for t, norm in zip((q, k, v), norms))
        return q, k, v, q_thw, k_thw

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1))

    def _pooled(self, x: Tensor, thw: tuple, norm, projection: tuple, pools: list):
        """Projects tokens, and pools the result ``(B, 1+L, len(pools)*heads*D)`` over the grid."""
        if pools[0] is None:
            return kernels.linear(x, *projection, norm), thw
        cls = int(self.has_cls())
        places, grid, stride = _read(thw, pools[0], x.device)
        if places is None:
            y = kernels.linear(x, *projection, norm)
            first, y = y.split([cls, x.shape[1] - cls], dim=1)
        else:
            first = kernels.linear(x[:, :1], *projection, norm) if cls else None
            y = kernels.linear(x, *projection, norm, places + cls)
        y = y.unflatten(1, grid).permute(0, 4, 1, 2, 3)  # channels-last in memory
        if isinstance(pools[0], nn.Conv3d):
            weight = cat([pool.weight.repeat(self.num_heads, 1, 1, 1, 1) for pool in pools])
            y = kernels.depthwise(y, weight.to(y.dtype), stride, pools[0].padding)
        else:
            y = pools[0](y)
        grid = tuple(y.shape[2:])
        y = y.permute(0, 2, 3, 4, 1).flatten(1, 3)
        if cls:
            y = cat([first, y], dim=1)
        return y, grid

    def _fold(self, q: Tensor, k: Tensor, v: Tensor, thw, q_thw: tuple, k_thw: tuple):
        """Adds the channels whose inner product is the relative position term.

        ``q (B, N, heads, D)`` gains its products with the table rows of every key place along
        each axis, ``k`` the one-hot of its place along each axis, ``v`` zeros.
        """
        cls = int(self.has_cls())
        patches = q[:, cls:].unflatten(1, q_thw)  # (B, T, H, W, heads, D)
        products, places = [], []
        for axis, table in enumerate(self.tables()):
            if table is None:
                continue
            rows = self._rows(axis, table, thw, q_thw[axis], k_thw[axis]).to(q.dtype)
            products.append(_products(patches, rows, axis))
            shape = [1, 1, 1, k_thw[axis]]
            shape[axis] = k_thw[axis]
            place = eye(k_thw[axis], dtype=k.dtype, device=k.device).view(shape)
            places.append(place.expand(*k_thw, k_thw[axis]))
        extra = sum(t.shape[-1] for t in places)
        pad = -(q.shape[3] + extra) % 8
        products = F.pad(cat(products, dim=5).flatten(1, 3), (0, pad, 0, 0, cls, 0))
        places = F.pad(cat(places, dim=3).flatten(0, 2), (0, pad, cls, 0))  # (N, extra + pad)
        places = places[None, :, None].expand(*k.shape[:3], -1)
        return cat([q, products], dim=3), cat([k, places], dim=3), F.pad(v, (0, extra + pad))

    def _rows(self, axis: int, table: Tensor, thw, q_size: int, k_size: int) -> Tensor:
        """Table rows ``(q_size, k_size, D)`` of every query and key place along an axis.

        In time after a selection ``(B, q_size, k_size, D)``, since every clip keeps other frames.
        """
        pools = [pool for pool, _ in self.pools()[:2]]
        whole = size = thw[axis]
        if axis == 0:
            frames = getattr(thw, "frames", None) if self.selectors else None
            strided = any(_geometry(pool)[1][0] > 1 for pool in pools)
            if frames is not None and not strided:
                distances = frames[:, :, None] - frames[:, None, :] + len(table) // 2
                return table[distances.clamp(0, len(table) - 1)]
        elif any(selector.dimension == "SPACE" for selector in self.selectors):
            # The grid that the table was made for: a cropped one reads the part of it in reach.
            strides = [_geometry(pool)[1][axis] for pool in pools]
            whole = max(size, (len(table) + 1) // 2 * min(strides))
        q_whole, k_whole = (_pooled_size(whole, pool, axis) for pool in pools)
        distances = self.distances(q_whole, k_whole, table.device)[:q_size, :k_size].long()
        return _interpolate(table, 2 * max(q_whole, k_whole) - 1)[distances]


class _TorchvisionAttention(FusedAttention):
    """Stands in for ``torchvision.models.video.mvit.MultiscaleAttention``."""

    @staticmethod
    def fits(attn: nn.Module) -> bool:
        names = ("qkv", "project", "scaler", "pool_q", "pool_k", "residual_with_cls_embed")
        if not all(hasattr(attn, name) for name in names):
            return False
        pools = [attn.pool_q, attn.pool_k, attn.pool_v]
        if any(pool is not None and pool.norm_before_pool for pool in pools):
            return False
        if any(pool is not None and len(pool.norm_act or ()) > 1 for pool in pools):
            return False
        return _fusible(attn.qkv, _TorchvisionAttention.pools(attn))

    def projections(self):
        return _split(self.qkv)

    def pools(self):
        pools = (self.pool_q, self.pool_k, self.pool_v)
        return [
            (None, None)
            if pool is None
            else (pool.pool, pool.norm_act[0] if pool.norm_act else None)
            for pool in pools
        ]

    def tables(self):
        return self.rel_pos_t, self.rel_pos_h, self.rel_pos_w

    def has_cls(self) -> bool:
        return True

    def softmax_scale(self) -> float:
        return self.scaler

    def residual(self) -> str:
        if not self.residual_pool:
            return "none"
        return "all" if self.residual_with_cls_embed else "patches"

    def output(self, x: Tensor) -> Tensor:
        linear, *dropout = self.project
        x = kernels.linear(x, linear.weight, linear.bias)
        return dropout[0](x) if dropout else x

    @staticmethod
    def distances(q_size: int, k_size: int, device) -> Tensor:
        """``_add_rel_pos``'s rows, in its order of float operations, before truncation."""
        q_ratio, k_ratio = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
        q = arange(q_size, device=device)[:, None] * q_ratio
        return q - (arange(k_size, device=device) + (1.0 - k_size)) * k_ratio


class _SlowFastAttention(FusedAttention):
    """Stands in for ``slowfast.models.attention.MultiScaleAttention``."""

    @staticmethod
    def fits(attn: nn.Module) -> bool:
        names = ("pool_first", "separate_qkv", "has_cls_embed", "mode", "residual_pooling", "proj")
        if not all(hasattr(attn, name) for name in names) or attn.pool_first:
            return False
        linears = [attn.q, attn.k, attn.v] if attn.separate_qkv else [attn.qkv]
        pools = _SlowFastAttention.pools(attn)
        return all(_fusible(linear, pools) for linear in linears)

    def projections(self):
        if self.separate_qkv:
            biases = [linear.bias for linear in (self.k, self.v)]
            kv = cat([self.k.weight, self.v.weight]), None if None in biases else cat(biases)
            return (self.q.weight, self.q.bias), kv
        return _split(self.qkv)

    def pools(self):
        return [(getattr(self, f"pool_{x}"), getattr(self, f"norm_{x}", None)) for x in "qkv"]

    def tables(self):
        return tuple(getattr(self, f"rel_pos_{axis}", None) for axis in "thw")

    def has_cls(self) -> bool:
        return self.has_cls_embed

    def softmax_scale(self) -> float:
        return self.scale

    def residual(self) -> str:
        if not self.residual_pooling:
            return "none"
        return "patches" if self.has_cls_embed else "all"

    def output(self, x: Tensor) -> Tensor:
        x = kernels.linear(x, self.proj.weight, self.proj.bias)
        return self.proj_drop(x) if self.drop_rate > 0.0 else x

    @staticmethod
    def distances(q_size: int, k_size: int, device) -> Tensor:
        """``cal_rel_pos_spatial``'s rows, in its order of float operations, before truncation."""
        q_ratio, k_ratio = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
        q = arange(q_size, device=device)[:, None] * q_ratio
        return q - arange(k_size, device=device) * k_ratio + (k_size - 1) * k_ratio


class FusedBlock(_View):
    """A second view of a stock MViT block: same attributes, parameters and children.

    Args:
        stock: the block to stand in for.
        cls_reader: the one that reads what comes out, where it drops all but the cls token; then
            that comes out alone.

    Shapes: tokens ``(B, [1+]T*H*W, C)`` and ``(T, H, W)`` in; tokens and their grid out.
    """

    def __init__(self, stock: nn.Module, cls_reader: nn.Module | None = None):
        super().__init__(stock, cls_reader=cls_reader)

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        if not cls.is_stock(block) or "forward" in vars(block):  # a checkpointing wrapper's
            return False
        first, activation, second, *dropouts = cls.mlp_layers(block)
        return (
            isinstance(block.attn, FusedAttention)
            and type(block.norm1) is type(block.norm2) is nn.LayerNorm
            and all(norm.elementwise_affine for norm in (block.norm1, block.norm2))
            and type(first) is type(second) is nn.Linear
            and type(activation) is nn.GELU
            and activation.approximate == "none"
            and all(dropout.p == 0.0 for dropout in dropouts)
        )

    def forward(self, x: Tensor, thw):
        if jit.is_tracing() or not thw or not self._fused():
            return self.stock.forward(x, thw)
        y, norm = (x, self.norm1) if kernels.in_pieces(x) else (self.norm1(x), None)
        cls_alone = self._cls_alone()
        out, thw_new = self.attn(y, thw, norm, cls_alone)
        project, in_attention = self.projection()
        if project is not None and in_attention:
            x = kernels.linear(y, project.weight, project.bias, norm)
            project = None
        x = (x[:, :1] if cls_alone else self._skip(x, tuple(thw))) + self.drop(out)
        ones = x.new_ones(len(x), 1, 1)
        scale = self.drop(ones)  # what stochastic depth multiplies each clip with
        scale = None if scale is ones else scale
        first, _, second, *_ = self.mlp_layers(self)
        return kernels.residual_mlp(x, self.norm2, first, second, project, scale), thw_new

    def _cls_alone(self) -> bool:
        """Whether the patches' queries, and all that follows from them, can be left out.

        Not where parameters serve those alone: every parameter must get a gradient.
        """
        reader, attn = self.cls_reader, self.attn
        if reader is None or attn.tables() != (None, None, None) or attn.pools()[0][0] is not None:
            return False
        return not (self._forward_hooks or reader._forward_hooks or reader._forward_pre_hooks)

    def _fused(self) -> bool:
        """Whether the parts are still as they were, and nobody has hooks on them."""
        if torch.compiler.is_compiling():
            return True
        if not self.fits(self):
            return False
        parts = [self.norm1, self.attn, self.norm2, self.mlp, *self.mlp_layers(self)]
        parts += [part for part in self.projection()[:1] if part is not None]
        return not any(
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            for part in parts
        )

    def _skip(self, x: Tensor, thw: tuple) -> Tensor:
        """Pools the residual ``(B, [1+]T*H*W, C)`` over the grid."""
        pool = self.skip_pool()
        if pool is None:
            return x
        cls = x.shape[1] - thw[0] * thw[1] * thw[2]
        y = pool(x[:, cls:].unflatten(1, thw).permute(0, 4, 1, 2, 3))
        y = y.permute(0, 2, 3, 4, 1).flatten(1, 3)
        return cat([x[:, :cls], y], dim=1) if cls else y


class _TorchvisionBlock(FusedBlock):
    """Stands in for ``torchvision.models.video.mvit.MultiscaleBlock``."""

    @staticmethod
    def is_stock(block: nn.Module) -> bool:
        return type(block) in (MultiscaleBlock, _TorchvisionBlock) and isinstance(block.mlp, MLP)

    @staticmethod
    def mlp_layers(block: nn.Module) -> list[nn.Module]:
        """The first linear layer, the activation, the second linear layer and dropouts."""
        layers = list(block.mlp)
        dropouts = [layer for layer in layers if isinstance(layer, nn.Dropout)]
        return [layer for layer in layers if not isinstance(layer, nn.Dropout)] + dropouts

    def projection(self) -> tuple[nn.Module | None, bool]:
        """What changes the width of the residual, if anything, and whether before the MLP."""
        return self.project, self.proj_after_attn

    def drop(self, x: Tensor) -> Tensor:
        return self.stochastic_depth(x)

    def skip_pool(self) -> nn.Module | None:
        return self.pool_skip and self.pool_skip.pool


class _SlowFastBlock(FusedBlock):
    """Stands in for ``slowfast.models.attention.MultiScaleBlock``."""

    @staticmethod
    def is_stock(block: nn.Module) -> bool:
        stock = _name_in_slowfast(block) == "models.attention.MultiScaleBlock"
        if not stock and type(block) is not _SlowFastBlock:
            return False
        if type(block.mlp).__name__ != "Mlp":
            return False
        return getattr(block, "gamma_1", None) is getattr(block, "gamma_2", None) is None

    @staticmethod
    def mlp_layers(block: nn.Module) -> list[nn.Module]:
        """The first linear layer, the activation, the second linear layer and dropouts."""
        mlp = block.mlp
        return [mlp.fc1, mlp.act, mlp.fc2] + ([mlp.drop] if mlp.drop_rate > 0.0 else [])

    def projection(self) -> tuple[nn.Module | None, bool]:
        """What changes the width of the residual, if anything, and whether before the MLP."""
        return getattr(self, "proj", None), self.dim_mul_in_att

    def drop(self, x: Tensor) -> Tensor:
        return self.drop_path(x)

    def skip_pool(self) -> nn.Module | None:
        return self.pool_skip


class _PatchProjection(_View):
    """A second view of the convolution that makes tokens; on a CPU they come out channels-last.

    So they lie as ``(B, T*H*W, C)`` needs them, and are not copied to get there.
    """

    @staticmethod
    def fits(parent: nn.Module, name: str) -> bool:
        torchvision = type(parent) is MViT and name == "conv_proj"
        if not torchvision and (type(parent).__name__, name) != ("PatchEmbed", "proj"):
            return False
        conv = parent._modules[name]
        return type(conv) is nn.Conv3d and conv.padding_mode == "zeros"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.device.type == "cpu" and not jit.is_tracing():
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
        settings = self.stride, self.padding, self.dilation, self.groups
        return F.conv3d(x, weight, self.bias, *settings)


class _SkipPool(nn.Module):
    """A block's ``MaxPool3d`` on the residual, as a pooling of frames with channels last.

    PyTorch's own is not vectorised on a CPU.
    """

    def __init__(self, stock: nn.MaxPool3d):
        super().__init__()
        self.__dict__["stock"] = stock

    @staticmethod
    def fits(pool: nn.Module | None) -> bool:
        if type(pool) is not nn.MaxPool3d or pool.return_indices or pool.ceil_mode:
            return False
        return _geometry(pool)[0][0] == _geometry(pool)[1][0] == 1

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.stock(x)
        frames = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)  # (B*T, C, H, W)
        sizes = (self.stock.kernel_size, self.stock.stride, self.stock.padding, self.stock.dilation)
        frames = kernels.max_pool(
            frames, *(size if isinstance(size, int) else size[1:] for size in sizes)
        )
        return frames.permute(0, 2, 3, 1).unflatten(0, (len(x), -1)).permute(0, 4, 1, 2, 3)


def _fusible(linear: nn.Module, pools) -> bool:
    """Whether projection and pooling are of the kinds that can be rearranged exactly."""
    pool_k, pool_v = pools[1][0], pools[2][0]
    if type(linear) is not nn.Linear or (pool_k is None) != (pool_v is None):
        return False
    for pool, norm in pools:
        if norm is not None and type(norm) is not nn.LayerNorm:
            return False
        if type(pool) is nn.Conv3d:
            depthwise = pool.groups == pool.in_channels == pool.out_channels
            centred = pool.padding == tuple(size // 2 for size in pool.kernel_size)
            plain = (
                pool.bias is None and pool.dilation == (1, 1, 1) and pool.padding_mode == "zeros"
            )
            if not (depthwise and centred and plain):
                return False
        elif pool is not None and type(pool) not in (nn.MaxPool3d, nn.AvgPool3d):
            return False
    if pool_k is None:
        return True
    return type(pool_k) is type(pool_v) and _geometry(pool_k) == _geometry(pool_v)


def _split(qkv: nn.Linear) -> tuple[tuple, tuple]:
    """Weight and bias that project to queries, and those that project to keys and values."""
    width = qkv.out_features // 3
    weights = qkv.weight.split([width, 2 * width])
    biases = (None, None) if qkv.bias is None else qkv.bias.split([width, 2 * width])
    return tuple(zip(weights, biases))


def _geometry(pool: nn.Module | None) -> tuple[tuple, tuple]:
    """Kernel and stride of a pooling module along time, height and width."""
    if pool is None:
        return (1, 1, 1), (1, 1, 1)
    sizes = (pool.kernel_size, pool.stride)
    return tuple((size,) * 3 if isinstance(size, int) else tuple(size) for size in sizes)


def _pooled_size(size: int, pool: nn.Module | None, axis: int) -> int:
    kernel, stride = (sizes[axis] for sizes in _geometry(pool))
    return (size + kernel // 2 * 2 - kernel) // stride + 1


def _read(thw: tuple, pool: nn.Module, device) -> tuple[Tensor | None, tuple, tuple]:
    """The places of the tokens that a pooling reads, their grid, and its stride over that grid.

    A convolution of kernel 3 and stride 8 reads three rows in eight: with only those left, it is
    one of stride 3 (the first window's padding stays the padding). None where all are read.
    """
    kernels, strides = _geometry(pool)
    skips = [stride > kernel for kernel, stride in zip(kernels, strides)]
    if not isinstance(pool, nn.Conv3d) or not any(skips):
        return None, thw, strides
    rows = [
        _rows_read(size, kernel, stride, device) if skip else arange(size, device=device)
        for size, kernel, stride, skip in zip(thw, kernels, strides, skips)
    ]
    places = (rows[0][:, None] * thw[1] + rows[1])[:, :, None] * thw[2] + rows[2]  # (t, h, w)
    strides = tuple(
        kernel if skip else stride for kernel, stride, skip in zip(kernels, strides, skips)
    )
    return places.flatten(), tuple(places.shape), strides


def _rows_read(size: int, kernel: int, stride: int, device) -> Tensor:
    """The rows of an axis that lie in some window of a pooling with padding ``kernel // 2``."""
    before = kernel // 2
    windows = (size + 2 * before - kernel) // stride + 1
    after = max((windows - 1) * stride - before + kernel - size, 0)
    starts = arange(windows, device=device) * stride - before
    rows = (starts[:, None] + arange(kernel, device=device)).flatten()
    return rows[before : len(rows) - after]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q k^T) v`` of ``(B, N, heads, D)``, likewise laid out."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if jit.is_tracing():
        out = (q * scale @ k.transpose(2, 3)).softmax(dim=3) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2)


def _products(patches: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Inner products of queries ``(B, T, H, W, heads, D)`` with their rows along one axis."""
    if rows.dim() == 4:
        return einsum("bthwnc,btkc->bthwnk", patches, rows)
    return einsum(f"bthwnc,{'thw'[axis]}kc->bthwnk", patches, rows)


def _interpolate(table: Tensor, length: int) -> Tensor:
    """Stretches a table ``(rows, D)`` linearly, as both hosts do for another input size."""
    if len(table) == length:
        return table
    return F.interpolate(table.t()[None], size=length, mode="linear")[0].t()
