"""Files of methods other than LoRA: PEFT's settings say how the layers are stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaw import IA3, attach, save
from tests.conftest import fill, tiny_gpt2, tiny_llama


@pytest.mark.parametrize(("make", "transposed"), [(tiny_gpt2, True), (tiny_llama, False)], ids=["Conv1D", "Linear"])
def test_peft_is_told_whether_layers_are_stored_by_their_inputs(
    make: Callable[[], Any], transposed: bool, tmp_path: Path
) -> None:
    folder = save(fill(attach(make(), IA3())), tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is transposed
