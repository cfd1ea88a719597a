"""Operators of the fused blocks: PyTorch's own results, in less time and memory.

On a CPU fresh memory makes large tensors slow: the system allocates it page by page and clears it,
which may take longer than the computation. So large temporaries (normalised tokens, the hidden
layer of an MLP) are computed in chunks that fit the cache, for which the allocator reuses the same
pages, and computed again in the backward pass.
"""

import torch
from torch import Tensor, jit, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Elements of a chunk on a CPU: 8 MiB of float32.
CHUNK_ELEMENTS = 2**21


def use_chunks(x: Tensor) -> bool:
    """Whether operators work on chunks of ``x``: on a CPU, unless they are compiled or traced."""
    traced = torch.compiler.is_compiling() or jit.is_tracing()
    return x.device.type == "cpu" and not traced


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """``F.linear(norm(x))`` of tokens ``(B, N, C)``.

    Args:
        norm: normalises the tokens; None for no norm.
        positions: use only the tokens at these indices into ``N``, each at most once.
    """
    if norm is None or not use_chunks(x):
        x = x if positions is None else x.index_select(1, positions)
        return F.linear(x if norm is None else norm(x), weight, bias)
    dtype = compute_dtype(x)
    tokens = len(x) * (x.shape[1] if positions is None else len(positions))
    rows = max(min(CHUNK_ELEMENTS // x.shape[2], tokens), 1)
    layer = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _NormedLinear.apply(x, *_settings(norm), *layer, positions, rows)


def residual_mlp(
    x: Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    second: nn.Linear,
    project: nn.Linear | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The second half of a block, of tokens ``x (B, N, C)``.

    With ``y = norm(x)`` it is ``x + scale * second(gelu(first(y)))``, with ``project(y)`` in place
    of ``x`` if given. For the backward pass only ``x`` is kept, and the hidden layer before the
    activation unless it is computed in chunks.

    Args:
        scale: ``(B, 1, 1)``, stochastic depth; None for 1.
    """
    dtype = compute_dtype(x)
    weights: list[Tensor | None] = [first.weight, first.bias, second.weight, second.bias]
    weights += [None, None] if project is None else [project.weight, project.bias]
    weights = [None if t is None else t.to(dtype) for t in weights]
    tokens = x.shape[0] * x.shape[1]
    rows = min(CHUNK_ELEMENTS // first.out_features, tokens) if use_chunks(x) else tokens
    return _ResidualMLP.apply(x, scale, *_settings(norm), *weights, max(rows, 1))


def depthwise(x: Tensor, weight: Tensor, stride: tuple, padding: tuple) -> Tensor:
    """Depth-wise 3-D convolution of ``x (B, C, T, H, W)``, channels-last in memory."""
    if x.device.type == "cpu" and stride[0] == 1 and padding[0] * 2 + 1 == weight.shape[2]:
        return _Depthwise.apply(x, weight, stride, padding)
    if x.is_cuda:
        x = x.contiguous()  # the layout of CUDA's depth-wise kernel
    return F.conv3d(x, weight, None, stride, padding, groups=x.shape[1])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer of ``x``, or its attention, computes in."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # the meta device has no autocast
        return x.dtype
    return torch.get_autocast_dtype(device)


def _settings(norm: nn.LayerNorm) -> tuple:
    return norm.weight, norm.bias, norm.eps


def _normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple:
    """``F.layer_norm``, and mean and inverse deviation for the backward pass."""
    return torch.native_layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps)


def _normalize_backward(
    grad: Tensor, x: Tensor, norm: tuple, weight: Tensor, bias: Tensor, needed: tuple
) -> tuple:
    """Gradients by ``x``, in its type, and by weight and bias, each if needed, else None; ``norm``
    is ``_normalize``'s."""
    grad_x, *grads = torch.ops.aten.native_layer_norm_backward(
        grad.to(weight.dtype),
        x.to(weight.dtype),
        x.shape[-1:],
        *norm[1:],
        weight,
        bias,
        needed,
    )
    return None if grad_x is None else grad_x.to(x.dtype), *grads


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, positions, rows):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, positions)
        ctx.eps, ctx.rows = eps, rows
        read = x if positions is None else x.index_select(1, positions)
        tokens, out = read.flatten(0, 1), None
        for part in _chunks(tokens, rows):
            chunk = _normalize(tokens[part], norm_weight, norm_bias, eps)[0].to(weight.dtype)
            out = _write_chunk(out, part, F.linear(chunk, weight, bias), len(tokens))
        return out.view(*read.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, norm_weight, norm_bias, weight, positions = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_x = grad_norm_weight = grad_norm_bias = grad_weight = grad_bias = None
        read = x if positions is None else x.index_select(1, positions)
        tokens, grad_output = read.flatten(0, 1), grad_output.flatten(0, 1)
        for part in _chunks(tokens, ctx.rows):
            grad = grad_output[part]
            norm = _normalize(tokens[part], norm_weight, norm_bias, ctx.eps)
            if needed[4]:
                grad_weight = _accumulate(grad_weight, grad.t() @ norm[0].to(weight.dtype))
            if not any(needed[:3]):
                continue
            grad, by_weight, by_bias = _normalize_backward(
                grad @ weight, tokens[part], norm, norm_weight, norm_bias, needed[:3]
            )
            grad_norm_weight = _accumulate(grad_norm_weight, by_weight)
            grad_norm_bias = _accumulate(grad_norm_bias, by_bias)
            if needed[0]:
                grad_x = _write_chunk(grad_x, part, grad, len(tokens))
        if grad_x is not None:
            grad_x = grad_x.view(read.shape)
            if positions is not None:
                grad_x = x.new_zeros(x.shape).index_copy_(1, positions, grad_x)
        if needed[5]:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_norm_weight, grad_norm_bias, None, grad_weight, grad_bias, None, None


class _ResidualMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, norm_weight, norm_bias, eps, *layers_and_rows):
        *layers, rows = layers_and_rows
        weight_1, bias_1, weight_2, bias_2, weight_p, bias_p = layers
        tokens, out = x.flatten(0, 1), None
        scale = _per_token(scale, x)
        for part in _chunks(tokens, rows):
            chunk = _normalize(tokens[part], norm_weight, norm_bias, eps)[0].to(weight_1.dtype)
            hidden = F.linear(chunk, weight_1, bias_1)
            y = F.linear(F.gelu(hidden), weight_2, bias_2)
            if scale is not None:
                y *= scale[part]
            y = y + (tokens[part] if weight_p is None else F.linear(chunk, weight_p, bias_p))
            out = _write_chunk(out, part, y, len(tokens))
        kept = hidden if rows >= len(tokens) else None
        ctx.save_for_backward(
            x, scale, norm_weight, norm_bias, weight_1, bias_1, weight_2, weight_p, kept
        )
        ctx.eps, ctx.rows = eps, rows
        return out.view(*x.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, scale, norm_weight, norm_bias, weight_1, bias_1, weight_2, weight_p, kept = (
            ctx.saved_tensors
        )
        # By x, scale, norm (2), eps, the three layers (2 each), rows.
        grads, needed = [None] * 12, ctx.needs_input_grad
        tokens, grad_output = x.flatten(0, 1), grad_output.flatten(0, 1)
        for part in _chunks(tokens, ctx.rows):
            norm = _normalize(tokens[part], norm_weight, norm_bias, ctx.eps)
            chunk = norm[0].to(weight_1.dtype)
            hidden = F.linear(chunk, weight_1, bias_1) if kept is None else kept
            grad = grad_output[part] if scale is None else grad_output[part] * scale[part]
            grad = grad.to(weight_1.dtype)
            if needed[7]:
                grads[7] = _accumulate(grads[7], grad.t() @ F.gelu(hidden))
            if needed[8]:
                grads[8] = _accumulate(grads[8], grad.sum(0))
            grad = torch.ops.aten.gelu_backward(grad @ weight_2, hidden)
            if needed[5]:
                grads[5] = _accumulate(grads[5], grad.t() @ chunk)
            if needed[6]:
                grads[6] = _accumulate(grads[6], grad.sum(0))
            grad = grad @ weight_1
            if weight_p is not None:
                by_out = grad_output[part].to(weight_1.dtype)
                if needed[9]:
                    grads[9] = _accumulate(grads[9], by_out.t() @ chunk)
                if needed[10]:
                    grads[10] = _accumulate(grads[10], by_out.sum(0))
                grad = grad + by_out @ weight_p
            if not any((needed[0], *needed[2:4])):
                continue
            grad, by_weight, by_bias = _normalize_backward(
                grad, tokens[part], norm, norm_weight, norm_bias, (needed[0], *needed[2:4])
            )
            grads[2], grads[3] = _accumulate(grads[2], by_weight), _accumulate(grads[3], by_bias)
            if not needed[0]:
                continue
            if weight_p is None:
                grad += grad_output[part]
            grads[0] = _write_chunk(grads[0], part, grad, len(tokens))
        if needed[0]:
            grads[0] = grads[0].view(x.shape)
        return tuple(grads)


def _per_token(scale: Tensor | None, x: Tensor) -> Tensor | None:
    """``(B, 1, 1)`` as ``(B*N, 1)``."""
    return None if scale is None else scale.expand(-1, x.shape[1], 1).reshape(-1, 1)


def _chunks(tokens: Tensor, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, len(tokens), rows)]


def _write_chunk(out: Tensor | None, part: slice, chunk: Tensor, length: int) -> Tensor:
    """Writes a chunk into a tensor of ``length`` rows; an only chunk is that tensor."""
    if len(chunk) == length:
        return chunk
    if out is None:
        out = chunk.new_empty(length, chunk.shape[1])
    out[part] = chunk
    return out


def _accumulate(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)


class _Depthwise(torch.autograd.Function):
    """The convolution, differentiated as one of two dimensions per tap in time, some clips at once.

    oneDNN's gradients of depth-wise 3-D convolutions take 1.2 to 3 times as long.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv3d(x, weight, None, stride, padding, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        frames = x.shape[2]
        x = x.permute(0, 2, 3, 4, 1)  # (B, T, H, W, C)
        grad_output = grad_output.permute(0, 2, 3, 4, 1)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = torch.zeros_like(weight)
        middle = ctx.padding[0]
        at_once = max(CHUNK_ELEMENTS // x[0].numel(), 1)
        for clips, grad_clips, grad_out in zip(
            *(t.split(at_once) for t in (x, grad_x, grad_output))
        ):
            # The middle tap reaches every frame, and is written; the others are added.
            for tap in sorted(range(weight.shape[2]), key=lambda tap: tap != middle):
                shift = tap - middle  # output frame t reads input frame t + shift
                read = slice(max(shift, 0), frames + min(shift, 0))
                written = slice(max(-shift, 0), frames + min(-shift, 0))
                if read.start >= read.stop:
                    continue
                grad_frames, grad_tap, _ = torch.ops.aten.convolution_backward(
                    grad_out[:, written].flatten(0, 1).permute(0, 3, 1, 2),
                    clips[:, read].flatten(0, 1).permute(0, 3, 1, 2),
                    weight[:, :, tap].contiguous(),
                    None,
                    ctx.stride[1:],
                    ctx.padding[1:],
                    (1, 1),
                    False,
                    (0, 0),
                    x.shape[4],
                    (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False),
                )
                if grad_tap is not None:
                    grad_weight[:, :, tap] += grad_tap
                if grad_frames is None:
                    continue
                grad_frames = grad_frames.permute(0, 2, 3, 1).unflatten(0, (len(clips), -1))
                if tap == middle:
                    grad_clips.copy_(grad_frames)
                else:
                    grad_clips[:, read] += grad_frames
        grad_x = grad_x.permute(0, 4, 1, 2, 3) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, None
