"""Questions answered by the full-precision model itself, greedily: conversations where none are at hand.

What a user asks later in a conversation is asked behind the answers that came before. The answers are written as
messages (JSONL), so that the next run, or another cell, can take them as they are.
"""

from pathlib import Path

from intactkv_eval.chat.conversations import Conversations
from intactkv_eval.chat.messages import Conversation, filled, waits
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.multi_turn import REQUEST
from intactkv_eval.storage.files import write_jsonl
from intactkv_eval.training.distributed import Ranks


def answered(lm: IntactKVLM, found: Conversations, tokens: int, out: Path) -> Conversations:
    """`found` with every question answered in at most `tokens` tokens, as it is written to `out`."""
    waiting = [one for one in found.texts if waits(one)]
    requests = [make_request(REQUEST, (one[0].content, _options(one, tokens))) for one in waiting]
    turns = iter(lm.generate_turns(requests))
    whole = [filled(one, [turn[0] for turn in next(turns)]) if waits(one) else one for one in found.texts]
    write_jsonl(out, ({"messages": [message._asdict() for message in one]} for one in whole))
    return Conversations.of(whole, out.name)


def _options(conversation: Conversation, tokens: int) -> dict[str, object]:
    return {"messages": [message._asdict() for message in conversation], "max_gen_toks": tokens}


def with_answers(full: IntactKVLM, found: Conversations, tokens: int, out: Path, ranks: Ranks) -> Conversations:
    """The conversations, those that wait for an answer answered by the full-precision model in so many tokens.

    Raises ConfigError or DataError where `tokens` and the conversations do not go together.
    """
    waiting = sum(map(waits, found.texts))
    if not waiting:
        if tokens:
            raise ConfigError(
                f"--generate-answers: does nothing, all conversations of {found.source} have their answers"
            )
        return found
    if not tokens:
        raise DataError(
            f"{found.source}: {waiting} of {len(found.texts)} conversations have a question without an answer; "
            "--generate-answers 256 lets the full-precision model answer them"
        )
    if ranks.world > 1:
        raise ConfigError(
            "--generate-answers: answer in one process first; the answers' file is then the --data of several"
        )
    return answered(full, found, tokens, out.with_suffix(".answers.jsonl"))
