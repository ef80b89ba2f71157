"""Quantized KV caches of the small models: what tests of several schemes share."""

import torch

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.kv_quant.codebook_calibration import calibrate_codebook
from intactkv_eval.pivot.capture import capture, fingerprint_of

PRE_ROPE = {"scheme": "pre_rope", "codebook": "file.safetensors"}
CHANNEL_KEY = {"scheme": "channel_key", "group_size": 4, "residual_length": 4}


def samples(count=3, length=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=draw) for _ in range(count)]


def levels_of(model, tokens, left_out, bits=3, texts=None):
    return calibrate_codebook(
        model, samples() if texts is None else texts, bits, fingerprint_of(model, "main"), tokens, left_out
    )


def pivoted(model, tokens, intact, kv, texts=None):
    """A cell on `model`, its codebook calibrated on the model itself where the scheme needs one."""
    pivot = capture(model, tokens, fingerprint_of(model, "main")) if intact else None
    left_out = max(len(tokens) if intact and not kv.quantize_pivot else 0, kv.sink_tokens)
    codebook = levels_of(model, tokens, left_out, kv.bits, texts) if kv.scheme == "pre_rope" else None
    return PivotedModel(model, tokens, pivot, kv, codebook)


def spec(scheme, bits=3, **others):
    """A KVSpec of a scheme's name, with small groups."""
    return KVSpec(bits=bits, **{"token_head": {}, "channel_key": CHANNEL_KEY, "pre_rope": PRE_ROPE}[scheme], **others)
