"""What is asked of `intactkv judge`, beside the judge and the answers."""

from dataclasses import dataclass, field
from pathlib import Path

from intactkv_eval.judge.cost import Prices


@dataclass(frozen=True)
class JudgeOptions:
    """bench and questions: of the answers. baseline: judge pairs against it. all_pairs: judge every two of the models.

    references: whose answers stand beside, None for those of the judge's own name. attempts: of a request whose reply
    has no verdict, in one run. cap: USD, over all runs with one folder. dry: say what it would cost, and stop.
    """

    bench: str = "mt_bench"
    questions: Path | None = None
    baseline: Path | None = None
    all_pairs: bool = False
    references: str | None = None
    concurrency: int = 4
    attempts: int = 3
    prices: Prices = field(default_factory=Prices)
    cap: float | None = None
    dry: bool = False

    @property
    def is_pairwise(self) -> bool:
        """Whether two answers are compared, and none is graded."""
        return self.all_pairs or self.baseline is not None
