"""The layer and the torch operator around cpu.py: buffers, torch.compile, and the gradient of x."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from intactkv_kernels import cpu
from intactkv_kernels.containers import ContainerWeight
from intactkv_kernels.parts import FrozenProduct, Parts
from intactkv_kernels.planes import PlanesWeight


class CpuLinear(nn.Module):
    """A linear layer on packed weights. Built only where `cpu.why_not` is None."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__()
        self._weight = cpu.prepare(
            parts.unpack(parts.words), parts.scales, parts.zeros, parts.bits, parts.group_size, parts.order
        )
        for name, tensor in _tensors(self._weight).items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held: dict[str, Any] = dict(self._buffers)
        if any(tensor.device.type != "cpu" for tensor in held.values()):
            raise RuntimeError("backend=cpu: its layers run on the CPU only; load the model with device=cpu")
        if any(held[name].dtype is not tensor.dtype for name, tensor in _tensors(self._weight).items()):
            raise RuntimeError("a packed layer cannot be cast to another dtype: load the model with dtype=...")
        self._weight = replace(self._weight, **held)
        return self

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> y [..., O]. Only torch.compile needs the operator, which costs time."""
        if torch.compiler.is_compiling():
            return _as_operator(x, self._weight, bias)
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = FrozenProduct.apply(x, lambda rows: cpu.linear(rows, self._weight, bias), self.matrix)  # type: ignore[no-untyped-call]
            return y
        return cpu.linear(x, self._weight, bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I] that many rows are multiplied by."""
        return cpu.dequantize(self._weight, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Unpacked codes [O, I], scales, zeros, and order where there is one."""
        weight = self._weight
        found = {"codes": weight.unpacked(), "scales": weight.scales, "zeros": weight.zeros}
        return found if weight.order is None else {**found, "order": weight.order.to(torch.int32)}


def _tensors(weight: cpu.CpuWeight) -> dict[str, Tensor]:
    held = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def _as_operator(x: Tensor, weight: cpu.CpuWeight, bias: Tensor | None) -> Tensor:
    packed = [weight.codes] if isinstance(weight, PlanesWeight) else [weight.containers, weight.tables]
    y: Tensor = _operator(
        x, packed, weight.scales, weight.zeros, weight.order, bias, weight.bits, weight.group_size, weight.out_features
    )
    return y


@torch.library.custom_op("intactkv::cpu_linear", mutates_args=())
def _operator(
    x: Tensor,
    packed: list[Tensor],
    scales: Tensor,
    zeros: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    rest = (scales, zeros, order, bits, group_size, x.shape[-1], out_features)
    weight = PlanesWeight(*rest, packed[0]) if len(packed) == 1 else ContainerWeight(*rest, packed[0], packed[1])
    return cpu.linear(x, weight, bias)


@_operator.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-1])
