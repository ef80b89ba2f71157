"""The seam to lm_eval: names, requests and defaults that differ from release to release.

Supported are lm_eval 0.4.13 to the newest release that pyproject.toml allows, 0.5.0.dev1 among them. The rest of the
package imports lm_eval from here alone. Knows no model and no task of ours.

                                   0.4.13                            0.5.0.dev1
    default seeds                  evaluate_config.DEFAULT_SEED      a default of EvaluatorConfig
    a request                      metadata=(task, document, N)      task_name=, doc_id=, repeats=
    a rolling request's arguments  (text,)                           ("", text)
    a rolling request's answer     a log-likelihood                  (log-likelihood, False)
    the class of a task            one for all                       one for each output_type
    max_cpu_memory                 goes into the device map          is forgotten
"""

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING
from importlib import import_module
from io import StringIO
from typing import Any

from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker, evaluation_tracker
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging, simple_parse_args_string

__all__ = [
    "HFLM",
    "SEED_NAMES",
    "ConfigurableTask",
    "EvaluationTracker",
    "EvaluatorConfig",
    "HarnessCLI",
    "Instance",
    "TaskManager",
    "default_seeds",
    "evaluation_tracker",
    "hash_args",
    "help_of_run",
    "make_request",
    "normalize_gen_kwargs",
    "rolling_text",
    "rolling_value",
    "setup_logging",
    "simple_evaluate",
    "simple_parse_args_string",
    "stop_sequences_criteria",
    "task_base",
    "with_cpu_memory",
    "without_processes",
]

_BY_METADATA = Instance.__dataclass_fields__["task_name"].default is not MISSING
_OF_CHAT = {"apply_chat_template", "chat_template"}
_ROLLING = "loglikelihood_rolling"
SEED_NAMES = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def default_seeds() -> dict[str, int]:
    """The seeds that lm_eval's command line sets where none is named, as arguments of `simple_evaluate`."""
    return dict(zip(SEED_NAMES, EvaluatorConfig().seed, strict=True))


def help_of_run() -> str:
    """The help text of `lm_eval run`."""
    text = StringIO()
    arguments = sys.argv
    sys.argv = ["lm_eval", "run", "--help"]
    try:
        with redirect_stdout(text), suppress(SystemExit):
            HarnessCLI().parse_args()
    finally:
        sys.argv = arguments
    return text.getvalue()


def make_request(
    kind: str,
    arguments: tuple[Any, ...],
    index: int = 0,
    doc: Mapping[str, Any] | None = None,
    task: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """A request of lm_eval, an `Instance`.

    Args:
        kind: The method of the model that answers it, such as "loglikelihood".
        arguments: What the method gets; of a rolling log-likelihood the text alone.
        index: Its place among the requests of its document.
        doc: The document that it belongs to.
        task: The name of its task.
        given: What lm_eval handed to the task's `construct_requests` for it.
    """
    named = {key: value for key, value in (given or {}).items() if key not in _OF_CHAT}
    if _BY_METADATA:
        named.setdefault("metadata", (task, named.pop("doc_id", None), 1))
    else:
        named = {"task_name": task or "", "doc_id": 0, **named}
        if kind == _ROLLING and len(arguments) == 1:
            arguments = ("", *arguments)
    return Instance(request_type=kind, doc=dict(doc or {}), arguments=arguments, idx=index, **named)


def without_processes() -> None:
    """Let lm_eval compute its bootstrapped errors in this process: a worker of a pool may not start others."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # 0.4.13 looks here each time
    try:
        newer = import_module("lm_eval.api.metrics.stderr")
    except ImportError:
        return
    newer.__dict__["DISABLE_MULTIPROC"] = True  # 0.5.0.dev1 has read its variable when it was imported


def task_base(output_type: str | None) -> type:
    """The class of lm_eval's own tasks of an output type, such as "multiple_choice"."""
    classes: Mapping[str, type] = getattr(ConfigurableTask, "_registry", {})
    return classes.get(str(output_type), ConfigurableTask)


def with_cpu_memory(arguments: Mapping[str, Any], limit: Any) -> dict[str, Any]:
    """hf's arguments of `from_pretrained`, with the CPU's share of the device map that 0.5.0.dev1 leaves out."""
    memory = arguments.get("max_memory")
    if limit is None or memory is None:
        return dict(arguments)
    return {**arguments, "max_memory": {**memory, "cpu": limit}}


def rolling_text(request: Any) -> str:
    """The text of a rolling log-likelihood request."""
    text: str = request.args[-1]
    return text


def rolling_value(answer: Any) -> float:
    """The log-likelihood in the answer to a rolling request."""
    return float(answer[0] if isinstance(answer, tuple) else answer)
