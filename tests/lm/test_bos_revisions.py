"""What was made when a chat template's BOS was tokenized as text is not mixed with what is made now."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import spm
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from intactkv_eval.assemble.chat_date import head_record
from intactkv_eval.cell import formulas
from intactkv_eval.chat.bos_text import bos_changes_tokens, encoded_as_text
from intactkv_eval.cli.main import app
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.lm import generation
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.pivot.tokens import prompt_head
from intactkv_eval.report.alike import unlike
from intactkv_eval.report.collect import collect


@pytest.fixture(params=[True, False], ids=["legacy", "not legacy"])
def legacy(request):
    return request.param


@pytest.fixture
def folder(tmp_path, legacy):
    return spm.save_both(tmp_path / "m", legacy, chat_template=spm.TEMPLATE)


def made_of(folder, **cell):
    return IntactKVLM(str(folder), device="cpu", dtype="float32", **cell)


def before(monkeypatch):
    """As it was: BOS is text in every request, and the formula has its first revision."""
    monkeypatch.setattr(formulas, "REVISIONS", {**formulas.REVISIONS, "chat": 1})


@pytest.mark.parametrize("says_its_head", [True, False])
def test_a_head_that_was_captured_before_is_refused(folder, legacy, tmp_path, says_its_head):
    lm = made_of(folder, pivot="prompt")
    old = prompt_head(lm.tokenizer, lm.chat, encoded_as_text)
    file = tmp_path / "head.safetensors"
    made = capture(lm.model, old, fingerprint_of(lm.model, "main"))
    replace(made, head=head_record(lm.tokenizer, lm.chat) if says_its_head else None).save(file)
    if legacy:
        assert old == lm.pivoted_model.token_ids
        made_of(folder, pivot=str(file))
        return
    assert old != lm.pivoted_model.token_ids
    with pytest.raises(PivotError, match=r"tokenized as text, so they begin with \['<s>', '<0x5B>', .*capture it anew"):
        made_of(folder, pivot=str(file))
    with pytest.raises(PivotError, match="tokenized as text"):
        made_of(folder, pivot="tokens:" + "+".join(map(str, old)), intact=False)


def test_runs_name_the_formula_where_it_matters(folder, legacy, tmp_path, monkeypatch):
    """A response cache of before is refused, and one of a tokenizer that makes the same of both is not."""
    with monkeypatch.context() as patched:
        before(patched)
        record = evaluated(folder, tmp_path / "cache")["config"]["intactkv"]
        assert record["formulas"] == ({} if legacy else {"chat": 1})
    if legacy:
        evaluated(folder, tmp_path / "cache")
        return
    with pytest.raises(ConfigError, match="older revision of a formula"):
        evaluated(folder, tmp_path / "cache")
    assert evaluated(folder, tmp_path / "other")["config"]["intactkv"]["formulas"] == {"chat": 2}


def evaluated(folder, cache=None, out=None, chat=True):
    """A task of two questions, through lm_eval."""
    arguments = {"pretrained": str(folder), "dtype": "float32", "pivot": "none"}
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"q": q}) + "\n" for q in ("Quick towns?", "And the fox?")))
    task = {
        "task": "two_questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["seven", "many"],
        "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    tracker = None if out is None else EvaluationTracker(output_path=str(out))
    results = simple_evaluate(
        "intactkv", arguments, [task], device="cpu", batch_size=2, use_cache=None if cache is None else str(cache),
        apply_chat_template=chat, evaluation_tracker=tracker, log_samples=True, bootstrap_iters=1,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    if tracker is not None:
        tracker.save_results_aggregated(results=results, samples=results["samples"])
    return results


def test_a_chat_run_of_before_is_no_baseline(folder, legacy, tmp_path, monkeypatch):
    """Runs of before record the template as it is; without one, and where nothing changed, they are still compared."""
    scores = {}
    for name, chat in (("chat", True), ("plain", False)):
        for when in ("before", "now"):
            with monkeypatch.context() as patched:
                if when == "before":
                    before(patched)
                    patched.setattr(generation, "_BOS_IS_ADDED", "")
                evaluated(folder, out=tmp_path / name / when, chat=chat)
            ((run,), _) = collect([tmp_path / name / when])
            scores[name, when] = run.scores["two_questions"]
    assert unlike(scores["plain", "before"], scores["plain", "now"]) == []
    found = [text.split(" (")[0] for text in unlike(scores["chat", "before"], scores["chat", "now"])]
    assert found == ([] if legacy else ["chat_template"])


def test_rows_that_were_trained_before_are_refused(folder, legacy, tmp_path):
    data, out, old = (tmp_path / name for name in ("talks.jsonl", "now.safetensors", "before.safetensors"))
    row = [("user", "Quick towns?"), ("assistant", "Seven green towns write many letters.")]
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in row]})
    data.write_text("\n".join([line] * 6))
    cell = f"pretrained={folder},dtype=float32,weights=rtn,bits=3,group_size=16,pivot=bos"
    options = ["--epochs", 1, "--batch-size", 2, "--min-assistant-tokens", 2, "--max-tokens", 60]
    done = CliRunner().invoke(
        app, ["calibrate", *map(str, ["--model_args", cell, "--data", data, "--out", out, *options])]
    )
    assert done.exit_code == 0, done.output
    made = PivotKV.load(out)
    trained = made.fingerprint.calibrated
    assert ("bos" in trained.settings) is not legacy
    settings = {key: value for key, value in trained.settings.items() if key != "bos"}
    fingerprint = made.fingerprint.model_copy(update={"calibrated": trained.model_copy(update={"settings": settings})})
    replace(made, fingerprint=fingerprint).save(old)
    rtn = {"weights": "rtn", "bits": 3, "group_size": 16}
    assert torch.equal(made_of(folder, pivot=str(out), **rtn).pivoted_model.pivot.keys[0], made.keys[0])
    if legacy:
        made_of(folder, pivot=str(old), **rtn)
        return
    with pytest.raises(PivotError, match=r"formula chat of revision 1, now 2: .* train it anew"):
        made_of(folder, pivot=str(old), **rtn)


def test_the_formula_is_asked_of_the_tokenizer(tmp_path, legacy):
    assert bos_changes_tokens(spm.tokenizer(tmp_path, legacy, chat_template=spm.TEMPLATE)) is not legacy
