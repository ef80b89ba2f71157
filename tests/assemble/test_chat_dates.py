"""Chat templates that write the date: one date in all prompts of a run, in its pivot and in its record."""

import copy
import dataclasses
import datetime

import pytest
from helpers.tiny import BOS, build_model
from lm_eval.api.model import CacheHook, CachingLM
from transformers.utils import chat_template_utils

from intactkv_eval.assemble import chat_date
from intactkv_eval.assemble.chat_date import chat_settings, moment_of_run
from intactkv_eval.cell.spec import PivotSpec
from intactkv_eval.chat.conversations import Conversations
from intactkv_eval.chat.messages import Message
from intactkv_eval.compat.lm_eval_api import hash_args, make_request
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.multi_turn import REQUEST
from intactkv_eval.pivot.kv import PivotKV, head_of_file
from intactkv_eval.training.examples import examples_of

REST = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DATED = "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n" + REST
TIMED = "{{ bos_token }}It is {{ strftime_now('%Y-%m-%d %H:%M:%S') }}.\n" + REST
BY_DEFAULT = (  # Granite's and Mistral's: only where no system message is given
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}Today's Date: {{ strftime_now('%B %d, %Y') }}.\n{% endif %}"
    + REST
)
LLAMA_3_1 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "Today Date: {{ date_string }}\n" + REST
)
LLAMA_3_2 = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}Today Date: {{ date_string }}\n" + REST
)
THINKING = "{{ bos_token }}thinking {{ 'off' if enable_thinking is false else 'on' }}\n" + REST
HI = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def clock(monkeypatch):
    """The clock that transformers' templates read; `clock.day = 29` sets it."""

    class Clock(datetime.datetime):
        day, hour_of_day = 28, 9

        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 11, cls.day, cls.hour_of_day, 30, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


@pytest.fixture
def make(tokenizer):
    def made(template, **arguments):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return IntactKVLM(pretrained=build_model("llama"), tokenizer=own, **{"pivot": "prompt", **arguments})

    return made


def captured(lm, path):
    lm.pivoted_model.pivot.save(path)
    return str(path)


def behind(lm):
    """What stands behind the pivot of a chat prompt."""
    ids, _ = lm.tok_batch_encode([lm.apply_chat_template(HI)])
    return lm.tokenizer.decode(ids[0])


def conversation(lm):
    """The prompt of a conversation that the model answers."""
    ((turn,),) = lm.generate_turns([make_request(REQUEST, ("hi", {"messages": HI, "max_gen_toks": 2}), 0)], True)
    return turn[1]


@pytest.mark.parametrize("template", [DATED, BY_DEFAULT, LLAMA_3_2, TIMED])
def test_a_file_of_yesterday_stands_in_front_of_prompts_of_its_date(make, clock, tmp_path, caplog, template):
    path = captured(make(template), tmp_path / "head.safetensors")
    expected = make(template).apply_chat_template(HI)
    clock.day, clock.hour_of_day = 29, 7
    lm = make(template, pivot=path)
    assert behind(lm) == "Hello there\n<|assistant|>"
    assert lm.apply_chat_template(HI) == conversation(lm) == expected
    assert lm.framing.counts["stripped"] == 2
    assert lm.cell_record()["chat_date"] == ("2026-11-28T09:30:05" if template == TIMED else "2026-11-28")
    assert "give its baseline chat_date=2026-11-28" in caplog.text


@pytest.mark.parametrize("template", [DATED, LLAMA_3_2, TIMED])
def test_midnight_changes_no_prompt_of_a_run(make, clock, template):
    lm = make(template)
    before = lm.apply_chat_template(HI)
    clock.day = 29
    assert lm.apply_chat_template(HI) == conversation(lm) == before
    assert behind(lm) == "Hello there\n<|assistant|>"
    talk = Conversations.of([(Message("user", "hi"), Message("assistant", "yes yes"))], "x")
    (example,) = examples_of(talk, lm.tokenizer, list, least_counted=1, chat=lm.chat)
    assert before.startswith(lm.tokenizer.decode(example.body).partition("\n")[0])
    other = make(template)
    assert other.apply_chat_template(HI) != before, "a run that begins today has today's date"
    assert lm.apply_chat_template(HI) == before
    assert chat_template_utils.datetime is clock


@pytest.mark.parametrize("template", [DATED, BY_DEFAULT, LLAMA_3_1, LLAMA_3_2])
def test_the_date_can_be_chosen(make, clock, template):
    lm = make(template, chat_date="2025-01-31")
    prompt = lm.apply_chat_template(HI)
    assert "31 Jan 2025" in prompt or "January 31, 2025" in prompt
    assert conversation(lm) == prompt
    assert lm.tokenizer.decode(lm.pivoted_model.token_ids) + "Hello there\n<|assistant|>" == prompt
    record = lm.cell_record()
    assert record["chat_date"] == record["cell"]["pivot"]["chat_date"] == "2025-01-31"
    timed = make(TIMED, chat_date="2025-01-31T18:00")
    assert "It is 2025-01-31 18:00:00." in timed.apply_chat_template(HI)


def test_a_date_that_is_a_variable_with_a_default_is_left_alone_unless_it_is_chosen(make, clock, tmp_path):
    lm = make(LLAMA_3_1)
    assert "Today Date: 26 Jul 2024" in lm.apply_chat_template(HI)
    assert lm.cell_record()["chat_date"] is None
    path = captured(make(LLAMA_3_1, chat_date="2025-01-31"), tmp_path / "head.safetensors")
    assert behind(make(LLAMA_3_1, pivot=path)) == "Hello there\n<|assistant|>"
    named = make(LLAMA_3_1, chat_template_args={"date_string": "1 May 1990"})
    assert "Today Date: 1 May 1990" in named.apply_chat_template(HI)
    with pytest.raises(ConfigError, match="does nothing"):
        make(LLAMA_3_1, chat_template_args={"date_string": "1 May 1990"}, chat_date="2025-01-31")


def test_a_head_that_this_run_does_not_render_is_refused_with_both(make, clock, tmp_path):
    path = captured(make(DATED), tmp_path / "head.safetensors")
    with pytest.raises(PivotError, match=r"Today is 28 Nov 2026.*Today is 29 Nov 2026.*captured with prompts of 2026"):
        make(DATED, pivot=path, chat_date="2026-11-29")
    with pytest.raises(PivotError, match="another chat template"):
        make(THINKING, pivot=path)
    path = captured(make(THINKING, enable_thinking=False), tmp_path / "off.safetensors")
    assert make(THINKING, pivot=path, enable_thinking=False).framing.counts["stripped"] == 0
    with pytest.raises(PivotError, match=r"thinking off.*thinking on.*captured with enable_thinking=False"):
        make(THINKING, pivot=path)
    path = captured(make(LLAMA_3_1), tmp_path / "default.safetensors")
    with pytest.raises(PivotError, match="no date of its own"):
        make(LLAMA_3_1, pivot=path, chat_date="2026-11-29")


def test_a_head_of_another_date_is_known_without_a_record(make, clock, tmp_path):
    """As a list of tokens, or in a file that says nothing of it."""
    pivot = make(DATED).pivoted_model.pivot
    listed = "tokens:" + "+".join(map(str, pivot.token_ids))
    dataclasses.replace(pivot, head=None).save(tmp_path / "old.safetensors")
    for source in (listed, str(tmp_path / "old.safetensors")):
        assert behind(make(DATED, pivot=source)) == "Hello there\n<|assistant|>"
    clock.day = 29
    for source in (listed, str(tmp_path / "old.safetensors")):
        with pytest.raises(PivotError, match=r"28 Nov 2026.*29 Nov 2026.*chat_date=YYYY-MM-DD"):
            make(DATED, pivot=source)
        assert behind(make(DATED, pivot=source, chat_date="2026-11-28")) == "Hello there\n<|assistant|>"
    assert make(DATED, pivot=f"tokens:{BOS}+7+9").cell_record()["chat_date"] == "2026-11-29"


@pytest.mark.parametrize(
    "value", ["tomorrow", "28.11.2026", "2026-13-01", "20261128", 20261128, "2026-11-28T09:00+02:00"]
)
def test_what_is_no_date_is_refused(make, value):
    with pytest.raises(ConfigError, match=r"chat_date=.*(2026-11-28T09:30|leave out the time zone)"):
        make(DATED, chat_date=value)


@pytest.mark.parametrize("template", [THINKING, None, "{{ bos_token }}{# strftime_now #}" + REST])
def test_a_date_that_does_nothing_is_refused(make, template):
    assert make(template, pivot="bos").cell_record()["chat_date"] is None
    with pytest.raises(ConfigError, match="chat_date=2026-11-28: does nothing"):
        make(template, pivot="bos", chat_date="2026-11-28")


def test_answers_that_were_kept_yesterday_are_not_those_of_today(make, clock):
    """lm_eval keeps a conversation under its questions, which do not hold the date."""

    class Hook(dict):
        filename, tablename = ":memory:", "x"

        @property
        def dbdict(self):
            return self

        def add_partial(self, kind, arguments, answer):
            self[hash_args(kind, arguments)] = answer

    kept = Hook()
    prompts = []
    for day in (28, 29, 29):
        clock.day = day
        lm = make(DATED, pivot="bos")
        lm.cache_hook = kept
        prompts.append(conversation(lm))
    assert len(kept) == 2
    assert "28 Nov" in prompts[0]
    assert "29 Nov" in prompts[1]


def test_a_response_cache_behind_a_head_of_yesterday_names_its_date(make, clock, tmp_path):
    def cached(**arguments):
        lm = make(DATED, **arguments)
        CachingLM(lm, str(tmp_path / "answers.db"))
        return lm

    assert isinstance(cached().cache_hook, CacheHook)
    clock.day = 29
    with pytest.raises(ConfigError, match="go on with chat_date=2026-11-28"):
        cached()
    cached(chat_date="2026-11-28")


def test_templates_that_write_at_random_are_told(make):
    assert make("{{ bos_token }}{{ ['a', 'b', 'c'] | random }}\n" + REST).cell_record()["chat_template_is_random"]
    assert not make(THINKING + "{# random #}").cell_record()["chat_template_is_random"]


def test_models_of_one_run_have_one_date(make, clock):
    with moment_of_run() as begun:
        first = make(DATED).apply_chat_template(HI)
        clock.day = 30
        with moment_of_run():
            assert make(DATED).apply_chat_template(HI) == first
    assert begun == "2026-11-28T09:30:05"
    with moment_of_run("2025-01-31", chosen=False):
        assert "26 Jul 2024" in make(LLAMA_3_1).apply_chat_template(HI)
    with moment_of_run("2025-01-31"):
        assert "31 Jan 2025" in make(LLAMA_3_1).apply_chat_template(HI)


def test_of_several_processes_the_first_says_what_day_it_is(tokenizer, clock, monkeypatch):
    monkeypatch.setattr(chat_date.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        chat_date.torch.distributed, "broadcast_object_list",
        lambda held, source: held.__setitem__(0, datetime.datetime(2026, 11, 27, 23, 59)),
    )  # fmt: skip
    own = copy.deepcopy(tokenizer)
    own.chat_template = DATED
    assert chat_settings(PivotSpec(), own, {}).date == "2026-11-27"


def test_a_file_holds_how_its_prompts_were_rendered(make, clock, tmp_path):
    captured(make(DATED, chat_template_args={"tone": "dry"}), tmp_path / "head.safetensors")
    head = head_of_file(tmp_path / "head.safetensors")
    assert head == PivotKV.load(tmp_path / "head.safetensors").head
    assert (head.date, head.arguments) == ("2026-11-28", {"tone": "'dry'"})
    assert PivotKV.load(tmp_path / "head.safetensors").token_ids
    captured(make(DATED, pivot="bos"), tmp_path / "bos.safetensors")
    assert head_of_file(tmp_path / "bos.safetensors") is None
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "head.safetensors").read_bytes().replace(b"2026-11-28", b"xxxx-11-28"))
    with pytest.raises(PivotError, match="capture it anew"):
        make(DATED, pivot=str(damaged))
