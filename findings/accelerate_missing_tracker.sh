#!/bin/sh
# accelerate 1.15: of several trackers, one whose package is not installed is dropped without a word.
#
# Guess: Accelerator(log_with=["wandb", "tensorboard"]) without wandb warns or raises, as it warns of ["wandb"] alone and raises for an
# unknown name.
# Behaviour: a warning comes only where no tracker of the list is installed. Otherwise the missing one is left out with a message at
# level DEBUG: the run logs to the others, and its page at the missing one stays empty.
# Seen: a warning for "wandb" alone; ValueError for "wandbb"; for "wandb" and "tensorboard" the trackers ['tensorboard'], and nothing on
# standard error.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while accelerate does this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 tensorboard==2.21.0
cd "$folder"
cat > run.py <<'PYTHON'
import sys

from accelerate import Accelerator

names = sys.argv[1].split(",")
accelerator = Accelerator(cpu=True, log_with=names, project_dir="logs")
accelerator.init_trackers("run")
accelerator.log({"loss": 1.0}, step=1)
accelerator.end_training()
print([tracker.name for tracker in accelerator.trackers])
PYTHON
"$folder/venv/bin/python" run.py wandb 2>said
grep -q "no supported trackers are currently installed" said
both=$("$folder/venv/bin/python" run.py wandb,tensorboard 2>said)
echo "wandb,tensorboard: trackers $both, standard error of $(wc -c < said) bytes"
test "$both" = "['tensorboard']"
test ! -s said
if "$folder/venv/bin/python" run.py wandbb 2>said; then exit 1; fi
tail -n 1 said
grep -q "ValueError: Unsupported logging capability: wandbb" said
echo "as described"
