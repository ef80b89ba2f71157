"""FastChat's own code beside ours (tests/fixtures/released/judge.json): requests char by char, judgments, scores, win rates."""

import hashlib
import json
from pathlib import Path

import pytest
from helpers.judge_bench import answers_of, lines, write_bench
from helpers.judging import judged, rows

from intactkv_eval.judge.matches import Bench, single_matches
from intactkv_eval.judge.references import load_references
from intactkv_eval.judge.scores import ALL
from intactkv_eval.judge.verdict import rating_of
from intactkv_eval.mt_bench.answers import Answer
from intactkv_eval.mt_bench.questions import load_prompts, load_questions

RELEASED = json.loads((Path(__file__).parents[1] / "fixtures" / "released" / "judge.json").read_text())
JUDGES = ("gpt-4", "gpt-4-0125-preview")


@pytest.fixture
def models(tmp_path):
    write_bench(tmp_path / "data", references=JUDGES)
    return {name: lines(tmp_path / "answers" / f"{name}.jsonl", answers_of(name)) for name in ("one", "two", "three")}


def replies(found):
    """FastChat's prompts -> what its judge replied: a prompt that differs in one character has no reply."""
    single = {row["user_prompt"]: row["judgment"] for row in found if "judgment" in row}
    pairs = {row[f"{game}_user_prompt"]: row[f"{game}_judgment"] for row in found if "g1_judgment" in row
             for game in ("g1", "g2")}  # fmt: skip
    return single | pairs


@pytest.fixture
def tables(monkeypatch):
    """The figures that are printed, before they are rounded."""
    kept = {}
    for name in ("score_table", "win_table"):
        monkeypatch.setattr(f"intactkv_eval.judge.written.{name}", lambda figures, heading: kept.update(figures) or "")
    return kept


@pytest.mark.parametrize("judge", JUDGES)
def test_requests_judgments_and_scores_are_fastchats(server, models, tmp_path, tables, judge):
    """Missing verdicts (-1) and zeros are among them."""
    released = RELEASED["judged"][f"{judge} single"]
    server.reply = replies(released["rows"]).__getitem__
    judged(server, models.values(), tmp_path / "data", tmp_path / "out", model=judge, attempts=1)
    assert sum(server.served.values()) == len(released["rows"]) == 30
    options = {key: value for key, value in released["options"].items() if key != "n"}  # 1, the default
    for body in server.bodies:
        assert body["messages"][0] == {"role": "system", "content": "Be fair."}
        assert body == {"model": judge, "messages": body["messages"], **options}
    ours = {(row["model"], row["question_id"], row["turn"]): row for row in rows(tmp_path / "out", judge=judge)}
    assert {row["score"] for row in ours.values()} >= {-1, 0}
    for row in released["rows"]:
        mine = ours[row["model"], row["question_id"], row["turn"]]
        assert {key: mine[key] for key in row if key != "tstamp"} == {k: v for k, v in row.items() if k != "tstamp"}
    for part, shown in released["shown"].items():
        assert {name: row[part].value for name, row in tables.items()} == pytest.approx(shown, abs=1e-12)


@pytest.mark.parametrize("mode", ["pairwise-baseline", "pairwise-all"])
def test_pairs_and_win_rates_are_fastchats(server, models, tmp_path, tables, mode):
    released = RELEASED["judged"][f"{JUDGES[1]} {mode}"]
    server.reply = replies(released["rows"]).__getitem__
    beside = {"all_pairs": True} if mode == "pairwise-all" else {"baseline": models.pop("three")}
    judged(server, models.values(), tmp_path / "data", tmp_path / "out", model=JUDGES[1], attempts=1, **beside)
    found = rows(tmp_path / "out", "pair", JUDGES[1])
    ours = {(row["model_1"], row["model_2"], row["question_id"], row["turn"]): row for row in found}
    assert len(ours) == len(released["rows"])
    for row in released["rows"]:
        mine = ours[row["model_1"], row["model_2"], row["question_id"], row["turn"]]
        assert {key: mine[key] for key in row if key != "tstamp"} == {k: v for k, v in row.items() if k != "tstamp"}
    for model, shown in released["shown"].items():
        wins = tables[model]
        assert (wins.won, wins.tied, wins.lost) == (shown["win"], shown["tie"], shown["loss"])
        assert wins.figures[ALL].value == pytest.approx(shown["win_rate_adjusted"], abs=1e-12)


OTHERWISE = {"[[11]]": None, "[[100]]": None, "It reads nums[5].": None, "see [1]": None,
             "First [3], then rating: [6]": 6}  # fmt: skip


@pytest.mark.parametrize("reply", RELEASED["ratings"])
def test_ratings_are_fastchats_but_where_the_docs_say(reply):
    theirs = RELEASED["ratings"][reply]
    wanted = OTHERWISE.get(reply, None if theirs == -1 else theirs)
    assert rating_of(reply) == wanted


@pytest.mark.shared
@pytest.mark.parametrize("judge", JUDGES)
def test_requests_on_the_real_questions(shared_hub, judge):
    """80 questions, 2 turns; of the two judges' requests 60 differ, by their references."""
    folder = shared_hub.parent
    questions = {question.question_id: question for question in load_questions("mt_bench", folder).questions}
    references = load_references(judge, None, "mt_bench", folder, questions.values())
    bench = Bench(questions, load_prompts("mt_bench", folder), references)
    answers = {
        place: Answer(question_id=place, answer_id="a", model_id="m", tstamp=0.0, choices=[
            {"index": 0, "turns": [f"Answer {n} to {place}: {{x}} é" for n in (1, 2)]}])
        for place in questions
    }  # fmt: skip
    sent = [[text for _, text in match.messages] for match in single_matches(bench, answers)]
    ours = [hashlib.sha256(json.dumps(one).encode()).hexdigest()[:16] for one in sent]
    assert sorted(ours) == RELEASED["real"][judge]
    assert len(set(RELEASED["real"][JUDGES[0]]) - set(RELEASED["real"][JUDGES[1]])) == 60
