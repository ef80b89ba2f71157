"""The walk computes what the model computes, behind the pivot or not; and a killed run goes on to the same bytes."""

import contextlib

import pytest
import torch
from helpers.tiny import _SHAPE, BOS, FAMILIES, build_model
from transformers import AutoModelForCausalLM, LlamaConfig

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.awq import AWQ
from intactkv_eval.quantize.block_walk import BlockWalk
from intactkv_eval.quantize.gptq import GPTQ
from intactkv_eval.quantize.layerwise import BlockStore, Finished, quantize_blocks
from intactkv_eval.quantize.omniquant import OmniQuant

SAMPLES = [torch.arange(3, 20), torch.arange(40, 57), torch.arange(90, 101)]


def hidden_states(model, tokens, pivot):
    """What each layer is given in a plain forward, the last rows only where a pivot's tokens stand in front."""
    seen = []
    hook = [
        layer.register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for layer in walk_layers(model)
    ]
    PivotedModel(model, pivot.token_ids if pivot else (), pivot, KVSpec()).body_logits(tokens[None])
    for one in hook:
        one.remove()
    return seen


def walk_layers(model):
    return BlockWalk(model, SAMPLES[:1])._layers


@pytest.mark.parametrize("with_pivot", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_layer_has_the_models_own_inputs(family, with_pivot):
    model = build_model(family, dtype=torch.float64)
    pivot = capture(model, (BOS, 7), fingerprint_of(model, "main")) if with_pivot else None
    walk = BlockWalk(model, SAMPLES, pivot, keep_full=True)
    expected = [hidden_states(model, sample, pivot) for sample in SAMPLES]
    for index in range(len(walk)):
        block = walk.block(index)
        for place in range(len(SAMPLES)):
            torch.testing.assert_close(block.inputs[place], expected[place][index])
            torch.testing.assert_close(block.full_inputs[place], expected[place][index])
        walk.advance(index)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_full_inputs_stay_the_full_precision_models():
    model, untouched = build_model("llama"), build_model("llama")
    walk = BlockWalk(model, SAMPLES[:1], keep_full=True)
    expected = hidden_states(untouched, SAMPLES[0], None)
    for index in range(len(walk)):
        block = walk.block(index)
        torch.testing.assert_close(block.full_inputs[0], expected[index])
        if index:
            assert (block.inputs[0] - expected[index]).abs().max() > 1e-3
        GPTQ(2, 32).quantize(block)
        walk.advance(index)


class Killed(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_killed_run_goes_on_to_the_same_bytes(family, tmp_path):
    def run(folder, die_after=None):
        model = build_model(family, dtype=torch.bfloat16)
        walk, store = BlockWalk(model, SAMPLES), BlockStore(folder, {"bits": 3})

        finished = []

        def done():
            finished.append(1)
            if len(finished) - 1 == die_after:
                raise Killed

        quantize_blocks(walk, GPTQ(3, 32), store, done)
        return model

    whole = run(tmp_path / "whole")
    for die_after in (0, 1):
        with pytest.raises(Killed):
            run(tmp_path / "killed", die_after)
    again = run(tmp_path / "killed")
    for one, other in zip(sorted((tmp_path / "whole").iterdir()), sorted((tmp_path / "killed").iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_a_store_of_another_job_or_a_damaged_block_is_refused(tmp_path):
    BlockStore(tmp_path, {"bits": 3, "data": "a"})
    with pytest.raises(ConfigError, match="bits 3, now 4"):
        BlockStore(tmp_path, {"bits": 4, "data": "a"})
    store = BlockStore(tmp_path, {"bits": 3, "data": "a"})
    store.keep(0, Finished({}, {"norm": torch.ones(3)}))
    path = next(tmp_path.glob("block*"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        store.read(0)


def test_pivot_rows_change_what_a_layer_is_calibrated_on():
    model = build_model("llama")
    pivot = capture(model, (BOS,), fingerprint_of(model, "main"))
    plain, aware = BlockWalk(model, SAMPLES), BlockWalk(model, SAMPLES, pivot)
    outs = [walk.block(0).run(walk.inputs[0], 0) for walk in (plain, aware)]
    assert outs[0].shape == outs[1].shape
    assert (outs[0] - outs[1]).abs().max() > 1e-2


@pytest.mark.parametrize("with_pivot", [False, True])
def test_the_whole_model_runs_where_it_is(with_pivot):
    """A worker device is for one layer at a time; the pivot's rows go with the layer, not with the model."""
    model = build_model("llama")
    pivot = capture(model, (BOS, 7), fingerprint_of(model, "main")) if with_pivot else None
    there, here = (BlockWalk(model, SAMPLES, pivot, device=device) for device in (torch.device("meta"), None))
    assert all(torch.equal(one, other) for one, other in zip(there.inputs, here.inputs, strict=True))
    there.run_model(SAMPLES[0])
    out = there.block(0).run(there.inputs[0].to("meta"), 0)
    assert (out.device.type, out.shape) == ("meta", there.inputs[0].shape)


@pytest.mark.parametrize("method", [AWQ(3, 32), OmniQuant(3, 32, epochs=2)], ids=["awq", "omniquant"])
def test_a_resumed_run_divides_the_pivots_values_again(method, tmp_path):
    """With as many kv heads as heads V is scaled, and the pivot's values with it, also where a block is read back."""

    def run(folder, blocks):
        config = LlamaConfig(**{**_SHAPE, "num_key_value_heads": 4})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.data[::5] *= 8
        pivot = capture(model, (BOS, 7), fingerprint_of(model, "main"))
        walk, store = BlockWalk(model, SAMPLES, pivot, keep_full=True), BlockStore(folder, {})
        finished = []

        def done():
            finished.append(1)
            if len(finished) == blocks:
                raise Killed

        with contextlib.suppress(Killed):
            quantize_blocks(walk, method, store, done)
        return store

    whole = run(tmp_path / "whole", 4)
    for blocks in (1, 2, 4):
        store = run(tmp_path / "killed", blocks)
    assert max((whole.read(index).divided - 1).abs().max() for index in range(2)) > 1e-2
    for index in range(3):
        one, other = whole.read(index), store.read(index)
        assert torch.equal(one.divided, other.divided)
        for name, weight in one.layers.items():
            assert torch.equal(weight.codes, other.layers[name].codes), (index, name)
