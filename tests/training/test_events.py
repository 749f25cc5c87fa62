"""The lines of log.jsonl that events make: other programs read them by these keys, in this order."""

import json

from deltaw.data import Counts
from deltaw.training.events import Evaluated, Event, Started, Stepped, Warned
from deltaw.training.prepare import Sets


def line_of(event: Event) -> str:
    return json.dumps(event.to_json(), ensure_ascii=False)


def test_the_line_of_a_start_holds_the_adapter_and_the_records() -> None:
    event = Started(
        0, layers=2, parameters=64, share=0.5, left_out={"lm_head": "not a block"}, coverage=["2 of 3"], task="causal",
        counted="tokens", labels=None, data=Counts(4, 3, 2, 1, 90, 40, 33), base_bytes=512,
        sets=Sets("3 records of 2 prompts", None, None, ["ignored: id (3 records)"]), expected_memory={"weights": 512, "total": 600},
    )  # fmt: skip
    assert line_of(event) == (
        '{"event": "start", "step": 0, "layers": 2, "parameters": 64, "share": 0.5, "left_out": {"lm_head": "not a block"}, '
        '"coverage": ["2 of 3"], "task": "causal", "counted": "tokens", "labels": null, "data": {"records": 4, "kept": 3, '
        '"truncated": 2, "dropped": 1, "tokens": 90, "supervised": 40, "longest": 33}, "base_bytes": 512, "sets": {"train": '
        '"3 records of 2 prompts", "valid": null, "overlap": null, "notes": ["ignored: id (3 records)"]}, "expected_memory": {"weights": 512, "total": 600}, "alike": null}'
    )


def test_the_line_of_a_step_holds_loss_speed_and_time() -> None:
    event = Stepped(
        10, 2.5, 1e-4, None, 3.5, 900, 400, tokens_per_second=300.0, memory=7, seconds_left=1.5, total_steps=20
    )
    assert line_of(event) == (
        '{"event": "step", "step": 10, "loss": 2.5, "lr": 0.0001, "grad_norm": null, "seconds": 3.5, "tokens": 900, '
        '"supervised": 400, "tokens_per_second": 300.0, "memory": 7, "seconds_left": 1.5, "total_steps": 20}'
    )


def test_the_lines_of_evaluations_and_warnings() -> None:
    assert (
        line_of(Evaluated(5, 2.0, 1.5))
        == '{"event": "eval", "step": 5, "valid_loss": 2.0, "best_loss": 1.5, "accuracy": null}'
    )
    assert line_of(Warned(0, "‖ΔW‖ is 0")) == '{"event": "warning", "step": 0, "text": "‖ΔW‖ is 0"}'
