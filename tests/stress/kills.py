"""Kills: python tests/stress/kills.py [--kills 50] [--seed 0] [--only NAME]

Each work is run once undisturbed, then in other folders, killed with SIGKILL at random moments and begun anew after
each, until it ends: its end must be the same. After every kill what is there is read as its user would read it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[:0] = [str(Path(__file__).parents[1])]

from helpers import forked, works
from helpers.judge_bench import answers_of, lines, write_bench
from helpers.tiny import build_model, byte_tokenizer


@contextmanager
def serving_apart() -> Iterator[str]:
    """A judge in a process of its own, which outlives the kills; its address."""
    program = [sys.executable, str(HERE.parent / "helpers" / "server.py")]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def stage(folder: Path, url: str) -> dict[str, works.Work]:
    """The works, over a small model, a bench and answers in `folder`."""
    model = folder / "model"
    build_model("llama").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    bench = write_bench(folder / "data")
    answers = [lines(folder / "answers" / f"{name}.jsonl", answers_of(name)) for name in ("m", "n")]
    return works.works(model, url, bench, answers)


def kill_often(work: works.Work, folder: Path, kills: int, seed: str) -> str:
    """What came of it, for people. Raises AssertionError where an end differs from the undisturbed one."""
    draw = Random(seed)
    warm, calm = _made(folder / "warm"), _made(folder / "calm")
    forked.run(work.arguments(warm), warm / "log.txt")
    begun = time.monotonic()
    code = forked.run(work.arguments(calm), calm / "log.txt")
    seconds = time.monotonic() - begun
    wanted = work.end(calm)
    assert code == 0, _said(calm)
    assert wanted
    cut = ended = 0
    while cut < kills:
        place = _made(folder / f"run{ended}")
        until = draw.uniform(0, seconds)
        pid = forked.begin(work.arguments(place), place / "log.txt")
        code = forked.ended(pid, until)
        if code is None:
            forked.kill(pid)
            cut += 1
        found = work.end(place)
        assert found is None or found.items() <= wanted.items(), "half of it was taken for the whole"
        if found == wanted:
            ended += 1
        assert code in {None, 0}, _said(place)
    place = _made(folder / f"run{ended}")
    code = forked.run(work.arguments(place), place / "log.txt")
    assert code == 0, _said(place)
    assert work.end(place) == wanted, "another end than undisturbed"
    return f"{cut} kills within {seconds:.1f} s, {ended + 1} ends as undisturbed"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _said(folder: Path) -> str:
    return (folder / "log.txt").read_text(errors="replace")[-3000:]


def main() -> int:
    """Kill all of them; 1 where an end differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name, serving_apart() as url:
        staged = stage(Path(name), url)
        for key in [key for key in staged if asked.only in key]:
            try:
                print(
                    f"{key}: {kill_often(staged[key], Path(name) / key, asked.kills, f'{asked.seed}/{key}')}",
                    flush=True,
                )
            except AssertionError as error:
                failed += 1
                print(f"{key}: FAILED {error}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
