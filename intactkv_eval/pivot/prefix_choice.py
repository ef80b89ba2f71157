"""pivot=auto: BOS, and the few tokens whose presence in front keeps later tokens from becoming pivots.

    candidates: the tokens that are pivots behind [BOS], by how many there are in the texts that are searched
    each round: the candidate that leaves the fewest pivots behind it joins, while it removes `min_reduction` of them

Nothing is chosen for a figure that it is judged by: the search sees one half of the texts, the evidence is of the
other. Knows no tokenizer and no text.
Source: PrefixQuant, section 4.2 (the most frequent outlier tokens); the greedy choice and the held-out half are ours.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import cache_argument
from intactkv_eval.pivot.discover import find, observe

_CANDIDATES = 6


@dataclass(frozen=True)
class Evidence:
    """What a prefix does on texts that it was not chosen on.

    pivots: tokens behind the prefix that are pivots, a thousand tokens. nll: of each text, the mean over its tokens,
    from the full-precision model behind the prefix.
    """

    prefix: tuple[int, ...]
    pivots: float
    nll: tuple[float, ...]


@dataclass(frozen=True)
class PrefixChoice:
    """prefix: what was chosen. before, after: with the first token alone, and with the prefix. steps: of the search,
    the prefix and the pivots a thousand tokens behind it."""

    prefix: tuple[int, ...]
    before: Evidence
    after: Evidence
    steps: tuple[tuple[tuple[int, ...], float], ...]


@dataclass(frozen=True)
class PrefixLimits:
    """What a search looks for.

    Args:
        threshold: Of discover.find: how many times the median of its layer a pivot's hidden state reaches.
        max_tokens: The longest prefix.
        min_reduction: The share of pivots that a token must remove to join.
    """

    threshold: float
    max_tokens: int = 4
    min_reduction: float = 0.2


def choose(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    first: tuple[int, ...],
    texts: Sequence[Tensor],
    limits: PrefixLimits,
    done: Callable[[], object] = lambda: None,
) -> PrefixChoice:
    """A prefix that begins with `first`. texts: [T] each; every other one is searched. done: called after each text."""
    searched, held_out = texts[::2], texts[1::2]

    def behind(prefix: tuple[int, ...], samples: Sequence[Tensor]) -> Counter[int]:
        counts: Counter[int] = Counter()
        for text in samples:
            counts += pivots_behind(model, layers, prefix, text, limits.threshold)
            done()
        return counts

    def rate(counts: Counter[int], samples: Sequence[Tensor]) -> float:
        return 1000 * sum(counts.values()) / sum(map(len, samples))

    counts = behind(first, searched)
    steps = [(first, rate(counts, searched))]
    prefix = first
    while len(prefix) < limits.max_tokens and counts:
        tried = {(*prefix, token): None for token, _ in counts.most_common(_CANDIDATES)}
        seen = {one: behind(one, searched) for one in tried}
        best = min(seen, key=lambda one: (sum(seen[one].values()), one))
        if rate(seen[best], searched) > (1 - limits.min_reduction) * steps[-1][1]:
            break
        prefix, counts = best, seen[best]
        steps.append((prefix, rate(counts, searched)))

    def evidence(one: tuple[int, ...]) -> Evidence:
        nll = tuple(mean_nll(model, one, text) for text in held_out)
        return Evidence(one, rate(behind(one, held_out), held_out), nll)

    before = evidence(first)
    return PrefixChoice(prefix, before, before if prefix == first else evidence(prefix), tuple(steps))


def pivots_behind(
    model: PreTrainedModel, layers: Sequence[nn.Module], prefix: tuple[int, ...], text: Tensor, threshold: float
) -> Counter[int]:
    """How often each token of `text` [T] is a pivot behind the prefix."""
    seen = observe(model, layers, (*prefix, *text.tolist()), attention=False)
    return Counter(one.token for one in find(seen, threshold) if one.position >= len(prefix))


@torch.no_grad()
def mean_nll(model: PreTrainedModel, prefix: tuple[int, ...], text: Tensor) -> float:
    """Of each token of `text` [T] behind the prefix, on average; all but the first, which nothing of it foretells."""
    ids = torch.cat([torch.tensor(prefix, dtype=torch.long), text]).to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids[None], **cache_argument(model, None)).logits[0, len(prefix) : -1]
    return float(nll_of(logits, ids[len(prefix) + 1 :]).mean())


def nll_of(logits: Tensor, words: Tensor) -> Tensor:
    """logits [N, V] -> the nll [N] (fp64) of the words [N] that came."""
    scores = logits.float().log_softmax(dim=-1).gather(1, words[:, None].to(logits.device))
    return -scores[:, 0].double()
