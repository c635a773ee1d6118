from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, dataclass, make_dataclass
from pathlib import Path
from typing import Literal

import pytest

from ttpa.config import nearest, option, parse_config, run_command, save_config
from ttpa.errors import InputError


@dataclass
class Config:
    data: Path | None = option(None, "what to read", positional=True)
    learning_rate: float = option(1e-5, "peak learning rate")
    max_steps: int = option(-1, "optimizer steps; -1: by epochs")
    bf16: bool = option(False, "compute in bfloat16")
    loss_type: str = option("sigmoid", "outer function", choices=("sigmoid", "linear"))
    on_overlength: Literal["error", "drop"] = option("drop", "what to do with rows over max_length")
    max_length: int | None = option(1024, "longest path in tokens")
    run_name: str | None = option(None, "name of the run")
    warmup: float | Literal["auto"] = option("auto", "share of steps")


def parse(*argv: str, config_class: type = Config) -> Config:
    return parse_config(config_class, argv, prog="python -m ttpa.train", description="Train.")


def test_defaults():
    assert parse() == Config()


def test_flags_of_every_kind():
    config = parse(
        *("trees.jsonl", "--learning-rate", "1e-4", "--max_steps=-3", "--bf16", "--loss_type", "linear"),
        *("--on_overlength=error", "--max_length", "none", "--run_name", "a b", "--warmup", "0.5"),
    )
    assert config == Config(Path("trees.jsonl"), 1e-4, -3, True, "linear", "error", None, "a b", 0.5)
    assert parse("--bf16", "false").bf16 is False
    assert parse("--bf16", "--max_steps", "1") == Config(bf16=True, max_steps=1)
    assert parse("--warmup", "auto").warmup == "auto"
    assert parse("--data", "x").data == Path("x")


def test_yaml_gives_values_and_flags_override_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 1e-4  # PyYAML alone reads text here\nmax_steps: 10\nbf16: yes\nmax_length: null\n")
    assert parse("--max_steps", "20", "--config", str(file)) == Config(
        learning_rate=1e-4, max_steps=20, bf16=True, max_length=None
    )
    file.write_text("")
    assert parse("--config", str(file)) == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown option --lerning_rate: did you mean --learning_rate?"),
        (["--lerning-rate=1"], "unknown option --lerning-rate: did you mean --learning_rate?"),
        (["--zzzz"], "unknown option --zzzz; --help lists all options"),
        (["--learning_rate", "fast"], "--learning_rate: expected a number, got 'fast'"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number, got 'nan'"),
        (["--max_steps", "1.5"], "--max_steps: expected a whole number, got '1.5'"),
        (["--max_length", "x"], "--max_length: expected a whole number or none, got 'x'"),
        (["--bf16", "maybe"], "--bf16: expected true or false, got 'maybe'"),
        (["--loss_type", "ipo"], "--loss_type: expected one of sigmoid, linear, got 'ipo'"),
        (["--on_overlength", "cut"], "--on_overlength: expected one of error, drop, got 'cut'"),
        (["--warmup", "x"], "--warmup: expected one of auto or a number, got 'x'"),
        (["--max_steps"], "--max_steps needs a value"),
        (["--max_steps", "--bf16"], "--max_steps needs a value"),
        (["a", "b"], "unexpected argument 'b'"),
        (["-bf16"], "unknown option -bf16: did you mean --bf16?"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16: true\nlerning_rate: 1\n", ":2: unknown option 'lerning_rate': did you mean learning_rate?"),
        ("bf16: true\nmax_steps: many\n", ":2: max_steps: expected a whole number, got 'many'"),
        ("max_steps: null\n", ":1: max_steps: expected a whole number, got 'null'"),
        ("max_steps: 1\nbf16: [true\n", ":3: broken YAML: "),
        ("max_steps: 1\nmax_steps: 2\n", ":2: max_steps is given twice"),
        ("max_steps: [1, 2]\n", ":1: max_steps: expected a whole number, got a nested value"),
        ("\n- a\n", ":2: expected lines of the form `option: value`"),
        ("config: other.yaml\n", ":1: unknown option 'config'"),
        ("\tmax_steps: 1\n", ":1: broken YAML: "),
        ("x: \x00\n", ": broken YAML: "),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse("--config", str(file))
    assert str(error.value).startswith(f"{file}{message}")


def test_missing_yaml(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_required_option():
    required = make_dataclass("Required", [("data", Path, option(MISSING, "what to read"))])
    with pytest.raises(InputError, match="--data is required: what to read"):
        parse(config_class=required)
    assert parse("--data", "x", config_class=required).data == Path("x")


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(Path("a/b c"), 3e-07, 5, True, "linear", "error", None, "none", 0.25),
        Config(learning_rate=float("inf"), run_name="null", max_length=0),
        Config(run_name="1e-4: é\nx"),
    ],
)
def test_what_is_saved_reads_back(tmp_path, config):
    file = tmp_path / "new" / "config.yaml"
    save_config(config, file)
    assert parse("--config", str(file)) == config
    assert [path.name for path in file.parent.iterdir()] == ["config.yaml"]


def test_help_of_45_options_fits_two_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    fields = [
        (f"number_{i}_of_the_options", int, option(i, "how many there are of this kind " + "in all of the cases " * 4))
        for i in range(36)
    ]
    wide = make_dataclass("Wide", fields, bases=(Config,))
    with pytest.raises(SystemExit) as stop:
        parse("--help", config_class=wide)
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert len(lines) <= 100 and max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert all(f"--{field.name} " in text for field in wide.__dataclass_fields__.values())
    assert "peak learning rate [1e-05]" in text
    assert "(sigmoid, linear) [sigmoid]" in text
    assert "compute in bfloat16 [false]" in text


def test_nearest():
    assert nearest("chosn", ["chosen", "rejected"]) == "chosen"
    assert nearest("xyz", ["chosen", "rejected"]) is None


def test_run_command_prints_no_traceback():
    program = (
        "from ttpa.config import run_command; from ttpa.errors import InputError\n"
        "def main(argv):\n    raise InputError(f'bad {argv}', path='a.jsonl', line=3)\n"
        "run_command(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: a.jsonl:3: bad ['x']\n")


def test_run_command_lets_other_errors_through():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 / 0, [])
