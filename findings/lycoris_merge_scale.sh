#!/bin/sh
# LyCORIS 4.1.3: a LoHa or LoKr network that is merged has another ΔW than the one that it computed with, by a factor of alpha/rank.
#
# Guess: merge_to(1.0) makes the weights with which the plain model computes what the network's forward did. So it is for algo="lora".
# Behaviour: for loha and lokr, forward multiplies ΔW by alpha/rank once; merging (get_diff_weight) takes the scaled ΔW and multiplies
# it by alpha/rank again. Only alpha = rank hides it.
# Seen: rank 2, alpha 3, ΔW of the merged weight over ΔW of forward: lora 1.0, loha 1.5, lokr 1.5.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while LyCORIS does this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lycoris-lora==4.1.3 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from lycoris import LycorisNetwork, create_lycoris

ratios = {}
for algo in ("lora", "loha", "lokr"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
    before = model[0].weight.detach().clone()
    LycorisNetwork.apply_preset({"target_module": ["Sequential"]})
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=3, algo=algo, factor=4)
    network.apply_to()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.eval()
    with torch.no_grad():
        forward = model(torch.eye(32)).T - before
    network.restore()
    network.merge_to(1.0)
    merged = model[0].weight.detach() - before
    ratios[algo] = round(float((merged * forward).sum() / (forward * forward).sum()), 3)
print(f"ΔW merged / ΔW in forward, alpha/rank = 1.5: {ratios}")
sys.exit(0 if ratios == {"lora": 1.0, "loha": 1.5, "lokr": 1.5} else 1)
PYTHON
