"""What holds for every host: each test runs with each of the models in conftest.py."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from stts_slowfast.annealing import set_progress
from stts_slowfast.hooks import attach, detach, selections
from stts_slowfast.hosts import find_blocks
from stts_slowfast.standalone.flops import count_gflops
from tests.hosts.examples import EXAMPLES

SELECTION = {"time": {0: 0.5, 2: 0.5}, "space": {1: 0.6, 2: 0.5}, "num_samples": 20}
TOKENS = {"time": {0: 0.5}, "tokens": {1: 0.6, 2: 0.5}, "tokens_rest": "merge"}
# Of these single tokens are selected; windows are of other models of the same hosts.
OF_TOKENS = ("videomae-model", "dinov2", "timm-frames", "vjepa2, tokens")

NEWER = [
    "siglip",
    "clip",
    "dinov2",
    "dinov3",
    "timm-dinov3",
]  # the others are in tests/soak/hosts_table.py


@pytest.fixture(params=[*EXAMPLES, "vjepa2, tokens"])
def example(request):
    example = EXAMPLES[request.param.partition(",")[0]]()
    example.model.plan = TOKENS if request.param in OF_TOKENS else SELECTION
    return example


class Logits(torch.nn.Module):
    """From clips alone to logits."""

    def __init__(self, example):
        super().__init__()
        self.model, self.run = example.model, example.logits

    def forward(self, clips):
        return self.run(self.model, clips)


def select(model, **changes):
    plan = getattr(model, "plan", SELECTION)
    return attach(model, **{**plan, "fused_attention": False, **changes})


def train(model, teacher):
    """Selects in training: mixtures, or all tokens, which saliency teaches. Single tokens are
    merged instead of mixed."""
    tokens = getattr(model, "plan", SELECTION) is TOKENS
    select(model, teacher="saliency" if tokens else teacher).train()
    if tokens or teacher == "saliency":
        set_progress(model, 0.0 if teacher == "saliency" else 1.0)
    return model


def differentiate(example, seed=0):
    torch.manual_seed(seed)
    example.model.zero_grad()
    example.logits(example.model, example.clips).square().mean().backward()
    return {
        name: p.grad.clone() for name, p in example.model.named_parameters() if p.grad is not None
    }


def test_keeping_all_changes_no_bit(example):
    plain = example.logits(example.model, example.clips)
    plan = example.model.plan
    whole = {
        key: dict.fromkeys(plan[key], 1.0) for key in plan.keys() & {"time", "space", "tokens"}
    }
    select(example.model, **whole)
    assert torch.equal(example.logits(example.model, example.clips), plain)


def test_detaching_gives_the_model_back(example):
    plain, state = example.logits(example.model, example.clips), set(example.model.state_dict())
    attributes = {name: set(vars(m)) for name, m in example.model.named_modules()}
    select(example.model)
    assert not torch.equal(example.logits(example.model, example.clips), plain)
    detach(example.model)
    assert torch.equal(example.logits(example.model, example.clips), plain)
    assert set(example.model.state_dict()) == state
    assert {name: set(vars(m)) for name, m in example.model.named_modules()} == attributes


def test_selections_are_what_was_kept(example):
    select(example.model)
    with torch.no_grad():
        example.logits(example.model, example.clips)
    kept = selections(example.model)
    if "tokens" in example.model.plan:
        assert list(kept) == ["time_0", "tokens_1", "tokens_2"]
        assert all((value.diff(dim=1) > 0).all() for value in kept.values())
        assert kept["tokens_2"].shape[1] in (19 // 2, 38 // 2, 4 * (9 // 2))
        return
    assert list(kept) == ["time_0", "space_1", "time_2", "space_2"]
    frames = len(kept["time_0"][0])
    assert frames in (2, 4) and kept["time_2"].shape == (2, frames // 2)
    assert (kept["time_0"].diff(dim=1) > 0).all()
    assert kept["space_1"].shape == (2 * frames, 4) and (kept["space_1"][:, 2:] == 3).all()
    assert kept["space_2"].shape == (frames, 4) and (kept["space_2"][:, 2:] == 2).all()


def test_gradients_reach_every_scorer(example):
    select(example.model, teacher="mixture", tokens_rest="drop").train()
    gradients = differentiate(example)
    for key, selector in example.model.stts.items():
        for name, _ in selector.scorer.named_parameters():
            gradient = gradients[f"stts.{key}.scorer.{name}"]
            assert gradient.isfinite().all()
            # A bias of the last layer moves all scores alike, and normalising undoes that.
            assert gradient.abs().sum() > 0 or gradient.numel() == 1, (key, name)


def test_saliency_teaches_every_scorer(example):
    model = train(example.model, "saliency")
    gradients = differentiate(example)
    for key, selector in model.stts.items():
        for name, parameter in selector.scorer.named_parameters():
            gradient = gradients[f"stts.{key}.scorer.{name}"]
            assert gradient.isfinite().all()
            # A bias of the last layer moves all scores alike.
            assert gradient.abs().sum() > 0 or parameter.numel() == 1, (key, name)


@pytest.mark.parametrize("teacher", ["mixture", "saliency"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(example, reentrant, teacher, monkeypatch):
    model = train(example.model, teacher)
    plain = differentiate(example)
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    elif hasattr(model, "set_grad_checkpointing"):
        if reentrant and type(model).__name__ == "Eva":
            pytest.skip("timm's Eva gives keywords, which reentrant checkpointing does not take")
        monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
        model.set_grad_checkpointing()
    else:
        pytest.skip("this host has no gradient checkpointing")
    again = differentiate(example)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name], rtol=1e-4, atol=1e-7, msg=name)


def test_compiles_to_one_graph(example):
    select(example.model)
    plain = example.logits(example.model, example.clips)
    torch._dynamo.reset()
    compiled = torch.compile(example.model, fullgraph=True, backend="eager")
    assert torch.equal(example.logits(compiled, example.clips), plain)


@pytest.mark.parametrize("name, plan", [*((name, SELECTION) for name in NEWER), ("vjepa2", TOKENS)])
@torch.no_grad()
def test_exports(name, plan):
    example = EXAMPLES[name]()
    example.model.plan = plan
    select(example.model)
    plain = example.logits(example.model, example.clips)
    program = torch.export.export(Logits(example), (example.clips,)).module()
    torch.testing.assert_close(program(example.clips), plain)


@pytest.mark.parametrize(
    "name, plan",
    [("videomae", TOKENS), ("timesformer-divided", SELECTION), ("vjepa2", SELECTION)],
)
def test_gradients_of_the_compiled_model(name, plan):
    example = EXAMPLES[name]()
    example.model.plan = plan
    train(example.model, "mixture")
    plain = differentiate(example)
    torch._dynamo.reset()
    compiled = torch.compile(example.model, fullgraph=True, backend="eager")
    compiled.zero_grad()
    torch.manual_seed(0)
    example.logits(compiled, example.clips).square().mean().backward()
    for name, parameter in example.model.named_parameters():
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_flops_fall(example):
    before = count_gflops(Logits(example), example.clips[:1])
    select(example.model)
    after = count_gflops(Logits(example), example.clips[:1])
    assert 0 < after < 0.6 * before


def test_two_threads_do_not_meet(example):
    select(example.model)
    clips = [torch.randn_like(example.clips) for _ in range(2)]
    with torch.no_grad():
        alone = [example.logits(example.model, clip) for clip in clips]
    wrong = []

    def run(clip, expected):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(example.logits(example.model, clip), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(clips, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("how", [copy.deepcopy, "pickle"])
def test_copies_select_by_themselves(example, how):
    model = select(example.model)
    plain = example.logits(model, example.clips)
    if how == "pickle":
        if "Tubelets" in str(model):
            pytest.skip("pickled by the test module's name, which says nothing of a host")
        twin = pickle.load(io.BytesIO(pickle.dumps(model)))
    else:
        twin = how(model)
    assert torch.equal(example.logits(twin, example.clips), plain)
    for parameter in twin.stts.parameters():
        parameter.data.normal_()
    assert not torch.equal(example.logits(twin, example.clips), plain)
    assert torch.equal(example.logits(model, example.clips), plain)
    detach(twin)
    assert torch.equal(example.logits(model, example.clips), plain)


@torch.no_grad()
def test_blocks_copied_before_their_model_have_its_copy_select(example):
    model = select(example.model)
    plain = example.logits(model, example.clips)
    wrapper = nn.ModuleDict({"blocks": nn.ModuleList(find_blocks(model)), "model": model})
    twin = copy.deepcopy(wrapper)["model"]
    kept = selections(model)["time_0"]
    for parameter in model.stts.parameters():
        parameter.data.normal_()
    assert torch.equal(example.logits(twin, example.clips), plain)
    assert selections(model)["time_0"] is kept
