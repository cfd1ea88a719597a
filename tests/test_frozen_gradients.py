"""While the backbone is frozen, its gradients are neither computed nor reduced."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from stts_slowfast import backbones
from stts_slowfast.annealing import set_progress
from stts_slowfast.backbones import timesformer
from stts_slowfast.frozen_gradients import FrozenGradients
from stts_slowfast.hooks import attach, detach
from stts_slowfast.optimizer_groups import param_groups
from stts_slowfast.schedule import Schedule

CLIPS, LABELS = torch.randn(2, 3, 8, 32, 32), torch.tensor([0, 1])


def attached(cfg=None, seed=0, **more):
    torch.manual_seed(seed)
    stock = timesformer.TimeSformer(32, 8, 8, 16, 2, 2, 5) if cfg is None else backbones.build(cfg)
    settings = {"time": {0: 0.5}, "space": {1: 0.6}, "freeze_backbone_epochs": 0.5, "shrink": 0.5}
    return attach(stock, **{**settings, **more}).train()


def scheduled(model, max_epochs=1, **optimizer):
    groups = param_groups(model.parameters(), model)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5, **optimizer)
    return Schedule(model, optimizer, max_epochs=max_epochs, pretrained=True)


def train(schedule, first=0, last=4, network=None, clips=CLIPS):
    """Four steps an epoch; the losses."""
    network, losses = schedule.model if network is None else network, []
    for number in range(first, last):
        torch.manual_seed(number)
        schedule.step(number / 4)
        schedule.optimizer.zero_grad()
        loss = F.cross_entropy(network(clips), LABELS[: len(clips)])
        loss.backward()
        schedule.optimizer.step()
        losses.append(loss.item())
    return losses


def is_scorer(name):
    return name.removeprefix("module.").startswith("stts.")


@pytest.mark.parametrize("teacher", ["mixture", "saliency"])
def test_a_frozen_step_has_the_numbers_of_one_that_computes_all_gradients(
    tiny_cfg, teacher, monkeypatch
):
    found = []
    for computed in (False, True):
        model = attached(tiny_cfg, teacher=teacher)
        schedule = scheduled(model)
        if computed:
            monkeypatch.setattr(FrozenGradients, "turn_off", lambda *_: None)
        losses = train(schedule, last=2)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses, gradients, model.state_dict()))
    (losses, gradients, state), (all_losses, all_gradients, all_state) = found
    assert losses == pytest.approx(all_losses, abs=1e-6)
    assert all(map(is_scorer, gradients)) and len(all_gradients) > len(gradients) > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, all_gradients[name], rtol=1e-5, atol=1e-7)
    for name, value in state.items():
        torch.testing.assert_close(value, all_state[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_backbone_has_gradients_again_after_each_step_and_learns_after_the_freeze():
    model = attached()
    schedule = scheduled(model)
    before = copy.deepcopy(model.state_dict())
    train(schedule, last=2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    states = schedule.optimizer.state
    for name, parameter in model.named_parameters():
        assert is_scorer(name) or torch.equal(parameter, before[name]), name
        assert is_scorer(name) == (parameter in states), name
    assert len(train(schedule, 2, 4)) == 2
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert not torch.equal(parameter, before[name]), name


def test_blocks_before_the_first_selector_are_not_differentiated():
    model = attached(time={}, space={1: 0.6})
    seen = {}
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda module, args, output, number=number: seen.update(
                {number: output[0].requires_grad}
            )
        )
    train(scheduled(model), last=1)
    assert seen == {number: number >= 1 for number in range(len(model.blocks))}


def test_what_a_user_has_frozen_stays_frozen():
    model = attached()
    frozen = [p for name, p in model.named_parameters() if name.startswith("blocks.1.")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    schedule = scheduled(model)
    for first in range(4):
        train(schedule, first, first + 1)
        assert not any(parameter.requires_grad for parameter in frozen)
    others = [p for p in model.parameters() if all(p is not q for q in frozen)]
    assert all(parameter.requires_grad for parameter in others)


@pytest.mark.parametrize(
    "then",
    [
        scheduled,
        lambda model: param_groups(model.parameters(), model),
        lambda model: Schedule(
            model, torch.optim.SGD(model.parameters(), lr=1.0), max_epochs=1, pretrained=True
        ),
        detach,
    ],
)
def test_an_error_in_a_step_leaves_no_parameter_without_a_gradient(then):
    model = attached()
    schedule = scheduled(model)
    schedule.step(0.0)  # and an error before the optimizer's
    assert not all(parameter.requires_grad for parameter in model.parameters())
    then(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_removed_schedule_and_progress_alone_freeze_nothing():
    model = attached(backbone_lr=0.0, freeze_backbone_epochs=0.0)
    schedule = scheduled(model)
    schedule.step(0.9)  # a rate of 0 for all of training is a freeze
    assert not all(parameter.requires_grad for parameter in model.parameters())
    schedule.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    model = attached(freeze_backbone_epochs=3.0)
    scheduled(model, max_epochs=4).step(0.0)
    set_progress(model, 0.5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_resumed_from_a_frozen_step_is_the_whole_one():
    whole = attached()
    losses = train(scheduled(whole))
    for stop in (1, 2):
        first, second = attached(), attached(seed=1)
        schedule = scheduled(first)
        assert train(schedule, last=stop) == losses[:stop]
        state = copy.deepcopy((first.state_dict(), schedule.optimizer.state_dict()))
        second.load_state_dict(state[0])
        schedule = scheduled(second)
        schedule.optimizer.load_state_dict(state[1])
        assert train(schedule, stop, 4) == losses[stop:]
        for name, value in whole.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_scorers_learn_or_the_step_is_refused(reentrant):
    model = attached(space={})

    class Checkpointed(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return checkpoint(self.block, *args, use_reentrant=reentrant, **kwargs)

    schedule = scheduled(model)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = Checkpointed(block)
    if reentrant:
        with pytest.raises(ValueError, match=r"learn nothing; set use_reentrant=False"):
            train(schedule, last=1)
    else:
        train(schedule)
        assert all(p.grad is not None for p in model.parameters())


def test_a_compiled_training_has_room_for_its_graphs_and_other_models_keep_theirs():
    model, counter = attached(space={1: 0.25}, freeze_backbone_epochs=4.0), CompileCounter()
    torch._dynamo.reset()
    other = torch.compile(torch.nn.Linear(2, 2), backend=counter)
    other(torch.ones(2, 2))
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({limit: 8}):
        # With fullgraph, more graphs are an error.
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        schedule = scheduled(model, max_epochs=16)
        train(schedule, last=64, network=compiled)
        with torch.no_grad():
            compiled.eval()(CLIPS)
        other(torch.ones(2, 2))
        assert counter.frame_count == 1
        assert getattr(config, limit) == 16


# --- several processes --------------------------------------------------------------------------


def ddp_rank(rank, folder, static_graph):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = attached(space={}, shrink=0.0)
    count = (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.stts.parameters()),
    )
    network = DistributedDataParallel(model, static_graph=static_graph)
    reduced = []

    def hook(state, bucket):
        reduced[-1] += bucket.buffer().numel()
        done = dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return done.then(lambda future: future.value()[0])

    network.register_comm_hook(None, hook)
    schedule = scheduled(model)  # which finds the wrapper itself
    losses = []
    for number in range(4):
        reduced.append(0)
        clips = CLIPS_OF_BOTH[rank : rank + 1]
        losses += train(schedule, number, number + 1, network, clips)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    found = {"reduced": reduced, "count": count, "same": torch.equal(*both)}
    found["detached"] = [reduced_without_schedule(rank, then) for then in WITHOUT_SCHEDULE]
    found["tokens"] = [same_with_tokens(rank, progress) for progress in (0.0, 1.0)]
    if rank == 0:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


WITHOUT_SCHEDULE = {
    "detach": detach,
    "progress": lambda model: set_progress(model, 1.0),
    "groups": lambda model: param_groups(model.parameters(), model),
}


def reduced_without_schedule(rank, then):
    """Whether all gradients are those of both ranks after a frozen step whose schedule is lost."""
    # The default, of which set_progress only warns.
    model = attached(space={}, shrink=0.0, freeze_backbone_epochs=3.0)
    network = DistributedDataParallel(model)
    schedule = scheduled(model, max_epochs=4)
    train(schedule, last=1, network=network, clips=CLIPS_OF_BOTH[rank : rank + 1])
    WITHOUT_SCHEDULE[then](model)
    for _ in range(2):  # DDP raises in the second pass if parameters had no gradient in the first
        model.zero_grad()
        F.cross_entropy(network(CLIPS_OF_BOTH[rank : rank + 1]), LABELS[rank : rank + 1]).backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    return torch.equal(*both)


def same_with_tokens(rank, progress):
    """Whether gradients with single tokens are the mean of what both ranks compute alone, and in a
    narrow iteration those of one process with the clips of both."""

    def gradients(clips, labels, wrap=lambda model: model):
        torch.manual_seed(0)
        stock = timesformer.TimeSformer(32, 8, 8, 16, 2, 2, 5, attention_type="joint_space_time")
        selection = {"tokens": {0: 0.4, 1: 0.5}, "tokens_rest": "merge", "teacher": "saliency"}
        model = attach(stock, **selection, shrink=0.5).train()
        set_progress(model, progress)  # 0: all tokens pass; 1: KEEP
        network = wrap(model)  # a wrapper that is freed before the backward pass reduces nothing
        F.cross_entropy(network(clips), labels).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    clips = list(zip(CLIPS_OF_BOTH.split(1), LABELS.split(1)))
    reduced = gradients(*clips[rank], DistributedDataParallel)
    expected = [sum(gradients(*clip) for clip in clips) / 2]
    if progress == 1.0:
        expected.append(gradients(CLIPS_OF_BOTH, LABELS))
    return all(torch.allclose(reduced, each, rtol=1e-3, atol=1e-6) for each in expected)


CLIPS_OF_BOTH = torch.linspace(-1, 1, 2 * 3 * 8 * 32 * 32).sin().view(2, 3, 8, 32, 32)


@pytest.mark.parametrize("static_graph", [False, True])
def test_ddp_reduces_the_gradients_of_scorers_alone_and_then_all(static_graph, tmp_path):
    torch.multiprocessing.spawn(ddp_rank, (str(tmp_path), static_graph), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    every, scorers = found["count"]
    assert found["reduced"] == [scorers] * 2 + [every] * 2
    assert found["detached"] == [True] * len(WITHOUT_SCHEDULE)
    assert found["same"] and found["tokens"] == [True, True]
