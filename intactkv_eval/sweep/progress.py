"""A sweep as people see it: a live table in a terminal, a line for each end elsewhere."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from intactkv_eval.sanitize import clean, on_one_line
from intactkv_eval.sweep.grid import Unit
from intactkv_eval.sweep.schedule import State, UnitFinished

_SHOWN = 8


class Progress:
    """names: of the slots. total: units to run. figure: what a unit that is done came to, for people."""

    def __init__(self, names: Sequence[str], total: int, figure: Callable[[str], str]) -> None:
        self._names, self._total, self._figure = names, total, figure
        self._begun = time.monotonic()
        self._ended: list[UnitFinished] = []
        self._since: dict[str, float] = {}
        self._state = State({}, total)
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._shown)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live.is_started:
            self._live.refresh()
            self._live.stop()

    def happened(self, end: UnitFinished) -> None:
        """A unit has ended."""
        self._ended.append(end)
        if not self._live.is_started:
            self._console.print(Text(f"[{len(self._ended)}/{self._total}] {self._line(end)}"), soft_wrap=True)

    def look(self, state: State) -> None:
        """What is going on."""
        self._state = state
        now = time.monotonic()
        self._since = {unit.key: self._since.get(unit.key, now) for unit in state.running.values()}
        if self._live.is_started:
            self._live.refresh()

    def _line(self, end: UnitFinished) -> str:
        said = self._figure(end.unit.key) if end.error is None else f"FAILED {end.error.splitlines()[-1]}"
        return clean(f"{end.unit.label}: {said} ({end.seconds:.0f} s)")

    def _shown(self) -> Group:
        failed = sum(end.error is not None for end in self._ended)
        now = time.monotonic()
        spent = now - self._begun
        left = (
            f", about {spent / len(self._ended) * (self._total - len(self._ended)) / 60:.0f} min left"
            if self._ended
            else ""
        )
        table = Table(title=f"{len(self._ended)} of {self._total} cells, {failed} failed, {spent / 60:.0f} min{left}")
        for name in ("where", "cell", "seconds"):
            table.add_column(name, justify="right" if name == "seconds" else "left")
        for slot, name in enumerate(self._names):
            unit: Unit | None = self._state.running.get(slot)
            took = f"{now - self._since[unit.key]:.0f}" if unit is not None and unit.key in self._since else ""
            table.add_row(name, escape(on_one_line(unit.label)) if unit is not None else "", took)
        return Group(table, *(Text(self._line(end)) for end in self._ended[-_SHOWN:]))
