#!/bin/sh
# PEFT 0.21: an adapter with two patterns that fit one layer computes something else after save_pretrained and from_pretrained.
#
# Guess: what is saved and loaded again computes the same, or a warning says why not.
# Behaviour: alpha_pattern (and rank_pattern) are taken in their order, the first that fits a layer holds. save_pretrained writes
# adapter_config.json with sorted keys, so that the loaded adapter has the patterns in another order, and another alpha, of
# which nothing is said. (Of rank_pattern, loading then ends with an error about sizes.)
# Seen: alpha in memory [7, 7], loaded [3, 7]; logits differ by 0.00577; no warning about it.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while PEFT does this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
).eval()
weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
patterns = {"q_proj": 7, "layers.0.self_attn.q_proj": 3}
config = peft.LoraConfig(
    r=4, lora_alpha=10, target_modules=["q_proj"], alpha_pattern=patterns, init_lora_weights=False
)
model = peft.get_peft_model(base, config).eval()
ids = torch.arange(12)[None]
before = model(ids).logits
model.save_pretrained(f"{sys.argv[1]}/adapter")

again = LlamaForCausalLM(base.config)
again.load_state_dict(weights)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    loaded = peft.PeftModel.from_pretrained(again.eval(), f"{sys.argv[1]}/adapter").eval()
difference = float((loaded(ids).logits - before).detach().abs().max())


def alphas(of):
    return [m.lora_alpha["default"] for n, m in of.named_modules() if n.endswith("q_proj")]


about = [str(w.message) for w in said if "pattern" in str(w.message)]
print(f"alpha in memory {alphas(model)}, loaded {alphas(loaded)}; logits differ by {difference:.3g}; warnings about it: {about}")
sys.exit(0 if alphas(model) == [7, 7] and alphas(loaded) == [3, 7] and difference > 1e-3 and not about else 1)
PYTHON
