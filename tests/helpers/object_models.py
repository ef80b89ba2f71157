"""Models that are handed over as objects, and their folders, in our model class."""

import copy

import torch
from helpers.tiny import BOS, byte_tokenizer

from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.lm.intactkv_lm import IntactKVLM

PAIRS = [("The quick brown fox", " jumps"), ("Question: a b c\nAnswer:", " yes"), ("x", " a longer answer")]
RTN = {"weights": "rtn", "bits": 3, "group_size": 32}
SEVERAL = {"pivot": "tokens:256+7+8"}


def scores(lm):
    requests = [make_request("loglikelihood", pair, index, task="task") for index, pair in enumerate(PAIRS)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def answers(lm):
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    requests = [make_request("generate_until", (text, options), i, task="task") for i, text in enumerate(("abc", "de"))]
    return lm.generate_until(requests, True)


def of_object(model, **arguments):
    return IntactKVLM(pretrained=model, **{"tokenizer": byte_tokenizer(), "batch_size": 2, **arguments})


def of_folder(folder, **arguments):
    return IntactKVLM(str(folder), **{"dtype": "float32", "device": "cpu", "batch_size": 2, **arguments})


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rounded(model):
    """A pseudo-quantized copy, as scripts of papers make it: 3 bits by row, dequantized again."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                step = weight.abs().amax(dim=1, keepdim=True) / 3.5
                weight.copy_((weight / step).round().clamp(-4, 3) * step)
    return other


def values(model, tokens=(BOS,)):
    """V of the second layer, by transformers alone."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=True).past_key_values.layers[1].values[0]
