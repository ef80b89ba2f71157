"""Runs whose chat prompts are of two dates answer two questions."""

import json

import pytest
from test_report import BOS, NONE, write

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.report.collect import collect, identity_of
from intactkv_eval.report.compare import compare


@pytest.mark.parametrize("template", ["a hash", None])
def test_runs_of_two_dates_are_not_compared_where_prompts_are_chats(tmp_path, template):
    for number, (cell, day) in enumerate(((NONE, "2026-11-28"), (BOS, "2026-11-29"), (BOS, "2026-11-28")), 1):
        path = write(tmp_path, cell, [1.0, 1.2], number, samples=False, record={"chat_date": day})
        content = json.loads(path.read_text())
        content["chat_template_sha"] = template
        path.write_text(json.dumps(content))
    runs, _ = collect([tmp_path])
    other, same = (compare(run, "ppl_x", runs).to_baseline for run in runs[1:])
    assert same is not None
    assert (other is None) == (template is not None)


def test_a_date_that_was_chosen_is_the_one_that_was_the_present():
    plain = cell_from_args(BOS)
    named = cell_from_args({**BOS, "chat_date": "2026-11-28"})
    assert plain != named
    one, other = (identity_of({"cell": cell.model_dump(mode="json")}) for cell in (plain, named))
    assert one == other
