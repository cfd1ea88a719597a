"""Names that a config or a model refers to resolve to what they name."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stts_slowfast import backbones
from stts_slowfast.config import Settings
from stts_slowfast.hosts import HOSTS, Host, Tokens, old_names
from stts_slowfast.scorers import SCORERS
from stts_slowfast.topk import OPERATORS, hard_topk

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [name for name, _ in SCORERS])
def test_a_scorer_scores_frames_and_windows(name):
    grid = torch.randn(2, 4, 6, 6, 8)
    assert SCORERS.get(name)("TIME", 8)(grid, 2).shape == (2, 4)
    assert SCORERS.get(name)("SPACE", 8)(grid, (4, 4), (1, 1)).shape == (8, 9)
    Settings.from_kwargs(time={0: 0.5}, time_scorer=name).validate(1)


@pytest.mark.parametrize("name", [name for name, _ in OPERATORS])
def test_an_operator_gives_hard_indicators_without_noise(name):
    scores = torch.rand(3, 6)
    indicators = OPERATORS.get(name)(scores, 2, 0.0, 4, "exact")
    assert torch.equal(indicators.argmax(dim=2), hard_topk(scores, 2))
    assert torch.equal(indicators.sum(dim=2), torch.ones(3, 2))
    Settings.from_kwargs(time={0: 0.5}, operator=name).validate(1)


@pytest.mark.parametrize("name", [name for name, _ in HOSTS])
def test_a_host_has_its_methods(name):
    host = HOSTS.get(name)
    assert issubclass(host, Host)
    for method in ("blocks", "unpack", "pack"):
        assert getattr(host, method) is not getattr(Host, method), method
    assert not list(host.blocks(nn.Linear(2, 2)))


def test_every_host_in_the_folder_is_registered():
    folder = ROOT / "stts_slowfast" / "hosts"
    named = re.findall(r"^class (\w+)\(", "".join(p.read_text() for p in folder.glob("*.py")), re.M)
    registered = {host.__name__ for _, host in HOSTS if host.__module__.startswith("stts_slowfast")}
    bases = {"HFVideoHost", "TokenSequenceHost"}
    others = {"OldTokens", "Tokens"}
    assert registered == set(named) - bases - others


def test_the_host_that_takes_any_model_with_blocks_is_tried_last():
    assert next(iter(HOSTS))[0] == "BlocksWithGrid"


@pytest.mark.parametrize("name", [name for name, _ in backbones.FAMILIES])
def test_a_family_resolves(name):
    assert callable(backbones.FAMILIES.get(name).build)


# --- hosts with the names before 0.2 -----------------------------------------------------------


def test_a_host_with_old_names_works_with_a_warning():
    with pytest.warns(FutureWarning, match="rename read to unpack, write to pack") as warned:

        class Layers(Host):
            def read(self, args, kwargs, thw):
                x = args[0]
                return Tokens(x[:, 1:].unflatten(1, (2, 3, 3)), thw, clip=x[:, :1])

            def write(self, tokens, args, kwargs):
                grid, _, clip, frames = tokens
                assert frames is None
                return (torch.cat([clip, grid.flatten(1, 3)], dim=1), *args[1:]), kwargs

    assert warned[0].filename == __file__
    x, host = torch.randn(2, 19, 4), Layers(nn.Identity())
    tokens = host.unpack((x,), {}, None)
    assert torch.equal(tokens.cls, x[:, :1]) and tokens.frame_cls is None
    (again,), kwargs = host.pack(tokens, (x,), {})
    assert torch.equal(again, x) and kwargs == {}


def test_every_old_method_is_a_method_of_today():
    assert all(callable(getattr(Host, name)) for name in old_names.METHODS.values())


@pytest.mark.parametrize("path", ["hosts.is_a", "hosts.tokens_alone.TokensAlone"])
def test_documented_old_paths_are_importable_with_a_warning(path):
    module, _, name = f"stts_slowfast.{path}".rpartition(".")
    sys.modules.pop("stts_slowfast.hosts.tokens_alone", None)
    with pytest.warns(FutureWarning, match="is now"):
        assert getattr(importlib.import_module(module), name) is not None
