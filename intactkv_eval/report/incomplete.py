"""Judged sets that are not whole: how many of a bench's questions are judged, and which figure of them is compared.

`intactkv judge` writes `judged` among a task's metadata: {"questions": judged whole, "of": that the bench has,
"missing": verdicts}. The report shows n/N beside such a figure, compares the mean over whole questions, and its command
ends with exit code 3 unless --allow-partial is given. Knows no judge.
"""

from collections.abc import Iterable, Mapping
from typing import Any

JUDGED = "judged"
PAIRED = "score_whole_questions"
"""The mean over whole questions: that of the samples. `score` is the mean over rows, as FastChat makes it."""
_SCORE = "score"
_BY_A_JUDGE = " judged by "


def judge_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two judged sets the same measurement, beside the protocol. `judged`: `30/80`, None where it is whole.

    Raises ValueError where a judge's results do not say how many questions they are of, as older ones do not;
    TypeError, ValueError or KeyError where what they say is damaged.
    """
    counts = metadata.get(JUDGED)
    if counts is None and _BY_A_JUDGE in str(metadata.get("protocol")):
        raise ValueError(
            "a judge's results of before they said how many questions they are of, and whose references stood beside; "
            "remove them, and run `intactkv judge` again with the same --out: what has its verdict is not asked again"
        )
    return {
        "references": metadata.get("references"),
        "judge_prompts": metadata.get("judge_prompts"),
        JUDGED: None if counts is None else _share(counts["questions"], counts["of"]),
    }


def _share(questions: object, of: object) -> str | None:
    if not isinstance(questions, int) or not isinstance(of, int) or not 0 <= questions <= of:
        raise ValueError(f"{str(questions)[:20]} of {str(of)[:20]} questions judged")
    return None if questions == of else f"{questions}/{of}"


def paired_figures(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """A judged set's figures with the mean over whole questions, which pairs with a baseline's, as its score."""
    if PAIRED not in figures:
        return figures
    return {**figures, _SCORE: figures[PAIRED], f"{_SCORE}_stderr": figures.get(f"{PAIRED}_stderr")}


def share_beside(settings: Mapping[str, Any]) -> str:
    """` (30/80)` for a figure of a set that is not whole, else nothing."""
    share = settings.get(JUDGED)
    return f" ({share})" if share else ""


def incomplete_sets(scored: Iterable[tuple[object, Mapping[str, Any]]]) -> list[str]:
    """A line for each set that is not whole. scored: whose a score is, and its settings."""
    return [
        f"{name}: {settings[JUDGED]} questions are judged whole" for name, settings in scored if settings.get(JUDGED)
    ]
