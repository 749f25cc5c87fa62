"""Feed damaged adapters and data files to deltaw: each must be read right, or be refused by one error before anything changes.

    python benchmarks/fuzz.py                        # 2,000 adapters and 2,000 data files
    python benchmarks/fuzz.py --count 200 --seed 7
    python benchmarks/fuzz.py --show adapter:123     # one case with its whole traceback

Writes results/fuzz.json: how many were read right, refused, read wrongly in silence, ended in another exception, hung, or took
more memory than three times the file and 128 MiB (the libraries' own share). Each case has a number, and is made from it and the
seed alone. A worker process runs the cases; one that takes longer than the limit is killed and counts as hung.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import fuzz_adapters
import fuzz_data

LIMIT = 20.0
"""Seconds for one case."""
KINDS: dict[str, Callable[[Path], Callable[[int, int, Path], fuzz_adapters.Outcome]]] = {
    "adapter": fuzz_adapters.campaign, "data": fuzz_data.campaign,
}  # fmt: skip
# Memory that a case may take besides three times its files
_SPARE = 128 << 20


def run_case(
    case: Callable[[int, int, Path], fuzz_adapters.Outcome], seed: int, number: int, folder: Path
) -> dict[str, str]:
    """Run one case. Return its result, its mutation and, where it is a fault, what happened."""
    folder.mkdir(parents=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = case(seed, number, folder)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(frames) if "/deltaw/" in f.filename), frames[-1])
        where = f"{Path(place.filename).name}:{place.lineno}"
        note = " ".join(getattr(error, "__notes__", []))
        return {"result": "foreign", "what": f"{note} {type(error).__name__} at {where}: {error!s:.200}"}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    files = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if grown > 3 * files + _SPARE:
        return {"result": "memory", "what": f"{outcome.mutation}: {grown >> 20} MiB for {files:,} bytes"}
    return {"result": outcome.result, "what": f"{outcome.mutation}: {outcome.what}"}


def work(kind: str, seed: int, numbers: range, pipe: Connection) -> None:
    """Run cases in this process, and send each one's number before it and its result after it."""
    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        case = KINDS[kind](Path(scratch))
        for number in numbers:
            pipe.send((number, None))
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                pipe.send((number, run_case(case, seed, number, Path(folder) / "case")))
    pipe.send((-1, None))


def campaign(kind: str, count: int, seed: int) -> dict[str, object]:
    """Run the cases of one kind, with a new worker after each that hangs or dies. Return the counts and the faults."""
    counts, faults, mutations = Counter[str](), list[str](), Counter[str]()
    start, next_one = time.monotonic(), 0
    while next_one < count:
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("spawn").Process(
            target=work, args=(kind, seed, range(next_one, count), theirs), daemon=True
        )
        worker.start()
        theirs.close()
        current, limit = next_one, 120.0  # to import the libraries and make the models
        try:
            while ours.poll(limit):
                number, result = ours.recv()
                if number < 0:
                    next_one = count
                    break
                current, limit = number, LIMIT
                if result is not None:
                    next_one = number + 1
                    counts[result["result"]] += 1
                    mutations[result["what"].split(":")[0]] += 1
                    if result["result"] not in ("right", "refused"):
                        faults.append(f"{kind}:{number} {result['result']} {result['what']}")
                        print(faults[-1], file=sys.stderr, flush=True)
            else:
                raise TimeoutError
        except (TimeoutError, EOFError) as error:
            if limit != LIMIT:
                raise RuntimeError("a worker ended before its first case") from error
            counts["hang" if isinstance(error, TimeoutError) else "died"] += 1
            faults.append(f"{kind}:{current} {'hang' if isinstance(error, TimeoutError) else 'died'}")
            next_one = current + 1
            print(faults[-1], file=sys.stderr, flush=True)
        worker.kill()
        worker.join()
    seconds = round(time.monotonic() - start)
    return {
        "cases": count,
        **counts,
        "seconds": seconds,
        "mutations": dict(sorted(mutations.items())),
        "faults": faults,
    }


def show(name: str, seed: int) -> None:
    """Run one case in this process, with its whole traceback."""
    kind, _, number = name.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        case = KINDS[kind](Path(folder))
        (Path(folder) / "case").mkdir()
        print(case(seed, int(number), Path(folder) / "case"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="one kind alone; writes no results")
    parser.add_argument("--show", metavar="KIND:NUMBER", help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.show:
        show(arguments.show, arguments.seed)
        return
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    result = {"seed": arguments.seed, **{kind: campaign(kind, arguments.count, arguments.seed) for kind in kinds}}
    if arguments.kind:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        import machine

        machine.write("fuzz", result)


if __name__ == "__main__":
    main()
