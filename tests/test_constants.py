"""Tensors that depend on sizes alone are made once, and never outlive what they were made in."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stts_slowfast.constants import sized_constant


def counted():
    made = []

    @sized_constant
    def ramp(size, *, dtype, device):
        made.append(size)
        return torch.arange(size, dtype=dtype, device=device)

    return ramp, made


def test_made_once_for_each_size_and_dtype():
    ramp, made = counted()
    like = torch.zeros(1)
    assert ramp(like, 3) is ramp(like, 3)
    assert ramp(like, 4).tolist() == [0, 1, 2, 3]
    assert ramp(like.double(), 3).dtype == torch.float64
    assert made == [3, 4, 3]


def test_one_made_in_inference_mode_serves_training():
    ramp, _ = counted()
    with torch.inference_mode():
        ramp(torch.zeros(1), 3)
    weight = torch.ones(3, requires_grad=True)
    (weight * ramp(torch.zeros(1), 3)).sum().backward()
    assert weight.grad.tolist() == [0, 1, 2]


def test_fake_and_compiled_ones_are_not_kept():
    ramp, made = counted()
    with FakeTensorMode() as mode:
        assert ramp(torch.zeros(1), 3).fake_mode is mode
    compiled = torch.compile(lambda x: x + ramp(x, 3), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).tolist() == [1, 2, 3]
    made.clear()
    assert ramp(torch.zeros(1), 3).tolist() == [0, 1, 2]
    assert made == [3]


def test_transformed_ones_are_not_kept():
    ramp, made = counted()
    out = torch.func.vmap(lambda x: x + ramp(x, 3))(torch.ones(2, 1))
    assert out.tolist() == [[1, 2, 3]] * 2
    ramp(torch.zeros(1), 3)
    assert made == [3, 3]
