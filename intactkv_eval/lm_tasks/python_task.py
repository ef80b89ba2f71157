"""PythonTask: a task of lm_eval that is a YAML and a class; the YAML names the class with `class: !function`.

For tasks whose requests depend on the model's tokenizer or on --metadata.
"""

import logging
from typing import Any

from intactkv_eval.compat.lm_eval_api import ConfigurableTask, task_base

logger = logging.getLogger(__name__)


class PythonTask(ConfigurableTask):
    """ConfigurableTask, built from a YAML that has a `class` key (lm_eval hands that key on unread)."""

    def __new__(cls, config: dict[str, Any]) -> "PythonTask":
        """A task of this class that is also one of lm_eval's class for its output type, where there are several."""
        base = task_base(config.get("output_type"))
        made = cls if issubclass(cls, base) else type(cls.__name__, (cls, base), {"__module__": cls.__module__})
        task: PythonTask = object.__new__(made)
        return task

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def build_all_requests(self, *, cache_requests: bool = False, **options: Any) -> None:
        """Without lm_eval's request cache: it knows requests by the task's name, not by tokenizer and metadata."""
        if cache_requests:
            logger.warning("%s: --cache_requests is not used, its requests depend on the model", self.config.task)
        options.pop("rewrite_requests_cache", None)
        super().build_all_requests(cache_requests=False, **options)
