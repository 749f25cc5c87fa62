"""Adapters of other formats ↔ PEFT's folder.

adapters.py tells formats apart and has `convert`. loralib.py and gguf.py are of these formats; others.py is of those in
formats/others/. base.py has what is asked of a base.
"""

from deltaw.files.convert.adapters import FORMATS, convert, target_of
from deltaw.files.convert.base import base_config
from deltaw.files.convert.gguf import ARCHITECTURES, halves
from deltaw.files.convert.loralib import alpha_for_loralib

__all__ = ["ARCHITECTURES", "FORMATS", "alpha_for_loralib", "base_config", "convert", "halves", "target_of"]
