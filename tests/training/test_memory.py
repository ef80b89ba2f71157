"""Training holds one layer's activations at a time, however many layers there are; `--no-recompute` holds them all."""

import torch
from helpers.tiny import BOS, FAMILIES, uneven
from stress.training_memory import peak_bytes
from transformers import AutoModelForCausalLM

from intactkv_eval.model.structure import layer_devices
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.training.examples import Example
from intactkv_eval.training.student import Student
from intactkv_eval.training.teacher import layer_outputs
from intactkv_eval.training.trainable_kv import TrainedRows

TOKENS = 200


def step(layers):
    """A model of so many layers; what runs a step of its training in either way; and the bytes of a layer's rows."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = layers
    model = uneven(AutoModelForCausalLM.from_config(config).eval(), 0.1)
    pivot = capture(model, (BOS,), fingerprint_of(model, "main"))
    one = Example(torch.arange(TOKENS) % 250, torch.arange(TOKENS) > 20)
    targets = layer_outputs(model, pivot, one)
    rows = TrainedRows(pivot, torch.float32, layer_devices(model))

    def run(recompute):
        return Student(model, rows, recompute).add_gradient(one, targets, 1.0)

    return run, 2 * pivot.keys[0].numel() * 4


def test_memory_of_a_step_does_not_grow_with_the_layers():
    (few, rows), (many, _) = (step(layers) for layers in (3, 9))
    for run in (few, many):
        run(True)  # the gradients are there now, and every first use is over
    growth = {way: (peak_bytes(lambda w=way: many(w)) - peak_bytes(lambda w=way: few(w))) / 6 for way in (True, False)}
    hidden = TOKENS * FAMILIES["llama"]().hidden_size * 4
    assert growth[True] < 8 * rows < hidden / 4, "a layer more costs its rows, their copies and gradient"
    assert growth[False] > 4 * hidden
