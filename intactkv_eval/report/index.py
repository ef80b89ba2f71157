"""The runs of a folder, indexed once by what is compared, so that each figure's partner is looked up and not searched.

A bucket holds the runs of one key (a cell, or a cell's job) behind the same tokens. Within it, and one task, scores are
found by what `unlike` compares: settings, metric, documents, and the seed of the examples where documents are unknown.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from math import isfinite

from intactkv_eval.report.alike import unlike
from intactkv_eval.report.collect import Identity, Run
from intactkv_eval.report.identities import BOS, baseline_of, by_job, by_tokens, full_precision_of
from intactkv_eval.report.score import Document, Score
from intactkv_eval.report.settings import frozen, key_of

Key = Hashable
_ANY_HASH = ("any",)
_NO_VALUES, _ANY_VALUES = -1, -2


class RunIndex:
    """Runs, oldest first, and the newest of them that fits a wanted one.

    Each kind of partner has a function of the keys under which a run is found, and one of the key that is wanted.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._buckets: dict[str, dict[Key, _Bucket]] = {}
        self._found: dict[tuple[str, Identity, tuple[int, ...]], _Bucket | None] = {}
        self._documents: dict[frozenset[Document], int] = {}

    def newest(self, kind: str, run: Run, task: str) -> Score | None:
        """The newest score on `task`, under the same settings, of a partner of `run`. kind: a name of KINDS."""
        place = kind, run.identity, run.pivot_tokens
        if place not in self._found:
            key = KINDS[kind].wanted(run.identity)
            tokens = run.pivot_tokens if KINDS[kind].same_tokens else None
            self._found[place] = self._of_kind(kind).get((key, tokens))
        bucket = self._found[place]
        return None if bucket is None else bucket.newest(run.scores[task], task, self.number_of)

    def number_of(self, score: Score) -> int:
        """Of the documents that a score has logged: equal for the same ones, _NO_VALUES for none."""
        if not score.values:
            return _NO_VALUES
        return self._documents.setdefault(frozenset(score.values), len(self._documents))

    def _of_kind(self, kind: str) -> "dict[Key, _Bucket]":
        """All buckets of this kind, made when it is first asked for."""
        if kind not in self._buckets:
            made: dict[Key, _Bucket] = defaultdict(_Bucket)
            keys: dict[Identity, list[Key]] = {}
            for run in self.runs:
                if run.identity not in keys:
                    keys[run.identity] = list(KINDS[kind].keys(run.identity))
                tokens = run.pivot_tokens if KINDS[kind].same_tokens else None
                for key in keys[run.identity]:
                    made[key, tokens].runs.append(run)
            self._buckets[kind] = dict(made)
        return self._buckets[kind]


class _Bucket:
    """Runs that are partners of the same runs, oldest first."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._tables: dict[str, dict[Key, list[tuple[int, Score]]]] = {}

    def newest(self, score: Score, task: str, number_of: Callable[[Score], int]) -> Score | None:
        """The newest score of the task that is like `score` in all that `unlike` names."""
        if len(self.runs) == 1:
            other = self.runs[0].scores.get(task)
            return None if other is None or unlike(score, other) else other
        if task not in self._tables:
            self._tables[task] = self._table(task, number_of)
        table = self._tables[task]
        alike = [table[key] for key in _wanted_keys(score, number_of(score)) if key in table] if table else []
        last = [next((at for at in reversed(one) if isfinite(score.value - at[1].value)), None) for one in alike]
        found = max((at for at in last if at is not None), key=lambda at: at[0], default=None)
        return None if found is None else found[1]

    def _table(self, task: str, number_of: Callable[[Score], int]) -> dict[Key, list[tuple[int, Score]]]:
        made: dict[Key, list[tuple[int, Score]]] = defaultdict(list)
        for place, run in enumerate(self.runs):
            score = run.scores.get(task)
            if score is not None and isfinite(score.value):
                for key in _keys(score, number_of(score)):
                    made[key].append((place, score))
        return dict(made)


def _keys(score: Score, documents: int) -> Iterator[Key]:
    """Every key under which a score is looked for. documents: the number of those that it has logged."""
    drawn = "drawn", frozen(score.drawn)
    texts: list[Key] = [drawn, ("documents", score.documents) if score.documents else ("unknown", drawn)]
    same = score.metric, key_of(score.settings)
    for text in texts:
        yield same, text, documents
        yield same, text, _ANY_VALUES


def _wanted_keys(score: Score, documents: int) -> Iterator[Key]:
    """What a score that is like this one has among its keys.

    Hashes of documents decide where both have them, else the seed of the examples; logged documents where both have.
    """
    drawn = "drawn", frozen(score.drawn)
    texts: list[Key] = [("documents", score.documents), ("unknown", drawn)] if score.documents else [drawn]
    same = score.metric, key_of(score.settings)
    for text in texts:
        for logged in [_ANY_VALUES] if documents == _NO_VALUES else [documents, _NO_VALUES]:
            yield same, text, logged


class BaselineKind:
    """One kind of partner. keys: of a run that may be one. wanted: the key of a run's partner."""

    def __init__(
        self, keys: Callable[[Identity], Iterable[Key]], wanted: Callable[[Identity], Key], same_tokens: bool = True
    ) -> None:
        self.keys, self.wanted, self.same_tokens = keys, wanted, same_tokens


def _by_cell(identity: Identity) -> list[Key]:
    """With the hash of its weights, and without, for one that knows none."""
    cell = by_tokens(identity).without_hash()
    return [(cell, identity.source_hash), (cell, _ANY_HASH)]


def _wanted_cell(wanted: Identity) -> Key:
    return wanted.without_hash(), wanted.source_hash or _ANY_HASH


def _intact_bos(identity: Identity) -> list[Key]:
    pivot = identity.cell.pivot
    return _by_cell(baseline_of(identity)) if pivot.intact and pivot.source == BOS else []


def _plain(identity: Identity) -> list[Key]:
    return [] if identity.behind is not None else [by_job(identity)]


def _plain_baseline(identity: Identity) -> list[Key]:
    is_plain = identity.behind is None and not identity.cell.pivot.intact
    return [by_job(by_tokens(identity))] if is_plain else []


KINDS = {
    "baseline": BaselineKind(_by_cell, lambda identity: _wanted_cell(baseline_of(identity))),
    "full precision": BaselineKind(_by_cell, lambda identity: _wanted_cell(full_precision_of(identity))),
    "plain": BaselineKind(_plain, by_job),  # of another checkpoint, so of other weights, by the same job
    "plain baseline": BaselineKind(_plain_baseline, lambda identity: by_job(baseline_of(identity))),
    "bos": BaselineKind(_intact_bos, lambda identity: _wanted_cell(baseline_of(identity)), same_tokens=False),
}
"""baseline, full precision: of the same cell. plain: the checkpoint that was calibrated like this one, but not behind a
pivot; plain baseline: that one, where it computes the tokens itself. bos: the same cell but for its tokens in front."""
