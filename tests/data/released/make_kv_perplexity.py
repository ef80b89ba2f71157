"""Perplexities that IntactKV's released code measures with a quantized KV cache: kv_perplexity.json.

    github.com/ruikangliu/IntactKV   e9b841e9357c59ed800620373454110fc52fbfe4

Made on a CPU with Python 3.11, torch 2.13.0, transformers 4.36.2 (the release it was written for), tokenizers 0.15.2,
huggingface_hub 0.25.2 and safetensors:
    OMP_NUM_THREADS=1 python make_kv_perplexity.py INTACTKV MODEL WINDOWS.json kv_perplexity.json
MODEL is a folder of a Llama model, WINDOWS.json {"bos": id, "tokens": [...]}: the token ids of the text, as many as are
measured (WikiText-2 test, the first 2048 of SmolLM2's tokenizer for the file that is kept).

The released wrapper of the model, its attention with a quantized cache, its capture of [BOS], its rounding of weights and
its perplexity are run as they are, in fp32. Replaced are imports that are not used here (lm_eval's HFLM is only a holder of
the model, fastchat, bloom's blocks) and the move of weights to CUDA.
"""

import json
import subprocess
import sys
import types
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM

COMMIT = "e9b841e9357c59ed800620373454110fc52fbfe4"
WEIGHTS = {"fp": None, "rtn w4 g64": (4, 64)}
KV_BITS = (16, 4, 3)


def stub(name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


class HFLM:
    """What the released functions expect around a model."""

    def __init__(self, model):
        self.model = self._model = model


def import_released(repository):
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert head.stdout.strip() == COMMIT, f"{repository} is at another commit"
    for name in ("lm_eval", "lm_eval.models", "fastchat", "fastchat.model"):
        stub(name)
    stub("lm_eval.models.huggingface", HFLM=HFLM)
    stub("fastchat.model.model_adapter", get_conversation_template=None)
    sys.path.insert(0, repository)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self: self


def full_precision(folder):
    config = AutoConfig.from_pretrained(folder)
    written = json.loads(Path(folder, "config.json").read_text())  # by a newer transformers
    config.rope_theta = float(written.get("rope_theta") or written["rope_parameters"]["rope_theta"])
    config._attn_implementation_internal = "eager"  # as the released code loads it
    return LlamaForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32).eval()


def main(repository, folder, windows, out):
    import_released(repository)
    from eval_utils.ppl import ppl_eval
    from intactkv.inference_model import inject_intactkv_inference_model, inject_quantized_kv_model
    from intactkv.utils import gen_bos_kv
    from llm_awq.quantize.quantizer import pseudo_quantize_model_weight

    text = json.loads(Path(windows).read_text())

    class Tokenizer:
        bos_token, bos_token_id = "bos", text["bos"]

        def __call__(self, prompt, **kwargs):
            return types.SimpleNamespace(input_ids=torch.tensor([[text["bos"]]]))

    plain = HFLM(full_precision(folder))
    pivot, ids = gen_bos_kv(plain.model, Tokenizer())
    with torch.no_grad():
        logits = plain.model(ids).logits
    rows = []
    for weights, settings in WEIGHTS.items():
        for bits in KV_BITS:
            for intact in (False, True):
                held = HFLM(full_precision(folder))
                if settings is not None:
                    pseudo_quantize_model_weight(
                        held.model, settings[0], {"zero_point": True, "q_group_size": settings[1]}
                    )
                args = types.SimpleNamespace(quant_method="rtn", kv_bits=bits)
                front = (pivot, ids, logits) if intact else (None, None, None)
                inject_intactkv_inference_model(args, held, Tokenizer(), *front)
                held.model = held._model
                if bits < 16:
                    inject_quantized_kv_model(args, held)
                perplexity = ppl_eval(held._model, Tokenizer(), torch.tensor([text["tokens"]]))
                pivot_name = "bos" if intact else "none"
                rows.append(
                    {"weights": weights, "kv_bits": bits, "pivot": pivot_name, "perplexity": round(perplexity, 4)}
                )
                print(rows[-1], flush=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({"IntactKV": COMMIT, "tokens": len(text["tokens"])})[1:-1]
    Path(out).write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')


main(*sys.argv[1:])
