"""Kill deltaw at random instants, or let the disk be full, and see what is left: nothing half-made may be taken for whole, and
nothing from before be lost.

    python benchmarks/crashes.py                  # 240 kills and 110 full disks over all kinds of work, about ten minutes
    python benchmarks/crashes.py --kills 40 --disks 0 --only train,merge

Each kill works in a copy of a small prepared folder. A command is run there once without a break: its time bounds the instants,
its files are what must come out. Then, for each kill, the command is started and gets SIGKILL after a random time. Now each
output must be the one from before, the new one, or absent where nothing was before, by its sha256. After that the command is run
again (a training is resumed): the outputs must be the new ones, bit for bit, and no temporary file may be left.

A full disk is a limit on the size of files (RLIMIT_FSIZE), a random one below the largest file that the command writes. The
command must end with one message and no traceback; then the same is asked as after a kill.

A command is a fork of this process, which has imported everything: a new process would take seconds to start. Writes
results/crashes.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = 0
TRAIN = [
    "--steps",
    "24",
    "--batch",
    "4",
    "--eval-every",
    "6",
    "--log-every",
    "4",
    "--samples",
    "1",
    "--save-every",
    "2",
]


@dataclass(frozen=True)
class Work:
    """One kind of work, in a folder with model/, data.jsonl, adapter/, other/, tuned/, merged/ and run/."""

    name: str
    words: Sequence[str]
    """The command."""
    outputs: Sequence[str]
    """Files and folders that it writes."""
    prepare: Sequence[Sequence[str]] = ()
    """Commands before it."""
    again: Callable[[], Sequence[str]] | None = None
    """The command that goes on after a kill, asked in the folder; the same one where it is None."""
    keep: Sequence[str] = field(default=())
    """Outputs from before that must not be lost at any instant."""


def resumed() -> Sequence[str]:
    """A training is resumed where it had begun, else begun anew. One that ended, but could not write its state, is looked at."""
    if Path("run/result.json").exists() and not Path("run/state.safetensors").exists():
        return ["inspect", "run/adapter"]
    begun = Path("run/config.yaml").exists() or Path("run/next/config.yaml").exists()
    return ["train", "--resume", "run"] if begun else ["train", "model", "data.jsonl", "--out", "run", *TRAIN]


def replaced() -> Sequence[str]:
    """A run that was to replace another one is resumed where it had begun."""
    if Path("run/next/config.yaml").exists():
        return ["train", "--resume", "run"]
    return ["train", "model", "data.jsonl", "--out", "run", "--rank", "3", "--overwrite", *TRAIN]


FRESH = ["train", "model", "data.jsonl", "--out", "run", *TRAIN]
MERGE = ["merge", "model", "adapter", "-o", "out"]
COMPRESS = ["compress", "other", "--rank", "1", "-o", "out"]
GGUF = ["-o", "a.gguf", "--base", "model"]
SWEEP = [
    "sweep",
    "model",
    "data.jsonl",
    "--out",
    "sweep",
    "--ranks",
    "2,1",
    "--targets",
    "q",
    "--test-most",
    "4",
    *TRAIN[:-4],
]
BEFORE = [["merge", "model", "other", "-o", "out"]]
WORK = (
    Work("train", FRESH, ["run/adapter"], again=resumed),
    Work(
        "train --overwrite", [*FRESH, "--rank", "3", "--overwrite"], ["run/adapter"], [FRESH], replaced, ["run/adapter"]
    ),
    Work("train --resume", ["train", "--resume", "run"], ["run/adapter"], [["stop", *FRESH]], again=resumed),
    Work("sweep", SWEEP, ["sweep/runs"]),
    Work("merge", [*MERGE, "--overwrite"], ["out"], BEFORE, keep=["out"]),
    Work("merge --reversible", [*MERGE, "--reversible", "--overwrite"], ["out"], BEFORE, keep=["out"]),
    Work("unmerge", ["unmerge", "out", "adapter", "-o", "back", "--overwrite"], ["back"], [[*MERGE, "--reversible"]]),
    Work(
        "compress",
        ["compress", "adapter", "--rank", "1", "-o", "out", "--overwrite"],
        ["out"],
        [COMPRESS],
        keep=["out"],
    ),
    Work(
        "convert",
        ["convert", "adapter", *GGUF, "--overwrite"],
        ["a.gguf"],
        [["convert", "other", *GGUF]],
        keep=["a.gguf"],
    ),
    Work(
        "extract",
        ["extract", "model", "tuned", "--rank", "2", "-o", "out", "--overwrite"],
        ["out"],
        [COMPRESS],
        keep=["out"],
    ),
    Work("save", ["save", "adapter", "out"], ["out"], [["save", "other", "out"]], keep=["out"]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--disks", type=int, default=110)
    parser.add_argument("--only", help="kinds of work, with commas")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dry", action="store_true", help="write no result")
    chosen = parser.parse_args()
    import machine

    works = [work for work in WORK if not chosen.only or work.name in chosen.only.split(",")]
    with tempfile.TemporaryDirectory() as name:
        counts = campaign(Path(name), works, chosen.kills, chosen.disks, chosen.seed)
    total = {key: sum(of_work[key] for of_work in counts.values()) for key in (*TRIED, *FAULTS)}
    for work_name, of_work in counts.items():
        print(work_name, {k: v for k, v in of_work.items() if k != "problems"}, *of_work["problems"], sep="\n  ")
    print(total)
    if not chosen.dry:
        machine.write("crashes", {"seed": chosen.seed, "total": total, "work": counts})
    sys.exit(any(total[fault] for fault in FAULTS))


TRIED = ("kills", "hit", "disks", "full")
"""Kills, and those that met the command at work; limits on files, and those that stopped it."""
FAULTS = ("half_made", "lost", "other_bits", "left_over", "failed", "traceback")
"""An output that is neither the old nor the new one; an old one that is gone; a result of other bits after going on; temporary
files afterwards; a command that could not go on; a full disk told by a traceback."""


def campaign(place: Path, works: Sequence[Work], kills: int, disks: int, seed: int) -> dict[str, Any]:
    """Return the counts of each kind of work, over which kills and full disks are shared out."""
    imports()
    template = place / "template"
    call(place, ["template", str(template)])
    chance, counts = random.Random(seed), {}
    for i, work in enumerate(works):
        shares = [number // len(works) + (i < number % len(works)) for number in (kills, disks)]
        counts[work.name] = of_work(place, template, work, *shares, chance)
    return counts


def imports() -> None:
    """Import what the commands need, once. Nothing is computed: threads would not survive a fork."""
    import transformers.models.llama.modeling_llama  # noqa: F401


def of_work(place: Path, template: Path, work: Work, kills: int, disks: int, chance: random.Random) -> dict[str, Any]:
    """Kill one kind of work so many times, and let it meet so many full disks."""
    before = place / "before"
    shutil.copytree(template, before)
    for words in work.prepare:
        call(before, words)
    old = {output: digest(before / output) for output in work.outputs}
    reference = place / "reference"
    shutil.copytree(before, reference)
    clock, began = time.time(), time.monotonic()
    call(reference, work.words)
    seconds = time.monotonic() - began
    new = {output: digest(reference / output) for output in work.outputs}
    counts: dict[str, Any] = {
        "kills": kills,
        "hit": 0,
        "disks": disks,
        "full": 0,
        **dict.fromkeys(FAULTS, 0),
        "seconds": round(seconds, 3),
        "problems": [],
    }
    files = [file.stat() for file in reference.rglob("*") if file.is_file()]
    largest = max(file.st_size for file in files if file.st_mtime >= clock)

    def look(folder: Path, what: str) -> None:
        for fault, problem in looked_at(folder, work, old, new):
            counts[fault] += 1
            counts["problems"].append(f"{what}: {problem}")
        shutil.rmtree(folder)

    for number in range(kills):
        folder = place / "here"
        shutil.copytree(before, folder)
        wait = chance.uniform(0, seconds)
        counts["hit"] += killed(folder, work.words, wait)
        look(folder, f"kill {number} after {wait:.3f} s")
    for number in range(disks):
        folder = place / "here"
        shutil.copytree(before, folder)
        limit = chance.randrange(largest)
        code, said = limited(folder, work.words, limit)
        counts["full"] += code != 0
        if "Traceback" in said:
            counts["traceback"] += 1
            counts["problems"].append(f"files of at most {limit:,} bytes: {said}")
        look(folder, f"disk {number}, files of at most {limit:,} bytes")
    shutil.rmtree(before)
    shutil.rmtree(reference)
    return counts


def looked_at(folder: Path, work: Work, old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str]]:
    """Return faults and words for them: of what a kill left, and of what going on makes of it."""
    problems = []
    for output in work.outputs:
        left = digest(folder / output)
        if left not in (old[output], new[output], "") and output != "sweep/runs":
            problems.append(("half_made", f"{output} is neither the old nor the new one"))
        if output in work.keep and not left:
            problems.append(("lost", f"{output} is gone"))
    here = Path.cwd()
    os.chdir(folder)
    words = work.again() if work.again is not None else work.words
    os.chdir(here)
    code = call(folder, words, check=False)
    if code:
        said = (folder / "said.txt").read_text().strip().splitlines()
        problems.append(("failed", f"{' '.join(words)} ended with {code}: {said[-1] if said else ''}"))
    elif wrong := [output for output in work.outputs if digest(folder / output) != new[output]]:
        problems.append(("other_bits", f"{', '.join(wrong)} is not what one run without a break gives"))
    if rest := [
        str(path.relative_to(folder)) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old", ".lock")
    ]:
        problems.append(("left_over", f"{', '.join(rest)}"))
    return problems


def digest(path: Path) -> str:
    """The sha256 of a file, or of the weights in a folder and their names; "" where there is nothing."""
    if not path.exists():
        return ""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    hashed = hashlib.sha256()
    for file in files:
        if file.name.startswith("state") or any(part.startswith(".") for part in file.relative_to(path.parent).parts):
            continue
        hashed.update(str(file.relative_to(path.parent)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return hashed.hexdigest()


# --- processes ----------------------------------------------------------------------------------------------------


def started(folder: Path, words: Sequence[str], *, said: int | None = None, limit: int | None = None) -> int:
    """Start a command in a folder as a fork, in a group of its own. Return its number.

    What it prints goes to this file descriptor, by default into said.txt. `limit`: bytes of a file that it can write.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if said is None else said
        os.dup2(said, 1)
        os.dup2(said, 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = run(list(words))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killed(folder: Path, words: Sequence[str], seconds: float) -> bool:
    """Kill a command after so many seconds. Return whether it was still at work."""
    pid = started(folder, words)
    time.sleep(seconds)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # it has no group yet
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def limited(folder: Path, words: Sequence[str], limit: int) -> tuple[int, str]:
    """Run a command to its end with this limit on the size of files. Return its code and what it has printed."""
    ours, its = os.pipe()
    pid = started(folder, words, said=its, limit=limit)
    os.close(its)
    with os.fdopen(ours) as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def call(folder: Path, words: Sequence[str], *, check: bool = True) -> int:
    """Run a command to its end and return its code."""
    code = os.waitstatus_to_exitcode(os.waitpid(started(folder, words), 0)[1])
    if check and code and words[0] != "stop":
        sys.exit(f"{' '.join(words)} ended with {code}:\n{(folder / 'said.txt').read_text()}")
    return code


def run(words: list[str]) -> int:
    """Run a command of deltaw, or one of this script's own."""
    import torch

    torch.set_num_threads(1)
    if words[0] == "template":
        return template_in(Path(words[1]))
    if words[0] == "save":
        return saved(*words[1:])
    if words[0] == "stop":
        return stopped(words[1:])
    from deltaw.cli.main import main as command

    return command(words)


def template_in(folder: Path) -> int:
    """Write the folder that all work begins in."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import deltaw

    folder.mkdir()
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, eos_token_id=1, pad_token_id=0, **sizes))
    model.save_pretrained(folder / "model")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    chance = random.Random(SEED)
    lines = [{"prompt": f"w{chance.randrange(60)} w{i}", "completion": f" w{i % 7}"} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, rank in (("adapter", 2), ("other", 3)):
        deltaw.attach(model, deltaw.LoRA(rank=rank), name=name)
        for parameter in deltaw.parameters(model, name):
            torch.nn.init.normal_(parameter, std=0.05)
        deltaw.save(model, folder / name, name=name)
    deltaw.detach(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight += 0.02 * torch.randn_like(layer.self_attn.q_proj.weight)
    model.save_pretrained(folder / "tuned")
    fast.save_pretrained(folder / "tuned")
    return 0


def saved(source: str, out: str) -> int:
    """Load an adapter and save it elsewhere, in memory."""
    from transformers import AutoModelForCausalLM

    import deltaw

    model = AutoModelForCausalLM.from_pretrained("model")
    deltaw.load(model, source)
    try:
        deltaw.save(model, out)
    except deltaw.DeltaWError as error:
        print(error)
        return 1
    return 0


def stopped(words: list[str]) -> int:
    """Train, and stop in the middle as a scheduler does."""
    import threading

    from deltaw.cli.main import main as command

    def stop() -> None:
        while not Path("run/state.before.safetensors").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return command(words)


if __name__ == "__main__":
    main()
