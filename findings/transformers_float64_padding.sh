#!/bin/sh
# transformers 5.23: in float64, padding makes the logits of real tokens NaN in a model with windows of attention (Gemma 2).
#
# Guess: float64 only makes a model more precise. So a gradient check in float64, of a batch that float32 computes, is safe.
# Behaviour: the "eager" attention adds the least number of the model's dtype where a token must not look, and takes the softmax in
# float32. The least float64 becomes -inf there. A padded position whose whole window is padding then has no key at all, and its
# state is NaN. Real tokens give such positions the weight 0, and 0 * NaN is NaN: a row with more padding than the window loses
# its real tokens too, without a word. In float32 and bfloat16 the least number stays finite.
# Seen: a tiny Gemma 2 (window 8) with random weights, a row of 6 tokens and 18 of padding: all logits of the 6 finite in float32,
# NaN in float64. A row without padding is finite in both.
#
# Installs pinned public packages in a temporary folder. Ends with 0 while transformers does this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, sliding_window=8, max_position_embeddings=64, layer_types=["sliding_attention", "full_attention"],
)
model = Gemma2ForCausalLM(config).eval()
ids = torch.randint(3, 96, (2, 24))
mask = torch.ones_like(ids)
mask[0, 6:] = 0
finite = {}
for dtype in (torch.float32, torch.float64):
    with torch.no_grad():
        logits = model.to(dtype)(ids, attention_mask=mask).logits
    finite[dtype] = bool(logits[0, :6].isfinite().all()), bool(logits[1].isfinite().all())
    print(dtype, "padded row finite:", finite[dtype][0], "| whole row finite:", finite[dtype][1])
sys.exit(finite != {torch.float32: (True, True), torch.float64: (False, True)})
PYTHON
echo "as described"
