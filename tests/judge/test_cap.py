"""What is spent: priced before it leaves, capped over all calls, and nothing asked that cannot succeed."""

import json
import re

import pytest
from helpers.judge_bench import answers_of, lines
from helpers.judging import command, judged
from helpers.server import GOOD, completion, honest

from intactkv_eval.judge.cost import BudgetTracker, Prices
from intactkv_eval.judge.journal import NAME

PRICES = Prices(10.0, 30.0)
EACH = 0.0903  # USD, of 9000 tokens in and 10 out


def dear(prompt, before):
    return 200, json.dumps(completion(honest(prompt), prompt_tokens=9000))


@pytest.fixture
def many(tmp_path):
    return lines(tmp_path / "many.jsonl", answers_of("many", choices=4))  # 40 requests


@pytest.mark.parametrize("concurrency", [1, 4, 8])
def test_a_cap_holds_over_calls_and_is_overshot_by_no_more_than_is_in_flight(
    server, many, bench, tmp_path, concurrency
):
    """The server counts far more than the prices reserved: what is in flight is all that can go over."""
    server.behave, server.seconds = dear, 0.02
    options = {"prices": PRICES, "cap": 1.0, "concurrency": concurrency}
    table, said = judged(server, [many], bench, tmp_path / "out", **options)
    spent = EACH * sum(server.asked.values())
    assert 1.0 - 0.15 < spent <= 1.0 + concurrency * EACH
    assert "the cap of 1.00 USD is reached; raise --cap to go on" in said
    assert "| many |" in table
    asked = sum(server.asked.values())
    again, said = judged(server, [many], bench, tmp_path / "out", **options)
    assert sum(server.asked.values()) == asked, "nothing more is spent"
    assert (again, "the cap of 1.00 USD is reached" in said) == (table, True)
    assert f"{spent:.2f} USD were spent before" in said
    judged(server, [many], bench, tmp_path / "out", **{**options, "cap": 2.0})
    assert EACH * sum(server.asked.values()) <= 2.0 + concurrency * EACH


def test_a_request_that_costs_no_more_than_its_price_never_goes_over(server, many, bench, tmp_path):
    full = {"prompt_tokens": 40, "completion_tokens": 2048}
    server.behave = lambda prompt, before: (200, json.dumps(completion("no number", **full)))
    judged(server, [many], bench, tmp_path / "out", prices=PRICES, cap=0.5, concurrency=8)
    spent = PRICES.of((40, 2048)) * sum(server.asked.values())
    assert 0.4 < spent <= 0.5


def test_those_in_flight_are_waited_for_not_taken_for_spent(server, many, bench, tmp_path):
    """40 requests of 0.0013 USD fit into a cap that has room for the prices of six at a time."""
    server.seconds = 0.02
    _, said = judged(server, [many], bench, tmp_path / "out", prices=PRICES, cap=0.4, concurrency=8)
    assert sum(server.asked.values()) == 40
    assert "is reached" not in said
    assert server.most_at_once <= 6


def test_a_run_that_ends_at_its_cap_prints_and_exits_3(server, many, bench, tmp_path, called, capfd):
    server.behave = dear
    arguments = command(server, many, bench, tmp_path / "out", "--price-in", "10", "--price-out", "30", "--cap", "0.5")
    code, said = called(*arguments[3:])
    assert code == 3
    assert "incomplete: the cap of 0.50 USD is reached" in said
    code, said = called(*arguments[3:], "--allow-partial")
    assert (code, "is reached" in said) == (0, True)


def test_a_bad_request_is_not_asked_again_nor_paid(server, answer_file, bench, tmp_path):
    server.behave = lambda prompt, before: 400 if "First 1?" in prompt else GOOD
    _, said = judged(server, [answer_file], bench, tmp_path / "out", prices=PRICES, cap=1.0)
    assert set(server.asked.values()) == {1}
    assert "2 without a reply" in said
    assert "800 tokens in, 80 out, 0.01 USD" in said


def test_what_has_a_verdict_is_counted_by_what_is_there(server, bench, tmp_path):
    """Equal answers of two choices are two requests, each with a verdict of its own."""
    twice = answers_of("twice", choices=2)
    for row in twice:
        row["choices"][1]["turns"] = row["choices"][0]["turns"]
    file = lines(tmp_path / "twice.jsonl", twice)
    server.reply = lambda prompt: f"[[{5 + server.asked[prompt]}]]"
    table, said = judged(server, [file], bench, tmp_path / "out", concurrency=1)
    assert "20 to judge, 0 have their verdict; 20 requests" in said
    assert set(server.asked.values()) == {2}
    assert "| twice | 6.50 |" in table
    _, said = judged(server, [file], bench, tmp_path / "out", concurrency=1)
    assert "20 to judge, 20 have their verdict; 0 requests" in said


@pytest.mark.parametrize("fault", [1.0, (200, "{")])
def test_what_may_be_billed_is_paid_for_and_kept(server, answer_file, bench, tmp_path, fault):
    """A request that is given up, or whose reply cannot be read, counts with its price in later calls too."""
    server.behave = lambda prompt, before: fault if "First 1?|" in prompt else GOOD
    options = {"prices": PRICES, "cap": 1.0, "timeout": 0.3, "retries": 1, "attempts": 2}
    _, said = judged(server, [answer_file], bench, tmp_path / "out", **options)
    spent = float(re.search(r"out, ([\d.]+) USD", said).group(1))
    assert spent == pytest.approx(2 * 0.0614 + 9 * 0.0013, abs=0.01)
    server.behave = lambda prompt, before: GOOD
    _, said = judged(server, [answer_file], bench, tmp_path / "out", **options)
    assert f"{spent:.2f} USD were spent before" in said


def test_lines_of_before_costs_were_kept_count_at_todays_prices(server, answer_file, bench, tmp_path):
    judged(server, [answer_file], bench, tmp_path / "out")
    path = tmp_path / "out" / NAME
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for row in old:
        for key in ("cost", "references", "temperature", "error"):
            del row[key]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    _, said = judged(server, [answer_file], bench, tmp_path / "out", prices=PRICES, cap=1.0)
    assert "10 have their verdict; 0 requests" in said
    assert "0.01 USD were spent before" in said


def test_a_null_verdict_is_read_again_by_todays_rules(server, answer_file, bench, tmp_path):
    server.reply = lambda prompt: "The rating is [7]."
    judged(server, [answer_file], bench, tmp_path / "out")
    path = tmp_path / "out" / NAME
    path.write_text(path.read_text().replace('"verdict":7.0', '"verdict":null'))
    table, said = judged(server, [answer_file], bench, tmp_path / "out")
    assert "10 have their verdict" in said
    assert "| one | 7.00 |" in table


def test_a_budget_with_no_room_says_so_and_one_without_a_cap_has_room():
    budget = BudgetTracker(PRICES, 0.5)
    assert not budget.reserve((0, 10**6))
    assert budget.is_reached
    assert BudgetTracker(Prices(), None).reserve((10**12, 10**12))
