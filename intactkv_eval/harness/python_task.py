"""PythonTask: a task of lm_eval that is a YAML and a class; the YAML names the class with `class: !function`."""

from typing import Any

from lm_eval.api.task import ConfigurableTask


class PythonTask(ConfigurableTask):
    """ConfigurableTask, built from a YAML that has a `class` key (lm_eval 0.4.13 hands that key on unread)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
