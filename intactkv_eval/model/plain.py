"""What a module computes, told by trying it: whether it is a plain linear layer, or only scales each element.

Model code derives its own classes from nn.Linear (Falcon's computes x W^T + b in two steps), and some of them compute
something else (routers, quantized layers, adapters). The class alone does not tell. Knows no family of models.
"""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

_INPUTS, _OUTPUTS, _ROWS = 6, 10, 3  # of a trial
_MOST_SCALES = 2**20  # the largest models have 2**14 queries; matrices and experts are not tried
_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError)
"""What code that was not written for a trial's tensors raises."""


def is_plain_linear(layer: nn.Linear) -> bool:
    """Whether the forward of `layer` is F.linear(x, weight, bias), as the class computes it.

    A class with a forward of its own is tried in fp32 on a small matrix that takes the place of the layer's. What holds
    more than a weight and a bias, and what holds codes instead of numbers, is not plain.
    """
    if type(layer) is nn.Linear:
        return True
    names = {*dict(layer.named_parameters()), *dict(layer.named_buffers())}
    if list(layer.children()) or not names <= {"weight", "bias"} or not layer.weight.is_floating_point():
        return False
    if type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    if type(layer).forward is nn.Linear.forward:
        return True
    small = copy.copy(layer)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=random)
    bias = None if layer.bias is None else torch.randn(_OUTPUTS, generator=random)
    small.__dict__.update(
        _parameters={"weight": weight, "bias": bias}, in_features=_INPUTS, out_features=_OUTPUTS, training=False
    )
    x = torch.randn(1, _ROWS, _INPUTS, generator=random)
    try:
        with torch.no_grad():
            y = type(layer).forward(small, x)
    except _FAILURES:
        return False
    return _is_close(y, functional.linear(x, weight, bias))


@torch.no_grad()
def scales_elementwise(module: nn.Module) -> bool:
    """Whether the only parameters of `module` scale what it computes, one by one, as those of a norm do.

    Its output with a weight w is then g(x) + w h(x), number for number, whatever the shape of w. Norms of each head on
    its own have w [H, D] (Cohere's q_norm); a matrix product has no such form.
    """
    weights = dict(module.named_parameters())
    if any(True for _ in module.children()) or any(True for _ in module.buffers()) or set(weights) != {"weight"}:
        return False
    if weights["weight"].numel() > _MOST_SCALES:
        return False
    shape, random = weights["weight"].shape, torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 2, *shape, generator=random), torch.randn(shape, generator=random)
    try:
        zero, one, given = (
            functional_call(module, {"weight": value}, (x,))
            for value in (torch.zeros(shape), torch.ones(shape), weight)
        )
        return _is_close(given, zero + weight * (one - zero))
    except _FAILURES:
        return False


def _is_close(found: object, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found.float(), expected.float(), rtol=1e-5, atol=1e-5)
