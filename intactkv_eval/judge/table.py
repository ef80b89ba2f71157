"""The tables that `intactkv judge` prints, in markdown: scores, or wins, ties and losses."""

from collections.abc import Iterable, Mapping

from intactkv_eval.judge.scores import ALL, WHOLE, Figure
from intactkv_eval.judge.wins import Wins
from intactkv_eval.report.tables import markdown_row

_NONE = "no verdict"


def score_table(figures: Mapping[str, Mapping[str, Figure]], heading: str) -> str:
    """A row for each model, a column for each part; `whole questions` where a row is not judged whole."""
    parts = list(dict.fromkeys(part for row in figures.values() for part in row))
    if all(row[ALL].is_whole and row[ALL].value == row[WHOLE].value for row in figures.values()):
        parts.remove(WHOLE)
    rows = [[name, *(_cell(row.get(part)) for part in parts), str(row[ALL].unrated)] for name, row in figures.items()]
    return _table([heading, *parts, _NONE], rows)


def win_table(wins: Mapping[str, Wins], heading: str) -> str:
    """A row for each model: counts of pairs, then the share won, a tie as half."""
    parts = list(dict.fromkeys(part for one in wins.values() for part in one.figures))
    rows = [
        [name, str(one.won), str(one.tied), str(one.lost), *(_cell(one.figures.get(part)) for part in parts),
         str(one.figures[ALL].unrated)]
        for name, one in wins.items()
    ]  # fmt: skip
    named = ["win rate" if part == ALL else part for part in parts]
    return _table([heading, "win", "tie", "loss", *named, _NONE], rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(markdown_row(line) for line in [head, rule, *rows])


def _cell(figure: Figure | None) -> str:
    """`8.10 ± 0.20 (30/80)`: the last where not all of the bench's questions are judged whole."""
    if figure is None or figure.value is None:
        return "" if figure is None or figure.is_whole else f"({figure.questions}/{figure.of})"
    error = "" if figure.stderr is None else f" ± {figure.stderr:.2f}"
    spread = "" if figure.spread is None else f" (spread {figure.spread:.2f})"
    count = "" if figure.is_whole else f" ({figure.questions}/{figure.of})"
    return f"{figure.value:.2f}{error}{spread}{count}"
