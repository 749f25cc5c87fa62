"""One training run from end to end: model, records, loop, samples, run folder.

A run folder holds adapter/ (PEFT format), config.yaml (reproduces the run), log.jsonl, result.json and report.html.

run.py trains: one run, one that is resumed, or several over one model. job.py has a run that is prepared, rescue.py what is kept
after a step that is not finite, samples.py what the model says before and after, result.py what the run came to.
"""

from deltaw.runs.train.result import RunResult
from deltaw.runs.train.run import run_abreast, train

__all__ = ["RunResult", "run_abreast", "train"]
