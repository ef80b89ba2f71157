"""The class and the function that the tasks in this folder name."""

from intactkv_eval.lm_tasks.mt_bench import MTBenchTask, lengths  # noqa: F401  named in the YAML files
