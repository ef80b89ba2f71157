"""Settings of generation_config.json: texts are those of lm_eval's `hf` at batch size 1, or the setting is refused."""

import json
import logging

import pytest
import torch
from transformers import AutoTokenizer, CompileConfig, GenerationConfig

from intactkv_eval.compat.lm_eval_api import HFLM, make_request
from intactkv_eval.errors import ConfigError
from intactkv_eval.inference.generation import multi_turn, settings
from intactkv_eval.lm.intactkv_lm import IntactKVLM

PROMPTS = ["<s>Hello there my friend", "<s>Q", "<s>the cat sat on the mat and the cat sat on", "<s>ab ab ab"]
CELLS = {"none": {"pivot": "none"}, "bos": {"pivot": "bos"}, "alone": {"pivot": "bos", "share_prefix": False}}


def texts(lm, prompts=PROMPTS, **options):
    options = {"until": [], "max_gen_toks": 9, "do_sample": False, **options}
    asked = [make_request("generate_until", (text, dict(options)), i, task="t") for i, text in enumerate(prompts)]
    torch.manual_seed(1)
    return lm.generate_until(asked, disable_tqdm=True)


def hf(folder):
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def ours(folder, **cell):
    return IntactKVLM(pretrained=str(folder), device="cpu", dtype="float32", **{"batch_size": 4, **cell})


@pytest.fixture
def asking(saved_llama):
    """The checkpoint whose generation_config.json asks for so much more."""

    def make(**settings):
        file = saved_llama / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        return saved_llama

    settings._tell.cache_clear()
    return make


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "hybrid", "prompt_lookup_num_tokens": 3, "output_scores": True, "use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": None},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9},
        {"repetition_penalty": 3.0, "suppress_tokens": [10, 20]},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 3},
        {"bad_words_ids": [[99], [22, 5]], "sequence_bias": [[[40, 41], 3.0]]},
        {"forced_bos_token_id": 65, "forced_eos_token_id": 66, "begin_suppress_tokens": [22, 227]},
        {"watermarking_config": {"bias": 5.0, "seeding_scheme": "selfhash"}},
        {"guidance_scale": 1.5},
        {"min_length": 28, "max_length": 12},
        {"min_new_tokens": 7},
        {"exponential_decay_length_penalty": [2, 1.5]},
        {"max_new_tokens": 12},
        {"eos_token_id": [5, 40], "pad_token_id": -1},
    ],
    ids="+".join,
)
def test_what_the_file_asks_for_counts_as_in_hf(asking, settings):
    folder = asking(**settings)
    expected = texts(hf(folder))
    for name, cell in CELLS.items():
        assert texts(ours(folder, **cell)) == expected, name
    quantized = {"pivot": "bos", "kv_bits": 8}
    if "guidance_scale" not in settings:
        assert texts(ours(folder, **quantized)) == texts(ours(folder, **quantized, batch_size=1))


def test_beams_of_the_file_may_be_turned_off(asking):
    folder = asking(num_beams=3)
    greedy = texts(hf(folder), num_beams=1)
    assert greedy != texts(hf(folder))
    assert texts(ours(folder, pivot="bos"), num_beams=1) == greedy == texts(ours(folder, pivot="bos"), num_beams=None)


def test_beams_end_at_a_stop_string_as_in_a_batch_of_one(asking):
    folder = asking(num_beams=3)
    stops = sorted({text[1:3] for text in texts(hf(folder))})
    assert texts(ours(folder, pivot="bos"), until=stops) == texts(hf(folder), until=stops)


def test_what_changes_no_number_is_left_out_and_said(asking, caplog):
    folder = asking(
        cache_implementation="offloaded",
        return_dict_in_generate=True,
        output_attentions=True,
    )
    with caplog.at_level(logging.WARNING):
        found = texts(ours(folder, pivot="bos"))
    assert "generation_config.json: cache_implementation='offloaded' is left out" in caplog.text
    assert "return_dict_in_generate=True is left out" in caplog.text
    asking(cache_implementation=None, return_dict_in_generate=False, output_attentions=False)
    assert found == texts(hf(folder))


def test_settings_that_are_objects_are_left_out_too():
    found = settings.served(GenerationConfig(compile_config=CompileConfig()), {"output_scores": False})
    assert found.options["compile_config"] is None


def test_stop_strings_of_the_file_end_a_text(asking, llama, tokenizer):
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    plain = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[
        0, ids.shape[1] :
    ]
    stop = tokenizer.decode(plain[2:3])
    expected = llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )[0, ids.shape[1] :]  # fmt: skip
    assert len(expected) < 9
    assert texts(ours(asking(stop_strings=[stop]), pivot="bos"))[0] == tokenizer.decode(expected)


@pytest.mark.parametrize(
    ("settings", "cell", "named"),
    [
        ({"cache_implementation": "quantized"}, {}, "cache_implementation='quantized'.*kv_bits"),
        ({"num_return_sequences": 2, "num_beams": 2}, {}, "num_return_sequences=2.*one answer"),
        ({"num_return_sequences": 2}, {}, "num_return_sequences"),
        ({"penalty_alpha": 0.6}, {}, "penalty_alpha=0.6: contrastive"),
        ({"dola_layers": "high"}, {}, "dola_layers='high'"),
        ({"num_beams": 2, "num_beam_groups": 2}, {}, "num_beam_groups=2"),
        ({"num_beams": "four"}, {}, "num_beams='four': expected a whole number"),
        ({"token_healing": True}, {}, "token_healing=True"),
        ({"guidance_scale": 1.5}, {"kv_bits": 4}, "guidance_scale=1.5.*not quantized"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_by_its_name_and_place(asking, settings, cell, named):
    with pytest.raises(ConfigError, match=f"generation_config.json: .*{named}"):
        texts(ours(asking(**settings), pivot="bos", **cell))


def test_what_transformers_refuses_is_no_traceback(asking):
    with pytest.raises(ConfigError, match=r"refuses the settings.*bad_words_ids"):
        texts(ours(asking(bad_words_ids=[]), pivot="bos"))


def test_a_row_ends_at_the_eos_that_the_file_does_not_name(asking, llama, tokenizer):
    """The rows beside it go on; a special token is not decoded, so nothing would be cut where it stood."""
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    plain = llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None
    )
    mark = tokenizer.convert_ids_to_tokens(int(plain[0, ids.shape[1] + 3]))
    for eos in (None, [5]):
        folder = asking(eos_token_id=eos)
        changed = AutoTokenizer.from_pretrained(folder)
        changed.eos_token = mark
        changed.save_pretrained(folder)
        expected = texts(hf(folder))
        assert expected[0] == tokenizer.decode(plain[0, ids.shape[1] : ids.shape[1] + 3])
        for cell in CELLS.values():
            lm = ours(folder, **cell)
            assert texts(lm) == expected
            assert lm.eos == tuple(sorted({*(eos or ()), changed.eos_token_id}))


def test_a_special_stop_string_ends_its_row_alone(saved_llama, llama, tokenizer):
    changed = AutoTokenizer.from_pretrained(saved_llama)
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    plain = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    mark = tokenizer.convert_ids_to_tokens(int(plain[0, ids.shape[1] + 2]))
    changed.add_special_tokens({"additional_special_tokens": [mark]})
    changed.save_pretrained(saved_llama)
    expected = texts(hf(saved_llama), until=[mark])
    assert expected != texts(hf(saved_llama))
    assert texts(ours(saved_llama, pivot="bos"), until=[mark]) == expected


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize(
    "options", [{"max_length": 50}, {"min_length": 30}, {"max_length": 50, "min_length": 45}, {"min_new_tokens": 8}], ids=str
)  # fmt: skip
@pytest.mark.parametrize("pivot", ["bos", "none", "tokens:256+40"])
def test_lengths_count_the_prompt_as_in_hf(saved_llama, llama, options, pivot):
    """Also where the pivot is no part of the prompt: then the numbers of tokens are the same, and the texts are not."""
    options = dict(options)
    with torch.no_grad():
        llama.lm_head.weight[257] = llama.lm_head.weight[22] * 1.2  # an EOS that comes early
    llama.save_pretrained(saved_llama)
    prompts = [*PROMPTS, "<s>" + "at" * 22]
    plain, lm = hf(saved_llama), ours(saved_llama, pivot=pivot)
    if pivot != "tokens:256+40":
        assert texts(lm, prompts, **options) == texts(plain, prompts, **options)
        return
    options["min_length"] = options.get("max_length", 45)
    counts = []
    for model in (plain, lm):
        found, decode = [], model.tok_decode
        model.tok_decode = lambda ids, decode=decode, found=found, **kw: (found.append(ids), decode(ids, **kw))[1]
        texts(model, prompts, **options)
        counts.append(sorted(len(ids) for ids in found if isinstance(ids, list)))
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 1 or "max_length" not in options


def test_a_length_without_room_is_refused(saved_llama):
    with pytest.raises(ConfigError, match=r"max_length=10 leaves no room behind a prompt of 42 tokens.*max_gen_toks"):
        texts(ours(saved_llama, pivot="bos"), max_length=10)


def _pad_beyond(tok):
    tok.pad_token = None
    tok.add_special_tokens({"pad_token": "[PAD]"})
    assert tok.pad_token_id == 259


def _all_beyond(tok):
    _pad_beyond(tok)
    tok.add_special_tokens({"eos_token": "[EOS]"})


PADS = {
    "beyond the embedding": _pad_beyond,
    "and the EOS": _all_beyond,
    "none": lambda tok: setattr(tok, "pad_token", None),
    "the EOS": lambda tok: setattr(tok, "pad_token", tok.eos_token),
    "a letter": lambda tok: setattr(tok, "pad_token", "c"),
}


@pytest.mark.parametrize("change", PADS.values(), ids=PADS)
def test_a_pad_token_never_reaches_the_model(asking, change):
    folder = asking(eos_token_id=[73])
    tok = AutoTokenizer.from_pretrained(folder)
    change(tok)
    tok.save_pretrained(folder)
    prompts = [*PROMPTS, "<s>"]
    for options in ({}, {"num_beams": 2}):
        expected = texts(hf(folder), prompts, **options)
        for cell in CELLS.values():
            assert texts(ours(folder, batch_size=5, **cell), prompts, **options) == expected
    pairs = [make_request("loglikelihood", (text, " abc"), i, task="t") for i, text in enumerate(PROMPTS)]
    expected = [value for value, _ in hf(folder).loglikelihood(pairs, disable_tqdm=True)]
    lm = ours(folder, pivot="bos")
    assert [value for value, _ in lm.loglikelihood(pairs, disable_tqdm=True)] == pytest.approx(expected, abs=1e-4)
    assert 0 <= lm.pad < 259


def test_rows_without_a_token_to_fill_them_up_are_generated_alone(saved_llama, monkeypatch):
    expected = texts(ours(saved_llama, pivot="bos"), until=["Q", "c"])
    lm = ours(saved_llama, pivot="bos")
    monkeypatch.setattr(type(lm), "filling_token", None)
    assert texts(lm, until=["Q", "c"]) == expected


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4}, {"min_new_tokens": 5}, {"begin_suppress_tokens": [22, 227, 5]}, {"forced_eos_token_id": 65}],
    ids=str,
)
def test_conversations_keep_to_settings_that_count_from_an_answers_start(asking, monkeypatch, settings):
    """However few tokens a batch goes on by at once."""
    folder = asking(**settings)
    options = {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "And you?"}],
               "max_gen_toks": 8, "temperature": 0.0}  # fmt: skip
    asked = [make_request("generate_turns", ("Hi", options), 0, task="t")]
    whole = ours(folder, pivot="bos", share_prefix=False).generate_turns(asked, disable_tqdm=True)
    monkeypatch.setattr(multi_turn, "CHUNK", 3)
    assert ours(folder, pivot="bos").generate_turns(asked, disable_tqdm=True) == whole
