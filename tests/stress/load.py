"""Load: python tests/stress/load.py [--requests 200000]

Memory by the number of requests, and time by it, of a small model: log-likelihoods in calls of 2,000 with other texts each,
then in one call; and contexts of the model's full length. Memory counts as flat where its slope over the last three
quarters of the calls is within two standard errors of nothing, or under 1 byte a request. Free memory that the C library
keeps is given back before each look: it creeps, whoever allocates.
"""

import argparse
import ctypes
import gc
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path[:0] = [str(Path(__file__).parents[1])]

from helpers.tiny import build_model, byte_tokenizer

from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.lm.intactkv_lm import IntactKVLM

CALL = 2000
LENGTH = 4096  # tokens
BYTE = 1.0  # a request


def requests(count: int, draw: random.Random, length: int = 24) -> list[Any]:
    """Questions with four choices each; the texts are drawn anew."""
    found = []
    for number in range(count // 4):
        question = "".join(draw.choices("abcdefghij ", k=length))
        found += [make_request("loglikelihood", (question, f" {choice}"), number) for choice in "ABCD"]
    return found


def resident(process: psutil.Process) -> int:
    """Bytes in use, without what is free but kept."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(process.memory_info().rss)


def slope(values: list[float]) -> tuple[float, float]:
    """Least squares slope a step, and its standard error."""
    x, y = np.arange(len(values), dtype=float), np.array(values)
    x -= x.mean()
    found = float((x * y).sum() / (x**2).sum())
    rest = y - y.mean() - found * x
    return found, float(np.sqrt((rest**2).sum() / (len(values) - 2) / (x**2).sum()))


def main() -> int:
    """Measure and say; 1 where memory is not flat or time grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    asked = parser.parse_args()
    lm = IntactKVLM(
        pretrained=build_model("llama"), tokenizer=byte_tokenizer(), pivot="bos", batch_size=8, device="cpu"
    )
    draw, own = random.Random(0), psutil.Process()
    memory, seconds = [], []
    for _ in range(asked.requests // CALL):
        begun = time.monotonic()
        lm.loglikelihood(requests(CALL, draw), disable_tqdm=True)
        seconds.append(time.monotonic() - begun)
        memory.append(resident(own) / CALL)
    later = len(memory) // 4
    grows, error = slope(memory[later:])
    flat = grows < max(2 * error, BYTE)
    print(
        f"memory: {grows:+.2f} ± {error:.2f} bytes a request over {len(memory) - later} calls of {CALL}: {'flat' if flat else 'GROWS'}"
    )
    first, last = np.median(seconds[later : 2 * later]), np.median(seconds[-later:])
    print(f"time: {1e3 * first / CALL:.2f} ms a request in the second quarter, {1e3 * last / CALL:.2f} in the last")
    begun = time.monotonic()
    lm.loglikelihood(requests(asked.requests, draw), disable_tqdm=True)
    whole = (time.monotonic() - begun) / asked.requests
    print(f"time in one call of {asked.requests}: {1e3 * whole:.2f} ms a request")
    grown = long_contexts(own)
    return int(not flat or last > 1.3 * first or whole > 1.3 * first / CALL or grown > 16)


def long_contexts(process: psutil.Process) -> float:
    """MiB that 20 calls with contexts of the model's full length leave behind."""
    model = build_model("llama")
    model.config.max_position_embeddings = LENGTH
    lm = IntactKVLM(pretrained=model, tokenizer=byte_tokenizer(), pivot="bos", batch_size=4, device="cpu")
    long = [make_request("loglikelihood", (f"{n} " * LENGTH, " y"), n) for n in range(8)]
    lm.loglikelihood(long, disable_tqdm=True)
    before = resident(process)
    for _ in range(20):
        lm.loglikelihood(long, disable_tqdm=True)
    grown = (resident(process) - before) / 2**20
    print(f"contexts of the full {lm.max_length} tokens, 20 calls of 8: {grown:+.1f} MiB")
    return grown


if __name__ == "__main__":
    sys.exit(main())
