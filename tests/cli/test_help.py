"""The help: groups, an example on every page, sentences, the keys of a cell."""

import re

import pytest
import typer
from typer.testing import CliRunner

from intactkv_eval.cell.arguments import KEYS
from intactkv_eval.cli.main import COMMANDS, app

PAGES = [(name, example) for commands in COMMANDS.values() for name, (_, example) in commands.items()]


def page(*arguments):
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


def test_commands_stand_in_groups():
    text = page("--help")
    places = [text.index(group) for group in COMMANDS]
    assert places == sorted(places)
    assert page("-h") == text
    assert "--install-completion" in text


@pytest.mark.parametrize(("name", "example"), PAGES, ids=[name for name, _ in PAGES])
def test_every_page_has_an_example(name, example):
    text = page(name, "-h")
    assert page(name, "--help") == text
    assert "Example: " in text
    if example.startswith("intactkv"):
        assert example.split()[1] == name
        options = {option for parameter in command_of(name).params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--?[a-z][a-z_-]*", example)) <= options, "the example's options are the command's"


@pytest.mark.parametrize("name", [name for name, _ in PAGES if name != "eval"])
def test_the_help_of_an_option_is_a_sentence(name):
    for parameter in command_of(name).params:
        text = getattr(parameter, "help", None)
        if text is None or parameter.name == "help":
            continue
        assert text[0].isupper() or re.match(r"[a-z-]+: ", text), text
        assert len(text.split()) > 2, text


def test_the_keys_of_a_cell():
    text = page("eval", "--help")
    for name, key in KEYS.items():
        assert re.search(rf"^  {name} +{re.escape(key.help)}$", text, re.MULTILINE), name
    assert "--model_args" in text


def command_of(name):
    return typer.main.get_command(app).commands[name]
