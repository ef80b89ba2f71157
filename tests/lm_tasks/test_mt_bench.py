"""The bench of open questions through lm_eval: turns, prompts, choices, seeds, the response cache, bad input."""

import copy
import json
import time

import pytest
import torch
from helpers.tiny import EOS
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from intactkv_eval.bench import multi_turn
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import ConfigError, DataError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.multi_turn import REQUEST
from intactkv_eval.mt_bench.questions import load_questions
from intactkv_eval.storage.files import shipped_folder

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["One and one?", "And two?"]},
    {"question_id": 141, "category": "stem", "turns": ["Why is it?", "Why not?"]},
    {"question_id": 131, "category": "extraction", "turns": ["What is in a rather long text?"]},
]


@pytest.fixture
def bench(tmp_path):
    folder = tmp_path / "data" / "mt_bench"
    folder.mkdir(parents=True)
    (folder / "question.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return folder.parent


def run(model, bench, metadata=None, gen_kwargs="max_gen_toks=6", batch_size=3, **options):
    arguments = {"pretrained": str(model), "dtype": "float32", "pivot": "prompt", **options.pop("cell", {})}
    metadata = {**arguments, "questions": str(bench), **(metadata or {})}
    return simple_evaluate(
        "intactkv", arguments, ["mt_bench"], gen_kwargs=gen_kwargs, batch_size=batch_size, device="cpu",
        task_manager=TaskManager(include_path=str(shipped_folder("tasks")), include_defaults=False, metadata=metadata), bootstrap_iters=1,
        **options,
    )  # fmt: skip


def turns(results):
    """Question -> of each choice the turns."""
    samples = results["samples"]["mt_bench"]
    return {one["doc"]["question_id"]: [choice[0] for choice in one["resps"]] for one in samples}


def answers(results):
    return {place: [[turn[0] for turn in choice] for choice in talk] for place, talk in turns(results).items()}


def test_every_turn_is_answered_behind_the_answers_before_it(saved_llama, bench, tokenizer):
    results = run(saved_llama, bench)
    found = turns(results)
    assert {place: len(talk[0]) for place, talk in found.items()} == {81: 2, 101: 2, 141: 2, 131: 1}
    for place, (talk,) in found.items():
        said = []
        for question, (answer, prompt, ended, tokens) in zip(
            next(one["turns"] for one in QUESTIONS if one["question_id"] == place), talk, strict=True
        ):
            said.append({"role": "user", "content": question})
            assert prompt == tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            said.append({"role": "assistant", "content": answer})
            assert (ended, tokens) == ("length", 6) or (ended == "stop" and tokens < 6)
    record = results["config"]["intactkv"]["requests_on_rank_0"]
    assert record == {"stripped": 7}
    metadata = results["configs"]["mt_bench"]["metadata"]
    assert metadata["seed"] == 42
    assert metadata["data"].startswith("sha256:")
    figures = results["results"]["mt_bench"]
    assert 0 < figures["answer_tokens,none"] <= 6
    assert 0 <= figures["empty_answers,none"] <= figures["cut_answers,none"] <= 1


@pytest.mark.parametrize("cell", [{}, {"weights": "rtn", "bits": 4, "group_size": 32}, {"kv_bits": 4}])
def test_answers_depend_on_seed_and_choice_alone(saved_llama, bench, cell):
    one = run(saved_llama, bench, {"num_choices": 2}, batch_size=1, cell=cell)
    many = run(saved_llama, bench, {"num_choices": 2}, batch_size=8, cell={**cell, "share_prefix": False})
    assert answers(one) == answers(many)
    assert answers(one)[101][0] == answers(one)[101][1], "math is greedy"
    assert answers(one)[81][0] != answers(one)[81][1], "writing is sampled"
    other = answers(run(saved_llama, bench, {"seed": 43, "num_choices": 2}, cell=cell))
    assert other[101] == answers(one)[101]
    assert other[81] != answers(one)[81]
    greedy = answers(run(saved_llama, bench, {"num_choices": 2}, "max_gen_toks=6,temperature=0", cell=cell))
    assert greedy[81][0] == greedy[81][1]
    assert greedy == answers(run(saved_llama, bench, {"num_choices": 2}, "max_gen_toks=6,do_sample=False", cell=cell))


def test_rows_are_counted_by_what_a_conversation_may_come_to(saved_llama, monkeypatch, tokenizer):
    """batch_size=auto: many short conversations fit where few of the model's full length do."""
    lm = IntactKVLM(
        str(saved_llama), tokenizer=tokenizer, dtype="float32", pivot="prompt", device="cpu", batch_size="auto"
    )
    asked = []
    monkeypatch.setattr(lm, "_rows_that_fit", lambda tokens: asked.append(tokens) or 2)
    said = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two and three."}]
    options = [{"messages": said[:many], "max_gen_toks": 4} for many in (1, 2)]
    turns = lm.generate_turns([make_request(REQUEST, ("One.", one), 0) for one in options])
    nothing = {"role": "assistant", "content": ""}
    longest = tokenizer.apply_chat_template([said[0], nothing, said[1], nothing], tokenize=False)
    assert [len(found) for found in turns] == [1, 2]
    assert asked == [len(lm.tok_encode(longest)) + 2 * 4]


def test_an_intact_prompt_in_full_precision_is_the_plain_model(llama, tokenizer, saved_llama, bench):
    found = turns(run(saved_llama, bench, gen_kwargs="max_gen_toks=20,temperature=0"))
    for (talk,) in found.values():
        for answer, prompt, _, _ in talk:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = llama.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
            made = out[0, ids.shape[1] :].tolist()
            made = made[: made.index(EOS)] if EOS in made else made
            assert tokenizer.decode(made, skip_special_tokens=True).strip() == answer


def test_what_the_response_cache_holds_is_not_answered_again(saved_llama, bench, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = run(saved_llama, bench, use_cache=cache, limit=2)
    asked = []
    real = IntactKVLM._converse
    monkeypatch.setattr(
        IntactKVLM, "_converse", lambda lm, talks, done: (asked.append(len(talks)), real(lm, talks, done))
    )
    whole = run(saved_llama, bench, use_cache=cache)
    assert asked == [2]
    assert answers(whole) == answers(run(saved_llama, bench))
    assert {place: answers(whole)[place] for place in answers(first)} == answers(first)


def test_a_response_cache_of_another_chat_template_is_refused(saved_llama, bench, tmp_path, tokenizer):
    """The cache knows a conversation by its messages, and the template writes the prompts."""
    cache = str(tmp_path / "cache")
    run(saved_llama, bench, use_cache=cache, limit=1, cell={"pivot": "bos"})
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("Be kind.", "Be rude and short.")
    other.save_pretrained(saved_llama)
    with pytest.raises(ConfigError, match="another cell"):
        run(saved_llama, bench, use_cache=cache, limit=1, cell={"pivot": "bos"})


def test_one_stop_string_is_no_list_of_letters(saved_llama, bench):
    whole = answers(run(saved_llama, bench))
    assert answers(run(saved_llama, bench, gen_kwargs="max_gen_toks=6,until=</s>")) == whole


def test_a_system_instruction_is_the_first_message(saved_llama, bench):
    talk = turns(run(saved_llama, bench, system_instruction="Be short.", limit=1, cell={"pivot": "bos"}))[81][0]
    assert "system: Be short.\nuser: Write." in talk[0][1]
    with pytest.raises(PivotError, match="begins otherwise: '<s>Be kind"):
        run(saved_llama, bench, system_instruction="Be short.", limit=1)


def test_a_context_that_does_not_fit_is_cut_from_the_left_and_counted(saved_llama, bench):
    results = run(saved_llama, bench, gen_kwargs="max_gen_toks=90")
    counted = results["config"]["intactkv"]["requests_on_rank_0"]
    assert counted["answers_with_less_room"] > 0
    assert results["results"]["mt_bench"]["answer_tokens,none"] < 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_kwargs": "max_gen_toks=6,num_beams=2"}, "unknown argument 'num_beams'"),
        ({"gen_kwargs": "max_gen_toks=500"}, "max_gen_toks=500"),
        ({"metadata": {"num_choices": 0.5}}, "num_choices"),
        ({"metadata": {"num_choices": "two"}}, "num_choices='two'"),
        ({"metadata": {"seed": "x"}}, "seed='x'"),
        ({"gen_kwargs": "max_gen_toks=6,top_p=-0.5"}, r"top_p=-0\.5"),
        ({"gen_kwargs": "max_gen_toks=6,top_k=many"}, "top_k='many'"),
        ({"gen_kwargs": "max_gen_toks=6,temperature=hot"}, "temperature='hot'"),
    ],
)
def test_bad_options(saved_llama, bench, options, message):
    with pytest.raises(ConfigError, match=message):
        run(saved_llama, bench, **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question_id": 1, "category": "math", "turns": []}, "line 1: turns"),
        ({"question_id": "x", "category": "math", "turns": ["a"]}, "line 1: question_id"),
        ({"question_id": 1, "category": "math", "turns": ["a", " "]}, "question 1 has an empty turn"),
    ],
)
def test_questions_that_are_none(saved_llama, bench, line, message):
    (bench / "mt_bench" / "question.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message):
        run(saved_llama, bench)


def test_questions_that_come_twice(bench):
    """Ten thousand are looked through at once."""
    rows = [
        {"question_id": number // 2 if number < 4 else number, "category": "math", "turns": ["a"]}
        for number in range(10_000)
    ]
    (bench / "mt_bench" / "question.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    begun = time.process_time()
    with pytest.raises(DataError, match=r"come twice: \[0, 1\]"):
        load_questions("mt_bench", bench)
    assert time.process_time() - begun < 2


def test_a_bench_that_is_not_there(saved_llama, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"holds no mt_bench/question\.jsonl"):
        run(saved_llama, tmp_path)
    monkeypatch.setenv("INTACTKV_DATA", str(tmp_path))
    with pytest.raises(DataError, match="INTACTKV_DATA="):
        run(saved_llama, None, {"questions": None})


def test_the_measurement_against_a_plain_loop(saved_llama, bench, monkeypatch):
    """`intactkv bench multi-turn` shows ratios, and none where answers differ."""
    monkeypatch.setenv("INTACTKV_DATA", str(bench))
    monkeypatch.setattr(multi_turn, "CELL", {**multi_turn.CELL, "group_size": 32})
    head, _, *rows = multi_turn.multi_turn(str(saved_llama), 3, 5, 1).splitlines()[2:]
    assert head.startswith("| way | seconds | tokens/s |")
    assert [row.split(" | ")[0] for row in rows] == [
        "| generate, question by question", "| intactkv, batch 1", "| intactkv, batch 8",
    ]  # fmt: skip
    assert all(row.endswith("| 6 of 6 |") for row in rows)
    assert all(float(row.split(" | ")[3]) > 0 for row in rows)
    whole = multi_turn._ours
    monkeypatch.setattr(multi_turn, "_ours", lambda *args: ([["x", "y"]] * 3, whole(*args)[1]))
    assert multi_turn.multi_turn(str(saved_llama), 3, 5, 1).count("| answers differ | 0 of 6 |") == 2
