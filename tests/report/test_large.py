"""Large folders: partners are looked up as a search of all runs finds them, and the work grows as the runs do."""

from dataclasses import replace
from math import inf, nan
from pathlib import Path
from random import Random

import pytest
from pydantic import BaseModel

from intactkv_eval.bench.report import report, write_results
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.report import identities, refused
from intactkv_eval.report.alike import unlike
from intactkv_eval.report.collect import Identity, Run, collect
from intactkv_eval.report.compare import compare
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.groups import TaskGroups
from intactkv_eval.report.index import RunIndex
from intactkv_eval.report.refused import Unpaired
from intactkv_eval.report.score import Score
from intactkv_eval.report.settings import Settings


def drawn_run(draw, number):
    """A run in which little differs from the others', so that many are partners and many nearly are."""
    bits = draw.choice([None, 3])
    intact = draw.random() < 0.5
    cell = CellSpec.model_validate(
        {
            "model": {"pretrained": draw.choice(["a", "b"]), "reference": draw.choice([None, None, "a"])},
            "weights": {"method": "rtn", "bits": bits, "group_size": 64} if bits else {},
            "pivot": {"source": draw.choice(["bos", "prompt", "tokens:1+2"]), "intact": intact},
        }
    )
    identity = Identity(
        cell=cell,
        source_hash=draw.choice([None, "x", "x", "y"]),
        job=draw.choice([None, "{}"]),
        behind=draw.choice([None, None, "p"]),
        formulas=draw.choice([(), (("pivot", 1),)]),
    )
    scores = {task: drawn_score(draw, task) for task in ("t", "u") if draw.random() < 0.9}
    return Run(Path(f"{number}.json"), float(number), identity, draw.choice([(1,), (1, 2)]), scores, None)


def drawn_score(draw, task):
    settings = {"protocol": draw.choice([None, "p"]), "limit": draw.choice([1, 1.0, True, 2]), "list": [1, {"k": 2}]}
    values = draw.choice([{}, {("t", 1): 1.0}, {("t", 2): 1.0}])
    return Score(
        task=task, metric=draw.choice(["acc", "acc", "f1"]), value=draw.choice([0.5, 0.6, nan, inf, 1.7e308, -1.7e308]),
        stderr=None, higher_is_better=True, settings=draw.choice([dict, Settings])(settings), values=values,
        documents=draw.choice([None, "d", "e"]), drawn=draw.choice([None, 1, 2]),
    )  # fmt: skip


def searched(run, task, runs):
    """Which score each partner is, by trying every run: the baseline, full precision, plain one and [BOS] alone."""

    def newest(fits, same_tokens=True):
        for other in reversed(runs):
            if same_tokens and other.pivot_tokens != run.pivot_tokens:
                continue
            if fits(other.identity) and task in other.scores and not unlike(run.scores[task], other.scores[task]):
                return other.scores[task]
        return None

    def is_like(one, wanted):
        return identities.comparable(one, wanted) == wanted

    mine, by_job, by_tokens = run.identity, identities.by_job, identities.by_tokens
    base, full = identities.baseline_of(mine), identities.full_precision_of(mine)
    base_of = identities.baseline_of
    return {
        "baseline": newest(lambda one: is_like(one, base)),
        "full precision": newest(lambda one: is_like(one, full)),
        "plain": newest(lambda one: one.behind is None and by_job(one) == by_job(mine)),
        "plain baseline": newest(
            lambda one: one.behind is None and not one.cell.pivot.intact and by_job(by_tokens(one)) == by_job(base)
        ),
        "bos": newest(
            lambda one: one.cell.pivot.intact and one.cell.pivot.source == "bos" and is_like(base_of(one), base), False
        ),
    }


@pytest.mark.parametrize("seed", range(4))
def test_partners_are_those_of_a_search(seed):
    draw = Random(seed)
    runs = [drawn_run(draw, number) for number in range(70)]
    index, found = RunIndex(runs), 0
    for run in runs:
        for task in run.scores:
            for kind, wanted in searched(run, task, runs).items():
                assert index.newest(kind, run, task) is wanted, kind
                found += wanted is not None
    assert found > 10


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_run_is_that_of_a_search(seed):
    draw = Random(seed)
    runs = [drawn_run(draw, number) for number in range(40)]
    unpaired = Unpaired(RunIndex(runs))
    for run in runs:
        for task in run.scores:
            near = [
                refused._differences(run, other, task)
                for other in runs
                if not other.identity.cell.pivot.intact and task in other.scores
            ]
            nearest = min(near, key=len)
            assert f"the nearest differs in {', '.join(nearest[:4])}" in unpaired.why(run, task)


@pytest.fixture
def counted(monkeypatch):
    """How often identities and specs are compared or copied, settings compared, and a cell's settings listed."""
    counts = dict.fromkeys(["equal", "copied", "unlike", "flat"], 0)

    def counting(name, function):
        def call(*arguments, **named):
            counts[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(BaseModel, "__eq__", counting("equal", BaseModel.__eq__))
    monkeypatch.setattr(BaseModel, "model_copy", counting("copied", BaseModel.model_copy))
    monkeypatch.setattr(refused, "unlike", counting("unlike", refused.unlike))
    monkeypatch.setattr(refused, "_flat", counting("flat", refused._flat))
    return counts


def test_work_grows_as_the_runs_do(counted, tmp_path):
    """Of each figure that has its partners, and of each that has none: 185 runs, then twice as many."""
    seen = []
    for times in (1, 2):
        folder = tmp_path / str(times)
        write_results(folder, 185 * times, 2)  # five models, of which the last has no baselines
        runs, _ = collect([folder])
        before = dict(counted)
        grid = grid_of(runs)
        seen.append({key: counted[key] - before[key] for key in counted})
        assert len(grid.refusals) == 40 * times
    for key, first in seen[0].items():
        assert 0 < seen[1][key] <= 2.3 * first, key
        assert first <= 40 * 185, key


def test_groups_nested_deep_are_walked_once():
    """The innermost first, as a file may have them: each group is met by itself and by the one around it."""

    class Counted(dict):
        looked = 0

        def get(self, *arguments):
            Counted.looked += 1
            return super().get(*arguments)

    many = 2000
    groups = TaskGroups(children := Counted({f"g{n}": [f"g{n + 1}"] for n in range(many)} | {f"g{many}": ["leaf"]}))
    shown = set()
    for n in range(many, -1, -1):
        groups.add_below(f"g{n}", shown)
        assert groups.leaves(f"g{n}") == ["leaf"]
    assert shown == {*children, "leaf"} - {"g0"}
    assert Counted.looked < 8 * many


def test_groups_inside_of_themselves():
    groups = TaskGroups({"a": ["b", "x"], "b": ["a", "y"], "c": ["c"]})
    assert groups.leaves("a") == groups.leaves("b") == ["x", "y"]
    assert groups.leaves("c") == ["c"]
    assert groups.leaves("x") == ["x"]


def test_groups_that_multiply_are_refused():
    """Two thousand groups around one chain of a thousand: two million tasks in 60 KB."""
    children = {f"outer{n}": ["g0", f"leaf{n}"] for n in range(2000)} | {f"g{n}": [f"g{n + 1}"] for n in range(1000)}
    groups = TaskGroups(children)
    with pytest.raises(ValueError, match="together they hold more than 1000000 tasks"):
        [groups.leaves(f"outer{n}") for n in range(2000)]


def test_the_bench_checks_what_it_measures(tmp_path):
    text = report(files=205, repeats=1, tasks=1)
    assert "205 results files of 1 tasks" in text
    assert "| both |" in text


def test_an_identity_equals_another_by_its_values():
    """Its hash is kept, and is no part of it."""
    one = Identity(CellSpec.model_validate({"model": {"pretrained": "a"}}), source_hash="x")
    kept = hash(one)
    other = Identity(CellSpec.model_validate({"model": {"pretrained": "a"}}), source_hash="x")
    assert one == other
    assert hash(other) == kept
    assert hash(replace(one, source_hash="y")) != kept
    assert str(one) == str(replace(one))


def test_compare_of_a_list_is_that_of_the_index(tmp_path):
    write_results(tmp_path, 41, 1)
    runs, _ = collect([tmp_path])
    run = next(run for run in runs if run.identity.cell.pivot.intact)
    assert compare(run, "task_00", runs).to_baseline is not None
