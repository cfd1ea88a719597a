"""A model that adapts without labels agrees better with itself on all tokens."""

import copy

import pytest
import torch
from torch.nn import functional as F

import stts_slowfast as stts
from stts_slowfast import adaptation, saliency
from stts_slowfast.fidelity import outputs
from stts_slowfast.standalone.model import build_model

CLIPS = torch.randn(8, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tiny_cfg):
    """An MViT whose classes depend on the clip, with scorers that do not know it."""
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.FUSED_ATTENTION = True, False
    tiny_cfg.STTS.TIME.KEEP = [[0.25, 0.75]]
    model = build_model(tiny_cfg)
    with torch.no_grad():
        model.head[-1].weight.mul_(50.0)
    return model


def test_agreement_rises_at_every_budget(model):
    found = stts.adapt(
        model, [CLIPS[:4], CLIPS[4:]], [CLIPS], backbone=True, steps=12, backbone_lr=2e-3
    )
    assert found.steps == 12 and 0 < found.seconds <= found.seconds_total
    budgets = [f"time_0 {share}, space_2 0.6" for share in ("0.25", "0.433013", "0.75")]
    names = ("before", "uniform", "random", "after")
    assert [(row["when"], row["budget"]) for row in found.rows] == [
        (name, budget) for name in names for budget in budgets
    ]
    kl = {(row["when"], row["budget"]): row["kl"] for row in found.rows}
    for budget in budgets:
        assert kl["after", budget] < 0.8 * kl["before", budget]
    assert not model.training and model.stts["time_0"].share == (0.25, 0.75)
    assert {selector.teacher for selector in model.stts.values()} == {model.stts.settings.teacher}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_scorers_learn_unless_asked(model):
    before = copy.deepcopy(model.state_dict())
    found = stts.adapt(model, [CLIPS[:2]], steps=2)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(name.startswith("stts.") for name in changed)
    assert {name.split(".")[1] for name in changed} == {"time_0", "space_2"}
    assert found.rows == []


def first_lesson(model, monkeypatch, **more):
    """The tokens' gradient that teaches the first selector."""
    lessons = []

    def teach(tokens, *rest):
        if not lessons:
            tokens = tokens.detach().requires_grad_()
            lessons.append(tokens)
        return tokens

    monkeypatch.setattr(saliency, "teach", teach)
    stts.adapt(model, [CLIPS[:2]], steps=1, **more)
    return lessons[0].grad


def gradient_by_hand(model, loss_of, **more):
    """The same, from a forward pass without selection."""
    plain = stts.detach(copy.deepcopy(model)).eval()
    tokens = []
    plain.blocks[0].register_forward_pre_hook(
        lambda _, args: (tokens.append(args[0].detach().requires_grad_()) or tokens[0], *args[1:])
    )
    with torch.enable_grad():
        from stts_slowfast.fidelity import OutputRecorder

        with OutputRecorder(plain, **more) as recorder:
            plain(CLIPS[:2])
        loss_of(recorder.pop()).backward()
    return tokens[0].grad


def test_scorers_learn_the_saliency_of_the_predicted_class(model, monkeypatch):
    expected = gradient_by_hand(
        model, lambda out: F.cross_entropy(out.logits, out.logits.argmax(1))
    )
    found = first_lesson(copy.deepcopy(model), monkeypatch)
    count = found[0].numel() // found.shape[-1]
    torch.testing.assert_close(found.flatten(1, 3), expected[:, -count:], rtol=1e-3, atol=1e-7)


def test_without_classes_it_is_that_of_the_features_own_direction(model, monkeypatch):
    def projection(out):
        centred = out.features.detach() - out.features.detach().mean(0)
        return -(out.features * F.normalize(centred, dim=1)).sum(1).mean()

    expected = gradient_by_hand(model, projection, classes=False)
    found = first_lesson(copy.deepcopy(model), monkeypatch, classes=False)
    count = found[0].numel() // found.shape[-1]
    torch.testing.assert_close(found.flatten(1, 3), expected[:, -count:], rtol=1e-3, atol=1e-7)


def test_the_time_limit_ends_it(model, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(adaptation.time, "perf_counter", lambda: next(clock))
    found = stts.adapt(model, [CLIPS[:1]], steps=50, minutes=1.0)
    assert 0 < found.steps < 7


def test_scorers_without_weights_adapt_the_backbone(model, tiny_cfg):
    tiny_cfg.STTS.TIME.SCORER = tiny_cfg.STTS.SPACE.SCORER = "random"
    random = build_model(tiny_cfg)
    before = copy.deepcopy(random.state_dict())
    stts.adapt(random, [CLIPS[:2]], backbone=True, steps=1)
    assert any(not torch.equal(x, before[name]) for name, x in random.state_dict().items())
    with pytest.raises(ValueError, match=r"nothing would learn: no scorer .* backbone is False"):
        stts.adapt(random, [CLIPS[:2]])


def with_infinite_logits(model):
    torch.nn.init.constant_(model.head[-1].bias, torch.inf)
    return model


def test_mistakes_are_refused(model):
    with pytest.raises(ValueError, match="there are no clips to adapt to"):
        stts.adapt(model, [])
    with pytest.raises(ValueError, match="steps is 0 and minutes 20"):
        stts.adapt(model, [CLIPS], steps=0)
    with pytest.raises(ValueError, match=r"the loss \(saliency\) is not finite in step 1"):
        stts.adapt(with_infinite_logits(copy.deepcopy(model)), [CLIPS[:1]])
    with pytest.raises(ValueError, match="has no selectors: call attach"):
        stts.adapt(stts.detach(model), [CLIPS])


def test_all_tokens_are_what_is_compared_with(model):
    reference = outputs(stts.detach(copy.deepcopy(model)), [CLIPS])
    adapter = adaptation._Adapter(model, False, 1e-3, 1e-4, None, 0)
    assert torch.equal(adapter.reference([CLIPS]).logits, reference.logits)


@pytest.mark.parametrize("given", [iter([CLIPS]), CLIPS, {"x": CLIPS}])
def test_what_cannot_be_iterated_again_is_refused_before_anything_is_learned(model, given):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^clips is a .*: give a list of batches or a loader"):
        stts.adapt(model, given, steps=2)
    with pytest.raises(ValueError, match=r"^test_clips is a "):
        stts.adapt(model, [CLIPS], given, steps=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_nothing_of_an_adaptation_is_left_but_its_weights(model):
    states = [selector.scheduled for selector in model.stts.values()]
    with torch.no_grad():  # learns all the same
        stts.adapt(model, [[CLIPS[:2]]], backbone=True, steps=1)
    assert [selector.scheduled for selector in model.stts.values()] == states == [False, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_is_frozen_whole_is_refused(model):
    with pytest.raises(ValueError, match="nothing would learn"):
        stts.adapt(model.requires_grad_(False), [CLIPS], backbone=True)


def test_an_unknown_baseline_is_refused_at_once(model):
    with pytest.raises(ValueError, match=r"the scorer of time_0 is 'norm': use one of learned"):
        stts.adapt(model, [CLIPS], [CLIPS], baselines=("norm",))
