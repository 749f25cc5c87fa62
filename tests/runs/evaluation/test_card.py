"""Results in a few lines: of any length, and with any text in them."""

from __future__ import annotations

from pathlib import Path

import deltaw
from deltaw.runs.evaluation.card import as_html, as_text
from deltaw.runs.train import train
from tests.data.conftest import write_chat_model


def test_a_value_is_one_short_line_and_no_markup() -> None:
    rows = {"path": "/a" * 500, "name": '<b>x</b>\n\x1b[2J & "q"'}
    text = as_text("<Run>\n", rows)
    assert len(text.splitlines()) == 3 and max(map(len, text.splitlines())) < 130 and "\x1b" not in text
    page = as_html("<Run>", rows)
    assert "<b>x" not in page and "&lt;b&gt;x" in page and "&lt;Run&gt;" in page and "\x1b" not in page


def test_a_run_says_what_was_trained_and_where_it_is(tmp_path: Path) -> None:
    model = tmp_path / "<i>model"
    write_chat_model(model)
    records = [{"prompt": f"{n}?", "completion": f" {n}"} for n in range(24)]
    settings = deltaw.TrainConfig(out=str(tmp_path / "run"), steps=3, samples=0)
    result = train(str(model), records, settings, method=deltaw.LoRA(rank=2))
    shown = repr(result)
    assert 3 <= len(shown.splitlines()) <= 8
    for text in ("lora", "3 steps", "held-out loss", "adapter", f"{result.state.best_loss:.4f}"):
        assert text in shown
    page = result._repr_html_()
    assert "<i>" not in page and "&lt;i&gt;model" in page and page.count("<tr>") == len(shown.splitlines()) - 1
