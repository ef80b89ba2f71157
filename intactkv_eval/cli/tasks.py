"""`intactkv tasks`."""

from intactkv_eval.sanitize import say
from intactkv_eval.storage.files import shipped_folder


def tasks() -> None:
    """Print the folder of the tasks that come with this package, for lm_eval's --include_path."""
    say(shipped_folder("tasks"))
