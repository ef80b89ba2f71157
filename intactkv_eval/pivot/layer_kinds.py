"""What the layers of a model keep of its past, in words, where it is not the keys and values of plain attention.

Read from the kinds of layers in the config, as transformers makes cache layers from them. Knows no weights.
"""

from collections import Counter
from typing import Any

PLAIN = {"full_attention", "sliding_attention", "attention"}
_NO_KEYS = {  # layers without keys and values
    "linear_attention": "keep a recurrent state (linear attention or a state-space model)",
    "mamba": "keep a recurrent state (a state-space model)",
    "recurrent": "keep a recurrent state",
    "conv": "keep the last inputs of a convolution",
    "moe": "have no attention",
    "mlp": "have no attention",
}
_WITH_STATES = {  # layers with keys and values, and more
    "hybrid": "keep a recurrent state beside keys and values",
    "hybrid_sliding": "keep a recurrent state beside keys and values",
}
_OTHER_ATTENTION = {
    "chunked_attention": "attend inside of one chunk of positions alone{chunk}, so that tokens of later chunks do not "
    "see the pivot there",
    "indexed_attention": "attend to a few tokens that an indexer picks, by keys of its own that no PivotKV holds",
    "compressed_sparse_attention": "attend to compressed groups of tokens, which a PivotKV does not hold",
    "heavily_compressed_attention": "attend to compressed groups of tokens, which a PivotKV does not hold",
}
_ALL = {**_NO_KEYS, **_WITH_STATES, **_OTHER_ATTENTION}


def why_not(config: Any) -> str | None:
    """Why a model of this text config cannot have a pivot, as a clause behind its name; None where it can.

    config: Of the text decoder.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    counts = Counter(str(kind) for kind in kinds)
    plain = sum(count for kind, count in counts.items() if kind in PLAIN)
    other = [kind for kind in counts if kind not in PLAIN]
    if not other:
        has_heads = counts or getattr(config, "num_attention_heads", None)
        return (
            None if has_heads else "has no attention: a recurrent state is all that it keeps of its past. " + _NOTHING
        )
    chunk = getattr(config, "attention_chunk_size", None)
    shown = f" ({chunk})" if chunk else ""
    total = sum(counts.values())
    described = "; ".join(
        f"{'all' if counts[kind] == total else f'{counts[kind]} of'} its {total} layers ({kind}) "
        + _ALL.get(kind, "keep their past in a way that is not known here").format(chunk=shown)
        for kind in other
    )
    if set(other) <= _OTHER_ATTENTION.keys():
        return f"has another attention: {described}. It is not supported, pivot=none included"
    if not plain and set(other) <= _NO_KEYS.keys():
        return f"has no attention: {described}. {_NOTHING}"
    if set(other) <= {*_NO_KEYS, *_WITH_STATES}:
        states = f"and the keys and values of the other {plain}" if plain else "and its keys and values"
        return (
            f"is a hybrid model: {described}. Its pivot would be these states {states}, and only the latter can be "
            "captured here. It is not supported, pivot=none included"
        )
    return f"has layers of several kinds: {described}. It is not supported, pivot=none included"


_NOTHING = "There are no keys and values to keep intact, so it is not supported, pivot=none included"
