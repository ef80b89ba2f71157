"""Law 7: after use the model has no hook, patched method or module that it did not have."""

import torch
from helpers.tiny import BOS

from intactkv_eval.cell.spec import KVSpec, WeightSpec
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.on_the_fly import quantize_model

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def portrait(model):
    return {
        name: (id(module), type(module), sorted(vars(module)), [dict(getattr(module, kind)) for kind in HOOKS])
        for name, module in model.named_modules()
    }


def test_model_is_as_before(model):
    before = portrait(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pivot = capture(model, (BOS, 3), fingerprint_of(model, "main"))
    made = PivotedModel(model, (BOS, 3), pivot, KVSpec(bits=4))
    body = torch.randint(0, 256, (2, 5))
    made.body_logits(body)
    generate(made, body, torch.ones_like(body), 3, do_sample=False)
    quantize_model(model, WeightSpec(method="rtn", bits=4, group_size=32))
    assert portrait(model) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
