"""IntactKVLM through lm_eval: results and their record, batches, pivots from files, and bad input."""

import contextlib
import copy
import json

import pytest
import torch
from helpers.tiny import BOS, EOS, build_model
from lm_eval import simple_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from intactkv_eval.compat.lm_eval_api import make_request, rolling_value
from intactkv_eval.errors import ConfigError, IntactKVError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM

RTN = {"weights": "rtn", "bits": 4, "group_size": 32}


def requests(kind, arguments):
    return [make_request(kind, args, i, task="task") for i, args in enumerate(arguments)]


PAIRS = [
    (f"The {word} is", f" {end}") for word in ("sky", "sea on a summer day", "x") for end in ("blue", "a", "far away")
]


def likelihoods(lm, pairs=PAIRS):
    return [value for value, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]


def make(folder, **arguments):
    return IntactKVLM(pretrained=str(folder), dtype="float32", device="cpu", **arguments)


def test_it_is_registered():
    assert get_model("intactkv") is IntactKVLM


@pytest.mark.parametrize("batch_size", [7, "auto", "auto:4"])
def test_batch_sizes_agree(saved_llama, batch_size):
    one, many = (make(saved_llama, **RTN, batch_size=size) for size in (1, batch_size))
    assert likelihoods(one) == pytest.approx(likelihoods(many), abs=5e-4)
    prompts = [
        ("some text", {"until": ["q"], "max_gen_toks": 9}),
        ("t", {"until": ["q"], "max_gen_toks": 9}),
        ("", {"max_gen_toks": 5}),
    ]
    texts = [lm.generate_until(requests("generate_until", prompts), disable_tqdm=True) for lm in (one, many)]
    assert texts[0] == texts[1]
    rolling = [("a" * 300,), ("b",)]
    rolled = [
        [rolling_value(answer) for answer in lm.loglikelihood_rolling(requests("loglikelihood_rolling", rolling), True)]
        for lm in (one, many)
    ]
    assert rolled[0] == pytest.approx(rolled[1], abs=5e-4)


def test_quantization_and_the_pivot_change_answers(saved_llama):
    full, none, bos = (
        likelihoods(make(saved_llama, **arguments))
        for arguments in ({"pivot": "none"}, {**RTN, "bits": 2, "pivot": "none"}, {**RTN, "bits": 2, "pivot": "bos"})
    )
    assert full != pytest.approx(none, abs=1e-2)
    assert none != pytest.approx(bos, abs=1e-3)


def test_pivot_from_a_file_needs_no_capture_and_gives_the_same(saved_llama, tmp_path, monkeypatch):
    lm = make(saved_llama, **RTN, pivot="prompt")
    file = tmp_path / "prompt.safetensors"
    lm.pivoted_model.pivot.save(file)
    expected = likelihoods(lm)
    monkeypatch.setattr("intactkv_eval.assemble.pivot_source.capture", None)
    assert likelihoods(make(saved_llama, **RTN, pivot=str(file))) == expected
    baseline = make(saved_llama, **RTN, pivot=str(file), intact=False)
    assert baseline.pivoted_model.token_ids == lm.pivoted_model.token_ids
    assert likelihoods(baseline) != pytest.approx(expected, abs=1e-4)


def test_a_pivot_of_another_model_is_refused(saved_llama, tokenizer, tmp_path):
    file = tmp_path / "p.safetensors"
    make(saved_llama).pivoted_model.pivot.save(file)
    other = tmp_path / "other"
    build_model("llama", seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(PivotError, match="does not belong"):
        make(other, pivot=str(file))
    with pytest.raises(PivotError, match="dtype"):
        IntactKVLM(pretrained=str(saved_llama), dtype="bfloat16", device="cpu", pivot=str(file))
    with pytest.raises(PivotError, match=r"layers|vocabulary|heads|belong"):
        make(_resized(other, tmp_path), pivot=str(file))


def _resized(source, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_reference_is_loaded_once_and_kept(saved_llama, tokenizer, tmp_path, monkeypatch):
    """A checkpoint whose weights were changed elsewhere takes its pivot from the full-precision `reference`."""
    changed = tmp_path / "changed"
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(changed)
    tokenizer.save_pretrained(changed)
    first = make(changed, reference=str(saved_llama))
    assert first.pivoted_model.pivot.fingerprint.model == str(saved_llama)
    own = make(changed)
    assert likelihoods(first) != likelihoods(own)
    monkeypatch.setattr("intactkv_eval.assemble.pivot_source.capture", None)
    assert likelihoods(make(changed, reference=str(saved_llama))) == likelihoods(first)


def test_simple_evaluate_records_the_cell(saved_llama):
    found = simple_evaluate(
        model="intactkv",
        model_args=f"pretrained={saved_llama},dtype=float32,weights=rtn,bits=4,group_size=32,pivot=none",
        tasks=["intactkv_demo_qa"],
        limit=4,
        batch_size=4,
        device="cpu",
        task_manager=TaskManager(
            include_path="tasks", include_defaults=False, metadata={"pretrained": str(saved_llama)}
        ),
        bootstrap_iters=1,
    )
    record = found["config"]["intactkv"]
    expected = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False, "search": None, "rotate": False}
    assert record["cell"]["weights"] == expected
    assert record["backends"] == {"dense": 21}
    assert record["cell"]["pivot"]["intact"] is False
    assert record["pivot_tokens"] == [BOS]
    assert record["pivot_fingerprint"] is None
    assert record["requests_on_rank_0"] == {"prepended": 16}
    json.dumps(record)


def test_a_response_cache_belongs_to_one_cell(saved_llama, tmp_path):
    """lm_eval keys its cache by the request alone: without a guard, w2 would be given w4's answers."""
    database = str(tmp_path / "cache.db")
    first = CachingLM(make(saved_llama, **RTN), database)
    answers = first.loglikelihood(requests("loglikelihood", PAIRS))
    assert CachingLM(make(saved_llama, **RTN), database).loglikelihood(requests("loglikelihood", PAIRS)) == answers
    with pytest.raises(ConfigError, match="another cell"):
        CachingLM(make(saved_llama, **{**RTN, "bits": 2}), database)


def test_long_contexts_keep_the_pivot(saved_llama):
    lm = make(saved_llama, pivot="prompt")
    length = len(lm.pivoted_model.token_ids)
    assert lm.max_length == 128 - length
    assert torch.isfinite(torch.tensor(likelihoods(lm, [("long " * 100, "end")]))).all()
    assert lm.framing.counts["truncated"] == 1
    text = lm.generate_until(requests("generate_until", [("long " * 100, {"until": [], "max_gen_toks": 8})]), True)
    assert len(text) == 1
    assert lm.framing.counts["truncated"] == 2
    with pytest.raises(ConfigError, match="does not fit"):
        likelihoods(lm, [("a", "b" * 128)])


def test_empty_texts(saved_llama):
    """Nothing to score is an error, not a log-likelihood of 0; nothing in front of a text is the pivot alone."""
    lm = make(saved_llama)
    for context in ("", "a"):
        with pytest.raises(ConfigError, match="empty continuation"):
            likelihoods(lm, [(context, "")])
    assert likelihoods(lm, [("", "abc")])[0] < 0
    (answer,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)]), True)
    assert rolling_value(answer) == 0


def test_beams_are_those_of_the_plain_model(llama, tokenizer):
    lm = IntactKVLM(pretrained=llama, tokenizer=tokenizer, pivot="bos", batch_size=2)
    options = {"until": [], "max_gen_toks": 6, "num_beams": 3, "do_sample": False}
    texts = lm.generate_until(requests("generate_until", [("one", options), ("another", options)]), True)
    for text, answer in zip(("one", "another"), texts, strict=True):
        ids = torch.tensor([[BOS, *tokenizer(text).input_ids]])
        plain = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False)
        assert answer == tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("weights", [{}, RTN], ids=["fp", "rtn"])
def test_parallelize_places_every_layer_and_its_pivot_rows(saved_llama, weights):
    spread = make(saved_llama, **weights, parallelize=True, max_cpu_memory="4GiB")
    assert likelihoods(spread) == pytest.approx(likelihoods(make(saved_llama, **weights)), abs=1e-6)
    cache = spread.pivoted_model.new_cache(1)
    assert [layer.keys.device for layer in cache.layers] == spread.pivoted_model.devices


def test_sampling_from_nothing_is_seeded(saved_llama):
    lm = make(saved_llama)
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.95}
    texts = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        texts += lm.generate_until(requests("generate_until", [("", options)]), True)
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pretrained": "/no/such/folder"}, "/no/such/folder"),
        ({"pretrained": None}, "pretrained"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"dtpye": "float32"}, "'dtype'"),
        ({"gptqmodel": True}, "gptqmodel"),
        ({**RTN, "group_size": 48}, "group_size=48"),
        ({"max_length": 1, "pivot": "prompt"}, "max_length"),
        ({"pivot": "missing.safetensors"}, "does not exist"),
        ({"chat_template": "nope"}, "chat_template"),
        ({"kv_bits": 4, "kv_sink_tokens": 1}, "kv_sink_tokens=1"),
        ({**RTN, "peft": "adapter"}, "adapter"),
        ({"device_map": "auto"}, "parallelize"),
        ({"parallelize": True, "max_cpu_memory": 1}, "offloaded"),
        ({"prefix_token_id": 65}, "prefix_token_id=65"),
        ({"prefix_token_id": 65, "pivot": "tokens:5+65"}, "token 5 stands in front"),
        ({"add_bos_token": False}, "add_bos_token=False"),
        ({"add_bos_token": False, "pivot": "prompt", "intact": False}, "'<s>' stands in front"),
    ],
    ids=str,
)
def test_bad_arguments(saved_llama, arguments, said):
    with pytest.raises(IntactKVError, match=said):
        IntactKVLM(**{"pretrained": str(saved_llama), "device": "cpu", **arguments})


def test_what_hf_puts_in_front_is_taken_where_it_does_something(saved_llama, tokenizer):
    for arguments in ({"prefix_token_id": BOS}, {"add_bos_token": True}, {"add_bos_token": False, "pivot": "tokens:5"}):
        make(saved_llama, **arguments)
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    model = build_model("llama")
    plain, other = (
        likelihoods(IntactKVLM(pretrained=model, tokenizer=bare, pivot="none", **prefix), [("", "a")])
        for prefix in ({}, {"prefix_token_id": 65})
    )
    assert plain != pytest.approx(other, abs=1e-3)
    ending = copy.deepcopy(tokenizer)
    ending._tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    lm = IntactKVLM(pretrained=model, tokenizer=ending, add_bos_token=False)
    assert lm.tok_encode("x") == tokenizer.encode("x"), "no token of its end either"


def test_a_reference_is_never_loaded_as_the_checkpoint_is(saved_llama, tokenizer, tmp_path, monkeypatch):
    """What describes the quantized checkpoint alone does not reach the full-precision model."""
    seen = []
    parent = HFLM._create_model

    def spy(self, pretrained, **kwargs):
        seen.append(
            (pretrained, kwargs["quantization_config"], kwargs["gguf_file"])
            if "gguf_file" in kwargs
            else (pretrained, None, None)
        )
        kwargs["quantization_config"] = kwargs["gguf_file"] = None
        return parent(self, pretrained=pretrained, **kwargs)

    quantized = tmp_path / "quantized"
    build_model("llama").save_pretrained(quantized)
    tokenizer.save_pretrained(quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(HFLM, "_create_model", spy)
    with contextlib.suppress(IntactKVError, ImportError, RuntimeError):
        make(quantized, reference=str(saved_llama))
    assert seen[0] == (str(saved_llama), None, None)
    with pytest.raises(PivotError, match="name the full-precision model"):
        make(quantized)
