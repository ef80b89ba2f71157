"""Writes judge.json: what FastChat's own code asks a judge, reads from its replies, and shows as scores and win rates.

Run with FastChat (https://github.com/lm-sys/FastChat, commit 0e6d3e4beaab66f4d3f93db72541a4abab8af28d), the released
IntactKV repository (commit e9b841e9357c59ed800620373454110fc52fbfe4), and pandas:

    python tests/data/released/make_judge.py FASTCHAT INTACTKV

FastChat's gen_judgment, common and show_result are run beside an OpenAI package that keeps what it is asked and gives
invented replies; of FastChat's model code, which they import and do not use, all but the conversation templates is left
out. The invented bench and its judgments are stored in the file; of the real questions it holds digests only: SHA-256 of
the messages as JSON, for an invented answer to each turn.
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "judge"))
from judge_bench import answers_of, lines, write_bench

COMMITS = {"FastChat": "0e6d3e4beaab66f4d3f93db72541a4abab8af28d",
           "IntactKV": "e9b841e9357c59ed800620373454110fc52fbfe4"}  # fmt: skip
JUDGES = ("gpt-4", "gpt-4-0125-preview")
MODELS = ("one", "two", "three")
RATINGS = ("Fine. Rating: [[7]]", "Empty. [[0]]", "I cannot say.", "Rating: [[6.5]]", "[[10]] or [[2]]", "Rating: [4]")
WINNERS = ("[[A]]", "Better: [[B]].", "[[C]]", "Neither.", "[[A]]", "[[B]]")
REPLIES = (*RATINGS, "Score: [7]", "The rating is [7].", "[[11]]", "[[100]]", "[[-3]]", "It reads nums[5].", "see [1]",
           "First [3], then rating: [6]", "")  # fmt: skip


class OpenAI:
    """Keeps what it is asked; replies by the prompt's digest. asked: (model, messages, the rest)."""

    def __init__(self):
        self.asked = []
        self.reply = None

    def create(self, model, messages, **options):
        self.asked.append((model, messages, options))
        return {"choices": [{"message": {"content": self.reply or invented(messages[-1]["content"])}}]}


def invented(prompt):
    place = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    return WINNERS[place % 6] if "Assistant A:" in prompt else RATINGS[place % 6]


def fastchat(folder, server):
    """FastChat's modules, with a stand-in for whatever they import of its model code and of other packages."""
    sys.path.insert(0, str(folder))
    sys.modules["openai"] = MagicMock(ChatCompletion=server)
    sys.modules["anthropic"] = MagicMock()
    for path in [*(folder / "fastchat" / "model").glob("*.py"), *(folder / "fastchat" / "modules").glob("*.py")]:
        if path.stem not in {"__init__", "model_adapter"}:
            sys.modules[f"fastchat.{path.parent.name}.{path.stem}"] = MagicMock()
    for name in ("transformers", "torch", "psutil", "fastchat.utils"):
        sys.modules[name] = MagicMock()
    return [importlib.import_module(f"fastchat.llm_judge.{name}") for name in ("common", "gen_judgment", "show_result")]


def judgments(common, generate, data, answers, judge, mode):
    """The rows that gen_judgment writes, in its four steps."""
    questions = common.load_questions(str(data / "mt_bench" / "question.jsonl"), None, None)
    references = common.load_model_answers(str(data / "mt_bench" / "reference_answer"))
    prompts = common.load_judge_prompts(str(data / "judge_prompts.jsonl"))
    single = mode == "single"
    judges = (generate.make_judge_single if single else generate.make_judge_pairwise)(judge, prompts)
    make = {"single": generate.make_match_single, "pairwise-baseline": generate.make_match,
            "pairwise-all": generate.make_match_all_pairs}[mode]  # fmt: skip
    play = common.play_a_match_single if single else common.play_a_match_pair
    models = [model for model in answers if mode != "pairwise-baseline" or model != "three"]
    baseline = "three" if mode == "pairwise-baseline" else None
    common.check_data(questions, answers, references, models, judges)
    rows = []
    for kind, beside in (("default", None), ("math", references), ("default-mt", None), ("math-mt", references)):
        part = [q for q in questions if (q["category"] in common.NEED_REF_CATS) == kind.startswith("math")]
        for match in make(part, models, answers, judges[kind], baseline, beside, multi_turn=kind.endswith("mt")):
            rows.append({**play(match, output_file=None), "tstamp": 0})
    return json.loads(json.dumps(rows))


def shown(show, rows, mode, folder):
    """What show_result prints, as numbers: the tables themselves are taken from its print."""
    path = lines(folder / "judgments.jsonl", rows)
    tables = []
    show.print = lambda *said: tables.extend(one for one in said if not isinstance(one, str))
    options = argparse.Namespace(input_file=str(path), bench_name="mt_bench", model_list=None,
                                 baseline_model="three" if mode == "pairwise-baseline" else None)  # fmt: skip
    (show.display_result_single if mode == "single" else show.display_result_pairwise)(options)
    if mode != "single":
        return {model: row.to_dict() for model, row in tables[0].iterrows()}
    turns = {f"turn {n}": {model: row["score"] for (model, _), row in tables[n - 1].iterrows()} for n in (1, 2)}
    return {"all": {model: row["score"] for model, row in tables[2].iterrows()}, **turns}


def main():
    fastchat_folder, intactkv = map(Path, sys.argv[1:])
    server = OpenAI()
    common, generate, show = fastchat(fastchat_folder, server)
    made = {"commits": COMMITS, "judged": {}, "ratings": {}, "real": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_bench(folder / "data", references=JUDGES)
        for model in MODELS:
            lines(folder / "answers" / f"{model}.jsonl", answers_of(model))
        loaded = common.load_model_answers(str(folder / "answers"))
        answers = {model: loaded[model] for model in MODELS}
        for judge, mode in [
            (JUDGES[0], "single"),
            *((JUDGES[1], m) for m in ("single", "pairwise-baseline", "pairwise-all")),
        ]:
            server.asked.clear()
            rows = judgments(common, generate, data, answers, judge, mode)
            systems = {messages[-1]["content"]: messages[0] for _, messages, _ in server.asked}
            assert all(system == {"role": "system", "content": "Be fair."} for system in systems.values())
            (options,) = {json.dumps(options) for *_, options in server.asked}
            made["judged"][f"{judge} {mode}"] = {
                "rows": rows, "options": json.loads(options), "shown": shown(show, rows, mode, folder)}  # fmt: skip
        for reply in REPLIES:
            server.reply = reply or " "
            match = generate.make_match_single(
                common.load_questions(str(data / "mt_bench" / "question.jsonl"), 0, 1), ["one"], answers,
                generate.make_judge_single("gpt-4", common.load_judge_prompts(str(data / "judge_prompts.jsonl")))["default"],
            )[0]  # fmt: skip
            made["ratings"][reply] = common.play_a_match_single(match, output_file=None)["score"]
        server.reply = None
        real = intactkv / "fastchat" / "data"
        invented_answers = {"m": {
            q["question_id"]: {"choices": [{"turns": [f"Answer {n} to {q['question_id']}: {{x}} é" for n in (1, 2)]}]}
            for q in common.load_questions(str(real / "mt_bench" / "question.jsonl"), None, None)
        }}  # fmt: skip
        for judge in JUDGES:
            server.asked.clear()
            judgments(common, generate, real, invented_answers, judge, "single")
            found = [[message["content"] for message in messages] for _, messages, _ in server.asked]
            made["real"][judge] = sorted(hashlib.sha256(json.dumps(one).encode()).hexdigest()[:16] for one in found)
    (HERE / "judge.json").write_text(json.dumps(made, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
