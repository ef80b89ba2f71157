"""load_cell works without lm_eval, and gives what the model class of lm_eval gives."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.tiny import BOS

from intactkv_eval.assemble.load_cell import load_cell
from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.assemble.open_source import open_source
from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.lm.intactkv_lm import IntactKVLM

CELLS = {
    "full precision": {},
    "none": {"pivot": "none"},
    "rtn": {"weights": "rtn", "bits": 3, "group_size": 32},
    "rtn, pivot of two tokens": {"weights": "rtn", "bits": 3, "group_size": 32, "pivot": "tokens:256+7"},
    "rotated": {"weights": "rtn", "bits": 4, "group_size": -1, "symmetric": True, "rotate": True, "act_bits": 4},
    "kv": {"kv_bits": 3},
}


@pytest.mark.parametrize("name", CELLS)
def test_as_the_model_class(saved_llama, name):
    arguments = {"pretrained": str(saved_llama), "dtype": "float32", **CELLS[name]}
    cell = cell_from_args(arguments)
    built = load_cell(cell, open_source(cell, "cpu"))
    lm = IntactKVLM(**arguments, device="cpu")
    assert built._replace(pivoted=None) == lm.built._replace(pivoted=None)
    ids = torch.tensor([[5, 9, 33, 70]])
    assert torch.equal(built.pivoted.logits(ids), lm.pivoted_model.logits(ids))


def test_cells_differ(saved_llama):
    """The control of the test above: the comparison would see another cell."""
    cells = [
        cell_from_args({"pretrained": str(saved_llama), "dtype": "float32", **CELLS[name]}) for name in ("kv", "rtn")
    ]
    logits = [load_cell(cell, open_source(cell, "cpu")).pivoted.logits(torch.tensor([[5, 9]])) for cell in cells]
    assert not torch.equal(*logits)


def test_a_cache_of_models(saved_llama):
    models, built = ModelCache(), []
    for bits in (4, 4, 3):
        cell = cell_from_args({"pretrained": str(saved_llama), "weights": "rtn", "bits": bits, "group_size": 32})
        source = open_source(cell, "cpu")

        def load(name, revision, own=source.load):
            return models.get_or_load(name, lambda: own(name, revision))

        built.append(load_cell(cell, replace(source, load=load), models))
    assert (models.loads, models.derivations) == (1, 2)
    assert built[0].pivoted.model is built[1].pivoted.model is not built[2].pivoted.model
    assert built[0].pivoted.token_ids == (BOS,)


def test_no_lm_eval_is_imported(saved_llama):
    program = (
        "import sys\n"
        "from intactkv_eval.assemble.load_cell import load_cell\n"
        "from intactkv_eval.assemble.open_source import open_source\n"
        "from intactkv_eval.cell.arguments import cell_from_args\n"
        f"cell = cell_from_args({{'pretrained': {str(saved_llama)!r}, 'weights': 'rtn', 'bits': 4, 'group_size': 32}})\n"
        "load_cell(cell, open_source(cell, 'cpu'))\n"
        "assert 'lm_eval' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
