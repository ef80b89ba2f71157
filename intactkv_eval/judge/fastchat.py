"""Judgments in FastChat's layout, so that its show_result reads them; written anew from the journal each time.

    <judge>_single.jsonl   {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    <judge>_pair.jsonl     {"question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", ...}

A reply without a verdict has score -1 or winner `error`, which FastChat leaves out of its means. `choice` and
`references` are keys that FastChat does not have, and does not read.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intactkv_eval.judge.journal import Line
from intactkv_eval.judge.matches import Match
from intactkv_eval.storage.files import read_jsonl, write_jsonl

Judged = Sequence[tuple[Match, Line | None]]
_NO_SCORE, _NO_WINNER = -1, "error"


def single_rows(judged: Judged, judge: str) -> Iterable[dict[str, Any]]:
    """A row for each reply."""
    for match, line in judged:
        if line is not None:
            yield {
                "question_id": match.question_id,
                "model": match.models[0],
                "judge": [judge, match.prompt],
                "user_prompt": line.user_prompt,
                "judgment": line.reply,
                "score": _NO_SCORE if line.verdict is None else line.verdict,
                "turn": match.turn,
                "choice": match.choice,
                "references": match.references,
                "tstamp": line.tstamp,
            }


def pair_rows(judged: Judged, judge: str) -> Iterable[dict[str, Any]]:
    """A row for both orders of a match, also where a reply is missing."""
    for (first, one), (_, other) in zip(judged[::2], judged[1::2], strict=True):
        yield {
            "question_id": first.question_id,
            "model_1": first.models[0],
            "model_2": first.models[1],
            "g1_winner": _winner(one, {"A": "model_1", "B": "model_2"}),
            "g2_winner": _winner(other, {"A": "model_2", "B": "model_1"}),
            "judge": [judge, first.prompt],
            "g1_user_prompt": one.user_prompt if one else "",
            "g1_judgment": one.reply if one else "",
            "g2_user_prompt": other.user_prompt if other else "",
            "g2_judgment": other.reply if other else "",
            "turn": first.turn,
            "choice": first.choice,
            "references": first.references,
            "tstamp": max((line.tstamp for line in (one, other) if line), default=0.0),
        }


def _winner(line: Line | None, names: Mapping[str, str]) -> str:
    return _NO_WINNER if line is None or line.verdict is None else names.get(str(line.verdict), "tie")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A whole file of them, beside what it holds of other models."""
    made = list(rows)
    models = {_models(row) for row in made}
    kept = [row for row in (read_jsonl(path) if path.is_file() else []) if _models(row) not in models]
    write_jsonl(path, [*kept, *made])


def _models(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(row.get(key)) for key in ("model", "model_1", "model_2"))
