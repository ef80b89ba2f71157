"""Memory of one training step, by torch's own record of every allocation: python tests/stress/training_memory.py MODEL [TOKENS]"""

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.structure import layer_devices
from intactkv_eval.training.examples import Example
from intactkv_eval.training.student import Student
from intactkv_eval.training.teacher import layer_outputs
from intactkv_eval.training.trainable_kv import TrainedRows


def peak_bytes(call):
    """The most bytes that `call` has allocated at a time on the CPU, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    most = held = 0
    for one in sorted(events, key=lambda event: event.start_ns()):
        held += one.nbytes()
        most = max(most, held)
    return most


def main(model, tokens):
    cell = {"weights": "rtn", "bits": 3, "group_size": 64, "pivot": "prompt"}
    full = IntactKVLM(model, dtype="float32", device="cpu", pivot="prompt").pivoted_model
    body = torch.randint(1000, 9000, (tokens,), generator=torch.Generator().manual_seed(0))
    one = Example(body, torch.arange(tokens) > 50)
    targets = layer_outputs(full.model, full.pivot, one)
    quantized = IntactKVLM(model, dtype="float32", device="cpu", **cell).pivoted_model
    rows = TrainedRows(quantized.pivot, torch.float32, layer_devices(quantized.model))
    trained = sum(part.numel() * part.element_size() for part in rows.parameters())
    held = [*quantized.model.parameters(), *quantized.model.buffers()]
    weights = sum(part.numel() * part.element_size() for part in held)
    print(f"weights {weights / 2**20:.0f} MiB; {len(quantized.token_ids)} pivot rows {trained / 2**20:.1f} MiB")
    for recompute in (True, False):
        student = Student(quantized.model, rows, recompute)
        student.add_gradient(one, targets, 1.0)
        most = peak_bytes(lambda kept=student: kept.add_gradient(one, targets, 1.0))
        print(f"a step of {tokens} tokens, recompute {recompute}: {most / 2**20:.0f} MiB beside them")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 512)
