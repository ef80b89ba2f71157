"""Several processes of one calibration (`accelerate launch`): who takes which examples, and the sum of their gradients.

Every process holds the whole model and the same rows; after the sum they take the same step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among `world`."""

    rank: int = 0
    world: int = 1

    def mine(self, batch: Sequence[int]) -> Sequence[int]:
        """The examples of a batch that are this process's."""
        return batch[self.rank :: self.world]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def firsts(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The numbers of the first process: what is decided by them is then decided alike, to the last bit."""
        if self.world == 1:
            return list(numbers)
        held = torch.tensor(numbers, dtype=torch.float64).to(device)
        torch.distributed.broadcast(held, 0)
        found: list[float] = held.tolist()
        return found

    def summed(self, parameters: Sequence[Tensor], losses: Sequence[Tensor]) -> float:
        """Add up the gradients of all processes, in place; the sum of all losses."""
        total = torch.stack(list(losses)).double().sum().cpu() if losses else torch.zeros((), dtype=torch.float64)
        if self.world == 1:
            return float(total)
        for parameter in parameters:
            if parameter.grad is None:  # a batch may have fewer examples than there are processes
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
        device = parameters[0].device
        moved = total.to(device)
        torch.distributed.all_reduce(moved)
        return float(moved)
