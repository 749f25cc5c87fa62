"""Adapter folders as PEFT, vLLM and the HF hub read them: adapter_config.json and adapter_model.safetensors. No model code.

adapter.py has what is in one, reading.py and writing.py read and write it. config.py has the settings, and ranks.py and
targets.py what these say of a layer. keys.py has the names of the tensors, checks.py what can be wrong with them. metadata.py has
what deltaw adds to the file's header.
"""

from deltaw.files.formats.peft.adapter import LoRAFile
from deltaw.files.formats.peft.config import CONFIG, PICKLED, WEIGHTS, PeftConfig, method_of
from deltaw.files.formats.peft.metadata import BASE, ENDS, SCALES, W0, check_base, ends_of, fingerprint_of, is_ours
from deltaw.files.formats.peft.ranks import config_for
from deltaw.files.formats.peft.reading import read, tensors_of
from deltaw.files.formats.peft.writing import check_adapter_place, size, write

__all__ = [
    "BASE",
    "CONFIG",
    "ENDS",
    "PICKLED",
    "SCALES",
    "W0",
    "WEIGHTS",
    "LoRAFile",
    "PeftConfig",
    "check_adapter_place",
    "check_base",
    "config_for",
    "ends_of",
    "fingerprint_of",
    "is_ours",
    "method_of",
    "read",
    "size",
    "tensors_of",
    "write",
]
