"""Real decoder layers as blocks to quantize: run by hand, with or without a pivot's KV in front."""

import torch
from helpers.tiny import build_model
from torch import nn

from intactkv_eval.compat.transformers_api import DynamicCache, cache_argument
from intactkv_eval.quantize.method import Block, install
from intactkv_eval.quantize.rtn import quantize_rtn

TOKENS = 8  # no more than the sliding windows of tiny.py, so that causal is all there is


def make_block(model, index=1, samples=6, seed=0, planted=(), front=None, full_inputs=None, tokens=TOKENS):
    """Layer `index` of a tiny model on random hidden states whose channels `planted` are 30 times as large."""
    name, stack = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    module, width = stack[index], model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 1, tokens, width, generator=generator)
    inputs[..., list(planted)] *= 30
    inputs = list(inputs.to(model.dtype))
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    run = runner(model, module, front)
    divide = front.divide if front is not None else None
    return Block(f"{name}.{index}", module, layers, inputs, run, full_inputs or inputs, divide)


class Front:
    """One layer's pivot KV [1, H, P, D]."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def divide(self, scale):
        heads, width = self.values.shape[1], self.values.shape[3]
        self.values = self.values / scale.view(1, heads, 1, width).to(self.values.dtype)


def runner(model, module, front=None):
    base = model.base_model
    ahead = 0 if front is None else front.keys.shape[2]

    def run(hidden, index):
        length = hidden.shape[1]
        positions = torch.arange(ahead, ahead + length)[None]
        rows = torch.arange(length)[:, None] + ahead
        allowed = torch.arange(ahead + length)[None] <= rows
        floor = torch.zeros(length, ahead + length, dtype=hidden.dtype).masked_fill(~allowed, -1e30)
        options = {"attention_mask": floor[None, None], "position_ids": positions}
        if hasattr(base, "rotary_emb"):
            kinds = [module.self_attn.layer_type] if model.config.model_type == "gemma3_text" else []
            options["position_embeddings"] = base.rotary_emb(hidden, positions, *kinds)
        if front is not None:
            cache = DynamicCache()
            cache.update(front.keys.to(hidden.dtype), front.values.to(hidden.dtype), module.self_attn.layer_idx)
            options |= cache_argument(module, cache)
        output = module(hidden, **options)
        return output[0] if isinstance(output, tuple) else output

    return run


def planted_block(family="llama", seed=0, **options):
    """A layer whose inputs have a few channels many times as large as the others, as in real models."""
    return make_block(build_model(family, seed), planted=(3, 17, 40), seed=seed, **options)


def outputs(block):
    with torch.no_grad():
        return torch.cat([block.run(hidden, index) for index, hidden in enumerate(block.inputs)])


def output_error(block, expected):
    """Mean squared error of what the block makes of its inputs, relative to what it should be."""
    return float((outputs(block) - expected).square().mean() / expected.square().mean())


def error_of(method, family):
    """The output error of a planted block after `method`; after RTN in w3g32 where there is none."""
    block = planted_block(family)
    expected = outputs(block)
    if method is None:
        install(block, {n: quantize_rtn(m.weight, 3, 32, scale_dtype=torch.float16) for n, m in block.layers.items()})
    else:
        method.quantize(block)
    return output_error(block, expected)
