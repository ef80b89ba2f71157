"""The layer and the torch operator around cpu.py: buffers, torch.compile, and the gradient of x."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intactkv_kernels import cpu
from intactkv_kernels.parts import FrozenProduct, Parts


class CpuLinear(nn.Module):
    """A linear layer on packed int4 containers. Built only where `cpu.why_not` is None."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__()
        made = cpu.prepare(
            parts.unpack(parts.words), parts.scales, parts.zeros, parts.bits, parts.group_size, parts.order
        )
        for place, (container, table) in enumerate(zip(made.containers, made.tables, strict=True)):
            self.register_buffer(f"container{place}", container)
            self.register_buffer(f"table{place}", table)
        for name in ("scales", "zeros", "order"):
            self.register_buffer(name, getattr(made, name))
        self._weight = made

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held: dict[str, Any] = dict(self._buffers)
        count = range(len(self._weight.containers))
        containers, tables = (tuple(held[f"{name}{place}"] for place in count) for name in ("container", "table"))
        if containers[0].device.type != "cpu":
            raise RuntimeError("backend=cpu: its layers run on the CPU only; load the model with device=cpu")
        if tables[0].dtype is not torch.bfloat16:
            raise RuntimeError("a packed layer cannot be cast to another dtype: load the model with dtype=...")
        others = {name: held[name] for name in ("scales", "zeros", "order")}
        self._weight = replace(self._weight, containers=containers, tables=tables, **others)
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
        weight, outputs = self._weight, self._weight.out_features
        found = {
            "codes": cpu.codes_of(weight),
            "scales": weight.scales.t()[:outputs].contiguous(),
            "zeros": weight.zeros.t()[:outputs].contiguous(),
        }
        return found if weight.order is None else {**found, "order": weight.order.to(torch.int32)}


def _as_operator(x: Tensor, weight: cpu.PackedWeight, bias: Tensor | None) -> Tensor:
    y: Tensor = _operator(
        x, list(weight.containers), list(weight.tables), weight.scales, weight.zeros, weight.order, bias,
        weight.bits, weight.group_size, weight.out_features,
    )  # fmt: skip
    return y


@torch.library.custom_op("intactkv::cpu_linear", mutates_args=())
def _operator(
    x: Tensor,
    containers: list[Tensor],
    tables: list[Tensor],
    scales: Tensor,
    zeros: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
) -> Tensor:
    weight = cpu.PackedWeight(
        tuple(containers), tuple(tables), scales, zeros, order, bits, group_size, x.shape[-1], out_features
    )
    return cpu.linear(x, weight, bias)


@_operator.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-1])
