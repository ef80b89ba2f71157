"""The fuzzer: python tests/fuzz/run.py [--inputs 100000] [--seed 0] [--only NAME] [--keep FOLDER]

Every input must end in success or an IntactKVError, within 5 seconds and 2 GB. Inputs that do otherwise are kept in
tests/fuzz/found/TARGET/, where the test suite reads them ever after. The same seed makes the same inputs.
"""

import argparse
import contextlib
import hashlib
import io
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
FOUND = HERE / "found"
SECONDS, BYTES = 5.0, 2 * 2**30


class TookTooLong(BaseException):
    """Raised inside of a read that does not end."""


def peak() -> int:
    """Bytes of memory that this process has held at most since `forget_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    """From now on."""
    Path("/proc/self/clear_refs").write_text("5")


def queued() -> float:
    """Seconds that this thread was ready to run and had no processor: other work on the machine, not the read's."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def read_one(target, data: bytes, fresh: bool = True) -> str:
    """How reading ended: `read`, `refused`, or what went wrong. fresh: forget what took memory before."""
    from intactkv_eval.errors import IntactKVError

    def ring(_signal: int, _frame: object) -> None:
        if time.monotonic() - queued() >= begun + SECONDS:
            raise TookTooLong

    if fresh:
        forget_peak()
    before = peak()
    begun = time.monotonic() - queued()
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS / 10)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            target.read(data)
        ended = "read"
    except IntactKVError as error:
        ended = "refused" if str(error).strip() else "an error without a message"
    except TookTooLong:
        ended = f"took more than {SECONDS:g} s"
    except Exception as error:  # noqa: BLE001  the fuzzer's own question is which these are
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "intactkv_eval" in frame.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "not in our code"
        ended = f"{type(error).__name__} at {place}: {str(error)[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = peak() - before
    return f"took {grown / 2**30:.1f} GB" if grown > BYTES else ended


@dataclass
class Worst:
    """What reads took at most: seconds that the machine did not spend on other work, by target; bytes of the process."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes: int = 0


def fuzz(
    found, inputs: int, seed: int, keep: Path | None, worst: Worst | None = None
) -> tuple[Counter, dict[str, str]]:
    """`inputs` of all targets in turn; how many ended how, and the first failure of each kind.

    worst: gets what reads took at most.
    """
    ends: Counter = Counter()
    failures: dict[str, str] = {}
    seen: set[str] = set()
    names = sorted(found)
    for number in range(inputs):
        name = names[number % len(names)]
        data = found[name].make(Random(f"{seed}/{name}/{number}"))
        begun = time.monotonic() - queued()
        ended = read_one(found[name], data, fresh=number % 100 == 0)
        if worst is not None:
            worst.seconds[name] = max(worst.seconds.get(name, 0.0), time.monotonic() - queued() - begun)
            worst.bytes = max(worst.bytes, peak())
        ends[name, ended if ended in {"read", "refused"} else "failed"] += 1
        kind = f"{name}: {ended.partition(': ')[0]}"
        if ended not in {"read", "refused"} and kind not in seen:
            seen.add(kind)
            failures[f"{name}: {ended}"] = digest = hashlib.sha256(data).hexdigest()[:16]
            if keep is not None:
                (keep / name).mkdir(parents=True, exist_ok=True)
                (keep / name / digest).write_bytes(data)
    return ends, failures


def main() -> int:
    """Fuzz and say what came; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=Path, default=FOUND)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    import seeds
    import targets
    from helpers.tiny import byte_tokenizer

    with tempfile.TemporaryDirectory() as name:
        seeds.make_seeds(Path(name), byte_tokenizer())
        found = {key: one for key, one in targets.targets(Path(name)).items() if asked.only in key}
        begun = time.monotonic()
        worst = Worst()
        ends, failures = fuzz(found, asked.inputs, asked.seed, asked.keep, worst)
        seconds = time.monotonic() - begun
    for key in sorted(found):
        counts = ", ".join(f"{ends[key, end]} {end}" for end in ("read", "refused", "failed"))
        print(f"{key:28} {counts}")
    for failure, digest in failures.items():
        print(f"\n{digest} {failure}")
    slowest = max(worst.seconds, key=lambda key: worst.seconds[key])
    print(f"\nslowest read: {worst.seconds[slowest]:.2f} s ({slowest}); memory at most {worst.bytes / 2**20:.0f} MiB")
    print(f"{sum(ends.values())} inputs in {seconds:.0f} s, {len(failures)} kinds of failure")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
