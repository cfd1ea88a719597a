"""Selection of single tokens: ``token_selector.py``, ``token_scorers.py`` and their settings."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stts_slowfast as stts
from stts_slowfast import saliency
from stts_slowfast.annealing import set_progress
from stts_slowfast.backbones.timesformer import TimeSformer
from stts_slowfast.backbones.vit import Block
from stts_slowfast.budgets import plan_grids
from stts_slowfast.config import Settings
from stts_slowfast.token_scorers import TOKEN_SCORERS, spread_order
from stts_slowfast.token_selector import TokenSelector


class FixedScores(torch.nn.Module):
    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, *_):
        return self.scores


def vit(**more):
    sizes = {"img_size": 16, "num_frames": 4, "patch_size": 4, "embed_dim": 16, "depth": 3}
    kind = {"num_heads": 2, "num_classes": 3, "attention_type": "joint_space_time"} | more
    return TimeSformer(**sizes, **kind).eval()


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_best_tokens_are_kept_in_order(per_frame):
    selector = TokenSelector(4, 0, 0.25, per_frame=per_frame).eval()
    scores, grid = torch.rand(2, 2 * 12), torch.randn(2, 2, 3, 4, 4)
    selector.scorer = FixedScores(scores)
    kept = selector(grid)
    assert kept.shape == ((2, 2, 1, 3, 4) if per_frame else (2, 1, 1, 6, 4))
    groups = scores.view(2, 2, 12) if per_frame else scores[:, None]
    best = groups.topk(3 if per_frame else 6).indices.sort().values
    best = (best + torch.arange(best.shape[1])[:, None] * 12).flatten(1)
    assert selector.kept.tolist() == best.tolist()
    for clip, index, tokens in zip(grid.flatten(1, 3), best, kept.flatten(1, 3)):
        assert torch.equal(tokens, clip[index])


@pytest.mark.parametrize("per_frame", [False, True])
def test_a_mixture_is_of_all_tokens_that_compete(per_frame):
    selector = TokenSelector(4, 0, 0.25, per_frame=per_frame, sigma=0.5).train()
    grid = torch.randn(2, 2, 3, 4, 4)
    choice = selector.select(grid)
    tokens = grid.reshape(4, 12, 4) if per_frame else grid.reshape(2, 24, 4)
    expected = torch.einsum("bkn,bnc->bkc", choice.weights, tokens)
    mixed = selector.apply_selection(grid, choice)
    torch.testing.assert_close(mixed.flatten(), expected.flatten())
    mixed.square().sum().backward()
    assert all(p.grad is not None for p in selector.parameters())


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_rest_is_merged_into_the_most_similar_kept_tokens(per_frame):
    selector = TokenSelector(4, 0, 0.25, per_frame=per_frame, rest="merge", teacher="saliency")
    grid = torch.randn(2, 2, 3, 4, 4, requires_grad=True)
    selector.scheduled = True
    found = selector.train()(grid).flatten(1, 3)
    for clip, index, tokens in zip(grid.flatten(1, 3), selector.kept, found):
        merged = [[] for _ in index]
        for number, token in enumerate(clip):
            frame = number // 12 if per_frame else 0
            own = [i for i, k in enumerate(index.tolist()) if not per_frame or k // 12 == frame]
            near = F.cosine_similarity(token, clip[index[own]], dim=1).argmax()
            merged[own[int(near)]].append(token)
        torch.testing.assert_close(tokens, torch.stack([torch.stack(m).mean(0) for m in merged]))
    found.square().sum().backward()
    assert (grid.grad != 0).all() and not any(p.grad.any() for p in selector.parameters())
    torch.testing.assert_close(selector.eval()(grid).flatten(1, 3), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rest_is_finite_in_half_precision(dtype):
    selector = TokenSelector(4, 0, 0.25, rest="merge").eval()
    grid = torch.full((1, 2, 4, 4, 4), 6e4).to(dtype)  # equal scores, and a sum that overflows
    found = selector.to(dtype)(grid)
    torch.testing.assert_close(found, grid.flatten(1, 3)[:, None, None, :8], rtol=0.02, atol=0)
    model = stts.attach(vit(), tokens={1: 0.25}, tokens_rest="merge")
    clip = torch.randn(1, 3, 4, 16, 16)
    plain = model(clip)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(clip).float(), plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("rest", ["drop", "merge"])
def test_if_all_tokens_are_kept_they_are_still_a_grid(rest):
    grid = torch.randn(2, 2, 3, 4, 4)
    selector = TokenSelector(4, 0, 1.0, rest=rest)
    assert selector.eval()(grid) is grid and torch.equal(selector.train()(grid), grid)
    selector(grid).sum().backward()  # distributed training needs a gradient, here of zero
    assert all(p.grad is not None and not p.grad.any() for p in selector.parameters())
    model, clip = vit(), torch.randn(1, 3, 4, 16, 16)
    plain = model(clip)
    stts.attach(model, tokens={0: 1.0, 1: 1.0}, tokens_scorer="norm", tokens_rest=rest)
    assert torch.equal(model(clip), plain)


class LargestTensor(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return out


@pytest.mark.parametrize("rest", ["drop", "merge"])
@torch.no_grad()
def test_evaluation_makes_nothing_larger_than_the_tokens(rest):
    selector, grid = TokenSelector(4, 0, 0.5, rest=rest).eval(), torch.randn(1, 4, 16, 16, 4)
    with LargestTensor() as largest:
        selector(grid)
    assert largest.size <= grid.numel()  # k * d is 512 * 1024


@pytest.mark.parametrize("per_frame", [False, True])
def test_a_batch_without_clips_passes(per_frame, caplog):
    caplog.set_level("INFO")
    model = stts.attach(vit(), tokens={0: 0.5}, tokens_per_frame=per_frame, tokens_rest="merge")
    assert "learned tokens before block 0, keep 0.5, merge the rest" in caplog.text
    assert model(torch.randn(0, 3, 4, 16, 16)).shape == (0, 3)


def test_frames_windows_and_tokens_compose():
    model = vit()
    stts.attach(model, time={0: 0.5}, space={0: 0.25}, tokens={0: 0.5, 2: 0.5})
    model(torch.randn(2, 3, 4, 16, 16))
    kept = {key: tuple(value.shape) for key, value in stts.selections(model).items()}
    assert kept == {"time_0": (2, 2), "space_0": (4, 4), "tokens_0": (2, 4), "tokens_2": (2, 2)}
    positions = stts.positions(model)
    frames = stts.selections(model)["time_0"]
    for clip, index in zip(positions.tolist(), frames.tolist()):
        assert clip == sorted(clip) and {number // 16 for number in clip} <= set(index)
    features = torch.randn(2, 3, 5)
    scattered = stts.scatter(features, model)
    assert scattered.shape == (2, 4, 4, 4, 5) and scattered.flatten(1, 3).any(2).sum() == 4
    found = scattered.flatten(1, 3).gather(1, positions[:, :, None].expand(-1, -1, 5))
    assert torch.equal(found, features[:, 1:])


def test_saliency_teaches_scores_of_tokens():
    model, clips = vit(), torch.randn(2, 3, 4, 16, 16)
    stts.attach(model, tokens={1: 0.25}, teacher="saliency", shrink=0.5).train()
    set_progress(model, 0.0)  # all tokens pass
    given = FixedScores(torch.zeros(2, 64, requires_grad=True))
    model.stts["tokens_1"].scorer = given
    model(clips).square().sum().backward()
    stts.detach(model)
    x, thw = model.embed(clips)
    x, thw = model.blocks[0](x, thw)
    # As frames of one token each: their share of saliency is the token's own.
    scores = torch.zeros(2, 64, 1, requires_grad=True)
    x = x.detach().requires_grad_()
    taught = saliency.teach(x[:, 1:].reshape(2, 64, 1, 1, 16), scores, ((1, 1), (1, 1)))
    x = torch.cat([x[:, :1], taught.flatten(1, 3)], dim=1)
    for block in model.blocks[1:]:
        x, thw = block(x, thw)
    model.head(model.norm(x[:, 0])).square().sum().backward()
    torch.testing.assert_close(given.scores.grad, scores.grad.flatten(1))
    assert given.scores.grad.std() > 0


def test_a_range_is_sampled_and_annealed():
    model = vit()
    stts.attach(model, tokens={1: (0.125, 0.5)}, shrink=0.5).train()
    counts = set()
    for step in range(40):
        set_progress(model, 0.5 + step / 80)
        model(torch.randn(1, 3, 4, 16, 16))
        counts.add(stts.selections(model)["tokens_1"].shape[1])
    assert min(counts) < 16 < max(counts) <= 32 and min(counts) >= 8
    model.eval()(torch.randn(1, 3, 4, 16, 16))
    assert stts.selections(model)["tokens_1"].shape == (1, 32)


def test_both_teachers_are_saliency():
    model = stts.attach(vit(), tokens={1: 0.25}, teacher="both", shrink=0.5).train()
    set_progress(model, 0.9)
    (selector,) = model.stts.values()
    assert selector.select(torch.randn(1, 4, 4, 4, 16)).weights is None


@pytest.mark.parametrize("widening", [0.0, 1.0])
def test_a_block_may_change_its_tokens_in_place(widening):
    selector = TokenSelector(16, 1, 0.5, teacher="saliency").train()
    selector.set_budget(0.0, widening)
    selector.scheduled = True
    grid = 1.0 * torch.randn(1, 4, 4, 4, 16, requires_grad=True)
    selector(grid).add_(1.0).square().sum().backward()
    assert all(p.grad is not None for p in selector.parameters())


# --- scorers --------------------------------------------------------------------------------------


def test_uniform_is_a_lattice():
    marks = lambda n: (spread_order(4, 4) < n).int().tolist()  # noqa: E731
    assert marks(4) == [[1, 0, 1, 0], [0] * 4, [1, 0, 1, 0], [0] * 4]
    assert marks(8) == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert spread_order(3, 5).flatten().sort().values.tolist() == list(range(15))
    scores = TOKEN_SCORERS.get("uniform")(4)(torch.randn(2, 3, 4, 4, 4), 6, False)
    best = scores.topk(6).indices.sort().values[0]
    assert (best // 16).bincount().tolist() == [2, 2, 2]  # as many of each frame


def test_norm_change_unique_and_random():
    grid = torch.randn(2, 3, 2, 2, 4)
    score = lambda name, grid=grid, by_frame=False: TOKEN_SCORERS.get(name)(4)(grid, 2, by_frame)  # noqa: E731
    torch.testing.assert_close(score("norm"), grid.flatten(1, 3).norm(dim=2))
    change = score("change").view(2, 3, 4)
    expected = (grid[:, 2] - grid[:, 1]).square().mean(-1).flatten(1)
    torch.testing.assert_close(change[:, 2], expected)
    assert torch.equal(change[:, 0], change[:, 1])
    assert not torch.equal(score("random"), score("random"))
    twins = grid.clone()
    twins[:, 1, 0, 0] = 2 * twins[:, 0, 1, 1]  # two tokens of one direction
    unique = score("unique", twins)
    assert unique.argsort(dim=1)[:, :2].sort().values.tolist() == [[3, 4]] * 2
    torch.testing.assert_close(unique[:, 3], torch.zeros(2), atol=1e-5, rtol=0)
    assert (score("unique", twins, True)[:, 3:5] > 0).all()  # they are in two frames


def test_attention_is_that_of_the_cls_token_in_the_block():
    scorer, block = TOKEN_SCORERS.get("attention")(16), Block(16, 2)
    scorer.bind(block)
    grid, cls = torch.randn(2, 2, 2, 2, 16), torch.randn(2, 1, 16)
    x = block.norm1(torch.cat([cls, grid.flatten(1, 3)], dim=1))
    q, k, _ = block.attn.qkv(x).unflatten(2, (3, 2, 8)).unbind(2)
    logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k[:, 1:]) / 8**0.5
    expected = logits.softmax(-1).mean(1)
    torch.testing.assert_close(scorer(grid, 2, False, block=block, cls=cls), expected)
    mean = torch.einsum("bhd,bnhd->bhn", q[:, 1:].mean(1), k[:, 1:]) / 8**0.5
    found = scorer(grid, 2, False, block=block, cls=None)
    torch.testing.assert_close(found, mean.softmax(-1).mean(1))


def test_a_block_without_known_projections_is_refused():
    with pytest.raises(ValueError, match=r"STTS.TOKENS.SCORER is attention, but no projections"):
        TOKEN_SCORERS.get("attention")(4).bind(torch.nn.Linear(4, 4))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"time": {2: 0.5}}, r"STTS.TIME.BLOCKS names block 2, behind .* block 1, .* up to 1"),
        ({"space": {2: 0.5}}, r"STTS.SPACE.BLOCKS names block 2, behind .* block 1"),
        ({"tokens": {1: 0.5, 2: 0.5}, "tokens_scorer": "change"}, r"SCORER is change, .*\[1, 2\]"),
        (
            {"tokens_scorer": "best"},
            r"STTS.TOKENS.SCORER is 'best': use one of learned, uniform.*attention",
        ),
        ({"time_scorer": "norm"}, r"STTS.TIME.SCORER is 'norm'"),
        ({"tokens": {9: 0.5}}, r"STTS.TOKENS.BLOCKS names block 9"),
        ({"tokens": {1: 0}}, r"STTS.TOKENS.KEEP holds 0"),
        ({"tokens_per_frame": 1}, r"STTS.TOKENS.PER_FRAME is 1: give True or False"),
        ({"tokens_rest": "keep"}, r"STTS.TOKENS.REST is 'keep': use one of drop, merge"),
        (
            {"tokens_rest": "merge", "teacher": "mixture"},
            r"REST is merge, but STTS.TEACHER is mixture.*TEACHER saliency, or STTS.TOKENS.REST",
        ),
        ({"tokens": {1: 0.01}}, r"0.01 leaves no token of the 64 tokens that .* 1: .* 0.016"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, message):
    settings = Settings.from_kwargs(**{"tokens": {1: 0.5}, **arguments})
    with pytest.raises(ValueError, match=message):
        settings.validate(4, [(4, 4, 4)] * 4)


def test_plan_of_frames_and_tokens():
    grids = [(4, 4, 4)] * 3
    planned = plan_grids({0: 0.5}, {}, grids, end=1, tokens={0: 0.25, 2: 0.5})
    assert planned == {
        "time_0": ((4, 4, 4), (2, 4, 4)),
        "tokens_0": ((2, 4, 4), (1, 1, 8)),
        "tokens_2": ((1, 1, 8), (1, 1, 4)),
    }
    planned = plan_grids({}, {}, grids, end=1, tokens={1: 0.25}, per_frame=True)
    assert planned == {"tokens_1": ((4, 4, 4), (4, 1, 4))}


@pytest.mark.parametrize("kind", ["joint_space_time", "space_only", "divided_space_time"])
def test_blocks_are_tried_for_what_they_need(kind):
    model = vit(attention_type=kind)
    if kind == "divided_space_time":
        with pytest.raises(ValueError, match=r"tokens is \[1\], .* TimeSformer .*\(space\)"):
            stts.attach(model, tokens={1: 0.5})
        return
    stts.attach(model, tokens={1: 0.5})
    assert model.stts["tokens_1"].per_frame == (kind == "space_only")


def test_hosts_that_pool_are_refused(tiny_cfg):
    model = stts.build_model(tiny_cfg)
    with pytest.raises(ValueError, match=r"tokens is .* of this MViT cannot be selected"):
        stts.attach(model, tokens={1: 0.5})
