"""`python -m ttpa.data check FILE...`: what data files hold, before anything is computed with them.

    python -m ttpa.data check pairs.jsonl dialogues.jsonl --model ORG/MODEL
    python -m ttpa.data check trees.jsonl --max_length 4096 --json check.json

Prints a table for each file. The exit code is 0 where nothing was found that a run would refuse, 1 where something was,
and 2 where the command itself cannot be carried out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ttpa.config import nearest, option, parse_config, run_command
from ttpa.data.doctor import check_file
from ttpa.data.doctor_table import checkup_table
from ttpa.embedded import MODEL_DIR
from ttpa.errors import InputError
from ttpa.files import atomic_write
from ttpa.model import load_tokenizer, window

PROG = "python -m ttpa.data check FILE..."
DESCRIPTION = "Check data files: what they hold, what a run refuses, leaves out or repairs, and what is worth a look."


@dataclass(frozen=True)
class CheckConfig:
    """The options of the command; raises InputError for values that make no sense."""

    model: str | None = option(None, "model folder or Hugging Face name, for its tokens; none is the embedded model")
    dialect: str | None = option(None, "how the model writes calls, as in mistral; none: as its template does")
    max_length: int | None = option(None, "longest path in tokens; none is the model's window")
    json: Path | None = option(None, "write all of it there, every error and place included")

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"--max_length must be at least 2, not {self.max_length}")


def main(argv: Sequence[str]) -> None:
    """Run the command with its arguments and exit with code 1 where there are errors; raises InputError for a command,
    a file or a model that does not exist."""
    command, words = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("-h", "--help"):
        words = ["--help"]
    elif command != "check":
        close = f": did you mean {PROG}" if nearest(command, ["check"]) else f"; write {PROG}"
        raise InputError(f"unknown command {command!r}{close}" if command else f"no command is given; write {PROG}")
    files, flags = split_words(words)
    config = parse_config(CheckConfig, flags, prog=PROG, description=DESCRIPTION)
    if not files:
        raise InputError(f"no file is given; write {PROG}")
    if check(files, config)["num_errors"]:
        raise SystemExit(1)


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files, and the flags with their values."""
    files: list[Path] = []
    flags: list[str] = []
    for word in words:
        takes_value = bool(flags) and flags[-1].startswith("--") and "=" not in flags[-1]
        if word.startswith("-") or takes_value:
            flags.append(word)
        else:
            files.append(Path(word).expanduser())
    return files, flags


def check(files: Sequence[Path], config: CheckConfig) -> dict[str, Any]:
    """Check files, print a table for each, and return the record that --json writes; raises InputError for a file or a
    model that does not exist."""
    for file in files:
        if not file.exists():
            raise InputError("no such file", path=file)
    source = MODEL_DIR if config.model is None else config.model
    tokenizer = load_tokenizer(source, dialect=config.dialect)
    length = window_of(source) if config.max_length is None else config.max_length
    model = "the embedded model, as no --model is given" if config.model is None else config.model
    print(f"tokens are those of {model}; max_length is {length or 'none'}\n")
    checkups = []
    for file in files:
        checkups.append(check_file(file, tokenizer=tokenizer, max_length=length))
        print(checkup_table(checkups[-1]) + "\n", flush=True)
    num_errors = sum(len(checkup.errors) for checkup in checkups)
    print(f"files: {len(files)}, errors: {num_errors:,}")
    record = {
        "model": str(source),
        "max_length": length,
        "num_errors": num_errors,
        "files": [checkup.to_dict() for checkup in checkups],
    }
    if config.json is not None:
        with atomic_write(config.json) as output:
            output.write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    return record


def window_of(source: Path | str) -> int | None:
    """The longest text that a model was made for, in tokens, as a run takes it; None for a folder with nothing but a
    tokenizer."""
    try:
        described = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return window(described)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
