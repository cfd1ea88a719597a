"""A saved optimizer state is of the run's parameters, or the difference is named."""

import copy

import torch
from torch import nn

from stts_slowfast.checkpoints.optimizer_state import optimizer_mismatch


def optimizer(*shapes):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    found = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    sum(p.sum() for p in parameters).backward()
    found.step()
    return found


def test_a_state_of_the_same_parameters_fits():
    run = optimizer((2, 3), (4,))
    assert optimizer_mismatch(copy.deepcopy(run.state_dict()), run) == ""
    assert optimizer_mismatch({"param_groups": run.state_dict()["param_groups"]}, run) == ""


def test_other_groups_and_shapes_are_named():
    run = optimizer((2, 3), (4,))
    state = optimizer((2, 3)).state_dict()
    assert optimizer_mismatch(state, run) == "it has groups of [1] parameters, this run has [2]"
    assert "groups of []" in optimizer_mismatch({}, run)
    state = optimizer((3, 2), (4,)).state_dict()
    assert optimizer_mismatch(state, run) == "it has a tensor (3, 2) for a parameter (2, 3)"
    assert optimizer_mismatch(state, run, reshaped=True) == ""
    state = optimizer((2, 4), (4,)).state_dict()
    assert "(2, 4)" in optimizer_mismatch(state, run, reshaped=True)
