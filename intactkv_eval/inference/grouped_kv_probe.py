"""Whether a model can be asked for whole rows whose KV is quantized in groups: both copies side by side, by mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.inference.padding_probe import disagreement
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import KNOWN_LAYERS
from intactkv_eval.kv_quant.quantizer import KVQuantizer

_TOKENS = 24


@dataclass(frozen=True)
class _Exact:
    """Groups as of a quantizer, of which nothing is lost."""

    group: int = 4
    recent: int = 4

    def keys(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        return states.clone()

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        return states.clone()


def check_groups(pivoted: PivotedModel) -> None:
    """Raise UnsupportedModelError, with the reason, where groups that lose nothing give other logits than no groups."""
    model = pivoted.model
    name = f"kv_scheme={pivoted.kv.scheme} is not possible with {type(model).__name__}: "
    used = getattr(model.config, "_attn_implementation", None)
    if used not in {"sdpa", "eager"}:
        raise UnsupportedModelError(f"{name}attention {used!r} takes no mask of its own; use attn_implementation=sdpa")
    unknown = set(pivoted.windows) - KNOWN_LAYERS
    if unknown:
        raise UnsupportedModelError(f"{name}it has layers of kind {', '.join(sorted(unknown))}")
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, words, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    plain = PivotedModel(model, pivoted.token_ids, pivoted.pivot).forward(ids).logits[0]
    try:
        found = pivoted.forward_in_groups(ids, KVQuantizer(_Exact())).logits[0]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise UnsupportedModelError(f"{name}{type(error).__name__}: {str(error)[:200]}") from error
    reason = disagreement(found.double(), plain.double(), plain.dtype)
    if reason is None and pivoted.columns.counted_anywhere:
        reason = "its attention counts columns, not tokens, and both copies of a row have columns"
    if reason:
        raise UnsupportedModelError(f"{name}{reason}")
