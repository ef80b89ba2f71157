"""The loss is the paper's, its gradient right in both ways of computing it, and the model is left as it was."""

import pytest
import torch
from helpers.tiny import BOS, FAMILIES, build_model

from intactkv_eval.cell.spec import WeightSpec
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.model.structure import decoder_layers, layer_devices
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.on_the_fly import quantize_model
from intactkv_eval.training.examples import Example
from intactkv_eval.training.student import Student
from intactkv_eval.training.teacher import KeptTargets, full_nll, layer_outputs
from intactkv_eval.training.trainable_kv import TrainedRows

PIVOT = (BOS, 7, 99)


def example(seed=0, length=12, words=256):
    draw = torch.Generator().manual_seed(seed)
    body = torch.randint(0, words, (length,), generator=draw)
    return Example(body, torch.arange(length) % 3 > 0)


def pair(family, dtype=torch.float64, bits=3, backend="auto"):
    """The full model, its pivot, the quantized model and the rows that are trained."""
    full = build_model(family, dtype=dtype)
    pivot = capture(full, PIVOT, fingerprint_of(full, "main"))
    quantized = quantize_model(full, WeightSpec(method="rtn", bits=bits, group_size=32), backend)
    return (
        full,
        pivot,
        quantized,
        TrainedRows(pivot, torch.promote_types(dtype, torch.float32), layer_devices(quantized)),
    )


def outputs_by_hand(model, body):
    """Of each layer for the tokens behind the pivot, with the pivot's tokens in front as text."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in decoder_layers(model)[1]
    ]
    with torch.no_grad():
        model(input_ids=torch.cat([torch.tensor(PIVOT), body])[None])
    for hook in hooks:
        hook.remove()
    return [one[len(PIVOT) :] for one in seen]


def test_nats_are_those_of_the_counted_tokens_behind_the_pivots_text():
    full, pivot, *_ = pair("llama")
    talks, expected = [example(0), example(1, length=20)], []
    for one in talks:
        ids = torch.cat([torch.tensor(PIVOT), one.body])
        with torch.no_grad():
            lost = torch.nn.functional.cross_entropy(full(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        expected.append(lost[len(PIVOT) - 1 :][one.counted])
    assert not talks[0].counted[0], "whose first token is foretold by the pivot alone, and so is not counted"
    assert full_nll(full, pivot, talks) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_targets_are_the_full_models_outputs(family):
    full, pivot, *_ = pair(family)
    one = example()
    expected = outputs_by_hand(full, one.body)
    found = layer_outputs(full, pivot, one)
    assert len(found) == 3
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want[one.counted])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_loss_is_zero_for_the_full_model_and_the_formula_for_another(family):
    full, pivot, quantized, rows = pair(family)
    one = example()
    targets = layer_outputs(full, pivot, one)
    same = Student(full, TrainedRows(pivot, torch.float64, layer_devices(full))).add_gradient(one, targets, 1.0)
    assert float(same.max()) < 1e-20
    losses = Student(quantized, rows).add_gradient(one, targets, 1.0)
    theirs = layer_outputs(quantized, pivot, one)
    by_hand = [float((y - t).square().mean() / 2) for y, t in zip(theirs, targets, strict=True)]
    torch.testing.assert_close(losses.tolist(), by_hand)
    assert min(by_hand) > 1e-6


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_agree_with_finite_differences(family, recompute):
    full, pivot, quantized, rows = pair(family)
    one = example()
    targets = layer_outputs(full, pivot, one)
    student = Student(quantized, rows, recompute)
    student.add_gradient(one, targets, 0.5)
    exact = family in {"opt", "gpt2"}  # the norms of all others compute in fp32 whatever they are given
    step, near, checked = (1e-6, 1e-6, 0) if exact else (2e-3, 3e-3, 0)
    gradients = [parameter.grad.clone() for parameter in rows.parameters()]
    for parameter, gradient in zip(rows.parameters(), gradients, strict=True):
        for place in gradient.flatten().abs().topk(2).indices.tolist():
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * step
                ends.append(float(student.add_gradient(one, targets, 0.5).sum()) / 2)
                with torch.no_grad():
                    parameter.view(-1)[place] -= sign * step
            difference = (ends[0] - ends[1]) / (2 * step)
            expected = float(gradient.view(-1)[place])
            assert difference == pytest.approx(expected, rel=near, abs=near * 1e-2)
            checked += abs(expected) > 1e-7
    assert checked >= 6


@pytest.mark.parametrize("backend", ["dense", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_one_gradient_on_packed_layers(dtype, backend):
    full, pivot, quantized, _ = pair("llama", dtype, backend=backend)
    targets = layer_outputs(full, pivot, example())
    found = []
    for recompute in (True, False):
        rows = TrainedRows(pivot, torch.float32, layer_devices(quantized))
        losses = Student(quantized, rows, recompute).add_gradient(example(), targets, 1.0)
        found.append((losses, [parameter.grad for parameter in rows.parameters()]))
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found[0][0], found[1][0], **close)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert float((one - other).norm()) <= close["rtol"] * float(other.norm())


def test_a_small_share_survives_fp16():
    """So little of the gradient that fp16 itself could not hold it on its way."""
    full, pivot, quantized, rows = pair("llama", torch.float16, bits=4)
    targets = layer_outputs(full, pivot, example())
    student = Student(quantized, rows)
    student.add_gradient(example(), targets, 1.0)
    whole = torch.cat([parameter.grad.flatten() for parameter in rows.parameters()])
    for parameter in rows.parameters():
        parameter.grad = None
    student.add_gradient(example(), targets, 1e-5)
    small = torch.cat([parameter.grad.flatten() for parameter in rows.parameters()])
    assert float((small * 1e5 - whole).norm()) < 0.1 * float(whole.norm())


@pytest.mark.parametrize("recompute", [True, False])
def test_nothing_is_left_in_the_model(recompute):
    full, pivot, quantized, rows = pair("llama", torch.float32)
    quantized.get_input_embeddings().weight.requires_grad_()
    before = [(name, p.requires_grad, p.grad) for name, p in quantized.named_parameters()]
    tensors = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    Student(quantized, rows, recompute).add_gradient(example(), layer_outputs(full, pivot, example()), 1.0)
    assert [(name, p.requires_grad, p.grad) for name, p in quantized.named_parameters()] == before
    assert all(torch.equal(tensors[name], tensor) for name, tensor in quantized.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in quantized.modules())


def test_quality_is_loss_and_nll(tmp_path):
    full, pivot, quantized, rows = pair("llama", torch.float32)
    examples = [example(seed, 10 + seed) for seed in range(3)]
    kept = KeptTargets(tmp_path)
    kept.fill(full, pivot, examples)
    found = Student(quantized, rows).quality(examples, map(kept, range(3)))
    losses, nats, tokens = torch.zeros(3), 0.0, 0
    for one in examples:
        losses += Student(quantized, rows).add_gradient(one, layer_outputs(full, pivot, one), 1.0) / 3
        with torch.no_grad():
            cached = capture(full, PIVOT, fingerprint_of(full, "main"))
            logits = PivotedModel(quantized, PIVOT, cached).body_logits(one.body[None])[0].log_softmax(-1)
        for place in range(1, len(one.body)):
            if one.counted[place]:
                nats, tokens = nats - float(logits[place - 1, one.body[place]]), tokens + 1
    assert found.blocks == pytest.approx(float(losses.sum()), rel=1e-5)
    assert found.last == pytest.approx(float(losses[-1]), rel=1e-5)
    assert found.nll == pytest.approx(nats / tokens, rel=1e-5)
