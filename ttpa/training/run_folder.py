"""The run folder: what a training run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ttpa.config import save_config
from ttpa.errors import InputError
from ttpa.files import atomic_write

FILES = ("config.yaml", "metrics.jsonl", "data_report.json", "trees.jsonl", "before.json", "summary.json")
MODEL, ADAPTER, CHECKPOINTS = "final", "adapter", "checkpoints"
REPLACED = (*FILES, "skipped_steps.jsonl", MODEL, ADAPTER, CHECKPOINTS, "tensorboard", "wandb")


class RunFolder:
    """The output folder of one run; made when it is not there. Of several processes only `main` writes. Raises
    InputError where nothing can be written."""

    def __init__(self, path: Path, *, main: bool = True) -> None:
        self.path, self.main = path, main
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}; choose another --output", path=path) from error

    def begin(self, config: Any) -> bool:
        """Write config.yaml; the files of an earlier run, which are deleted first, and they alone. Returns whether
        there were any."""
        earlier = [self.path / name for name in REPLACED if (self.path / name).exists()]
        if self.main:
            for path in earlier:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            save_config(config, self.path / "config.yaml")
        return bool(earlier)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; raises InputError where the disk is full."""
        if not self.main:
            return
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            problem = f"cannot be written: {error.strerror}; make room, and --resume auto goes on"
            raise InputError(problem, path=path) from error

    def save_text(self, name: str, text: str) -> None:
        """Write one file."""
        if self.main:
            with atomic_write(self.path / name) as file:
                file.write(text)

    def save_json(self, name: str, record: dict[str, Any]) -> None:
        """Write one JSON object, indented."""
        self.save_text(name, json.dumps(record, ensure_ascii=False, indent=2) + "\n")

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Write model (safetensors) and tokenizer to a folder that transformers loads, under a temporary name that is
        renamed to `final`; returns where it is. A full disk raises InputError, and an earlier model stays."""
        temporary, final = self.path / f".{MODEL}.{os.getpid()}.tmp", self.path / MODEL
        if not self.main:
            return final
        for left in self.path.glob(f".{MODEL}.*.tmp"):  # by a run that was cut off here
            shutil.rmtree(left)
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            shutil.rmtree(final, ignore_errors=True)  # of this run, before it went on from a checkpoint
            temporary.replace(final)
        except OSError as error:
            raise InputError(
                f"the trained model cannot be written: {error.strerror}; make room, and --resume auto goes on from the "
                "last checkpoint",
                path=self.path,
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final
