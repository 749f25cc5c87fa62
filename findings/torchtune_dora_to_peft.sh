#!/bin/sh
# torchtune 0.6.1: a DoRA adapter of queries and keys, exported for PEFT by its own function, computes something else there.
#
# Guess: tune_to_peft_adapter_weights, which the checkpointer calls for adapter_model.safetensors, gives an adapter with which PEFT
# computes the same. For LoRA it does.
# Behaviour: torchtune has the rows of q_proj and k_proj of Llama in another order than transformers. The function reorders lora_B, but
# not DoRA's magnitude, which is there once a row. So each row of those layers is scaled by another row's magnitude.
# Seen: largest difference of an adapted weight of 32 x 32 in PEFT's formula from torchtune's: 0.38 for q_proj, 3e-7 for v_proj.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while torchtune does this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.11.0 torchtune==0.6.1
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import torch
from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_weights
from torchtune.modules.peft import DoRALinear

HEADS, DIM, RANK, ALPHA = 4, 32, 4, 10.0
torch.manual_seed(0)
differences = {}
for name in ("q_proj", "v_proj"):
    theirs = torch.randn(DIM, DIM)  # transformers' order of rows
    W0 = hf_to_tune({f"model.layers.0.self_attn.{name}.weight": theirs}, HEADS, HEADS, DIM)[f"layers.0.attn.{name}.weight"]
    layer = DoRALinear(DIM, DIM, RANK, ALPHA)
    with torch.no_grad():
        layer.weight.copy_(W0)
        torch.nn.init.normal_(layer.lora_b.weight, std=0.2)
        layer.magnitude.copy_(torch.rand(DIM) + 0.5)
        tune = layer(torch.eye(DIM)).T
        adapter = {f"layers.0.attn.{name}.{key}": value for key, value in layer.state_dict().items() if key != "weight"}
    exported = tune_to_peft_adapter_weights(adapter, HEADS, HEADS, DIM)
    A, B, m = (next(v for k, v in exported.items() if part in k) for part in ("lora_A", "lora_B", "magnitude"))
    whole = theirs + ALPHA / RANK * B @ A
    in_peft = (m / whole.norm(dim=1))[:, None] * whole
    as_tune = tune if name == "v_proj" else tune.view(HEADS, DIM // HEADS // 2, 2, DIM).transpose(1, 2).reshape(DIM, DIM)
    differences[name] = float((in_peft - as_tune).detach().abs().max())
print("largest difference of the adapted weight in PEFT from torchtune's:", {n: f"{d:.1e}" for n, d in differences.items()})
sys.exit(0 if differences["q_proj"] > 0.05 and differences["v_proj"] < 1e-5 else 1)
PYTHON
