"""GPTQModel's own GPTQ and AWQ on the samples of sweeps/quantizers.yaml, measured as that sweep's cells are.

    python scripts/beside_gptqmodel.py MODEL OUT PYTHON      PYTHON: of a venv that has gptqmodel (make test-gptqmodel)

OUT/made: the checkpoints; OUT/runs: their results, for `intactkv report results/quantizers OUT/runs`. What is there
already is not done again. Each of the two Pythons has one of the libraries, so imports stand where they are used.
"""

import json
import subprocess
import sys
from pathlib import Path

SAMPLES, LENGTH, WINDOWS = 32, 512, 60
JOBS = {
    "gptqmodel-gptq-w4g64": {"method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False},
    "gptqmodel-gptq-w3g64": {"method": "gptq", "bits": 3, "group_size": 64, "sym": False, "desc_act": False},
    "gptqmodel-gptq-w4g64-act": {"method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": True},
    "gptqmodel-gptq-w3g64-act": {"method": "gptq", "bits": 3, "group_size": 64, "sym": False, "desc_act": True},
    "gptqmodel-awq-w4g64": {"method": "awq", "bits": 4, "group_size": 64, "sym": False},
}


def main(model: str, out: Path, python: str) -> None:
    """Write the samples, let GPTQModel quantize, evaluate."""
    from transformers import AutoTokenizer

    from intactkv_eval.data.calibration_text import load_samples

    samples = load_samples("wikitext2", AutoTokenizer.from_pretrained(model), SAMPLES, LENGTH)
    (out / "made").mkdir(parents=True, exist_ok=True)
    (out / "samples.json").write_text(json.dumps([window.tolist() for window in samples.tokens]))
    for name in JOBS:
        made, runs = out / "made" / name, out / "runs" / name
        if not (made / "config.json").is_file():
            subprocess.run([python, __file__, "quantize", model, str(out), name], check=True)
        if not list(runs.rglob("results_*.json")):
            cell = f"pretrained={made},dtype=bfloat16,pivot=none"
            command = [
                "eval",
                "--model_args",
                cell,
                "--tasks",
                "ppl_wikitext2",
                "--limit",
                str(WINDOWS),
                "--batch_size",
                "1",
            ]
            said = ["--device", "cpu", "--log_samples", "--output_path", str(runs)]
            subprocess.run([sys.executable, "-m", "intactkv_eval.cli", *command, *said], check=True)


def quantize(model: str, out: Path, name: str) -> None:
    """In GPTQModel's own Python."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.models._const import DEVICE

    ids = json.loads((out / "samples.json").read_text())
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    config = QuantizeConfig(**JOBS[name], offload_to_disk=False, device=DEVICE.CPU)
    found = GPTQModel.load(model, config)
    found.quantize(rows, batch_size=1)
    found.save(str(out / "made" / name))


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3])
