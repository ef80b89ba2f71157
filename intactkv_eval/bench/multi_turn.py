"""Two-turn conversations of MT-Bench, greedy: ours against transformers' `generate`, one question after another.

Both have the same 4-bit model behind the same head of the chat, which it computes itself. The gate: the same answers.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from intactkv_eval.chat.bos_text import encoded_prompt
from intactkv_eval.chat.messages import Conversation, Message, filled, open_question
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.demo import prepare_model
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.multi_turn import REQUEST
from intactkv_eval.mt_bench.questions import load_questions
from intactkv_eval.storage.files import cache_folder
from intactkv_eval.training.examples import rendered

CELL: dict[str, Any] = {"weights": "rtn", "bits": 4, "group_size": 64, "pivot": "prompt", "intact": False}
BATCHES = (1, 8)
_AGREE = 0.95  # of the answers: two tokens can be as likely as rounding is coarse

Answers = list[list[str]]
Way = Callable[[], tuple[Answers, int]]


def multi_turn(model: str | None, questions: int, tokens: int, repeats: int) -> str:
    """A markdown table: seconds, tokens a second and equal answers, of a plain loop and of ours by batch size.

    Raises DataError where the questions cannot be had.
    """
    folder = model or str(prepare_model(cache_folder() / "demo"))
    asked = [tuple(Message("user", turn) for turn in one.turns) for one in load_questions("mt_bench").questions]
    asked = asked[:: max(1, len(asked) // questions)][:questions]  # of all categories
    lms = {rows: IntactKVLM(folder, dtype="float32", device="cpu", batch_size=rows, **CELL) for rows in BATCHES}
    ways: dict[str, Way] = {"generate, question by question": partial(_plain, lms[1], asked, tokens)}
    ways |= {f"intactkv, batch {rows}": partial(_ours, lm, asked, tokens) for rows, lm in lms.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, tuple[Answers, int]] = {}
    for _ in range(repeats):
        for name, run in ways.items():
            begun = time.perf_counter()
            found[name] = run()
            times[name].append(time.perf_counter() - begun)
    return _table(folder, len(asked), tokens, times, found)


def _plain(lm: IntactKVLM, asked: list[Conversation], tokens: int) -> tuple[Answers, int]:
    answers, made = [], 0
    for conversation in asked:
        said: list[str] = []
        while (end := open_question(whole := filled(conversation, said))) is not None:
            prompt = rendered(whole[:end], lm.tokenizer, invite=True)
            ids = torch.tensor([encoded_prompt(lm.tokenizer, prompt)])
            seen = torch.ones_like(ids)
            out = lm.model.generate(
                ids, attention_mask=seen, max_new_tokens=tokens, do_sample=False, pad_token_id=lm.pad
            )
            new = out[0, ids.shape[1] :].tolist()
            new = new[: next((place for place, token in enumerate(new) if token in lm.eos), len(new))]
            said.append(lm.tok_decode(new).strip())
            made += len(new)
        answers.append(said)
    return answers, made


def _ours(lm: IntactKVLM, asked: list[Conversation], tokens: int) -> tuple[Answers, int]:
    options = [{"messages": [one._asdict() for one in each], "max_gen_toks": tokens} for each in asked]
    requests: list[Any] = [make_request(REQUEST, ("", one), place) for place, one in enumerate(options)]
    found = lm.generate_turns(requests, disable_tqdm=True)
    return [[turn[0] for turn in each] for each in found], sum(turn[3] for each in found for turn in each)


def _table(
    folder: str, questions: int, tokens: int, times: dict[str, list[float]], found: dict[str, tuple[Answers, int]]
) -> str:
    rival = next(iter(times))
    expected = [answer for each in found[rival][0] for answer in each]
    lines = [
        f"{questions} questions of MT-Bench, {len(expected)} answers of at most {tokens} tokens, greedy, w4g64, fp32, "
        f"CPU, {torch.get_num_threads()} threads, {Path(folder).name}, medians of {len(times[rival])} runs",
        "",
        "| way | seconds | tokens/s | times the plain loop's speed | answers that agree |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds in times.items():
        answers, made = found[name]
        equal = sum(a == b for a, b in zip(expected, [answer for each in answers for answer in each], strict=True))
        agrees = equal >= _AGREE * len(expected)
        ratio = f"{median(times[rival]) / median(seconds):.2f}" if agrees else "answers differ"
        lines.append(
            f"| {name} | {median(seconds):.1f} | {made / median(seconds):.1f} | {ratio} | {equal} of {len(expected)} |"
        )
    return "\n".join(lines)
