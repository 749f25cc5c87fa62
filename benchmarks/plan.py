"""Compare the memory that `deltaw plan` predicts with what `deltaw train` takes: real models on a CPU.

    python benchmarks/plan.py --smollm2 FOLDER --minilm FOLDER

Each setting runs in its own process. Every record has one token less than the planned length, so that rows are padded to it. The
measured peak is the most that the process held in its steps, with the interpreter, the libraries and the model. Writes
results/plan.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import own_process

HERE = Path(__file__).resolve().parent
STEPS = 3


@dataclass(frozen=True)
class Setting:
    """What is trained, and planned."""

    model: str
    method: str
    batch: int
    length: int
    dtype: str
    task: str = "causal"
    checkpointing: bool = False


# In float32, in which this can be had of any CPU; bfloat16 takes hours where the processor does not have it
SETTINGS = (
    Setting("smollm2", "lora", 8, 128, "float32"),
    Setting("smollm2", "lora-qv", 4, 256, "float32"),
    Setting("smollm2", "lora", 4, 512, "float32"),
    Setting("smollm2", "lora", 4, 512, "float32", checkpointing=True),
    Setting("smollm2", "full", 4, 128, "float32"),
    Setting("minilm", "full", 32, 128, "float32", "classification"),
    Setting("minilm", "lora", 32, 128, "float32", "classification"),
    Setting("minilm", "lora", 32, 256, "float32", "classification"),
    Setting("minilm", "houlsby", 32, 128, "float32", "classification"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", default=str(HERE.parent / ".cache" / "smollm2"))
    parser.add_argument("--minilm", default=str(HERE.parent / ".cache" / "minilm"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        told = json.loads(chosen.worker)
        print(json.dumps(measured(told["folder"], Setting(**told["setting"]))))
        return
    import machine

    rows = []
    for setting in SETTINGS:
        folder = getattr(chosen, setting.model)
        found = own_process.run(__file__, {"folder": folder, "setting": dataclasses.asdict(setting)})
        rows.append(dataclasses.asdict(setting) | compared(planned(folder, setting), found))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    worst = max(abs(row["error"]) for row in rows)
    machine.write("plan", {"steps": STEPS, "worst_error": worst, "rows": rows})


def planned(folder: str, setting: Setting) -> dict[str, Any]:
    """The prediction, in bytes by part."""
    import deltaw

    config = deltaw.PlanConfig(
        methods=setting.method, task=setting.task, batch=setting.batch, length=setting.length, dtype=setting.dtype,  # type: ignore[arg-type]
        device="cpu", gradient_checkpointing=setting.checkpointing,
    )  # fmt: skip
    (row,) = deltaw.plan(folder, config).rows
    return dataclasses.asdict(row.memory) | {"total": row.memory.total}


def compared(plan: dict[str, Any], found: dict[str, int]) -> dict[str, Any]:
    """Both, and how far the prediction is off: as a share of the measured peak, and of what came on top of the loaded model."""
    own = plan["total"] - plan["process"] - plan["weights"]
    return {
        "predicted": plan,
        "measured": found,
        "error": round(plan["total"] / found["peak"] - 1, 4),
        "error_over_loaded": round(own / (found["peak"] - found["loaded"]) - 1, 4),
    }


def measured(folder: str, setting: Setting) -> dict[str, int]:
    """Bytes that this process holds: before the model is opened, with it and its adapter, and at most in a training step."""
    import deltaw.run

    import deltaw
    from deltaw.methods.registry import contestants

    found = {"process": own_process.held("VmRSS")}

    def hear(event: Any) -> None:
        if event.kind == "start":
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            found["loaded"] = own_process.held("VmRSS")
        elif event.kind == "step":
            found["peak"] = own_process.held("VmHWM")

    (contestant,) = contestants(setting.method)
    records = [_record(i, setting) for i in range(setting.batch * 4)]
    with tempfile.TemporaryDirectory() as out:
        config = deltaw.TrainConfig(
            out=out, batch=setting.batch, steps=STEPS, valid_share=0.0, samples=0, log_every=1, overwrite=True,
            dtype=setting.dtype, device="cpu", gradient_checkpointing=setting.checkpointing,  # type: ignore[arg-type]
            data=deltaw.DataConfig(max_length=setting.length - 1),
        )  # fmt: skip
        deltaw.train(folder, records, config, method=contestant.method, on_event=hear)
    return found


def _record(number: int, setting: Setting) -> dict[str, Any]:
    """More words than the length has tokens, to be cut there."""
    text = " ".join(f"{number + i}" for i in range(setting.length))
    return (
        {"text": text, "label": "odd" if number % 2 else "even"} if setting.task == "classification" else {"text": text}
    )


if __name__ == "__main__":
    main()
