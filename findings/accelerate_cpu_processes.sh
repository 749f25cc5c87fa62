#!/bin/sh
# accelerate 1.15: `accelerate launch --cpu --num_processes 2` starts one process, without a word; `--multi_gpu` starts two on a
# machine without a GPU.
#
# Guess: --num_processes 2 starts two processes, on a CPU too, and --multi_gpu needs GPUs.
# Behaviour: for a CPU the launcher runs the script once, in one process without RANK and WORLD_SIZE, unless --mpirun_hostfile is
# given. The number is taken and dropped. With --multi_gpu it goes through torchrun, which asks for no GPU: two processes, which can
# use gloo. A test of data-parallel training that is launched with --cpu never has a second process, and passes.
# Seen: "process None of None" once with --cpu; "process 0 of 2" and "process 1 of 2" with --multi_gpu, where CUDA is not available.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while accelerate does this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cd "$folder"
cat > script.py <<'PYTHON'
import os

print("process", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), flush=True)
PYTHON
launch() {
    CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/accelerate" launch "$@" --num_machines 1 --mixed_precision no --dynamo_backend no script.py 2>&1 | grep "^process" | sort
}
on_cpu=$(launch --cpu --num_processes 2)
on_gpus=$(launch --multi_gpu --num_processes 2)
echo "--cpu: $on_cpu"
echo "--multi_gpu: $on_gpus"
test "$on_cpu" = "process None of None"
test "$on_gpus" = "process 0 of 2
process 1 of 2"
echo "as described"
