"""On a pretended GPU no host waits for the device, and nothing comes from the CPU."""

import pytest

from tests.gpu.subjects import SMALL

# transformers copies the position table of VideoMAE to the device in each forward pass.
POSITION_TABLE = {"_to_copy from cpu to cuda": 1}


@pytest.mark.parametrize("name", SMALL)
def test_passes_wait_for_nothing_and_take_nothing_from_the_host(worker, name):
    """Every host and family in bf16, fp16 and fp32, by both operators: evaluation, forward and
    backward pass. Mixed devices and shapes that depend on numbers raise in the worker."""
    found = worker.ask("run_small", name)
    assert len(found["parts"]) == 3 * (1 + 2 * 2)
    for part, record in found["parts"].items():
        stock = POSITION_TABLE if "videomae" in name and "backward" not in part else {}
        assert record == {"waits": stock, "from_host": {}}, part
    table = 1 if "videomae" in name else 0
    assert len(found["capture"]) == table, found["capture"]
