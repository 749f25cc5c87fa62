"""The formats on disk: safetensors, PEFT, GGUF, loralib, corrections, fingerprints. Know no model."""
