"""Searching the prefix of a model: for `intactkv pivots`, and for cells with pivot=auto, which keep what was found."""

import hashlib
import json
import logging
from collections.abc import Callable
from math import exp, sqrt
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedModel

from intactkv_eval.cell.spec import PivotSpec
from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.compat.tensor_parts import weight_hash
from intactkv_eval.data.calibration_text import Samples, load_samples
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.pivot import store
from intactkv_eval.pivot.capture import check_supported
from intactkv_eval.pivot.prefix_choice import Evidence, PrefixLimits, choose
from intactkv_eval.pivot.prefix_file import PrefixFile, Searched
from intactkv_eval.pivot.tokens import resolve_tokens
from intactkv_eval.storage.files import cache_folder

logger = logging.getLogger(__name__)


class Search(NamedTuple):
    """Where pivots are looked for, and what counts as one. See pivot/discover.py and pivot/prefix_choice.py."""

    data: str = "wikitext2"
    samples: int = 16
    length: int = 256
    seed: int = 0
    threshold: float = 8.0
    max_prefix_tokens: int = 4
    min_reduction: float = 0.2

    def check(self) -> None:
        """Raise ConfigError for what is no setting."""
        if self.threshold <= 1:
            raise ConfigError(f"--threshold {self.threshold}: a pivot is larger than the median, so more than 1")
        if self.samples < 2:
            raise ConfigError(f"--samples {self.samples}: one half is searched, the other judges: at least 2")
        if self.max_prefix_tokens < 1 or not 0 < self.min_reduction < 1:
            raise ConfigError(
                f"--max-prefix-tokens {self.max_prefix_tokens}, --min-reduction {self.min_reduction}: use at least 1 "
                "token, and a share between 0 and 1"
            )


def search_prefix(
    model: PreTrainedModel, tokenizer: Any, first: tuple[int, ...], samples: Samples, search: Search
) -> PrefixFile:
    """The prefix that begins with `first`, and its evidence. Raises UnsupportedModelError or PivotError."""
    check_supported(model)
    layers = list(decoder_layers(model)[1])
    with tqdm(desc="Searching a prefix", unit=" texts") as bar:
        limits = PrefixLimits(search.threshold, search.max_prefix_tokens, search.min_reduction)
        chosen = choose(model, layers, first, samples.tokens, limits, bar.update)
    searched = Searched(
        model=model.name_or_path or type(model).__name__,
        weight_hash=weight_hash(model.named_parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        samples=samples.record(),
        threshold=search.threshold,
        max_prefix_tokens=search.max_prefix_tokens,
        min_reduction=search.min_reduction,
    )
    words = tuple(tokenizer.decode([token]) for token in chosen.prefix)
    return PrefixFile(tokens=chosen.prefix, text=words, searched=searched, choice=chosen)


def tokens_of(
    spec: PivotSpec,
    tokenizer: Any,
    vocabulary: int,
    source: tuple[str, str, str] | None,
    load: Callable[[], PreTrainedModel],
    chat: ChatSettings | None = None,
) -> tuple[int, ...]:
    """The tokens of a pivot that is no PivotKV file; `auto` is searched in the full-precision model.

    source: that model's name or folder, revision and dtype; None where these do not say what it is, and nothing is kept
    under them. chat: how chat templates are rendered.
    Raises PivotError where there are none, DataError.
    """
    if spec.source != "auto":
        return resolve_tokens(spec, tokenizer, vocabulary, chat)
    found = automatic_tokens(source, resolve_tokens(PivotSpec(intact=False), tokenizer, vocabulary), tokenizer, load)
    if not found:
        raise PivotError("pivot=auto: this model has no BOS and shows no pivot tokens; name some with pivot=tokens:...")
    return found


def automatic_tokens(
    source: tuple[str, str, str] | None,
    first: tuple[int, ...],
    tokenizer: Any,
    load: Callable[[], PreTrainedModel],
) -> tuple[int, ...]:
    """The prefix of pivot=auto, searched with the settings of `Search` once and kept beside captured pivots.

    source, load: of the full-precision model. Raises DataError where the texts cannot be had.
    """
    search = Search()
    identity = store.source_identity(*source[:2]) if source is not None else None
    asked = hashlib.sha256(json.dumps([identity, source, search, first, _words(tokenizer)]).encode()).hexdigest()[:32]
    path = cache_folder() / "pivots" / f"auto-{asked}.json"
    if identity is not None and path.is_file():
        return PrefixFile.load(path).tokens
    model = load()
    samples = load_samples(search.data, tokenizer, search.samples, search.length, search.seed)
    made = search_prefix(model, tokenizer, first, samples, search)
    logger.info("pivot=auto: %s; %s", json.dumps(made.text, ensure_ascii=False), control(made))
    if identity is not None:
        made.save(path)
    return made.tokens


def _words(tokenizer: Any) -> str:
    """What a tokenizer makes of texts, which may be another one's than the model's: a hash of its tokens."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def control(made: PrefixFile) -> str:
    """What the prefix does to the full-precision model on held-out texts, in a line."""
    before, after = made.choice.before, made.choice.after
    if before.prefix == after.prefix:
        return f"{before.pivots:.1f} pivots a thousand tokens behind it; no token in front removes enough of them"
    differences = [a - b for a, b in zip(after.nll, before.nll, strict=True)]
    mean = sum(differences) / len(differences)
    spread = sum((one - mean) ** 2 for one in differences)
    error = sqrt(spread / max(len(differences) - 1, 1) / len(differences))
    return (
        f"pivots a thousand tokens behind it {before.pivots:.1f} -> {after.pivots:.1f}; full-precision perplexity "
        f"{_perplexity(before):.2f} -> {_perplexity(after):.2f} ({mean:+.4f} ± {error:.4f} nats a token, paired over "
        f"{len(differences)} held-out texts)"
    )


def _perplexity(evidence: Evidence) -> float:
    return exp(sum(evidence.nll) / len(evidence.nll))
