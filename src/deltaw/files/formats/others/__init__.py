"""Adapters of other programs, a file each: what theirs hold, read into one form and written from it. No model code.

foreign.py has the form. mlx_lm.py and onnx_adapter.py read and write; kohya.py, litgpt.py and torchtune.py read.
"""

from deltaw.files.formats.others.foreign import Foreign, Pair

__all__ = ["Foreign", "Pair"]
