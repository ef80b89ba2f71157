"""How far a pivot's KV lies from what a model computes: by rounding, and by a config that was changed.

    python tests/stress/config_noise.py MODEL

A table of the differences that `check_belongs` bounds, for pivots of one, two and seven tokens.
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM

from intactkv_eval.assemble.checks import computed_difference
from intactkv_eval.pivot.capture import computed

PIVOTS = ((1,), (1, 216), (1, 9690, 198, 2683, 359, 253, 5356))
CHANGES = {
    "RoPE base / 10": lambda config: {"rope_parameters": {**config.rope_parameters, "rope_theta": config.rope_parameters["rope_theta"] / 10}},
    "RoPE base * 1.1": lambda config: {"rope_parameters": {**config.rope_parameters, "rope_theta": config.rope_parameters["rope_theta"] * 1.1}},
    "GELU": lambda config: {"hidden_act": "gelu"},
    "epsilon 1e-3": lambda config: {"rms_norm_eps": 1e-3},
}  # fmt: skip


def changed(model, change):
    config = copy.deepcopy(model.config)
    for key, value in change(config).items():
        setattr(config, key, value)
    made = type(model)(config).to(model.dtype).eval()
    made.load_state_dict(model.state_dict())
    return made


def main(name):
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        eager = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="eager")
        others = {"eager attention": eager, **{key: changed(model, change) for key, change in CHANGES.items()}}
        for key, other in others.items():
            found = [computed_difference(computed(model, pivot), computed(other, pivot)) for pivot in PIVOTS]
            print(f"{dtype} {key:16}", *(f"{one:.2g}" for one in found))


if __name__ == "__main__":
    main(sys.argv[1])
