"""Outputs are recorded as the model computes them, and compared by the formulas that are named."""

import pytest
import torch
from torch import nn

from stts_slowfast.fidelity import (
    OutputRecorder,
    Outputs,
    budget_at,
    centred_cosine,
    compare,
    join,
    outputs,
    per_clip,
    replaced_scorers,
)
from stts_slowfast.hooks import attach, selections
from stts_slowfast.standalone.model import build_model

CLIPS = torch.randn(4, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    return build_model(tiny_cfg).eval()


def test_measures_are_those_that_are_named():
    torch.manual_seed(0)
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    found = compare(Outputs(a, 2 * a), Outputs(b, 2 * b))
    p, q = (2 * a).softmax(1), (2 * b).softmax(1)
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), abs=1e-4)
    assert found["top1_agreement"] == pytest.approx(
        100 * sum(x == y for x, y in zip(a.argmax(1).tolist(), b.argmax(1).tolist())) / 5
    )
    mean = a.mean(0)
    cosines = [(x @ y / x.norm() / y.norm()).item() for x, y in zip(a - mean, b - mean)]
    assert found["features_cosine"] == pytest.approx(sum(cosines) / 5, abs=1e-4)
    assert found["logits_cosine"] == pytest.approx(found["features_cosine"], abs=1e-4)
    same = compare(Outputs(a, a), Outputs(a, a))
    assert same["top1_agreement"] == 100 and same["kl"] == pytest.approx(0, abs=1e-5)
    assert same["features_cosine"] == pytest.approx(1, abs=1e-5)


def test_a_model_without_classes_has_features_only():
    found = compare(Outputs(torch.eye(3)), Outputs(torch.eye(3)))
    assert found["features_cosine"] == pytest.approx(1) and found["kl"] is None
    assert (
        found["top1_agreement"] is None
        and centred_cosine(torch.ones(1, 2), torch.ones(1, 2)) is None
    )
    with pytest.raises(ValueError, match="outputs of 2 clips are compared with 3"):
        compare(Outputs(torch.eye(3)), Outputs(torch.eye(3)[:2]))


def test_features_are_what_the_classifier_reads(model):
    with OutputRecorder(model) as recorder:
        logits = model(CLIPS)
        model(CLIPS[:1])
    found = recorder.outputs()
    assert torch.equal(found.logits[:4], logits) and len(found.logits) == 5
    torch.testing.assert_close(model.head[-1](found.features[:4]), logits)
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, nn.Linear))


class FrameModel(nn.Module):
    """Reads frames; its output is normalised, so that no linear layer made it."""

    def __init__(self):
        super().__init__()
        self.num_frames = 2
        self.layer, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.layer(x))


def test_what_no_linear_layer_computed_is_a_feature():
    model = FrameModel()
    found = outputs(model, [torch.randn(2, 3)])
    assert found.logits is None and found.features.shape == (2, 4)
    found = outputs(model.layer, [torch.randn(2, 3)])
    assert found.logits is not None
    assert outputs(model.layer, [torch.randn(2, 3)], classes=False).logits is None


def test_tokens_and_frames_of_a_clip_are_averaged():
    x = torch.arange(24.0).view(4, 3, 2)  # two frames of each of two clips, three tokens
    assert torch.equal(per_clip(x, 2), torch.stack([x[:2].mean((0, 1)), x[2:].mean((0, 1))]))
    with pytest.raises(ValueError, match=r"are not of 3 clips: .* set model.num_frames"):
        per_clip(x, 3)
    with pytest.raises(ValueError, match="there are no clips"):
        join([])


def test_outputs_that_are_not_finite_are_refused(model):
    with pytest.raises(ValueError, match="of this FrameModel are not finite"):
        outputs(FrameModel(), [torch.full((2, 3), torch.inf)])


def test_a_budget_holds_while_it_is_open(model):
    attached = attach_ranges(model)
    for position, kept in ((0.0, 1), (0.5, 2), (1.0, 4)):
        with budget_at(attached, position) as text, torch.no_grad():
            attached(CLIPS)
            assert selections(attached)["time_0"].shape == (4, kept)
            assert text == f"time_0 {kept / 4:g}"
    selector = attached.stts["time_0"]
    assert selector.share == (0.25, 1.0) and selector.sample is None


def attach_ranges(model):
    from stts_slowfast.hooks import detach

    return attach(detach(model), time={0: (0.25, 1.0)}, fused_attention=False).eval()


def test_another_scorer_chooses_while_it_is_open(model):
    first = model.stts["time_0"].scorer
    with replaced_scorers(model, "uniform"), torch.no_grad():
        model(CLIPS)
        assert selections(model)["time_0"].tolist() == [[1, 3]] * 4
    assert model.stts["time_0"].scorer is first
