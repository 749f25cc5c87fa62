"""Methods of adaptation, one small file each: a frozen dataclass of settings whose `plan(model)` says as data which update goes
on which layer. `model/attach.py` applies plans. Methods import torch only to plan, so that flags are read without it."""
