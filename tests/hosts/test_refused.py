"""Models that cannot be served are refused by attach, with the reason or the right module."""

import pytest
import torch
from torch import nn

from stts_slowfast import param_groups, set_progress
from stts_slowfast.hooks import attach, detach, selections, settings_of
from tests.hosts.examples import timm_vit, videomae

TIMM = {
    "beit_base_patch16_224": "relative position bias",
    "naflexvit_base_patch16_gap": "several sizes",
    "hiera_tiny_224": "mask units",
    "samvit_base_patch16": "windows",
    "cait_xxs24_224": "only the cls token attends",
    "vit_relpos_small_patch16_224": "relative positions",
    "xcit_nano_12_p16_224": "convolve",
}


def refused(model, match):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        attach(model, time={0: 0.5})
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", TIMM)
def test_transformers_of_timm_that_read_the_whole_grid(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = timm.create_model(name)
    refused(model, TIMM[name])


@pytest.mark.parametrize(
    "name", ["swin_t", "swin_v2_t", "convnext_tiny", "mobilenet_v3_small", "vit_b_32", "s3d"]
)
def test_models_of_torchvision_that_have_no_clips_of_tokens(name):
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    refused(model, f"{type(model).__name__} has no blocks to select tokens before")


def test_blocks_that_take_no_grid_are_named():
    class Block(nn.Module):
        def forward(self, x, rope=None):
            return x

    model = nn.Module()
    model.blocks = nn.ModuleList([Block()])
    refused(model, r"Block takes no grid \(forward\(self, x, rope=None\)\)")


def test_tokens_that_timm_drops_at_random():
    refused(timm_vit(patch_drop_rate=0.5)[0], "patch_drop = nn.Identity")


class Wrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(24, 5)

    def forward(self, clips):
        return self.head(self.backbone(clips).last_hidden_state.mean(1))


def test_the_error_for_a_wrapper_names_the_module_to_attach_to():
    model, clips, _ = videomae("Model")
    wrapper = Wrapper(model)
    plain = wrapper(clips)
    refused(wrapper, r"its backbone \(VideoMAEModel\) has: attach\(model.backbone, ...\)")
    attach(wrapper.backbone, time={0: 0.5}, fused_attention=False)
    wrapper.train()(clips).sum().backward()
    assert selections(wrapper)["time_0"].shape == (2, 2)
    assert set_progress(wrapper, 0.5) > 0 and settings_of(wrapper).time
    groups = param_groups([{"params": list(wrapper.parameters())}], wrapper)
    assert sorted(group["backbone"] for group in groups) == [False, True]
    assert detach(wrapper) is model
    torch.testing.assert_close(wrapper.eval()(clips), plain)


class PeftModel(nn.Module):
    """Passes attributes on, and calls ``forward`` of its model instead of the model, as peft's."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base_model"], name)

    def forward(self, *args, **kwargs):
        return self.base_model.forward(*args, **kwargs)


PeftModel.__module__ = "peft.peft_model"


@torch.no_grad()
def test_the_error_for_an_adapted_model_names_its_base_model():
    model, clips, logits = videomae()
    expected = None
    adapted = PeftModel(model)
    refused(adapted, r"attach\(model.get_base_model\(\), ...\)")
    attach(adapted.get_base_model(), time={0: 0.5, 2: 0.5}, fused_attention=False)
    expected = logits(model, clips)
    assert torch.equal(logits(adapted, clips), expected)
    assert set(selections(adapted)) == {"time_0", "time_2"}
