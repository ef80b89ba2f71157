"""Law 17: a cache that was handed over was used, after every forward and every generate; else an error names the model."""

import pytest
import torch
from helpers.tiny import BOS, build_model
from transformers import LlamaForCausalLM

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.compat import transformers_api
from intactkv_eval.compat.cache_use import CountingCache, generate_with_cache, run_with_cache
from intactkv_eval.compat.transformers_api import Cache
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.inference import pivoted_model as pivoted_module
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel
from intactkv_eval.inference.scoring.score import Request, score
from intactkv_eval.pivot.capture import capture, check_supported, computed, fingerprint_of
from intactkv_eval.quantize.block_walk import BlockWalk

TOKENS = (BOS, 10, 20)
BODY = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
KV = {
    "nothing quantized": None,
    "token_head": KVSpec(bits=4),
    "in groups": KVSpec(bits=4, scheme="channel_key", group_size=4, residual_length=4),
}
ERROR = "LlamaForCausalLM did not use the KV cache that it was given"


def made(kv=None, intact=True):
    model = build_model("llama")
    return PivotedModel(model, TOKENS, capture(model, TOKENS, fingerprint_of(model, "main")) if intact else None, kv)


def score_one(pivoted):
    return score(SharedModel(pivoted), [Request([1, 2, 3], [4, 5])], lambda tokens: 2)


WAYS = {
    "a forward": lambda pivoted: pivoted.body_logits(BODY),
    "shared scoring": score_one,
    "generation": lambda pivoted: generate(pivoted, BODY, torch.ones_like(BODY), 4, do_sample=False),
    "generation from nothing": lambda pivoted: generate(
        pivoted, BODY[:, :0], torch.ones_like(BODY[:, :0]), 4, do_sample=False
    ),
}


def rename(monkeypatch):
    """transformers renames the argument, and takes what we call it into its **kwargs."""
    monkeypatch.setattr(transformers_api, "_CACHE_NAMES", ("kv_store",))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("intact", [True, False])
def test_a_renamed_argument_is_an_error(way, kv, intact, monkeypatch):
    pivoted = made(KV[kv], intact)
    WAYS[way](pivoted)
    rename(monkeypatch)
    if KV[kv] is None and not intact:
        WAYS[way](pivoted)  # nothing is handed over
        return
    with pytest.raises(UnsupportedModelError, match=r"takes no KV cache|has no field"):
        WAYS[way](pivoted)


@pytest.mark.parametrize("kv", ["nothing quantized", "token_head"])
@pytest.mark.parametrize("way", ["a forward", "shared scoring"])
def test_a_forward_that_drops_its_cache_is_an_error(way, kv, monkeypatch):
    pivoted = made(KV[kv])
    name = next(iter(transformers_api.cache_argument(pivoted.model, CountingCache())))
    inner = pivoted.model.model
    plain = inner.forward
    monkeypatch.setattr(inner, "forward", lambda **given: plain(**{**given, name: None}))
    with pytest.raises(UnsupportedModelError, match=ERROR):
        WAYS[way](pivoted)


def test_a_dropped_cache_is_an_error_in_captures_walks_and_long_bodies(monkeypatch):
    pivoted = made()
    monkeypatch.setattr(pivoted_module, "_LONG", 8)
    pivoted.body_logits(BODY)
    monkeypatch.setattr(transformers_api, "_cache_name", lambda function: "kv_store")
    for run in (
        lambda: pivoted.body_logits(BODY),
        lambda: computed(pivoted.model, TOKENS),
        lambda: BlockWalk(pivoted.model, [BODY[0]], pivoted.pivot),
    ):
        with pytest.raises(UnsupportedModelError, match=ERROR):
            run()


def test_a_model_without_a_known_argument_is_told_what_was_looked_for(monkeypatch):
    model = build_model("llama")
    check_supported(model)
    rename(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.* takes no KV cache.*kv_store.*transformers"):
        check_supported(model)


class Older(LlamaForCausalLM):
    """The code of a checkpoint that was written before transformers 5.24."""

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        (name,) = set(transformers_api.cache_argument(build_model("llama"), CountingCache())) - {"use_cache"}
        return super().forward(input_ids=input_ids, use_cache=use_cache, **{name: past_key_values}, **kwargs)


def test_the_code_of_a_checkpoint_may_use_the_older_name():
    model = build_model("llama")
    older = Older(model.config).eval()
    older.load_state_dict(model.state_dict())
    check_supported(older)
    with torch.no_grad():
        found, expected = (run_with_cache(one, CountingCache(), BODY).logits for one in (older, model))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kv", KV)
def test_a_cache_that_is_thrown_away_in_the_middle_of_an_answer_is_an_error(kv):
    """As Phi-3 does where an answer crosses the length from which its frequencies are the long ones."""
    pivoted = made(KV[kv])
    plain = pivoted.model.prepare_inputs_for_generation

    def forgetful(input_ids, *args, **kwargs):
        if input_ids.shape[1] > 17:
            for name in ("cache", "past_key_values"):
                if kwargs.get(name) is not None:
                    kwargs[name] = CountingCache(config=pivoted.model.config)
        return plain(input_ids, *args, **kwargs)

    pivoted.model.prepare_inputs_for_generation = forgetful
    generate(pivoted, BODY, torch.ones_like(BODY), 2, do_sample=False)
    with pytest.raises(UnsupportedModelError, match=ERROR):
        generate(pivoted, BODY, torch.ones_like(BODY), 8, do_sample=False)


def test_a_layer_that_writes_nothing_is_an_error(monkeypatch):
    model = build_model("llama")
    layer = model.model.layers[1]
    plain = layer.forward

    def without(*args, **kwargs):
        return plain(*args, **{key: None if isinstance(value, Cache) else value for key, value in kwargs.items()})

    run_with_cache(model, CountingCache(), BODY)
    monkeypatch.setattr(layer, "forward", without)
    with pytest.raises(UnsupportedModelError, match=r"0 rows in layer 1 \(1 of 3 layers differ\), expected 12"):
        run_with_cache(model, CountingCache(), BODY)


def test_rows_are_those_of_this_forward_alone():
    """A cache that was full before does not hide a forward that wrote nothing."""
    model, cache = build_model("llama"), CountingCache()
    run_with_cache(model, cache, BODY)
    with pytest.raises(UnsupportedModelError, match=ERROR):
        generate_with_cache(
            model, cache, torch.cat([BODY, BODY[:, :3]], dim=1), max_new_tokens=2, do_sample=False, custom_generate=idle
        )


def idle(model, input_ids, **options):
    """A decoding loop that never calls the model."""
    return torch.cat([input_ids, input_ids[:, :2]], dim=1)
