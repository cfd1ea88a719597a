"""Stand-ins for SlowFast: a registry with two models, and a config that names one of them."""

from types import SimpleNamespace

import pytest
from fvcore.common.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

from stts_slowfast.pyslowfast import autoload, plugin
from stts_slowfast.standalone.config import get_cfg


class Block(nn.Module):
    """Tokens in, tokens out, as SlowFast's blocks have it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)

    def forward(self, x, thw):
        return self.norm1(x), thw


class Transformer(nn.Module):
    """Two blocks over 4 frames of 6x6 tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8), Block(8)])

    def forward(self, x):
        thw = [4, 6, 6]
        for block in self.blocks:
            x, thw = block(x, thw)
        return x


class ConvNet(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3)


MODEL_REGISTRY = Registry("MODEL")


class Builders:
    """``get(name)(cfg)`` builds a registered model as SlowFast's ``build_model`` does, wrapped."""

    def get(self, name: str):
        def build_model(cfg, gpu_id=None):
            return MODEL_REGISTRY.get(name)(cfg)

        module = SimpleNamespace(build_model=build_model)
        plugin.wrap_build_model(module)
        module.build_model.__wrapped__ = MODEL_REGISTRY._obj_map.get(name)
        return module.build_model

    def register(self, kind) -> None:
        MODEL_REGISTRY.register(kind)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(MODEL_REGISTRY, "_obj_map", {})
    MODEL_REGISTRY.register(Transformer)
    MODEL_REGISTRY.register(ConvNet)
    return Builders()


@pytest.fixture
def cfg():
    cfg = get_cfg()
    for node, values in {
        "MASK": {"ENABLE": False},
        "MULTIGRID": {"LONG_CYCLE": False, "SHORT_CYCLE": False},
        "DETECTION": {"ENABLE": False},
    }.items():
        if node not in cfg:
            cfg[node] = CfgNode(values)
    cfg.MODEL.MODEL_NAME = "Transformer"
    cfg.STTS.ENABLE = True
    cfg.STTS.TIME.KEEP = [0.5]
    cfg.STTS.SIGMA = cfg.STTS.BACKBONE_LR = 0.1
    cfg.STTS.SPACE.BLOCKS = [1]
    return cfg


@pytest.fixture(autouse=True)
def no_results(monkeypatch):
    """No hook has run in this process."""
    monkeypatch.setattr(autoload, "results", {})
