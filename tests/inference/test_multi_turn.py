"""Conversations answered many at a time: the answers of a plain loop, whatever stands beside them in a batch."""

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from helpers.tiny import EOS, FAMILIES, PAD
from test_prefix_cache import CELLS, pivoted

from intactkv_eval.inference.generation.multi_turn import TurnPrompt, converse
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.generation.sampling import RowSampler, SamplingParams
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel

QUESTIONS = [
    ([7, 8, 9, 10], [40, 41]),
    ([60 + place for place in range(21)], [42]),
    ([5], [43, 44, 45], [9, 9]),
    ([99] * 18, [1] * 17),
    ([30, 31, 32],),
]


class Tokens:
    """A codec whose texts are tokens; question i of a talk stands behind all that was said before."""

    eos, pad = (EOS, 19), PAD

    def __init__(self, most=9, temperature=0.0, until=None):
        self.most, self.temperature, self.until = most, temperature, until

    def ask(self, talk, answers):
        place, questions = talk
        if len(answers) == len(questions):
            return None
        said = [token for question, answer in zip(questions, answers, strict=False) for token in (*question, *answer)]
        draw = SamplingParams(
            self.temperature if place % 2 else 0.0, top_k=40, top_p=0.95, seed=f"{place}/{len(answers)}"
        )
        return TurnPrompt(str(place), [*said, *questions[len(answers)]], self.most + place, draw)

    def answer(self, talk, tokens):
        cut = tokens.index(self.until) if self.until in tokens else None
        return tuple(tokens[:cut]), cut is not None


def talked(made, codec, rows, kept):
    starts = PrefixCache(SharedModel(made)) if kept else None
    found = {}
    with starts.turns_kept() if starts else nullcontext():
        converse(made, list(enumerate(QUESTIONS)), codec, rows, starts, found.__setitem__)
    return [found[place] for place in range(len(QUESTIONS))]


def plain(made, codec):
    """One talk after another, every token from a forward over all of its tokens."""
    found = []
    for talk in enumerate(QUESTIONS):
        answers, ends = [], []
        while asked := codec.ask(talk, answers):
            made_so_far, ended = [], "length"
            for _ in range(asked.most):
                scores = made.logits(torch.tensor([asked.body + made_so_far]))[:, -1]
                token = int(RowSampler([asked.draw])(None, scores).argmax())
                if token in codec.eos:
                    ended = "stop"
                    break
                made_so_far.append(token)
                if codec.answer(talk, made_so_far)[1]:
                    ended = "stop"
                    break
            answers.append(codec.answer(talk, made_so_far)[0])
            ends.append(ended)
        found.append(list(zip(answers, ends, strict=True)))
    return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_answers_of_a_plain_loop(family, cell, monkeypatch):
    monkeypatch.setattr("intactkv_eval.inference.generation.multi_turn.CHUNK", 4)
    made = pivoted(family, cell)
    codec = Tokens(temperature=0.9, until=77)
    expected = plain(made, codec)
    assert {len(talk) for talk in expected} == {1, 2, 3}
    for rows, kept in ((1, True), (2, True), (3, False), (5, True)):
        found = talked(made, codec, rows, kept)
        assert [[turn[:1] + turn[2:3] for turn in talk] for talk in found] == expected, (rows, kept)


def test_answers_end_by_their_token_by_a_stop_string_and_by_length(monkeypatch):
    monkeypatch.setattr("intactkv_eval.inference.generation.multi_turn.CHUNK", 4)
    made = pivoted("llama", "intact")
    free = talked(made, Tokens(most=12), 2, True)
    assert {turn.ended for talk in free for turn in talk} == {"length"}
    assert [turn.tokens for turn in free[1]] == [13, 13]
    third, fifth = free[1][0].answer[2], free[1][0].answer[5]
    ended = Tokens(most=12, until=fifth)
    ended.eos = (EOS, third)
    found = talked(made, ended, 2, True)[1]
    place = free[1][0].answer.index(third)
    assert found[0].answer == free[1][0].answer[:place]
    assert (found[0].ended, found[0].tokens) == ("stop", place)
    stopped = talked(made, Tokens(most=12, until=fifth), 2, True)[1]
    assert stopped[0].answer == free[1][0].answer[: free[1][0].answer.index(fifth)]
    assert stopped[0].ended == "stop"


def test_a_second_turn_and_a_next_chunk_compute_only_what_is_new(monkeypatch):
    monkeypatch.setattr("intactkv_eval.inference.generation.multi_turn.CHUNK", 8)
    made = pivoted("llama", "intact")
    widths = []
    made.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    talked(made, Tokens(most=20), 2, True)
    asked = [len(question) for questions in QUESTIONS for question in questions]
    assert sum(widths) < sum(asked) + 20 * len(asked) + 40
    assert max(widths) <= max(asked) + 3


def test_samples_follow_the_distribution_and_their_seed():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])
    draw = SamplingParams(temperature=0.7, top_k=4, top_p=0.95, seed="one")
    drawn = Counter(int(RowSampler([draw])(None, scores).argmax()) for _ in range(20000))
    kept = (scores[0] / 0.7).masked_fill(torch.tensor([False, False, False, True, False]), -torch.inf).softmax(-1)
    assert kept[[0, 4, 1]].sum() > 0.95  # so the nucleus leaves the third out
    expected = kept[[0, 4, 1]] / kept[[0, 4, 1]].sum()
    for token, share in zip((0, 4, 1), expected.tolist(), strict=True):
        assert drawn[token] / 20000 == pytest.approx(share, abs=0.012)
    assert set(drawn) == {0, 4, 1}
    again = [
        [int(SamplingParams(1.0, seed=seed).sampled(scores).argmax()) for _ in range(1)] for seed in map(str, range(40))
    ]
    assert again == [[int(SamplingParams(1.0, seed=seed).sampled(scores).argmax())] for seed in map(str, range(40))]
    assert any(one != other for one, other in pairwise(again))


def test_greedy_rows_are_untouched_beside_sampled_ones():
    scores = torch.randn(3, 50)
    out = RowSampler([SamplingParams(), SamplingParams(1.0, seed="a"), SamplingParams(5e-5)])(None, scores)
    assert torch.equal(out[[0, 2]], scores[[0, 2]])
    assert not torch.equal(out[1], scores[1])
