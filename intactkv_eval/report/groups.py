"""Groups of tasks as a results file names them: what each holds, however deep they are nested. Knows no figures."""

from collections.abc import Mapping, Sequence

_MOST = 1_000_000
"""Tasks that the groups of one file hold, each counted for every group that it is looked for in."""


class TaskGroups:
    """children: what each group holds by itself; a file may name a group inside of itself."""

    def __init__(self, children: Mapping[str, Sequence[str]]) -> None:
        self._children = children
        self._leaves: dict[str, frozenset[str]] = {}
        self._seen = 0

    def add_below(self, task: str, shown: set[str]) -> None:
        """Add all that a group holds, and what those hold, to `shown`, which has only whole ones: each is met once."""
        left = list(self._children.get(task, []))
        while left:
            name = left.pop()
            if name not in shown:
                shown.add(name)
                left += self._children.get(name, [])

    def leaves(self, task: str) -> list[str]:
        """The tasks below a group that hold nothing, sorted; the task itself where it holds none.

        Raises ValueError for groups that are nested so that together they hold more than a million tasks.
        """
        met, found = set[str](), set[str]()
        left = list(self._children.get(task, []))
        while left:
            name = left.pop()
            if name in met:
                continue
            met.add(name)
            inside = self._children.get(name)
            known = self._leaves.get(name)
            if not inside:
                found.add(name)
            elif known is not None:
                found |= known
                self._count(len(known))
            else:
                left += inside
            self._count(1)
        self._leaves[task] = frozenset(found)
        return sorted(found) or [task]

    def _count(self, tasks: int) -> None:
        self._seen += tasks
        if self._seen > _MOST:
            raise ValueError(f"its groups are nested so that together they hold more than {_MOST} tasks")
