"""The tree of prefixes: every sequence is answered once, in rows that hold its tokens and see only its own."""

import random
import tracemalloc

import numpy as np
import pytest
import torch

from intactkv_eval.inference.scoring.packed_rows import flatten, mask, padded, visible
from intactkv_eval.inference.scoring.prefix_tree import Limits, all_behind_nothing, behind, build_tree, merged
from intactkv_eval.inference.scoring.request_table import Request, ScoreTable


def sequences_of(seed, count=60, alphabet=3, longest=14):
    draw = random.Random(seed)
    made = {tuple(draw.randrange(alphabet) for _ in range(draw.randrange(longest))) for _ in range(count)}
    return [np.array(one, np.int32) for one in sorted(made, key=lambda one: draw.random())]


def walk(tree, limits):
    """(kept prefix's end, row or None, node) of every step, and the tokens computed."""
    steps, tokens = [], 0
    waiting = [(0, all_behind_nothing(tree, limits), 0)]
    while waiting:
        start, found, held = waiting.pop()
        for part in merged([row for row in found.rows if row.size], max(limits.capacity, 1)):
            row = flatten(part, tree.sequences)
            tokens += len(row.tokens)
            steps.append((start, row))
        for node in found.kept:
            assert node.start == start
            alone = type(node)(node.start, node.end, node.first, node.last, node.ends)
            row = flatten([alone], tree.sequences)
            tokens += len(row.tokens)
            steps.append((start, row))
            waiting.append((node.end, behind(node, limits, held + node.end), held + node.end))
    return steps, tokens


@pytest.mark.parametrize(
    "limits", [Limits(0, 1e9, 0), Limits(0, 2, 1e9), Limits(6, 3, 1e9), Limits(9, 1, 20), Limits(500, 3, 1e9)]
)
@pytest.mark.parametrize("seed", range(12))
def test_every_token_of_every_sequence_is_computed_once_for_it(seed, limits):
    sequences = sequences_of(seed)
    tree = build_tree(sequences)
    assert [tuple(one) for one in tree.sequences] == sorted(tuple(one) for one in sequences)
    assert all(np.array_equal(tree.sequences[place], sequences[given]) for place, given in enumerate(tree.order))
    steps, _ = walk(tree, limits)
    covered = [[0] * len(one) for one in tree.sequences]
    for start, row in steps:
        seen = visible(row, len(row.tokens))
        for node, column, _ in row.spans:
            for place in range(node.first, node.last):
                one = tree.sequences[place]
                for depth in range(node.start, min(node.end, len(one))):
                    covered[place][depth] += 1
                    own = np.flatnonzero(seen[column + depth - node.start])
                    assert row.tokens[own].tolist() == one[start : depth + 1].tolist()
                    assert row.depths[own].tolist() == list(range(start, depth + 1))
    assert all(count == 1 for one in covered for count in one)


def test_more_sharing_computes_fewer_tokens():
    tree = build_tree(sequences_of(1, count=200, alphabet=2))
    nothing, kept, trees = (
        walk(tree, limits)[1] for limits in (Limits(0, 1e9, 0), Limits(0, 2, 1e9), Limits(10**6, 1, 0))
    )
    assert nothing == sum(len(one) for one in tree.sequences)
    assert trees < kept < nothing
    assert trees == len({tuple(one[: end + 1]) for one in tree.sequences for end in range(len(one))})


def test_the_budget_bounds_what_is_held():
    draw = random.Random(0)
    line = [draw.randrange(50) for _ in range(400)]
    tree = build_tree([np.array([*line[:end], 60 + end % 7], np.int32) for end in range(10, 400, 10)])
    limits = Limits(0, 1, 500)
    waiting = [(all_behind_nothing(tree, limits), 0)]
    deepest = 0
    while waiting:
        found, held = waiting.pop()
        for node in found.kept:
            assert held + node.end <= limits.budget
            deepest = max(deepest, held + node.end)
            waiting.append((behind(node, limits, held + node.end), held + node.end))
    assert deepest > 0


def test_masks_of_a_small_tree():
    tree = build_tree([np.array(one, np.int32) for one in ([1, 2, 3], [1, 2, 4, 5], [1, 7])])
    row = flatten([tree.root], tree.sequences)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 7]
    _, positions = padded([row])
    seen = (mask([row], positions + 2, 2, None, torch.float32)[0, 0] == 0).int().tolist()
    assert seen == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 1],
    ]
    window = (mask([row], positions + 2, 2, 3, torch.float32)[0, 0] == 0).int().tolist()
    assert window[4] == [0, 0, 0, 1, 0, 1, 1, 0]
    assert window[5] == [0, 1, 1, 0, 0, 0, 0, 1]


def test_a_whole_mmlu_is_scheduled_in_little_memory():
    """14,042 questions of 57 subjects, 4 choices, behind heads of 500 tokens."""
    draw = np.random.default_rng(0)

    def requests():
        for subject in range(57):
            head = draw.integers(0, 49000, 500).tolist()
            for _ in range(247 if subject else 210):
                question = head + draw.integers(0, 49000, int(draw.integers(40, 160))).tolist()
                for choice in (330, 389, 340, 422):
                    yield Request(question, [choice])

    tracemalloc.start()
    table = ScoreTable(requests(), ())
    limits = Limits(192, 64, 1e5)
    steps, tokens = walk(table.tree, limits)
    asked = sum(len(table.asked_of(row).columns) for _, row in steps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table) == asked == 4 * 14_042
    assert tokens < 57 * 500 + 14_042 * 160
    assert peak < 400e6
