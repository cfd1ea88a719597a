"""The documentation's example of each host, run as it is, with a small model instead of weights."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
SECTION = PAGE.read_text().split("## One attach, every host")[1].split("\n## ")[0]
IMPORTS, *EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def small(monkeypatch):
    """Has every library make small models if the example loads trained ones."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    hub = pytest.importorskip("pytorchvideo.models.hub", reason="pytorchvideo is not installed")
    from pytorchvideo.models import vision_transformers

    def from_pretrained(kind, name):
        size = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
        size |= {"frames_per_clip": 16} if "fpc16" in name else {"intermediate_size": 24}
        return kind(kind.config_class(**size)).eval()

    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)
    )
    create = timm.create_model
    size = {"embed_dim": 24, "depth": 5, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, **size))
    monkeypatch.setattr(
        hub,
        "mvit_base_16x4",
        lambda pretrained: vision_transformers.create_multiscale_vision_transformers(
            spatial_size=224,
            temporal_size=16,
            depth=5,
            patch_embed_dim=24,
            conv_patch_embed_stride=(2, 16, 16),
            head_num_classes=5,
        ),
    )
    swin = torchvision.models.video.SwinTransformer3d
    monkeypatch.setattr(
        torchvision.models.video,
        "swin3d_t",
        lambda weights: swin([2, 4, 4], 12, [1, 1], [1, 2], [8, 7, 7]),
    )


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda text: text.split("\n")[0][2:].split(";")[0]
)
@torch.no_grad()
def test_an_example_runs(example, monkeypatch):
    small(monkeypatch)
    assert len(example.strip().splitlines()) == 4  # what it is, and three lines
    names = {}
    exec(IMPORTS, names)
    exec(example, names)
    kept = names["stts"].selections(names["model"])
    assert names["logits"].isfinite().all() and len(names["logits"]) in (1, 2)
    assert [key.split("_")[0] for key in kept] == ["time", "space"]


def test_each_host_has_its_example():
    for host in ("torchvision", "pytorchvideo", "VideoMAE", "ViViT", "V-JEPA 2", "TimeSformer"):
        assert any(host in example.split("\n")[0] for example in EXAMPLES), host
    assert any("timm" in example for example in EXAMPLES)
