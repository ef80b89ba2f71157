"""Run by an interpreter that has gptqmodel: read a checkpoint with it, write its weights [O, I] (fp16) and logits.

`logits` are computed by its own layers in fp16; `logits_fp32` by transformers in fp32 on the weights that it read.

python read_by_gptqmodel.py CHECKPOINT OUT.safetensors
"""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
from transformers import AutoConfig

folder, out = sys.argv[1:]
method = AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.GPTQ_TORCH
model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=backend).model
found = {}
with torch.inference_mode():
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            # What the layer makes of the unit vectors is its weight, whatever it does inside.
            found[name] = module(torch.eye(module.in_features, dtype=torch.float16)).T.contiguous().clone()
    ids = torch.arange(100, 164)[None]
    found["logits"] = model(ids).logits[0].float().clone()
    for name in [name for name in found if name != "logits"]:
        parent, _, child = name.rpartition(".")
        layer, old = torch.nn.Linear(*found[name].T.shape, bias=False), model.get_submodule(name)
        layer.weight = torch.nn.Parameter(found[name].float(), requires_grad=False)
        assert getattr(old, "bias", None) is None
        setattr(model.get_submodule(parent), child, layer)
    found["logits_fp32"] = model.float()(ids).logits[0].clone()
save_file(found, out)
