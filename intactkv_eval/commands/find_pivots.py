"""What `intactkv pivots` does: a model and texts in, a table of its pivot tokens and a prefix out."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from intactkv_eval.assemble.load_cell import load_cell
from intactkv_eval.assemble.open_source import open_source
from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.data.calibration_text import Samples, load_samples
from intactkv_eval.errors import ConfigError
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.pivot.auto import Search, control, search_prefix
from intactkv_eval.pivot.discover import Found, find, observe
from intactkv_eval.storage.files import check_writable


def pivots_of(
    arguments: dict[str, Any], loading: dict[str, Any], search: Search, attention: bool, out: Path | None
) -> str:
    """The table, the prefix and its control as text; the choice in `out` too."""
    cell = cell_from_args({**arguments, "pivot": "none"})
    search.check()
    if out is not None:
        check_writable(out.parent)
    source = open_source(cell, **loading)
    built = load_cell(cell, source)
    if built.quantization is not None:
        raise ConfigError(f"{arguments['pretrained']} is quantized: pivots are found in the full-precision model")
    samples = load_samples(search.data, source.tokenizer, search.samples, search.length, search.seed)
    model, first = built.pivoted.model, built.pivoted.token_ids
    found = found_in(model, first, samples, search, attention)
    made = search_prefix(model, source.tokenizer, first, samples, search)
    if out is not None:
        made.save(out)
    if not any(found):
        return f"no pivots: no token's hidden states reach {search.threshold:g} times the median of their layer"
    words = json.dumps(made.text, ensure_ascii=False)
    listed = "+".join(map(str, made.tokens))
    return f"{table(found, len(first), source.tokenizer)}\n\nprefix {words}, pivot=tokens:{listed}\n{control(made)}"


def found_in(
    model: PreTrainedModel, first: tuple[int, ...], samples: Samples, search: Search, attention: bool = True
) -> list[list[Found]]:
    """The pivots of each text behind the tokens `first`."""
    layers = list(decoder_layers(model)[1])
    texts = tqdm(samples.tokens, desc="Looking for pivots")
    return [find(observe(model, layers, (*first, *text.tolist()), attention), search.threshold) for text in texts]


def table(found: Sequence[Sequence[Found]], first: int, tokenizer: Any, rows: int = 20) -> str:
    """Markdown: each pivot token, in how many texts, where first, in which layers, how large, how much attended."""
    kinds: dict[tuple[bool, int], list[Found]] = defaultdict(list)
    texts: dict[tuple[bool, int], set[int]] = defaultdict(set)
    for number, text in enumerate(found):
        for one in text:
            kind = one.position < first, one.token
            kinds[kind].append(one)
            texts[kind].add(number)
    lines = ["| token | id | texts | first at | layers | ratio to median | attention share |", "|---" * 7 + "|"]
    ordered = sorted(kinds, key=lambda kind: (not kind[0], -len(texts[kind]), -max(one.ratio for one in kinds[kind])))
    for kind in ordered[:rows]:
        seen = kinds[kind]
        layers = sorted({layer for one in seen for layer in one.layers})
        shares = [one.share for one in seen if one.share is not None]
        share = f"{100 * sum(shares) / len(shares):.1f} %" if shares else ""
        word = json.dumps(tokenizer.decode([kind[1]]), ensure_ascii=False).replace("|", "\\|")
        place = min(one.position for one in seen)
        lines.append(
            f"| {word} | {kind[1]} | {len(texts[kind])} of {len(found)} | {place} | {layers[0]}-{layers[-1]} "
            f"| {max(one.ratio for one in seen):.1f} | {share} |"
        )
    if len(ordered) > rows:
        lines.append(f"\n{len(ordered) - rows} more tokens, in fewer texts.")
    return "\n".join(lines)
