"""Checkpoints that were calibrated behind the pivot: their honest baseline is the plainly calibrated checkpoint."""

import numpy as np
import pytest
from test_report import FP, write

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.cell.formulas import current, names_of_job
from intactkv_eval.quantize.job import job_from
from intactkv_eval.report.collect import collect
from intactkv_eval.report.compare import compare
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.tables import markdown

RNG = np.random.default_rng(0)
FULL = RNG.normal(3.0, 0.3, 40)
GIVEN = {"method": "gptq", "bits": 4, "group_size": 64, "data": "c4", "samples": 32, "length": 512}


def put(folder, date, lost, behind=None, pivot="none", intact=None, **more):
    """A run of a GPTQ checkpoint; behind: the pivot that it was calibrated behind."""
    job = job_from({**GIVEN, **more, **({"pivot": behind} if behind else {})}, []).model_dump(mode="json")
    made = {"job": job, "source": {"model": "m", "dtype": "float32"}, "formulas": current(names_of_job(job))}
    found = {"method": "gptq", "bits": 4, "group_size": 64, "symmetric": False, "act_order": False, "mixed": False}
    cell = {"pretrained": f"made-{behind}", "pivot": pivot}
    if intact is not None:
        cell["intact"] = intact
    if pivot != "none" and intact is not False:
        cell["reference"] = "m"
    values = list(FULL + lost + RNG.normal(0, 0.02, 40))
    record = {"source_hash": f"{behind}", "quantization": {**found, "made": made}}
    if pivot.startswith("tokens:"):
        record["pivot_tokens"] = [1, 5]
    write(folder, cell, values, date, record=record)


def behind_of(folder):
    runs, _ = collect([folder])
    run = next(run for run in runs if run.identity.behind and run.identity.cell.pivot.intact)
    return compare(run, "ppl_x", runs), markdown(runs)


def test_its_own_baseline_is_no_baseline(tmp_path):
    """Without the pivot it does what it was never made for: that run made 31% of it 69%."""
    write(tmp_path, FP, list(FULL), 1)
    put(tmp_path, 2, 0.9, behind="bos")
    put(tmp_path, 3, 0.3, behind="bos", pivot="bos")
    found, text = behind_of(tmp_path)
    assert (found.to_baseline, found.share) == (None, None)
    row = next(line for line in text.splitlines() if "calibrated behind bos | 16 | bos |" in line)
    assert "%" not in row
    assert "run: intactkv quantize m --out PLAIN --method gptq --bits 4 --group-size 64" in text
    put(tmp_path, 4, 0.4, pivot="bos")
    _, text = behind_of(tmp_path)
    assert "intactkv quantize" not in text, "the checkpoint is there"
    assert "run: intactkv eval --model_args pretrained=PLAIN,pivot=none --tasks ppl_x" in text


def test_the_plain_checkpoint_is_its_baseline(tmp_path):
    write(tmp_path, FP, list(FULL), 1)
    put(tmp_path, 2, 0.9, behind="bos")
    put(tmp_path, 3, 0.3, behind="bos", pivot="bos")
    put(tmp_path, 4, 0.5)
    put(tmp_path, 5, 0.4, pivot="bos")
    found, text = behind_of(tmp_path)
    runs, _ = collect([tmp_path])
    plain = next(run for run in runs if run.date == 4)
    assert found.to_baseline.value == found.score.value - plain.scores["ppl_x"].value
    assert found.share.value == pytest.approx(0.4, abs=0.02)
    assert "run: intactkv" not in text
    assert "Not compared" not in text


@pytest.mark.parametrize("change", [{"samples": 64}, {"bits": 3}, {"data": "wikitext2"}])
def test_another_job_is_not_the_plain_one(tmp_path, change):
    write(tmp_path, FP, list(FULL), 1)
    put(tmp_path, 3, 0.3, behind="bos", pivot="bos")
    put(tmp_path, 4, 0.5, **change)
    found, text = behind_of(tmp_path)
    assert found.to_baseline is None
    assert "run: intactkv quantize" in text


def test_a_longer_pivot_has_the_plain_one_behind_the_same_tokens(tmp_path):
    write(tmp_path, FP, list(FULL), 1)
    put(tmp_path, 3, 0.3, behind="tokens:1+5", pivot="tokens:1+5")
    put(tmp_path, 4, 0.5)
    found, text = behind_of(tmp_path)
    assert found.to_baseline is None
    assert "pretrained=PLAIN,pivot=tokens:1+5,intact=false --tasks ppl_x" in text
    put(tmp_path, 5, 0.6, pivot="tokens:1+5", intact=False)
    assert behind_of(tmp_path)[0].to_baseline is not None


def test_the_command_makes_the_very_job(tmp_path):
    """Every option of the words that are printed, read by the command's own parser, is that of the checkpoint."""
    from typer.testing import CliRunner

    from intactkv_eval.cli import main as cli
    from intactkv_eval.commands import quantize

    write(tmp_path, FP, list(FULL), 1)
    put(tmp_path, 3, 0.3, behind="bos", pivot="bos", seed=7, symmetric=True)
    words = behind_of(tmp_path)[1].partition("run: intactkv ")[2].partition(";")[0].split()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "quantize_to_folder", lambda *a: seen.append(a) or (1, "gptq"))
        result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    [(source, _, _, job)] = seen
    expected = job_from({**GIVEN, "seed": 7, "symmetric": True}, [])
    assert (job, source.dtype, source.pretrained) == (expected, "float32", "m")
    assert cell_from_args({"pretrained": "PLAIN", "pivot": "none"})
    assert grid_of(collect([tmp_path])[0])
