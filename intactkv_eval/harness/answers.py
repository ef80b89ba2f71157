"""Questions answered by the full-precision model itself, greedily: conversations where none are at hand.

What a user asks later in a conversation is asked behind the answers that came before. The answers are written as
messages (JSONL), so that the next run, or another cell, can take them as they are.
"""

import json
from pathlib import Path

from lm_eval.api.instance import Instance

from intactkv_eval.calibrate.conversations import Conversation, Conversations, Message, waits
from intactkv_eval.calibrate.examples import rendered
from intactkv_eval.files import write_atomic
from intactkv_eval.harness.lm import IntactKVLM


def answered(lm: IntactKVLM, found: Conversations, tokens: int, out: Path) -> Conversations:
    """`found` with every question answered in at most `tokens` tokens, as it is written to `out`."""
    whole = list(found.texts)
    while True:
        places = [place for place, conversation in enumerate(whole) if waits(conversation)]
        if not places:
            break
        cut = [_asked(whole[place]) for place in places]
        prompts = [
            rendered(whole[place][:end], lm.tokenizer, invite=True) for place, end in zip(places, cut, strict=True)
        ]
        for place, end, text in zip(places, cut, _generated(lm, prompts, tokens), strict=True):
            said = whole[place]
            whole[place] = (*said[:end], Message("assistant", text), *said[end:])
    lines = [json.dumps({"messages": [m._asdict() for m in one]}, ensure_ascii=False) for one in whole]
    write_atomic(out, lambda partial: partial.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return Conversations.of(whole, out.name)


def _asked(conversation: Conversation) -> int:
    """The number of messages up to the first question that has no answer."""
    pairs = zip(conversation, (*conversation[1:], None), strict=True)
    return next(
        place
        for place, (message, after) in enumerate(pairs, start=1)
        if message.role == "user" and (after is None or after.role == "user")
    )


def _generated(lm: IntactKVLM, prompts: list[str], tokens: int) -> list[str]:
    options = {"until": [lm.tokenizer.eos_token], "max_gen_toks": tokens, "do_sample": False}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, options), idx=0) for prompt in prompts
    ]
    return lm.generate_until(requests)
