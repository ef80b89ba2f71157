"""Every family of the table is held by tests: one line here for each."""

from helpers.tiny import FAMILIES as TINY
from helpers.tiny import build_model

from intactkv_eval.model.families import FAMILIES, family_of_layer, norm_offset
from intactkv_eval.model.structure import decoder_layers

# model type -> the small model of the tests; None where the table only says why it cannot be rotated
TESTED = {
    "gemma2": None,
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "opt": "opt",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


def test_every_family_is_tested():
    assert TESTED.keys() == FAMILIES.keys()
    assert {name for name in TESTED.values() if name} == set(TINY)
    assert {name for name, tiny in TESTED.items() if tiny} == {n for n, f in FAMILIES.items() if f.shares_prefixes}


def test_the_table_says_what_the_models_are():
    for name, tiny in TESTED.items():
        if tiny is None:
            continue
        model, family = build_model(tiny), FAMILIES[name]
        assert model.config.model_type == name
        layer = decoder_layers(model)[1][0]
        assert family_of_layer(layer) is (family if family.layer_class else None)
        for group in family.scale_groups:
            for path in (group.front, *group.layers, group.parent):
                layer.get_submodule(path)
        if family.rotation is not None:
            for path in (family.rotation.attention_norm, *family.rotation.attention, family.rotation.down):
                layer.get_submodule(path)


def test_norms_that_add_one():
    norms = {tiny: next(m for m in build_model(tiny).modules() if "Norm" in type(m).__name__) for tiny in TINY}
    assert {tiny for tiny, norm in norms.items() if norm_offset(norm)} == {"gemma3"}
