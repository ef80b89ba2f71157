"""Small models whose RoPE frequencies depend on the length, in our model class and in lm_eval's `hf`."""

from importlib.metadata import version

import torch
from helpers.tiny import _SHAPE, BOS, byte_tokenizer, uneven
from lm_eval.models.huggingface import HFLM
from packaging.version import Version
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PhimoeConfig

from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.lm.intactkv_lm import IntactKVLM

OLD = Version(version("transformers")) < Version("5.23")
# In these releases PhiMoE has no long frequencies, a text behind a longer one keeps the longer one's with dynamic NTK, and
# `generate` drops all but the last token at Phi-3's border.
BORDER, HALF = 40, 8  # positions, and half the channels of a head
FACTORS = {"short_factor": [1 + 0.02 * i for i in range(HALF)], "long_factor": [1 + 2.0 * i for i in range(HALF)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BORDER, **FACTORS}
MODELS = {
    "phi3": lambda: Phi3Config(**_SHAPE, original_max_position_embeddings=BORDER, rope_parameters=LONGROPE),
    "phimoe": lambda: PhimoeConfig(
        **_SHAPE, num_local_experts=2, original_max_position_embeddings=BORDER,
        rope_parameters={**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3},
    ),
    "dynamic": lambda: LlamaConfig(
        **{**_SHAPE, "max_position_embeddings": BORDER},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
}  # fmt: skip
DYNAMIC = MODELS["dynamic"]
if OLD:
    del MODELS["phimoe"], MODELS["dynamic"]
LONG = [name for name in MODELS if name != "dynamic"]
TEXT = "the cat sat on the mat and " * 4
PAIRS = [(TEXT[:26], " a b"), (TEXT[:26], " c d e"), (TEXT[:46], "xyz" * 5), (TEXT[:20], "q" * 34), (TEXT[:36], "z")]
PAIRS += [(TEXT[:n], "ab") for n in (BORDER - 2, BORDER - 1, BORDER)]
FRONT = (BOS, 10, 20, 30)
ANSWERS_OF_UNLIKE_TOKENS = {"phi3": 1, "phimoe": 0}  # seeds of prompts


def build(name, seed=0):
    torch.manual_seed(seed)
    model = uneven(AutoModelForCausalLM.from_config(MODELS[name]()).float().eval(), 0.1)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] *= 6
    return model


def ours(name, **arguments):
    return IntactKVLM(pretrained=build(name), tokenizer=byte_tokenizer(), max_length=120, **arguments)


def hf(name):
    return HFLM(pretrained=build(name), tokenizer=byte_tokenizer(), max_length=120, batch_size=1)


def scores(lm, pairs):
    pairs = [(f"<s>{context}", answer) for context, answer in pairs]  # the tokenizer adds no BOS
    requests = [make_request("loglikelihood", pair, place) for place, pair in enumerate(pairs)]
    return torch.tensor([found for found, _ in lm.loglikelihood(requests, disable_tqdm=True)])


def texts(lm, prompts, **options):
    options = {"until": [], "do_sample": False, "max_gen_toks": 24, **options}
    requests = [
        make_request("generate_until", (f"<s>{one}", dict(options)), place) for place, one in enumerate(prompts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)
