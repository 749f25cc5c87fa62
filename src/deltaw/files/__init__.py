"""What is on disk: atomic writes, adapter folders in PEFT's format, fingerprints. No model code."""
