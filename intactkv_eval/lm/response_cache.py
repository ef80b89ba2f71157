"""lm_eval's --use_cache keeps answers by request text, not by model: two cells on one file would share their answers.

The first cell writes its own identity into the file; another cell is refused. Answers lie there as pickles, which
lm_eval will load: they are read as plain values (plain_pickle.py), which answers always are.
"""

import hashlib
import json
import pickle
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from intactkv_eval.errors import ConfigError
from intactkv_eval.storage.documents import BROKEN_PICKLE
from intactkv_eval.storage.limits import PICKLE_BYTES
from intactkv_eval.storage.plain_pickle import read_plain

_WAIT = 30.0  # seconds for another process to end its writing
_COLUMNS = re.compile(
    r"""CREATE\s+TABLE\s+("[^"]*"|\w+)\s*\(\s*key\s+TEXT\s+PRIMARY\s+KEY\s*,\s*value\s+BLOB\s*\)""", re.I
)
_KEY, _DATE = "intactkv_cell", "intactkv_chat_date"


def guard_response_cache(cache_hook: Any, record: Mapping[str, Any], chat_date: str | None = None) -> None:
    """Claim the cache behind `cache_hook` for the cell of `record`. Raises ConfigError where it is another's.

    chat_date: of the run's chat prompts. Answers are kept by the text of their prompts, so another date does no harm,
    but where the pivot holds it.
    """
    answers = getattr(cache_hook, "dbdict", None)
    if answers is None:
        return
    _check_plain(answers.filename, answers.tablename)
    answers.decode = _plain  # what comes into the file later is read no otherwise
    identity = hashlib.sha256(json.dumps(_without_date(record), sort_keys=True).encode()).hexdigest()
    _claim(answers, identity)
    owner = answers.get(_KEY)
    if owner is None:
        raise ConfigError("--use_cache: this file was filled by another model class; name a new file for this cell")
    if owner != identity:
        raise ConfigError(
            "--use_cache: this file holds the answers of another cell, or of this cell by an older revision of a "
            "formula; name one file for each cell, and a new file after an update of intactkv-eval"
            + _other_date(answers.get(_DATE), chat_date)
        )
    answers[_DATE] = chat_date
    answers.commit()


def _claim(answers: Any, identity: str) -> None:
    """Write an owner into an empty file, in one step: of two cells that begin at once one is the owner."""
    with closing(sqlite3.connect(answers.filename, timeout=_WAIT)) as file, file:
        file.execute(
            f'INSERT INTO "{answers.tablename}" (key, value) SELECT ?, ? '
            f'WHERE NOT EXISTS (SELECT 1 FROM "{answers.tablename}")',
            (_KEY, answers.encode(identity)),
        )


def _without_date(record: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's date may be chosen or be the present one: what of it changes answers is in prompts and pivot tokens."""
    cell = record.get("cell")
    if not isinstance(cell, Mapping) or not isinstance(cell.get("pivot"), Mapping):
        return dict(record)
    pivot = {key: value for key, value in cell["pivot"].items() if key != "chat_date"}
    return {**record, "cell": {**cell, "pivot": pivot}}


def _other_date(held: str | None, chat_date: str | None) -> str:
    if held is None or held == chat_date:
        return ""
    return f". Its chat prompts are of {held}, and this run's of {chat_date}: go on with chat_date={held}"


def _plain(value: Any) -> Any:
    if not isinstance(value, bytes) or len(value) > PICKLE_BYTES:
        raise pickle.UnpicklingError(f"a value that is no answer of at most {PICKLE_BYTES >> 20} MiB")
    return read_plain(value)


def _check_plain(path: str, table: str) -> None:
    try:
        with closing(sqlite3.connect(path)) as file:
            for kind, name, said in file.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
                plain = kind == "table" and _COLUMNS.fullmatch(str(said))
                if not plain and (kind != "table" or name == table):  # columns may be computed, and indexes of it too
                    raise pickle.UnpicklingError(f"the {kind} {name}, which acts when the file is used")
            for (value,) in file.execute(f'SELECT value FROM "{table}"'):
                _plain(value)
    except (*BROKEN_PICKLE, sqlite3.Error) as error:
        raise ConfigError(
            f"--use_cache {path}: holds something that is no answer ({type(error).__name__}: {error}); loading it "
            "could run a stranger's code. Remove the file"
        ) from None
