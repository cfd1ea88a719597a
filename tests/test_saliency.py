"""Scores taught by the gradient of the tokens: ``saliency.py``, and selectors that use it."""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from stts_slowfast import saliency
from stts_slowfast.annealing import update_schedule
from stts_slowfast.backbones import timesformer
from stts_slowfast.hooks import attach, selections
from stts_slowfast.schedule import Schedule
from stts_slowfast.selector_state import KEEP_SCALE
from stts_slowfast.selectors import SpatialSelector, TemporalSelector
from stts_slowfast.standalone.model import build_model

FRAME = (4, 6)


def case(d_of="windows", shared=False, seed=0):
    """Tokens, scores, and windows with their stride, in float64."""
    torch.manual_seed(seed)
    tokens = torch.randn(3, 4, *FRAME, 5, dtype=torch.float64, requires_grad=True)
    window, stride = ((2, 3), (2, 1)) if d_of == "windows" else (FRAME, FRAME)
    d = 2 * 4 if d_of == "windows" else 1
    shape = (3, 1 if shared else 4, d)
    scores = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return tokens, scores, (window, stride)


def loss_of(tokens):
    return (tokens.pow(3) * torch.linspace(-1, 1, tokens[0].numel()).view_as(tokens[0])).mean()


def windows_by_hand(frame, window, stride):
    return [
        frame[top : top + window[0], left : left + window[1]].mean()
        for top in range(0, FRAME[0] - window[0] + 1, stride[0])
        for left in range(0, FRAME[1] - window[1] + 1, stride[1])
    ]


def cross_entropy_by_hand(tokens, scores, candidates, temperature):
    """What the scores shall descend, spelt out: a number."""
    (gradient,) = torch.autograd.grad(loss_of(tokens), tokens)
    centred = tokens.detach() - tokens.detach().mean((1, 2, 3), keepdim=True)
    salient = (gradient * centred).abs().sum(-1)  # (B, T, H, W)
    total = 0.0
    for clip in range(len(salient)):
        frames = [torch.stack(windows_by_hand(frame, *candidates)) for frame in salient[clip]]
        values = torch.stack(frames)  # (T, d)
        if scores.shape[1] == 1:
            values = values.mean(0, keepdim=True)
        log_chances = (scores[clip] / temperature).flatten().log_softmax(0)
        total -= (values.flatten() / values.sum() * log_chances).sum()
    return total * salient.sum() / len(salient)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("d_of", ["windows", "frames"])
def test_scores_get_the_gradient_of_the_cross_entropy(d_of, shared, temperature):
    tokens, scores, *rest = case(d_of, shared)
    taught = saliency.teach(tokens, scores, *rest, temperature)
    gradient, found = torch.autograd.grad(loss_of(taught), (tokens, scores))
    assert torch.equal(taught, tokens)
    assert torch.equal(gradient, torch.autograd.grad(loss_of(tokens), tokens)[0])

    by_hand = lambda scores: cross_entropy_by_hand(tokens, scores, *rest, temperature)  # noqa: E731
    torch.testing.assert_close(found, torch.autograd.grad(by_hand(scores), scores)[0])
    finite = torch.zeros_like(scores)
    with torch.no_grad():
        for i in range(scores.numel()):
            nudge = torch.zeros_like(scores).view(-1).index_fill(0, torch.tensor(i), 1e-5)
            nudge = nudge.view_as(scores)
            with torch.enable_grad():
                finite.view(-1)[i] = (by_hand(scores + nudge) - by_hand(scores - nudge)) / 2e-5
    torch.testing.assert_close(found, finite, rtol=1e-5, atol=1e-8)


def test_the_default_temperature_is_that_of_the_experiments():
    tokens, scores, *rest = case()
    (found,) = torch.autograd.grad(loss_of(saliency.teach(tokens, scores, *rest)), scores)
    by_hand = cross_entropy_by_hand(tokens, scores, *rest, temperature=0.3)
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, scores)[0])


def test_without_a_lesson_scores_have_a_gradient_of_zero():
    tokens, scores, _ = case()
    loss_of(saliency.teach(tokens, scores, None)).backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores)) and tokens.grad.any()


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
def test_the_lesson_is_scaled_as_the_loss_is(scale):
    found = []
    for factor in (1.0, scale):
        tokens, scores, *rest = case()
        (loss_of(saliency.teach(tokens, scores, *rest)) * factor).backward()
        found.append(scores.grad / factor)
    assert torch.equal(*found)  # powers of 2 lose nothing


def test_a_clip_of_small_loss_teaches_as_much_as_another_and_one_without_any_nothing():
    tokens, scores, candidates = case()
    weight = torch.tensor([1.0, 1e-6, 0.0])[:, None, None, None, None]
    (saliency.teach(tokens, scores, candidates).pow(3) * weight).sum().backward()
    first, small, none = scores.grad.abs().sum((1, 2))
    assert 0.2 < small / first < 5 and none == 0
    tokens, scores, *rest = case()
    (saliency.teach(tokens, scores, *rest).sum() * 0.0).backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))  # and no NaN


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_an_overflow_shows_in_the_lesson(broken):
    """A GradScaler looks for it in every gradient, and skips the step."""
    tokens, scores, *rest = case()
    (saliency.teach(tokens, scores, *rest).sum() * broken).backward()
    assert not scores.grad.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_teaches_the_same(dtype):
    found = []
    for kind in (torch.float32, dtype):
        tokens, scores, *rest = case()
        tokens = tokens.detach().to(dtype).to(kind).requires_grad_()
        scores = scores.detach().float().requires_grad_()
        taught = saliency.teach(tokens, scores, *rest)
        # A gradient of which no product is representable in float16.
        taught.backward(torch.full_like(taught, 2.0**-14))
        assert taught.dtype == kind and scores.grad.dtype == torch.float32
        found.append(scores.grad)
    torch.testing.assert_close(*found)


def widen(selectors, wide):
    for selector in selectors:
        selector.set_budget(0.0, wide)
        selector.scheduled = True


# ---- selectors ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([TemporalSelector, SpatialSelector]),
    st.tuples(*(st.integers(2, 6) for _ in range(3))),
    st.floats(0.5, 1.0),
    st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    st.booleans(),
    st.integers(0, 3),
)
def test_training_passes_the_tokens_of_the_hard_choice(kind, thw, keep, wide, shared, stride):
    torch.manual_seed(0)
    more = {"shared": shared, "stride": stride} if kind is SpatialSelector else {}
    selector = kind(8, 0, keep, teacher="saliency", **more).train()
    widen([selector], wide)
    grid = torch.randn(2, *thw, 8, requires_grad=True)
    out = selector(grid)
    if kind is TemporalSelector:
        expected = torch.stack([clip[kept] for clip, kept in zip(grid, selector.kept)])
    else:
        crops = [
            frame[top : top + height, left : left + width]
            for frame, (top, left, height, width) in zip(grid.flatten(0, 1), selector.kept.tolist())
        ]
        expected = torch.stack(crops).unflatten(0, grid.shape[:2])
    assert torch.equal(out, expected)
    if wide == 1.0:
        assert torch.equal(out, grid)
    if not wide:
        assert torch.equal(out, selector.eval()(grid))
    out.square().sum().backward()
    passed = torch.autograd.grad(expected.square().sum(), grid)[0]
    assert torch.equal(grid.grad, passed)  # the scorer's own gradient ends at the scorer
    for parameter in selector.parameters():
        assert parameter.grad.isfinite().all()


def marked_clips(everywhere):
    """Clips with one token marked by a channel, in one frame or at one position; its index."""
    grid = torch.randn(16, 4, 4, 4, 8)
    time, row, column = places = [torch.randint(0, 4, (16,)) for _ in range(3)]
    for clip in range(16):
        frames = slice(None) if everywhere else time[clip]
        grid[clip, frames, row[clip], column[clip], 0] = 8.0
    return grid, places


@pytest.mark.parametrize("shared", [None, False, True])
def test_a_scorer_learns_which_tokens_the_loss_depends_on(shared):
    torch.manual_seed(0)
    if shared is None:
        selector = TemporalSelector(8, 0, 0.25, teacher="saliency").train()
    else:
        selector = SpatialSelector(8, 0, 0.25, shared=shared, teacher="saliency").train()
    widen([selector], 1.0)
    optimizer = torch.optim.Adam(selector.parameters(), 1e-2)
    for _ in range(100):
        grid, _ = marked_clips(everywhere=shared is not None)
        passed = selector(grid)
        assert torch.equal(passed, grid)
        passed[passed[..., 0] > 4].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    grid, (time, row, column) = marked_clips(everywhere=shared is not None)
    selector.eval()(grid)
    if shared is None:
        right = selector.kept[:, 0] == time
    else:
        top, left = selector.kept.view(16, 4, 4)[..., :2].unbind(2)  # windows of 2 x 2
        right = (top <= row[:, None]) & (row[:, None] < top + 2)
        right &= (left <= column[:, None]) & (column[:, None] < left + 2)
    assert right.float().mean() > 0.9


def test_scorers_that_do_not_learn_choose_hard_and_are_not_taught():
    selector = TemporalSelector(8, 0, 0.5, scorer="uniform", teacher="saliency").train()
    widen([selector], 0.0)
    grid = torch.randn(1, 4, 2, 2, 8, requires_grad=True)
    assert torch.equal(selector(grid), grid[:, [1, 3]])
    selector(grid).sum().backward()
    assert torch.equal(grid.grad[:, [0, 2]], torch.zeros(1, 2, 2, 2, 8))


# ---- models ---------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_cfg):
    """An MViT of which half of the frames and windows of a quarter are kept."""
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.TEACHER = True, "saliency"
    tiny_cfg.STTS.SPACE.KEEP = [0.3]
    tiny_cfg.MODEL.DROPOUT_RATE = tiny_cfg.MVIT.DROPPATH_RATE = 0.0
    model = build_model(tiny_cfg).train()
    update_schedule(model, 0.9)
    return model


def vit_with_tokens(**more):
    """A plain ViT of which 40% of the tokens are kept, then half of these, and the rest merged."""
    stock = timesformer.TimeSformer(
        32, 8, 8, 16, 2, 2, num_classes=5, attention_type="joint_space_time"
    )
    selection = {"tokens": {0: 0.4, 1: 0.5}, "tokens_rest": "merge", "teacher": "saliency"}
    return attach(stock, **selection | more).train()


@pytest.fixture(params=["frames and windows", "tokens"])
def any_model(request):
    """A model of frames and windows, or one of single tokens."""
    if request.param != "tokens":
        return request.getfixturevalue("model")
    model = vit_with_tokens()
    update_schedule(model, 0.9)
    return model


CLIPS, LABELS = torch.randn(4, 3, 8, 32, 32), torch.arange(4)


def gradients(model, run=None, scale=1.0):
    model.zero_grad()
    run = model if run is None else run
    (F.cross_entropy(run(CLIPS), LABELS) * scale).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_training_iteration_computes_what_a_test_does(any_model):
    model, found = any_model, []
    for training in (True, False):
        for selector in model.stts.values():
            selector.train(training)
        found.append([model(CLIPS), *selections(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("wide", [0.0, 0.5, 1.0])
def test_scorers_are_taught_when_all_tokens_pass_and_have_a_gradient_always(any_model, wide):
    model = any_model
    widen(model.stts.values(), wide)
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    for key in model.stts:
        taught = [bool(g.any()) for name, g in found.items() if name.startswith(f"stts.{key}.")]
        assert len(taught) == 10 and (sum(taught) >= 9 if wide == 1.0 else not any(taught)), (
            key
        )  # a bias shifts all scores


def test_with_both_teachers_training_mixes_unless_all_tokens_pass(model):
    for selector in model.stts.values():
        selector.teacher = "both"
        widen([selector], 1.0)
    lesson = gradients(model)
    for selector in model.stts.values():
        selector.teacher = "saliency"
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, lesson[name]), name
    mixed = []
    for teacher in ("both", "mixture"):
        for selector in model.stts.values():
            selector.teacher = teacher
            widen([selector], 0.0)
        mixed.append(gradients(model))
    for name, gradient in mixed[0].items():
        assert torch.equal(gradient, mixed[1][name]), name
    assert mixed[0]["stts.space_2.scorer.network.score.0.weight"].any()


def test_the_backbone_learns_from_the_hard_choice_alone(any_model):
    model = any_model
    for wide in (0.0, 1.0):
        widen(model.train().stts.values(), wide)
        found = gradients(model)
        if wide:
            for selector in model.stts.values():
                selector.low = selector.high = KEEP_SCALE
        for selector in model.stts.values():
            selector.eval()
        model.zero_grad()
        F.cross_entropy(model(CLIPS), LABELS).backward()
        for name, parameter in model.named_parameters():
            if not name.startswith("stts."):
                assert torch.equal(parameter.grad, found[name]), name


def test_a_grad_scaler_gives_back_the_same_gradients(any_model):
    model = any_model
    widen(model.stts.values(), 1.0)
    plain, scaled = gradients(model), gradients(model, scale=2.0**12)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name] / 2.0**12, gradient, msg=name)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("wide, backend", [(0.0, "eager"), (1.0, "aot_eager")])
def test_a_compiled_model_has_the_same_gradients(wide, backend, tokens):
    if tokens:
        model = vit_with_tokens()
    else:
        stock = timesformer.TimeSformer(32, 8, 8, 16, 2, 2, num_classes=5)
        model = attach(stock, time={0: 0.5}, space={1: 0.3}, teacher="saliency").train()
    widen(model.stts.values(), wide)
    plain = gradients(model)
    torch._dynamo.reset()
    again = gradients(model, torch.compile(model, fullgraph=True, backend=backend))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_ddp_finds_every_gradient(any_model, tmp_path):
    model = any_model
    plain = gradients(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(model)  # raises if it waits for a gradient
        for wide in (1.0, 0.0, 0.0):
            widen(model.stts.values(), wide)
            again = gradients(model, ddp)
    finally:
        dist.destroy_process_group()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def test_activation_checkpointing_has_the_same_gradients(tiny_cfg, model):
    tiny_cfg.MODEL.ACT_CHECKPOINT = True
    again = build_model(tiny_cfg).train()
    again.load_state_dict(model.state_dict())
    widen((*model.stts.values(), *again.stts.values()), 1.0)
    plain = gradients(model)
    for name, gradient in gradients(again).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_autocast_teaches_in_full_precision(any_model):
    model = any_model
    widen(model.stts.values(), 1.0)
    plain = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(CLIPS), LABELS)
    model.zero_grad()
    loss.backward()
    name = f"stts.{next(iter(model.stts))}.scorer.network.score.0.weight"
    near = F.cosine_similarity(
        model.get_parameter(name).grad.flatten(), plain[name].flatten(), dim=0
    )
    assert near > 0.9


def iteration_flops(model):
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(CLIPS), LABELS).backward()
    return counter.get_total_flops()


def test_a_narrow_iteration_costs_its_share_of_flops():
    stock = timesformer.TimeSformer(32, 8, 8, 64, 4, 4, num_classes=5)
    model = attach(copy.deepcopy(stock), time={0: 0.5}, space={1: 0.3}, teacher="saliency")
    update_schedule(model, 1.0)
    costs = []
    for one in (model, stock):
        training = iteration_flops(one.train())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one.eval()(CLIPS)
        costs.append((training, counter.get_total_flops()))
    (training, test), (all_training, all_test) = costs
    assert training / all_training == pytest.approx(test / all_test, rel=0.05)


def test_all_tokens_pass_while_the_backbone_is_frozen(tiny_cfg, model):
    tiny_cfg.STTS.SHRINK, tiny_cfg.STTS.FREEZE_BACKBONE_EPOCHS = 0.0, 2.0
    tiny_cfg.SOLVER.MAX_EPOCH = 10
    for teacher in ("saliency", "both", "mixture"):
        tiny_cfg.STTS.TEACHER = teacher
        model = build_model(tiny_cfg).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = Schedule(model, optimizer, max_epochs=10, pretrained=True)
        grid = torch.empty(1, 8, 14, 14, 1)
        sizes = []
        for epoch in (0.0, 1.9, 2.0):
            schedule.step(epoch)
            sizes.append([selector.output_size(grid)[0] for selector in model.stts.values()])
        narrow = [4, 7]
        assert sizes == ([[8, 14], [8, 14], narrow] if teacher != "mixture" else [narrow] * 3)


@pytest.mark.parametrize("epochs, trained", [(1.0, True), (1.0, False), (0.0, True)])
def test_a_training_in_which_nothing_would_be_taught_is_refused(tiny_cfg, epochs, trained):
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.TEACHER, tiny_cfg.STTS.SHRINK = True, "saliency", 0.0
    tiny_cfg.STTS.FREEZE_BACKBONE_EPOCHS = epochs
    model = build_model(tiny_cfg).train()

    def start():
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        Schedule(model, optimizer, max_epochs=10, pretrained=trained).step(0.0)

    if epochs and trained:
        start()
    else:
        with pytest.raises(
            ValueError, match="in iterations that keep all tokens, and there would be none"
        ):
            start()


def test_an_own_loop_that_sets_no_budget_is_refused(tiny_cfg):
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.TEACHER = True, "saliency"
    model = build_model(tiny_cfg)
    model.eval()(CLIPS)
    with pytest.raises(ValueError, match=r"no budget was set.*set_progress"):
        model.train()(CLIPS)


def test_a_second_derivative_takes_what_teaches_for_a_constant():
    tokens, scores, candidates = case()
    taught = saliency.teach(tokens, scores, candidates)
    (gradient,) = torch.autograd.grad(loss_of(taught), tokens, create_graph=True)
    penalty = gradient.square().sum()
    (second,) = torch.autograd.grad(penalty, tokens, retain_graph=True)
    (plain,) = torch.autograd.grad(loss_of(tokens), tokens, create_graph=True)
    (expected,) = torch.autograd.grad(plain.square().sum(), tokens)
    torch.testing.assert_close(second, expected)


def test_gradients_of_torch_func_are_those_of_autograd(model):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    clip = CLIPS[:1]

    def loss(weights):
        return torch.func.functional_call(model, weights, (clip,)).sum()

    model.eval()
    found = torch.func.grad(loss)(weights)
    model(clip).sum().backward()
    name = next(name for name, p in model.named_parameters() if p.grad is not None)
    torch.testing.assert_close(found[name], dict(model.named_parameters())[name].grad)
