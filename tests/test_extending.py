"""The examples of projects/stts/extending.md, installed as a package of their own and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "projects" / "stts" / "extending.md").read_text()
EXAMPLES = {
    re.match(r'"""(\w+)\.py', code)[1]: code
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
}

RUN = """
import torch
from torch import nn

import stts_slowfast as stts
from stts_slowfast.standalone.config import get_cfg

torch.manual_seed(0)
clips = torch.randn(2, 3, 8, 32, 32)


def built(*opts):
    cfg = get_cfg()
    cfg.merge_from_list([
        "MODEL.MODEL_NAME", "PlainViT", "MODEL.NUM_CLASSES", "5", "DATA.NUM_FRAMES", "8",
        "DATA.TRAIN_CROP_SIZE", "32", "STTS.ENABLE", "True", "STTS.TIME.KEEP", "[0.5]",
        "STTS.SPACE.BLOCKS", "[]", "PLAIN_VIT.WIDTH", "32", *opts,
    ])
    return stts.build_model(cfg)


# the family
model = built()
assert model(clips).shape == (2, 5) and stts.selections(model)["time_0"].shape == (2, 2)
stts.load_weights(model, built().state_dict())

# the scorer
model = built("STTS.TIME.SCORER", "contrast").eval()
assert not list(model.stts.parameters())
grid = model.stem(clips).permute(0, 2, 3, 4, 1)
best = grid.flatten(2, 3).std(dim=2).mean(dim=2).topk(2).indices.sort(dim=1).values
model(clips)
assert torch.equal(stts.selections(model)["time_0"], best)
try:
    built("STTS.SPACE.SCORER", "contrast", "STTS.SPACE.BLOCKS", "[1]")
except ValueError as error:
    assert "it scores frames" in str(error)
else:
    raise AssertionError("a scorer of frames took windows")

# the operator: hard in training, and still it learns
model = built("STTS.OPERATOR", "straight")
torch.testing.assert_close(model.train()(clips), model.eval()(clips))
model.train()(clips).square().sum().backward()
assert all(p.grad is not None for p in model.parameters())
assert any(p.grad.abs().sum() > 0 for p in model.stts.parameters())


# the host
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)
        )

    def forward(self, clips):
        x = self.embed(clips).flatten(1, 3)
        x = torch.cat([torch.zeros(len(x), 1, 16), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x


model = stts.attach(Encoder(), time={0: 0.5}, space={1: 0.5}, fused_attention=False)
assert model(torch.randn(2, 4, 3, 3, 3)).shape == (2, 1 + 2 * 2 * 2, 16)
assert model(torch.randn(2, 8, 6, 3, 3)).shape == (2, 1 + 4 * 4 * 2, 16)
"""


def test_the_four_examples_are_there():
    assert set(EXAMPLES) == {"contrast", "straight", "layers", "plain_vit"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    lines = [line for line in EXAMPLES[name].splitlines() if line.strip()]
    assert len(lines) <= 30, len(lines)


def test_examples_run_as_another_package(tmp_path):
    package, info = tmp_path / "theirs", tmp_path / "theirs-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    for name, code in EXAMPLES.items():
        (package / f"{name}.py").write_text(code)
    (package / "__init__.py").write_text(f"from theirs import {', '.join(EXAMPLES)}\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[stts_slowfast]\nmine = theirs\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
