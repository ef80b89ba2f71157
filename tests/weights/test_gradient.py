"""Gradients that are the same in every release of torch."""

import pytest
import torch

from intactkv_eval.weights.gradient import clamp_with_ends


@pytest.mark.parametrize(("low", "high"), [(-4.0, 3.0), (None, 3.0), (-4.0, None)])
def test_what_lies_on_a_bound_keeps_its_gradient(low, high):
    """torch 2.15 gives 0 there, and gave 1 before."""
    value = torch.tensor([-4.0, -4.5, 0.0, 3.0, 3.5], requires_grad=True)
    found = clamp_with_ends(value, low, high)
    assert torch.equal(found, value.detach().clamp(low, high))
    (slope,) = torch.autograd.grad(found.sum(), value)
    assert slope.tolist() == [1, float(low is None), 1, 1, float(high is None)]


def test_values_that_are_not_numbers_stay_so():
    value = torch.tensor([float("nan")])
    for wanted in (False, True):
        assert clamp_with_ends(value.clone().requires_grad_(wanted), -1, 1).isnan().all()
