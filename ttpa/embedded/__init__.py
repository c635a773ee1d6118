"""The model that comes with the package: about a million parameters, trained on the built-in world by `build`."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""A Hugging Face model folder: config, safetensors, tokenizer, chat template, and the log of how it was made."""
