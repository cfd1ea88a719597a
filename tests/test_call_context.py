"""The grid of a call is found wherever, whenever and however its blocks are called."""

import copy
import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from stts_slowfast import hosts
from stts_slowfast.call_context import MANY_RECORDS, Calls
from stts_slowfast.dense_features import positions
from stts_slowfast.grid import Grid
from stts_slowfast.hooks import attach, selections


class Block(nn.Module):
    """Needs the positions of its tokens."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.places = nn.Embedding(128, 8)

    def forward(self, x, places=None):
        if places is None:
            places = torch.arange(x.shape[1])
        return x + self.mix(self.norm(x + self.places(places)))


class Model(nn.Module):
    """Clips (B, T, H*W, 8), of any length; how its blocks run is ``run(blocks, x)``."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.run = one_by_one

    def forward(self, clips):
        return self.features(clips)

    def features(self, clips):
        return self.run(self.blocks, self.embed(clips).flatten(1, 2))


def one_by_one(blocks, x):
    for block in blocks:
        x = block(x)
    return x


class PlacesHost(hosts.Host):
    @staticmethod
    def blocks(model):
        return model.blocks if isinstance(model, Model) else ()

    def entry(self, model):
        return model.embed

    def call_grid(self, model, args, kwargs):
        return Grid((args[0].shape[1], 4, 4))

    def unpack(self, args, kwargs, thw):
        return hosts.Tokens(args[0].unflatten(1, tuple(thw)), thw)

    def pack(self, tokens, args, kwargs):
        return (tokens.grid.flatten(1, 3),), kwargs

    def adapt_call(self, block, thw, args, kwargs):
        if thw is None or not thw.is_selected:
            return args, kwargs
        return args, {"places": thw.positions(len(args[0]))}


@pytest.fixture(autouse=True)
def host():
    hosts.HOSTS.register(PlacesHost)
    yield
    del hosts.HOSTS._obj_map["PlacesHost"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return attach(Model(), time={1: 0.5, 2: 0.5}, space={1: 0.6}, num_samples=10)


def clips(length=4, seed=0):
    return torch.randn(2, length, 16, 8, generator=torch.Generator().manual_seed(seed))


def again(x):
    """Other memory with the same numbers, as a cast or an offloaded tensor has it."""
    return x + 0


def checkpointed(blocks, x, reentrant=False):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return x


def in_pairs(blocks, x, reentrant=False):
    """The second block of each checkpoint gets tokens that are new when they are made again."""
    for first, second in zip(blocks[::2], blocks[1::2]):
        x = checkpoint(lambda y, a=first, b=second: b(a(y)), x, use_reentrant=reentrant)
    return x


def nested(blocks, x):
    first, second = (partial(checkpointed, blocks[part]) for part in (slice(2), slice(2, 4)))
    x = checkpoint(first, x, use_reentrant=False)
    return checkpoint(second, x, use_reentrant=False)


def whole(blocks, x):
    return checkpoint(one_by_one, blocks, x, use_reentrant=False)


HOW = {
    "each": checkpointed,
    "each-reentrant": partial(checkpointed, reentrant=True),
    "pairs": in_pairs,
    "pairs-reentrant": partial(in_pairs, reentrant=True),
    "nested": nested,
    "whole": whole,
}


def gradients(model, lengths=(4, 4, 8), backward=torch.autograd.backward):
    """Several passes, of other clips and lengths, before one backward pass."""
    torch.manual_seed(1)
    model.zero_grad()
    losses = [model(clips(length, seed)).square().sum() for seed, length in enumerate(lengths)]
    backward(sum(losses))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("how", HOW)
def test_blocks_that_run_again_have_the_tokens_of_their_own_call(model, how):
    plain = gradients(model)
    assert all(gradient is not None for gradient in plain.values())
    model.run = HOW[how]
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name


def test_what_an_earlier_pass_kept_is_not_what_the_last_one_kept(model):
    """Though checkpointing runs the earlier pass again, and last."""
    model.run = checkpointed
    model.train()
    first, last = (model(clips(4, seed)).sum() for seed in (1, 2))
    kept, places = selections(model), positions(model)
    (first + last).backward()
    assert all(selections(model)[key] is each for key, each in kept.items())
    assert torch.equal(positions(model), places)


def test_they_do_in_another_thread_too(model):
    """As the engine of a device has one for its backward passes."""
    plain = gradients(model)
    model.run = checkpointed

    def elsewhere(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    for name, gradient in gradients(model, backward=elsewhere).items():
        assert torch.equal(gradient, plain[name]), name


def test_tokens_in_other_memory_are_refused_after_a_selection(model):
    def casting(blocks, x):
        for block in blocks:
            x = checkpoint(lambda y, block=block: block(again(y)), x, use_reentrant=False)
        return x

    model.run = casting
    loss = model(clips()).sum()
    with pytest.raises(ValueError, match=r"block 3 \(Block\) runs again .* in other memory"):
        loss.backward()


def test_before_the_first_selection_any_memory_will_do(model):
    def casting(blocks, x):
        x = checkpoint(lambda y: blocks[0](again(y)), x, use_reentrant=False)
        return one_by_one(blocks[1:], x)

    plain = gradients(model, (4, 4))
    model.run = casting
    for name, gradient in gradients(model, (4, 4)).items():
        assert torch.equal(gradient, plain[name]), name
    with pytest.raises(ValueError, match=r"block 0 \(Block\) runs again"):
        gradients(model, (4, 8))  # whose clip is it?


def test_a_pass_inside_a_backward_pass_is_no_repetition(model):
    model.eval()
    expected, seen = model(clips(seed=5)), []
    x = clips().requires_grad_()
    x.register_hook(lambda gradient: seen.append(model(clips(seed=5))) and None)
    model.run = checkpointed
    model(x).sum().backward()
    assert torch.equal(seen[0], expected)


@torch.no_grad()
def test_a_model_that_calls_itself_in_the_middle(model):
    model.eval()
    outer, inner = model(clips(4)), model(clips(8, seed=1))
    found = []

    def once(block, args):
        handle.remove()
        found.append(model(clips(8, seed=1)))

    handle = model.blocks[2].register_forward_pre_hook(once, prepend=True)
    assert torch.equal(model(clips(4)), outer)
    assert torch.equal(found[0], inner)


@torch.no_grad()
def test_a_failed_pass_leaves_no_open_call(model):
    model.eval()
    expected = model(clips(4))

    def fail(block, args):
        raise RuntimeError("no")

    def in_between(block, args):
        with pytest.raises(RuntimeError):
            model(clips(8))

    handle = model.blocks[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        model(clips(8))
    with pytest.raises(RuntimeError):
        model.features(clips(8))
    handle.remove()
    assert torch.equal(model(clips(4)), expected)
    calls = [0]

    def fail_inside(block, args):
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("no")
        if calls[0] == 1:
            in_between(block, args)

    model.blocks[2].register_forward_pre_hook(fail_inside)
    assert torch.equal(model(clips(4)), expected)


@torch.no_grad()
@pytest.mark.parametrize("way", ["features", "forward"])
def test_methods_that_pass_the_call_by(model, way):
    """Adapters call ``forward`` itself, users methods such as ``forward_features``."""
    model.eval()
    for length in (4, 8, 4):
        expected = model(clips(length))
        assert torch.equal(getattr(model, way)(clips(length)), expected)


@torch.no_grad()
def test_blocks_by_hand(model):
    model.eval()
    x = model.embed(clips()).flatten(1, 2)
    assert torch.equal(one_by_one(model.blocks, x), model(clips()))
    with pytest.raises(ValueError, match=r"block 3 \(Block\) was called outside of a call of its"):
        model.blocks[3](x)


@torch.no_grad()
def test_threads_with_clips_of_other_lengths(model):
    model.eval()
    expected = {length: model(clips(length)) for length in (8, 4)}
    wrong = []

    def run(length):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(clips(length)), expected[length]):
                    wrong.append(length)

    threads = [threading.Thread(target=run, args=(length,)) for length in (8, 4, 8, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
@pytest.mark.parametrize("each", [True, False])
def test_compiles_whole_or_block_by_block(model, each):
    model.eval()
    expected, kept = model(clips()), selections(model)
    torch._dynamo.reset()
    if each:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
    else:
        model.compile(fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(model(clips()), expected)
    assert all(torch.equal(kept[key], value) for key, value in selections(model).items())
    assert torch.equal(model(clips(seed=3)), copy.deepcopy(model)(clips(seed=3)))


def test_records_of_what_is_gone_are_dropped():
    calls = Calls()
    calls.start(Grid((1, 1, 1)))
    for _ in range(3 * MANY_RECORDS):
        calls.arrive(0, nn.Identity(), torch.zeros(1), False)
    assert len(calls._records) <= MANY_RECORDS


def sharded(model, tmp_path, rank, world, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = gradients(model)
        out.append({name: value.full_tensor() for name, value in found.items()})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", [None, "each", "pairs"])  # FSDP2 itself is not for reentrant ones
def test_layers_that_fsdp2_shards(model, tmp_path, how):
    """Its hooks hand a block new tensors."""
    plain, out = gradients(model), []
    if how:
        model.run = HOW[how]
    sharded(model, tmp_path, 0, 1, out)
    for name, gradient in out[0].items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
