"""Video Swin's windows: true distances behind a selection of windows, and no padding in time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

from stts_slowfast import attach, detach
from stts_slowfast.fused import fuse_model, video_swin
from stts_slowfast.fused.video_swin import SwinAttention


def swin() -> SwinTransformer3d:
    """Three stages on 4x16x16, 4x8x8 and 4x4x4 tokens, whose windows are 2x4x4."""
    return SwinTransformer3d([2, 4, 4], 8, [2, 1, 1], [1, 2, 2], [2, 4, 4], num_classes=5).eval()


def kinds(model) -> list[type]:
    return [type(block.attn) for stage in model.features[::2] for block in stage]


def test_relative_positions_stay_true_in_a_cropped_window():
    stock = ShiftedWindowAttention3d(8, [2, 4, 4], [0, 0, 0], 2)
    attention = SwinAttention(stock)
    for window in ([2, 4, 4], [1, 4, 4]):  # whole, and with frames missing: torchvision is right
        ours, theirs = (a.get_relative_position_bias(window) for a in (attention, stock))
        assert torch.equal(ours, theirs)

    bias = attention.get_relative_position_bias([2, 3, 2])[0].view(2, 2, 3, 2, 2, 3, 2)
    table = attention.relative_position_bias_table.view(3, 7, 7, 2)  # (frames, rows, columns) apart
    for query in ((0, 0, 0), (1, 2, 1)):
        for key in ((0, 1, 1), (1, 0, 0)):
            apart = [q - k for q, k in zip(query, key)]
            expected = table[apart[0] + 1, apart[1] + 3, apart[2] + 3]
            assert torch.equal(bias[(slice(None), *query, *key)], expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("space", "true_distances", "changed"),
    [({}, True, 0), ({1: 0.6}, False, 0), ({1: 0.6}, True, 2), ({0: 0.6, 2: 0.6}, True, 4)],
)
def test_attention_behind_a_selection_of_windows_is_replaced(space, true_distances, changed, fused):
    model = attach(
        swin(), time={0: 0.5}, space=space, true_distances=true_distances, fused_attention=fused
    )
    stock = SwinAttention if fused else ShiftedWindowAttention3d
    assert kinds(model) == [stock] * (4 - changed) + [SwinAttention] * changed
    found = [m for m in model.modules() if isinstance(m, SwinAttention)]
    assert sum(attention.true_distances for attention in found) == changed
    assert kinds(detach(model)) == [ShiftedWindowAttention3d] * 4


@torch.no_grad()
def test_a_cropped_grid_is_read_as_the_part_of_a_window_that_it_is():
    """Tokens outside of a 3x3 crop made unreachable give what the crop alone gives."""
    stock = ShiftedWindowAttention3d(8, [2, 4, 4], [0, 0, 0], 2)
    nn.init.normal_(stock.relative_position_bias_table)
    x = torch.randn(1, 2, 3, 3, 8)
    expected = explicit(stock, x)
    torch.testing.assert_close(SwinAttention(stock)(x), expected)
    assert (stock(x) - expected).abs().max() > 1e-3


def explicit(attn, x):
    """One window's attention, its biases looked up pair by pair."""
    _, t, h, w, c = x.shape
    table = attn.relative_position_bias_table.view(3, 7, 7, -1)
    places = [(i, j, k) for i in range(t) for j in range(h) for k in range(w)]
    bias = torch.stack(
        [
            torch.stack([table[a - d + 1, b - e + 3, c_ - f + 3] for d, e, f in places])
            for a, b, c_ in places
        ]
    )  # (N, N, heads)
    q, k, v = attn.qkv(x.flatten(1, 3)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) * (c // attn.num_heads) ** -0.5 + bias.permute(2, 0, 1)
    out = (logits.softmax(3) @ v).transpose(1, 2).flatten(2)
    return attn.proj(out).view(x.shape)


@pytest.mark.parametrize("shift", [[0, 0, 0], [2, 1, 2]])
@pytest.mark.parametrize("bias", [True, False])
def test_frames_that_pad_windows_are_not_computed(shift, bias, monkeypatch):
    """Of a shifted window, padding may be in the middle; in space, tokens are padded as before."""
    stock = ShiftedWindowAttention3d(8, [4, 2, 3], shift, 2, qkv_bias=bias)
    nn.init.normal_(stock.relative_position_bias_table)
    if bias:
        nn.init.normal_(stock.qkv.bias)
    attention = SwinAttention(stock, true_distances=False)
    frames, linear = [], F.linear
    monkeypatch.setattr(
        video_swin.F, "linear", lambda x, *layer: frames.append(x.shape[1]) or linear(x, *layer)
    )
    for grid in ((5, 4, 6), (7, 3, 5), (9, 2, 3)):
        x, outputs = torch.randn(2, *grid, 8, requires_grad=True), []
        for forward in (stock.forward, attention.fused, attention):
            frames.clear()
            out = forward(x)
            grads = torch.autograd.grad(out.square().sum(), [x, *stock.parameters()])
            outputs.append([out, *grads])
        assert frames == [grid[0]] * 2  # what the projections take
        for found in outputs[1:]:
            torch.testing.assert_close(found, outputs[0], rtol=1e-4, atol=1e-4)


def test_a_window_attention_whose_projection_is_observed_is_the_original():
    stock = ShiftedWindowAttention3d(8, [4, 2, 2], [2, 1, 1], 2)
    attention = SwinAttention(stock)
    assert attention.is_fused()
    stock.proj = nn.Sequential(stock.proj)
    assert not attention.is_fused()


def test_a_window_attention_of_another_formula_is_not_replaced(caplog):
    class Doubled(ShiftedWindowAttention3d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = swin()
    model.features[4][0].attn.__class__ = Doubled
    attach(model, space={1: 0.6})
    assert kinds(model)[-2:] == [SwinAttention, Doubled]
    assert "not replacing Doubled" in caplog.text
    assert fuse_model(model, False, False) == 0
