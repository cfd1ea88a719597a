"""On a pretended GPU no host waits for the device, and nothing comes from the CPU."""

import pytest

from tests.gpu.subjects import RANDOM, SMALL, precisions

# transformers copies the position table of VideoMAE to the device in each forward pass ...
POSITION_TABLE = {"_to_copy from cpu to cuda": 1}
# ... and keeps the coordinates of DINOv3's patches in a cache of its own.
CACHED = ["torch.float32 (16, 2) on cuda:0"]


@pytest.mark.parametrize("name", SMALL | RANDOM)
def test_passes_wait_for_nothing_and_take_nothing_from_the_host(worker, name):
    """Every host and family in bf16, fp16 and fp32, by both operators: forward and backward pass,
    and evaluation, also with weights cast once; and training by saliency. Mixed devices and shapes
    that depend on numbers raise in the worker."""
    found = worker.ask("run_small", name)
    assert len(found["parts"]) == len(precisions(name)) * (1 + 2 * 2) + 2 + 1
    for part, record in found["parts"].items():
        stock = POSITION_TABLE if "videomae" in name and "backward" not in part else {}
        assert record == {"waits": stock, "from_host": {}}, part
    if "videomae" not in name:  # its graph would read the CPU's table, with or without selectors
        assert found["capture"] == (CACHED if name == "dinov3" else [])


def test_the_standalone_loop_waits_for_nothing_between_two_log_lines(worker, tmp_path):
    """It reads the numbers of the step before, which is over while the device has the next one to
    do; with a log line those of its own step."""
    first, *steps = worker.ask("train_standalone", str(tmp_path), 9, 4)
    assert [step["behind"] for step in (first, *steps)] == (
        [[], [1], [1], [1, 0], [], [1], [1], [1, 0], [0]]
    )
    assert [step["waits"] for step in steps] == [{}] * 8


@pytest.mark.parametrize("job", ["validate_standalone", "evaluate_standalone"])
def test_a_standalone_evaluation_waits_for_nothing_between_two_log_lines(worker, tmp_path, job):
    """Validation logs accuracies, so it reads those of its batch then; a test logs its time."""
    first, *batches = worker.ask(job, str(tmp_path), 6, 3)
    validates = job == "validate_standalone"
    assert [batch["behind"] for batch in (first, *batches)] == (
        [[], [1], [1, 0], [], [1], [1, 0]] if validates else [[], [1], [1], [1], [1], [1, 0]]
    )
    assert [batch["waits"] for batch in batches] == [{}] * 5


def test_a_step_of_adaptation_waits_once(worker):
    """For its loss, before the optimizer's step: none is taken if the loss is not finite."""
    steps = worker.ask("adapt_small", 3)
    assert steps[1:] == [{"_local_scalar_dense": 1}] * 2
