"""`python -m ttpa.construct`: write dialogues of the built-in world to a file."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from ttpa.config import option, parse_config, run_command
from ttpa.construct import SPLITS, construct_dialogues
from ttpa.data.dialogues import write_dialogues


@dataclass
class ConstructConfig:
    """Options of the command."""

    output: Path = option(dataclasses.MISSING, "file to write, JSON Lines, one dialogue a line")
    num: int = option(1000, "number of dialogues")
    split: str = option("preference", "which part of the world they come from", choices=SPLITS)
    seed: int = option(0, "the same seed gives the same dialogues")


def main(argv: list[str]) -> None:
    config = parse_config(
        ConstructConfig,
        argv,
        prog="python -m ttpa.construct",
        description="Dialogues by reversed construction: real calls of the built-in toolbox first, questions last.",
    )
    write_dialogues(config.output, construct_dialogues(config.num, split=config.split, seed=config.seed))  # type: ignore[arg-type]
    print(f"{config.num} dialogues of split {config.split} written to {config.output}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
