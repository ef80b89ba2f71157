"""Revisions of formulas: which formulas a cell and a checkpoint use, and what a record without revisions means."""

import pytest

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.cell.formulas import REVISIONS, current, formulas_of, names_of_cell, names_of_job, recorded, stale
from intactkv_eval.compat.lm_eval_api import simple_parse_args_string

CELLS = {
    "": [],
    "weights=rtn,bits=4": ["weights.rtn"],
    "weights=rtn,bits=4,symmetric=true": ["weights.rtn", "symmetric.gptq"],
    "weights=rtn,bits=4,symmetric=true,rotate=true": ["weights.rtn", "symmetric.quarot", "rotation"],
    "act_bits=8": ["activations.token"],
    "kv_bits=4": ["kv.token_head"],
    "kv_bits=4,kv_scheme=channel_key": ["kv.channel_key"],
}
JOBS = [
    ({"method": "rtn", "group_size": 64}, ["weights.rtn"]),
    ({"method": "gptq", "group_size": 128, "options": {}}, ["weights.gptq"]),
    ({"method": "gptq", "group_size": -1, "options": {}}, ["weights.gptq"]),
    ({"method": "gptq", "group_size": 64, "options": {"static_groups": True}}, ["weights.gptq"]),
    ({"method": "gptq", "group_size": 64, "options": {}}, ["weights.gptq", "weights.gptq.small_groups"]),
    ({"method": "omniquant", "group_size": 64, "symmetric": True}, ["weights.omniquant", "symmetric.omniquant"]),
    ({"method": "gptq", "group_size": -1, "symmetric": True}, ["weights.gptq", "symmetric.gptq"]),
    (
        {"method": "gptq", "group_size": -1, "symmetric": True, "rotate": True},
        ["weights.gptq", "symmetric.quarot", "rotation"],
    ),
    ({"method": "another's"}, []),
    ({}, []),
]


def cell(text):
    return cell_from_args({"pretrained": "m", "pivot": "bos", **simple_parse_args_string(text)})


@pytest.mark.parametrize(("text", "names"), CELLS.items(), ids=CELLS)
def test_the_formulas_of_a_cell(text, names):
    assert names_of_cell(cell(text)) == names
    assert formulas_of(cell(text)) == {name: REVISIONS[name] for name in names}


@pytest.mark.parametrize(("job", "names"), JOBS)
def test_the_formulas_of_a_checkpoint(job, names):
    assert names_of_job(job) == names
    made = {"job": job, "formulas": current(names)}
    assert formulas_of(cell(""), {"made": made}) == current(names)
    assert formulas_of(cell(""), {"made": {"job": job}}) == dict.fromkeys(names, 1), "before revisions were written"


def test_what_a_record_does_not_name_is_of_revision_1():
    assert recorded(["kv.token_head"], None) == {"kv.token_head": 1}
    assert recorded(["kv.token_head"], {"kv.token_head": 7, "other": 3}) == {"kv.token_head": 7}
    for wrong in ("2", 2.0, True, None, [2]):
        with pytest.raises(ValueError, match=r"kv\.token_head: revision"):
            recorded(["kv.token_head"], {"kv.token_head": wrong})


def test_stale_formulas_are_named():
    assert stale(current(REVISIONS)) == []
    assert stale({"kv.token_head": 1, "weights.rtn": 1}) == [
        f"kv.token_head of revision 1, now {REVISIONS['kv.token_head']}"
    ]
    assert stale({"a formula that is gone": 1}) == ["a formula that is gone of revision 1, now gone"]
