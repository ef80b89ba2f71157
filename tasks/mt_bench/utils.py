"""The class and the function that the tasks in this folder name."""

from intactkv_eval.harness.mt_bench_task import MTBenchTask, lengths  # noqa: F401  named in the YAML files
