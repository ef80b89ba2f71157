"""In short what load.py measures at length: no call leaves behind what belongs to its requests."""

import gc
import random
import sys
import tracemalloc

import pytest
import torch
from helpers.tiny import build_model, byte_tokenizer
from stress import load

from intactkv_eval.lm.intactkv_lm import IntactKVLM

CALLS, REQUESTS = 5, 200


@pytest.mark.parametrize("pivot", ["bos", "none"])
def test_memory_does_not_grow_with_the_requests(pivot):
    """A request's texts, tokens or scores, held, would be hundreds of bytes each: the least of them more than 16."""
    lm = IntactKVLM(
        pretrained=build_model("llama"), tokenizer=byte_tokenizer(), pivot=pivot, batch_size=8, device="cpu"
    )
    draw = random.Random(0)

    def call():
        lm.loglikelihood(load.requests(REQUESTS, draw), disable_tqdm=True)
        gc.collect()
        sys._clear_type_cache()  # attribute names that CPython remembers, some 4,000 at most, each at its own address

    for _ in range(2):
        call()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    tracemalloc.start()
    call()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(CALLS):
        call()
    grown = (tracemalloc.get_traced_memory()[0] - before) / CALLS / REQUESTS
    tracemalloc.stop()
    assert sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()) == tensors
    assert grown < 16
