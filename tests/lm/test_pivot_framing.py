"""What of a request stands behind the pivot, and that it is counted."""

import pytest

from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.pivot_framing import PivotFraming
from intactkv_eval.lm.token_text import TokenText

BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("pivot", "prefix", "tokens", "body", "count"),
    [
        ((BOS,), BOS, [BOS, 5, 6], [5, 6], "stripped"),
        ((BOS,), BOS, [5, 6], [5, 6], "prepended"),
        ((BOS,), BOS, [BOS], [], "stripped"),
        ((BOS,), BOS, [], [], "prepended"),
        ((BOS, 7, 8), BOS, [BOS, 7, 8, 9], [9], "stripped"),
        ((BOS, 7, 8), BOS, [BOS, 7, 9], [7, 9], "bos_replaced"),
        ((BOS, 7, 8), BOS, [BOS], [], "bos_replaced"),
        ((BOS, 7, 8), BOS, [7, 8], [7, 8], "prepended"),
        ((5,), EOS, [EOS], [], "bos_replaced"),
        ((5,), EOS, [EOS, 9], [EOS, 9], "prepended"),
        ((), EOS, [EOS, 9], [EOS, 9], "unchanged"),
    ],
)
def test_body(pivot, prefix, tokens, body, count):
    framing = PivotFraming(pivot, prefix, room=100)
    assert framing.body(tokens) == body
    assert dict(framing.counts) == {count: 1}


def test_a_bos_that_opens_every_message_is_the_requests_own():
    """SmolLM2's BOS is ChatML's <|im_start|>: without it the first message would be text."""
    chat = [BOS, 9, 10, BOS, 11]
    assert PivotFraming((BOS, 7, 8), BOS, room=100).body(chat) == chat[1:]
    framing = PivotFraming((BOS, 7, 8), BOS, room=100, opens_messages=True)
    assert framing.body(chat) == chat
    assert framing.body([BOS, 7, 8, 11, BOS]) == [11, BOS]
    assert framing.body([BOS, 9, 10]) == [9, 10], "put in front of a plain text"
    assert dict(framing.counts) == {"prepended": 1, "stripped": 1, "bos_replaced": 1}


def test_a_long_context_loses_its_left_and_never_the_pivot():
    framing = PivotFraming((BOS, 7), BOS, room=6)
    request = framing.request([BOS, 7, *range(10, 30)], [50, 51])
    assert request.context == [25, 26, 27, 28, 29]
    assert framing.counts["truncated"] == 1
    assert len(request.context + request.continuation) - 1 == framing.room


def test_a_continuation_that_does_not_fit_is_an_error():
    assert PivotFraming((BOS,), BOS, room=3).request([BOS, 9], [5, 6, 7, 8]).context == []
    with pytest.raises(ConfigError, match="continuation of 5 tokens"):
        PivotFraming((BOS,), BOS, room=3).request([9], [5, 6, 7, 8, 9])
    with pytest.raises(ConfigError, match="does not fit"):
        PivotFraming((), EOS, room=3).request([9], [5, 6, 7, 8])


def test_a_window_loses_its_first_token_whatever_it_is():
    """Also where the second one is the pivot's own."""
    framing = PivotFraming((BOS,), BOS, room=10)
    assert framing.request([9, BOS], [5, 6], whole=True).context == [BOS]
    assert framing.request([BOS, 9], [5, 6], whole=True).context == [9]
    assert PivotFraming((), EOS, room=10).request([9, 8], [5], whole=True).context == [9, 8]
    assert framing.request([9, 8], list(range(10)), whole=True).context == [8]
    with pytest.raises(ConfigError, match="ppl_window=12"):
        framing.request([9, 8], list(range(11)), whole=True)


def test_exact_tokens_travel_as_text():
    import pickle

    text = TokenText("ab", (3, 4))
    assert text == "ab"
    assert pickle.loads(pickle.dumps(text)).ids == (3, 4)
