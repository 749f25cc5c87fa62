"""Folders of methods other than LoRA: read and written in any precision, and refused by name."""

from pathlib import Path

import pytest
import torch

from deltaw.errors import FileError
from deltaw.files.formats.method_file import MethodFile, read, write
from deltaw.files.formats.peft import PeftConfig


def file_of(l: torch.Tensor) -> MethodFile:  # noqa: E741
    config = PeftConfig.of({"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": []})
    return MethodFile("ia3", {"targets": ["k"], "inputs": [], "whole": []}, {"k.l": l}, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_vectors_of_any_precision_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """PyTorch cannot say of 8-bit floats whether they are finite, so that these had ended in an error of its own."""
    values = torch.tensor([1.0, 0.5, 2.0]).to(dtype)
    back = read(write(tmp_path / "a", file_of(values)))
    assert back.tensors["k.l"].dtype == dtype and torch.equal(back.tensors["k.l"], values)


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"not finite .*\n.*k\.ia3_l"):
        write(tmp_path / "a", file_of(torch.tensor([1.0, float("nan")])))
    assert not (tmp_path / "a").exists()
