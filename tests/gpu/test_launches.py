"""A step launches as many kernels as launches.json says, or fewer."""

import pytest
import torch

from tests.gpu.launches import read_table
from tests.gpu.subjects import FULL

TABLE = read_table()


@pytest.mark.parametrize("name", FULL)
def test_no_change_makes_more_launches(worker, name):
    """If a change must, ``python -m tests.gpu.launches --write``."""
    if not torch.__version__.startswith(TABLE["torch"]):
        pytest.skip(f"launches.json is of PyTorch {TABLE['torch']}, here is {torch.__version__}")
    for operator, launches in worker.ask("count_launches", name).items():
        budget = TABLE["launches"][name][operator]
        assert budget.keys() == launches.keys()
        more = {part: launches[part] for part, n in budget.items() if launches[part] > n}
        assert not more, (operator, budget)


def test_many_windows_launch_as_few_kernels_as_few(worker):
    few, many = (worker.ask("count_window_launches", stride) for stride in (14, 1))
    assert few == many <= 16  # a loop over 841 windows had 3,462


@pytest.mark.parametrize("name", ["MViT-B 16x4", "MViTv2-S 16x4", "Video Swin-T 32x2"])
def test_selected_evaluation_launches_fewer_kernels_than_stock(worker, name):
    selected = [budget["evaluation"] for budget in TABLE["launches"][name].values()]
    assert max(selected) < worker.ask("count_stock_launches", name)
