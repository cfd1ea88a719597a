"""On a GPU the numbers are those of a CPU, whichever way they are computed.

``STTS_REHEARSE=cpu`` runs on a CPU what can be run there: the tests themselves are tested so.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stts_slowfast as stts
from stts_slowfast.evaluation import evaluating
from stts_slowfast.hooks import raise_on_nan
from tests.gpu.subjects import SMALL

REHEARSAL = os.environ.get("STTS_REHEARSE") == "cpu"
DEVICE = "cpu" if REHEARSAL else "cuda"

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSAL), reason="needs a GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
every_model = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def strict_float32():
    """No TF32, which has ten bits of a mantissa."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def make(name: str, **changes):
    """A model with selectors, its clips, and a function of both."""
    (model, clips, logits), selection = SMALL[name]()
    # Saliency, which alone teaches single tokens, does so in iterations that keep all.
    shrink = 0.5 if "tokens" in selection else 0.0
    stts.attach(model, **selection, **{"shrink": shrink, "sigma": 0.2, **changes})
    stts.set_progress(model, 0.0)
    return model, clips, logits


def soft(model: nn.Module) -> nn.Module:
    """Selectors train, and what else is drawn at random is not."""
    model.eval()
    model.stts.train()
    return model


def schedule(model: nn.Module, optimizer=None):
    groups = stts.param_groups(model.parameters(), model)
    optimizer = optimizer or torch.optim.AdamW(groups, lr=1e-3)
    return optimizer, stts.Schedule(model, optimizer, max_epochs=2, pretrained=False)


def gradients(model: nn.Module) -> dict:
    return {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        if name.endswith("score.4.bias"):  # scores are normalised: 0 but for rounding
            continue
        scale = max(tensor.abs().max(), 0.01 * largest)
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


@every_model
def test_numbers_of_a_gpu_are_those_of_a_cpu(name):
    model, clips, logits = make(name)
    twin = copy.deepcopy(model).to(DEVICE)
    with torch.no_grad():
        expected, found = logits(model, clips), logits(twin, clips.to(DEVICE))
    assert_near({"logits": found.cpu()}, {"logits": expected}, 1e-4)
    for key, kept in stts.selections(model).items():
        assert torch.equal(stts.selections(twin)[key].cpu(), kept), key
    for each in (model, twin):
        logits(soft(each), clips.to(next(each.parameters()).device)).square().mean().backward()
    assert_near(gradients(twin), gradients(model), 1e-3)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ["subset", "perturbed"])
def test_half_precision_trains(name, dtype, operator):
    model, clips, logits = make(name, operator=operator, num_samples=20)
    model, clips = model.to(DEVICE), clips.to(DEVICE)
    optimizer, steps = schedule(model)
    model.train()
    for number in range(2):
        steps.step(number / 2)
        with torch.autocast(DEVICE, dtype):
            loss = logits(model, clips).float().square().mean()
        loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()


@needs_gpu
@every_model
def test_no_pass_waits_for_the_device(name):
    if "videomae" in name:
        pytest.skip("transformers copies VideoMAE's position table in each forward pass")
    model, clips, logits = make(name)
    model, clips = model.cuda(), clips.cuda()
    stts.set_progress(model, 0.5)

    def step():
        with torch.no_grad():
            logits(model.eval(), clips)
        logits(model.train(), clips).square().mean().backward()

    step()  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@every_model
@torch.no_grad()
def test_a_replayed_graph_gives_what_eager_mode_gives(name):
    if "videomae" in name:
        pytest.skip("a graph would read VideoMAE's position table from the CPU's memory")
    model, clips, logits = make(name)
    model, static = model.cuda(), clips.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            logits(model, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = logits(model, static)
    torch.cuda.empty_cache()  # what a graph reads of freed memory would be unmapped now
    kept = stts.selections(model)
    for _ in range(3):
        static.normal_()
        graph.replay()
        replayed, chosen = out.clone(), {key: tensor.clone() for key, tensor in kept.items()}
        torch.testing.assert_close(replayed, logits(model, static), rtol=1e-4, atol=1e-4)
        for key, tensor in stts.selections(model).items():
            assert torch.equal(tensor, chosen[key]), key
    raise_on_nan(model)


@needs_gpu
@torch.no_grad()
def test_a_compiled_evaluation_gives_what_eager_mode_gives():
    """As CUDA graphs, which overwrite what they returned before; the last batch is smaller."""
    model, clips, logits = make("plain")
    model, batches = model.cuda(), [clips.cuda(), clips.cuda() / 2, clips.cuda().flip(0)]
    batches += [*batches, batches[0][:1]]
    with evaluating(model, "float32", ""):
        expected = [logits(model, batch) for batch in batches]
    with evaluating(model, "float32", "reduce-overhead"):
        found = [logits(model, batch) for batch in batches]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_grad_scaler_leaves_out_a_step_that_overflows():
    model, clips, logits = make("plain")
    model, clips = soft(model.to(DEVICE)), clips.to(DEVICE)
    optimizer, steps = schedule(model)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())

    def step(epoch, factor):
        steps.step(epoch)
        with torch.autocast(DEVICE, torch.float16):
            loss = logits(model, clips).float().square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(0.0, 1e30)
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    step(0.5, 1.0)
    assert scaler.get_scale() == 2.0**9
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_resumed_training_is_the_whole_one(tmp_path):
    torch.use_deterministic_algorithms(True, warn_only=True)
    _, clips, logits = make("plain")
    clips = clips.to(DEVICE)

    def train(model, first, last, state=None):
        optimizer, steps = schedule(soft(model.to(DEVICE)))
        if state:
            optimizer.load_state_dict(state)
        for number in range(first, last):
            steps.step(number / 4)
            F.cross_entropy(logits(model, clips), torch.tensor([0, 1], device=DEVICE)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()

    whole, first, second = (make("plain")[0] for _ in range(3))
    train(whole, 0, 4)
    state = train(first, 0, 2)
    torch.save({"model": first.state_dict(), "optimizer": state}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    train(second, 2, 4, saved["optimizer"])
    torch.use_deterministic_algorithms(False)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, msg=key)


def _train_rank(rank: int, address: str, folder: str) -> None:
    dist.init_process_group(
        "gloo" if REHEARSAL else "nccl", f"file://{address}", rank=rank, world_size=2
    )
    device = torch.device(DEVICE, None if REHEARSAL else rank)
    if not REHEARSAL:
        torch.cuda.set_device(device)
    model, clips, logits = make("plain")
    network = DistributedDataParallel(_Call(soft(model.to(device)), logits))
    network(clips[rank : rank + 1].to(device)).square().mean().backward()
    if rank == 0:
        torch.save(gradients(model), folder)
    dist.barrier()
    dist.destroy_process_group()


class _Call(nn.Module):
    def __init__(self, model, logits):
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, clips):
        return self.logits(self.model, clips)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    if not REHEARSAL and torch.cuda.device_count() < 2:
        pytest.skip("NCCL has one process a GPU, and here is one GPU")
    arguments = str(tmp_path / "rendezvous"), str(tmp_path / "gradients.pt")
    torch.multiprocessing.spawn(_train_rank, arguments, nprocs=2)
    model, clips, logits = make("plain")
    logits(soft(model), clips).square().mean().backward()
    assert_near(torch.load(arguments[1], weights_only=True), gradients(model), 1e-3)
