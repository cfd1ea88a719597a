"""Hosts whose blocks are called with tokens and their ``thw``."""

import pytest
import torch
from torch import nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import find_blocks, resolve_host
from stts_slowfast.hosts.thw_blocks import ThwBlockHost

HOST = ThwBlockHost(nn.Module())


class Block(nn.Module):
    def forward(self, x, grid):
        return x, grid


def every_other(*args, **kwargs):
    """Unpacks a call, keeps every other frame, and packs it."""
    tokens = HOST.unpack(args, kwargs, HOST.incoming_grid(args, kwargs, None))
    grid, frame_cls = tokens.grid, tokens.frame_cls
    kept = torch.arange(0, grid.shape[1], 2).expand(len(grid), -1)
    tokens = tokens._replace(
        grid=grid[:, ::2],
        thw=tokens.thw.keep_frames(kept),
        frame_cls=None if frame_cls is None else frame_cls[:, ::2],
    )
    return HOST.pack(tokens, args, kwargs)


def numbered(count):
    return torch.arange(count, dtype=torch.float32).view(1, count, 1)


@pytest.mark.parametrize("kind", [tuple, list])
def test_plain_tokens(kind):
    (x, thw, *rest), kwargs = every_other(numbered(24), kind((4, 3, 2)), "more", also=1)
    assert thw == (2, 3, 2) and thw.frames.tolist() == [[0, 2]]
    assert x.flatten().tolist() == [*range(6), *range(12, 18)]
    assert rest == ["more"] and kwargs == {"also": 1}


@pytest.mark.parametrize("name", ["thw", "thw_shape"])
def test_a_grid_given_by_name_stays_so(name):
    (x,), kwargs = every_other(numbered(24), **{name: [4, 3, 2]})
    assert kwargs == {name: (2, 3, 2)} and x.shape[1] == 12
    assert HOST.incoming_grid((x,), kwargs, None) is kwargs[name]


def test_one_cls_token_stays_in_front():
    (x, _), _ = every_other(numbered(25), (4, 3, 2))
    assert x.flatten().tolist() == [0, *range(1, 7), *range(13, 19)]


def test_a_cls_token_per_frame_is_selected_with_its_frame():
    (x, thw), _ = every_other(numbered(28), (4, 3, 2))
    assert thw == (2, 3, 2)
    assert x.flatten().tolist() == [*range(7), *range(14, 21)]


def test_what_a_block_returns_carries_the_grid_that_arrived():
    thw = Grid((2, 4, 4), torch.tensor([[0, 3]]))
    x, pooled = HOST.set_block_grid((numbered(8), [2, 2, 2]), thw)
    assert pooled == (2, 2, 2) and pooled.frames is thw.frames and x.shape[1] == 8
    assert HOST.set_block_grid(x, thw) is x
    assert not HOST.incoming_grid((x, [2, 2, 2]), {}, None).is_selected


def test_tokens_that_fit_no_layout_are_named():
    with pytest.raises(ValueError, match=r"\(1, 26, 1\) do not make a grid of 4x3x2"):
        every_other(numbered(26), (4, 3, 2))
    with pytest.raises(ValueError, match="without thw"):
        every_other(numbered(26))


def test_blocks_without_a_norm_are_refused():
    with pytest.raises(ValueError, match="Linear: it has no LayerNorm"):
        HOST.channels(nn.Linear(3, 3))


def test_an_empty_list_of_blocks_is_refused():
    model = nn.Module()
    model.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="no blocks"):
        find_blocks(model)
    model.blocks.append(Block())
    assert isinstance(resolve_host(model)[0], ThwBlockHost)


def test_blocks_of_a_model_in_a_wrapper_are_found():
    wrapper, inside = nn.Module(), nn.Module()
    inside.blocks = nn.ModuleList([Block()])
    wrapper.model = inside
    assert find_blocks(wrapper) == [inside.blocks[0]]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d])
def test_the_first_norm_has_the_width_of_the_tokens(norm):
    assert HOST.channels(nn.Sequential(nn.Identity(), norm(12), nn.LayerNorm(3))) == 12
