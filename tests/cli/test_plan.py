"""`deltaw plan`."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from tests.cli.conftest import Run

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def test_sizes_memory_and_rows_that_fit_are_tables_and_json(place: Path, run: Run) -> None:
    words = ["plan", place / "model", "--length", 16, "--batch", 1, "--device", "cpu", "--methods", "lora-qv"]
    shown = run(*words, "--memory", "1kB").stdout
    assert "Training memory" in shown and "rows in 1kB" in shown and "peak" in shown
    (row,) = json.loads(run(*words, "--json").stdout)["rows"]
    assert row["parameters"] > 0 and row["memory"]["total"] > row["memory"]["weights"]


def test_image_models_are_planned_by_images(tmp_path: Path, run: Run) -> None:
    transformers.ViTConfig(image_size=16, patch_size=8, **SIZES).save_pretrained(tmp_path)
    shown = run("plan", tmp_path, "--methods", "lora", "--device", "cpu").stdout
    assert "image, batches of 8 images" in shown and "FLOPs/image" in shown
