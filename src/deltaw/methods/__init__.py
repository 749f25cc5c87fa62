"""Methods of adaptation, one small file each: a frozen dataclass of settings with `plan(model)`, which says as data
which update goes on which layer. Plans are applied by model/attach.py. Nothing here is imported before it is needed,
so that the settings (and their flags) can be read without torch."""
