"""Registered models that contain another: tokens are selected once, wherever the blocks are."""

import pytest
import torch
from torch import nn

import stts_slowfast as stts
from stts_slowfast.hosts import modules_with_selectors


@pytest.fixture
def register(checkout):
    """Registers classes, for one test."""
    from slowfast.models import MODEL_REGISTRY

    names = []

    def register(cls):
        MODEL_REGISTRY.register(cls)
        names.append(cls.__name__)
        return cls

    yield register
    for name in names:
        del MODEL_REGISTRY._obj_map[name]


def wrapper(child: str) -> type[nn.Module]:
    """A user's class that has a registered MViT as ``child``."""

    class Wrapper(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            from slowfast.models import MODEL_REGISTRY

            setattr(self, child, MODEL_REGISTRY.get("MViT")(cfg))

        def forward(self, inputs, bboxes=None):
            return getattr(self, child)(inputs)

    return Wrapper


def clips():
    return [torch.randn(2, 3, 8, 32, 32)]


@pytest.mark.parametrize("child", ["model", "backbone"])
def test_a_wrapped_mvit_is_selected_once(get_cfg, build, register, child):
    register(wrapper(child))
    cfg = get_cfg("STTS.ENABLE", True, "MODEL.MODEL_NAME", "Wrapper")
    model = build(cfg)
    arrived = []
    inner = getattr(model, child)
    inner.blocks[-1].register_forward_hook(lambda block, args, out: arrived.append(args[1]))
    model.eval()(clips())
    assert [int(size) for size in arrived[0]] == [2, 3, 3]  # half of 4 frames; window 6x6, pooled
    assert len(modules_with_selectors(model)) == 1
    assert stts.selections(model)["time_0"].shape == (2, 2)

    from slowfast.models import optimizer as optim

    groups = optim.construct_optimizer(model, cfg).param_groups
    assert {group["backbone"] for group in groups} == {True, False}


def test_a_wrapped_mvit_is_stock_with_selection_off(get_cfg, build, register):
    register(wrapper("backbone"))
    model = build(get_cfg("MODEL.MODEL_NAME", "Wrapper"))
    assert not modules_with_selectors(model)


def test_a_submodule_that_was_built_on_its_own_keeps_its_selectors(get_cfg, build, register):
    class Twice(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            part = cfg.clone()
            part.MODEL.MODEL_NAME = "MViT"
            self.trunk = build(part)

        def forward(self, inputs, bboxes=None):
            return self.trunk(inputs)

    register(Twice)
    model = build(get_cfg("STTS.ENABLE", True, "MODEL.MODEL_NAME", "Twice"))
    assert list(modules_with_selectors(model)) == ["trunk"]
    model.eval()(clips())
    assert stts.selections(model)["time_0"].shape == (2, 2)


def test_two_transformers_in_a_model_are_refused(get_cfg, build, register):
    class Two(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            from slowfast.models.video_model_builder import MViT

            self.rgb, self.flow = MViT(cfg), MViT(cfg)

    register(Two)
    with pytest.raises(ValueError, match=r"has 2 modules with blocks \(rgb, flow\)"):
        build(get_cfg("STTS.ENABLE", True, "MODEL.MODEL_NAME", "Two"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)

    def forward(self, x, thw=None):
        return x + self.norm(x) if thw is None else (x + self.norm(x), thw)


class Alone(nn.Module):
    """Its blocks take tokens alone: there is no grid to select in."""

    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Conv3d(3, 24, (2, 4, 4), (2, 4, 4))
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(24, cfg.MODEL.NUM_CLASSES)

    def forward(self, inputs, bboxes=None):
        x = self.embed(inputs[0]).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class WithGrid(Alone):
    """The same, with the grid: what the refusal asks for."""

    def forward(self, inputs, bboxes=None):
        x = self.embed(inputs[0])
        thw, x = list(x.shape[2:]), x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x, thw = block(x, thw)
        return self.head(x.mean(1))


class Idle(WithGrid):
    """The same, but its blocks are not called as modules."""

    def forward(self, inputs, bboxes=None):
        x = self.embed(inputs[0]).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block.forward(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(("model", "message"), [(Alone, "called without thw"), (Idle, "time_0")])
def test_own_models_that_cannot_be_selected_in_are_refused_when_built(
    get_cfg, build, register, model, message
):
    register(model)
    with pytest.raises(ValueError, match=rf"MODEL_NAME '{model.__name__}': .*{message}"):
        build(get_cfg("STTS.ENABLE", True, "MODEL.MODEL_NAME", model.__name__))


def test_own_models_are_built_and_their_shares_checked(get_cfg, build, register):
    register(WithGrid)
    opts = ("STTS.ENABLE", True, "MODEL.MODEL_NAME", "WithGrid")
    model = build(get_cfg(*opts))
    assert all(selector.kept is None for selector in model.stts.values())  # the copy ran
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.eval()(clips()).shape == (2, 8)
    with pytest.raises(ValueError, match=r"STTS\.TIME\.KEEP 0\.1 leaves no frame of the 4"):
        build(get_cfg(*opts, "STTS.TIME.KEEP", [0.1]))
