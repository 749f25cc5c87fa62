"""Settings of prompts that come with an adapter."""

from __future__ import annotations

import json
from pathlib import Path

from deltaw.cli import main
from tests.cli.conftest import WORDS


def test_prompts_are_wrapped_as_in_training_unless_asked_otherwise(place: Path) -> None:
    from deltaw.cli.opening import as_trained
    from deltaw.config import DataConfig

    adapter = str(place / "run" / "adapter")
    assert as_trained(DataConfig(), adapter).separator == "#"
    assert as_trained(DataConfig(separator="!"), adapter).separator == "!"


def test_an_adapter_of_chats_wraps_a_plain_prompt_as_a_chat(place: Path, tmp_path: Path) -> None:
    from deltaw.cli.opening import as_trained
    from deltaw.config import DataConfig

    turns = [[{"role": "user", "content": w}, {"role": "assistant", "content": "yes"}] for w in WORDS]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    words = ["train", str(place / "model"), str(tmp_path / "chats.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*words, "--steps", "1"]) == 0
    assert as_trained(DataConfig(), str(tmp_path / "run" / "adapter")).template == "chat"
    assert as_trained(DataConfig(), str(place / "run" / "adapter")).template == "plain"
