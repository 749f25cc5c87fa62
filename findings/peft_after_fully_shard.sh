#!/bin/sh
# peft 0.21 and torch 2.13, FSDP2: adapters put on after `fully_shard` are trained apart by each process, without a word.
#
# Guess: `fully_shard` sums the gradients of all trainable parameters of the model, so it does not matter whether `get_peft_model`
# comes before or after it; or one of the two says that it is too late.
# Behaviour: FSDP2 looks for parameters when it is called. Those that are added later are no parameters of its groups: they are not dealt
# out, and their gradients are never exchanged. PEFT adds them to the distributed layers without a warning. Forward and backward are
# right, losses fall, and each process has an adapter of its own; a checkpoint that the first one writes has seen its part of the data
# alone. Put on before `fully_shard`, the adapters are the same in all processes.
# Seen: after one step with other records in each process "adapters first: the same in both: True", "fully_shard first: the same in both: False".
#
# Installs pinned public packages in a temporary folder. Ends with 0 while the two do this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.0
cd "$folder"
cat > script.py <<'PYTHON'
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

dist.init_process_group("gloo")
rank = dist.get_rank()
lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def local(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach()


for late in (False, True):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    model = base if late else get_peft_model(base, lora)
    for block in base.model.layers:
        fully_shard(block)
    fully_shard(base)
    if late:
        torch.manual_seed(1)  # the same start in both processes
        model = get_peft_model(base, lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.arange(8)[None] + 8 * rank
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    mine = torch.cat([local(p).flatten() for name, p in model.named_parameters() if "lora_" in name])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    if rank == 0:
        print("fully_shard" if late else "adapters", "first: the same in both:", torch.equal(*both), flush=True)
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -m torch.distributed.run --nproc-per-node 2 script.py > out 2> err || { cat err; exit 1; }
cat out
test "$(cat out)" = "adapters first: the same in both: True
fully_shard first: the same in both: False"
echo "as described"
