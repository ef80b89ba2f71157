"""Peak memory while a packed checkpoint is loaded, in a process of its own, against the size of its weight files."""

import json
import subprocess
import sys
from pathlib import Path

from intactkv_eval.errors import CheckpointError

# The process reads its own high-water mark: before loading (libraries only) and after.
_PROGRAM = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.assemble.checkpoint_info import read_quantization
from intactkv_eval.model.checkpoint_loaders import PackedAutoModel

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
layout = read_quantization(folder, config).layout
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
before = peak()
loader = PackedAutoModel(AutoModelForCausalLM, layout, config, sys.argv[2])
model = loader.from_pretrained(folder, dtype=torch.bfloat16)
embedding = model.get_input_embeddings().weight
print(json.dumps([before, peak(), embedding.numel() * embedding.element_size()]))
"""


def loading(folder: Path, backend: str = "auto") -> str:
    """One line: the peak above the libraries' own memory, and the bound of 1.2 times the files plus the embedding.

    Raises CheckpointError where the checkpoint cannot be loaded.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder), backend], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise CheckpointError(f"{folder}: cannot be loaded: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    before, after, embedding = json.loads(done.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors") if "dequantized" not in file.name)
    bound = 1.2 * size + embedding
    return (
        f"{folder.name}: peak {(after - before) / 2**20:.0f} MiB above the libraries; files {size / 2**20:.0f} MiB, "
        f"embedding {embedding / 2**20:.0f} MiB, 1.2 x files + embedding {bound / 2**20:.0f} MiB: "
        f"{(after - before) / bound:.2f} of it"
    )
