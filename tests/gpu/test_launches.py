"""A step launches as many kernels as launches.json says, or fewer."""

import pytest
import torch

from tests.gpu.launches import read_table
from tests.gpu.subjects import FULL, OPERATORS

TABLE = read_table()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", FULL)
def test_no_change_makes_more_launches(worker, name, operator):
    """If a change must, ``python -m tests.gpu.launches --write``."""
    if not torch.__version__.startswith(TABLE["torch"]):
        pytest.skip(f"launches.json is of PyTorch {TABLE['torch']}, here is {torch.__version__}")
    budget = TABLE["launches"][name][operator]
    found = worker.ask("count_launches", name, operator)
    assert {part: n for part, n in found.items() if n > budget[part]} == {}, (found, budget)
