#!/usr/bin/env bash
# transformers 5.19.0: Gemma 4's MTP assistant cannot be used as its documentation shows,
# model.generate(..., assistant_model=assistant). The candidate generator made for it
# has two required arguments that generate() no longer gives it. So a test of
# speculative decoding that wants transformers as its oracle compares with plain greedy
# generation, or drafts by calling the assistant itself.
#
# Seen on 2026-11-30 with transformers 5.19.0 and torch 2.13.0:
#   without an assistant: 4 tokens
#   with it: TypeError: SinglePositionMultiTokenCandidateGenerator.__init__() missing 2
#     required positional arguments: 'input_ids' and 'model_kwargs'
#
# Exits with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet install torch==2.13.0 transformers==5.19.0
cat >"$folder/generate.py" <<'PYTHON'
import torch
import transformers
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

print("transformers", transformers.__version__, "torch", torch.__version__)
sizes = dict(
    vocab_size=64,
    vocab_size_per_layer_input=0,
    hidden_size=32,
    intermediate_size=32,
    hidden_size_per_layer_input=0,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    global_head_dim=16,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
    num_hidden_layers=2,
    num_kv_shared_layers=0,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
)
torch.manual_seed(0)
model = Gemma4ForCausalLM(Gemma4TextConfig(**sizes)).eval()
text = Gemma4TextConfig(**{**sizes, "num_kv_shared_layers": 2})
config = Gemma4AssistantConfig(text_config=text, backbone_hidden_size=32)
assistant = Gemma4AssistantForCausalLM(config).eval()
prompt = torch.tensor([[2, 5, 7]])
options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
made = model.generate(prompt, **options).shape[1] - prompt.shape[1]
print(f"without an assistant: {made} tokens")
assert made == 4
try:
    model.generate(prompt, assistant_model=assistant, **options)
except TypeError as error:
    print(f"with it: TypeError: {error}")
    assert "missing 2 required positional arguments" in str(error)
else:
    raise SystemExit("it generates now: this finding is out of date")
PYTHON
"$folder/venv/bin/python" "$folder/generate.py"
