"""A shipped sweep at length: python tests/stress/at_length.py SWEEP FOLDER [NAME=MODEL], else with the demo's SmolLM2.

Run undisturbed; then with SIGKILL at five random moments, resumed after each; then on a local Ray cluster of two workers of
which one is killed. Every sample's figures must be the same. Give every process the same number of threads
(OMP_NUM_THREADS=1): sums of another order are other sums.
"""

import random
import signal
import sys
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parents[1])]

from helpers.running import command, figures, processes_of, ray_cluster, ray_workers, wait_for

from intactkv_eval.demo import prepare_model
from intactkv_eval.storage.files import cache_folder

HOURS = 3 * 3600


def ended(process) -> None:
    """Raises AssertionError unless the sweep ended with every cell done."""
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said[-2000:]
    assert ", 0 failed" in said, said[-2000:]
    print(said.strip().splitlines()[-1], flush=True)


def calm(file: str, folder: Path, *more: str) -> None:
    """Undisturbed."""
    ended(command(folder, "--devices", "cpu,cpu", *more, file=file))


def killed(file: str, folder: Path, cells: int, *more: str) -> None:
    """Five kills, spread over the whole sweep."""
    draw = random.Random(0)
    for moment in sorted(draw.uniform(0, cells) for _ in range(5)):
        process = command(folder, "--devices", "cpu,cpu", *more, file=file)
        wait_for(int(moment), folder, process, HOURS)
        time.sleep(draw.uniform(0, 10))
        others = processes_of(process)[1:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not psutil.wait_procs(others, timeout=60)[1], "workers end with the sweep"
        print(f"killed with {len(figures(folder / 'out'))} cells done", flush=True)
    ended(command(folder, "--devices", "cpu,cpu", *more, file=file))


def on_ray(file: str, folder: Path, cells: int, *more: str) -> None:
    """Two workers; one is killed when a third of the cells is done."""
    with ray_cluster(folder) as address:
        where = ["--executor", "ray", "--address", address, "--shared-folder", str(folder / "made")]
        process = command(folder, *where, *more, file=file)
        wait_for(cells // 3, folder, process, HOURS)
        workers = ray_workers()
        workers[0].kill()
        print(f"killed one of {len(workers)} workers", flush=True)
        ended(process)


def main() -> None:
    """All three, and whether they agree."""
    file, out = sys.argv[1], Path(sys.argv[2]).resolve()
    named = sys.argv[3:] or [f"HuggingFaceTB/SmolLM2-135M-Instruct={prepare_model(cache_folder() / 'demo')}"]
    models = [f"--model={said}" for said in named]
    for name in ("calm", "killed", "ray"):
        (out / name).mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    calm(file, out / "calm", *models)
    wanted = figures(out / "calm" / "out")
    print(f"undisturbed: {len(wanted)} cells in {time.monotonic() - begun:.0f} s", flush=True)
    for name, work in (("killed", killed), ("ray", on_ray)):
        begun = time.monotonic()
        work(file, out / name, len(wanted), *models)
        assert figures(out / name / "out") == wanted, f"{name}: other figures"
        print(f"{name}: the same figures, in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
