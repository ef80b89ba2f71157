"""The whole files that the fuzzer changes, made of a small model: a pivot, levels, a choice, a run with its samples."""

import json
from pathlib import Path

import torch
from helpers.tiny import build_model

from intactkv_eval.commands.quantize import Source, quantize_to_folder
from intactkv_eval.kv_quant.codebook_calibration import calibrate_codebook
from intactkv_eval.lm.evaluate_task import evaluate_task
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.pivot.prefix_choice import Evidence, PrefixChoice
from intactkv_eval.pivot.prefix_file import PrefixFile, Searched
from intactkv_eval.quantize.job import job_from

_MACHINE = ("pretty_env_info", "git_hash", "upper_git_hash")


def make_seeds(folder: Path, tokenizer) -> None:
    """folder/seeds: pivot.safetensors, levels.safetensors, choice.json, model/, checkpoints/, results/."""
    folder = folder / "seeds"
    folder.mkdir(parents=True)
    model = build_model("llama")
    fingerprint = fingerprint_of(model, "main")
    capture(model, (256, 7), fingerprint).save(folder / "pivot.safetensors")
    texts = [torch.randint(0, 200, (32,), generator=torch.Generator().manual_seed(place)) for place in range(4)]
    calibrate_codebook(model, texts, 3, fingerprint, (256,), 1, "seed").save(folder / "levels.safetensors")
    before, after = Evidence((256,), 3.0, (2.0, 2.1)), Evidence((256, 7), 1.0, (2.0, 2.2))
    choice = PrefixChoice((256, 7), before, after, (((256,), 3.0), ((256, 7), 1.0)))
    searched = Searched(
        model="m", weight_hash="h", dtype="float32", samples={}, threshold=8.0, max_prefix_tokens=4, min_reduction=0.2
    )
    PrefixFile(tokens=(256, 7), text=("<s>", "a"), searched=searched, choice=choice).save(folder / "choice.json")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for layout, asked in (("compressed-tensors", {}), ("intactkv", {"rotate": True, "act_bits": 8})):
        job = job_from({"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True, **asked}, [])
        quantize_to_folder(Source(str(folder / "model")), folder / "checkpoints" / layout, layout, job)
    _run(folder)


def _run(folder: Path) -> None:
    arguments = {"pretrained": str(folder / "model"), "weights": "rtn", "bits": 3, "group_size": 32, "pivot": "bos"}
    settings = {"device": "cpu", "limit": 8, "batch_size": 1}
    evaluate_task(arguments, "intactkv_demo_ppl", folder / "out", None, {"ppl_window": 32}, **settings)
    written = next((folder / "out").rglob("results_*.json")).parent
    for path in written.glob("results_*.json"):  # an input that is kept must not tell of the machine
        said = {key: value for key, value in json.loads(path.read_text()).items() if key not in _MACHINE}
        path.write_text(json.dumps(said))
    written.rename(folder / "results")
