"""The judge as the tests run it."""

import sys

from intactkv_eval.commands.judge import judge_command
from intactkv_eval.judge.client import JudgeServer
from intactkv_eval.judge.options import JudgeOptions
from intactkv_eval.storage.files import read_jsonl

SECRET = "sk-very-secret-0123456789"


def judged(server, sources, bench, out, model="judge", **options):
    settings = {"timeout": 5.0, "retries": 4} | {
        key: options.pop(key) for key in ("timeout", "retries", "requests_per_minute") if key in options
    }
    said = []
    made = judge_command(
        sources, JudgeServer(model, server.url, **settings), JudgeOptions(questions=bench, **options), out, said.append
    )
    return made.table, "\n".join([*said, *made.incomplete])


def rows(out, kind="single", judge="judge"):
    return read_jsonl(out / "model_judgment" / f"{judge}_{kind}.jsonl")


def command(server, answer_file, bench, out, *more):
    return [sys.executable, "-m", "intactkv_eval.cli", "judge", str(answer_file), "--model", "judge", "--out", str(out),
            "--base-url", server.url, "--questions", str(bench), *more]  # fmt: skip
