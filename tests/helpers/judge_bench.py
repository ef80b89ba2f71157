"""A small bench in FastChat's layout, and answers to it."""

import json

CATEGORIES = ("writing", "math", "stem", "coding", "roleplay")
SINGLE = "Rate it.\n[Question]\n{question}\n[Answer]\n{answer}\n"
TALK = "{question_1}|{answer_1}|{question_2}|{answer_2}"
PAIR = "[[A]] or [[B]]? {question}\nAssistant A: {answer_a}\nAssistant B: {answer_b}"
PAIRS = "[[A]] or [[B]]? {question_1}|{question_2}\nAssistant A: {answer_a_1}|{answer_a_2}\nAssistant B: {answer_b_1}|{answer_b_2}"
PROMPTS = {
    "single-v1": SINGLE, "single-math-v1": SINGLE + "{ref_answer_1}", "single-v1-multi-turn": TALK,
    "single-math-v1-multi-turn": TALK + "|{ref_answer_1}|{ref_answer_2}", "pair-v2": PAIR,
    "pair-math-v1": PAIR + "{ref_answer_1}", "pair-v2-multi-turn": PAIRS,
    "pair-math-v1-multi-turn": PAIRS + "|{ref_answer_1}|{ref_answer_2}",
}  # fmt: skip


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_of(model, questions=range(1, 6), choices=1):
    """Answers with all that a template could trip over."""
    text = "{model} {0} {{x}} [[3]] [[B]] <script>alert(1)</script> é of"
    return [
        {"question_id": question, "answer_id": f"a{question}", "model_id": model, "tstamp": 1.5,
         "choices": [{"index": i, "turns": [f"{text} {model} {question} {i} {turn}" for turn in (1, 2)]}
                     for i in range(choices)]}
        for question in questions
    ]  # fmt: skip


def write_bench(folder, size=5, references=("judge", "gpt-4")):
    """The bench in `folder`: question i of category (i - 1) mod 5."""
    categories = [CATEGORIES[i % 5] for i in range(size)]
    wanting = [i for i, category in enumerate(categories, start=1) if category in {"math", "coding"}]
    lines(
        folder / "mt_bench" / "question.jsonl",
        [{"question_id": i, "category": category, "turns": [f"First {i}?", f"Second {i}?"]}
         for i, category in enumerate(categories, start=1)],
    )  # fmt: skip
    lines(
        folder / "judge_prompts.jsonl",
        [{"name": name, "type": "single" if name.startswith("single") else "pairwise", "system_prompt": "Be fair.",
          "prompt_template": template, "output_format": "[[rating]]" if name.startswith("single") else "[[A]]"}
         for name, template in PROMPTS.items()],
    )  # fmt: skip
    for judge in references:
        lines(folder / "mt_bench" / "reference_answer" / f"{judge}.jsonl", answers_of(f"{judge}'s", wanting))
    return folder
