"""Options of a command: one flat dataclass is the only list of them; flags and a YAML file fill it in."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ttpa.errors import InputError
from ttpa.files import atomic_write

ConfigT = TypeVar("ConfigT")
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: TRUTH[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (lambda text: float(text.replace(".inf", "inf")), "a number"),  # YAML writes infinity as .inf
    Path: (lambda text: Path(text).expanduser(), "a path"),
    str: (str, "a text"),
}


def option(default: Any, help: str, *, choices: Sequence[str] | None = None, positional: bool = False) -> Any:
    """A dataclass field with its one line of help; a default of `dataclasses.MISSING` makes the option required,
    `choices` lists the texts that are allowed, and `positional` lets the value stand without its flag."""
    metadata = {"help": help, "choices": tuple(choices or ()), "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


ELSEWHERE = {
    "dataset_name": "data",
    "gradient_accumulation_steps": "batch_size",
    "gradient_checkpointing": "activation_checkpointing",
    "max_completion_length": "max_new_tokens",
    "max_prompt_length": "max_length",
    "model_name_or_path": "model",
    "output_dir": "output",
    "per_device_eval_batch_size": "decode_batch_size",
    "per_device_train_batch_size": "batch_size",
    "resume_from_checkpoint": "resume",
    "save_total_limit": "keep_last",
    "torch_compile": "compile",
    "train_batch_size": "batch_size",
}
"""What other trainers call an option whose name says something else."""


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The name most like `name` (difflib ratio of at least `cutoff`), or None."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def parse_config(config_class: type[ConfigT], argv: Sequence[str], *, prog: str, description: str) -> ConfigT:
    """Fill `config_class` from flags (`--learning_rate 1e-4`, `--learning-rate=1e-4`, `--bf16`, `--bf16 false`), then
    from `--config FILE.yaml`, then from its defaults; `--help` prints all options and exits. Raises InputError for an
    unknown option (naming the nearest), a value of the wrong kind, broken YAML (file:line), a missing option."""
    options = _options(config_class)
    bare = next((name for name, o in options.items() if o.field.metadata["positional"]), None)
    from_file, from_flags = dict[str, Any](), dict[str, Any]()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(_help(options, prog=prog, description=description))
            raise SystemExit(0)
        if not word.startswith("-"):
            if bare is None or bare in from_flags:
                raise InputError(f"unexpected argument {word!r}; options are written --name value")
            from_flags[bare] = options[bare].from_text(word, label=bare)
            continue
        flag, equals, text = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("--") or (name != "config" and name not in options):
            raise InputError(f"unknown option {flag}{_hint(name, [*options, 'config'], '--')}")
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif name != "config" and bool in options[name].kinds:
                text = "true"
            else:
                raise InputError(f"{flag} needs a value")
        if name == "config":
            from_file.update(_read_yaml(Path(text), options))
        else:
            from_flags[name] = options[name].from_text(text, label=flag)
    values = {**from_file, **from_flags}
    for name, o in options.items():
        if o.field.default is dataclasses.MISSING and name not in values:
            raise InputError(f"--{name} is required: {o.field.metadata['help']}")
    return config_class(**values)


def save_config(config: Any, path: Path | str) -> None:
    """Write a configuration as YAML that `--config` reads back, under a temporary name that is renamed."""
    with atomic_write(path) as file:
        yaml.safe_dump(plain_options(config), file, sort_keys=False, allow_unicode=True)


def plain_options(config: Any) -> dict[str, Any]:
    """The options by name, as values that JSON and YAML know."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def run_command(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Call `main` with the arguments of the command line; an InputError is printed to stderr; exit code 2."""
    try:
        main(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@dataclasses.dataclass(frozen=True)
class _Option:
    field: dataclasses.Field[Any]
    kinds: tuple[Any, ...]

    @property
    def optional(self) -> bool:
        return type(None) in self.kinds

    @property
    def choices(self) -> list[Any]:
        literal = [v for kind in self.kinds if typing.get_origin(kind) is Literal for v in typing.get_args(kind)]
        return [*literal, *self.field.metadata["choices"]]

    @property
    def free(self) -> list[Any]:
        """The types of which any value will do."""
        return [] if self.field.metadata["choices"] else [kind for kind in self.kinds if kind in KINDS]

    @property
    def expected(self) -> str:
        listed = [f"one of {', '.join(map(str, self.choices))}"] if self.choices else []
        return " or ".join(listed + [KINDS[kind][1] for kind in self.free] + ["none"] * self.optional)

    def from_text(self, text: str, *, label: str, none: bool = True, **place: Any) -> Any:
        """The value of a text; `none` says whether the words none and null mean None."""
        if none and self.optional and text.lower() in ("none", "null"):
            return None
        for value in self.choices:
            if text == str(value):
                return value
        for kind in self.free:
            with contextlib.suppress(ValueError, KeyError):
                value = KINDS[kind][0](text)
                if value == value:  # nan is never meant
                    return value
        raise InputError(f"{label}: expected {self.expected}, got {text!r}", **place)


def _options(config_class: Any) -> dict[str, _Option]:
    hints, unions = typing.get_type_hints(config_class), (typing.Union, types.UnionType)
    kinds = {name: typing.get_args(t) if typing.get_origin(t) in unions else (t,) for name, t in hints.items()}
    return {field.name: _Option(field, kinds[field.name]) for field in dataclasses.fields(config_class)}


def _hint(name: str, names: Collection[str], dashes: str = "") -> str:
    if ELSEWHERE.get(name) in names:
        return f": what other trainers call so is {dashes}{ELSEWHERE[name]} here"
    close = nearest(name, names)
    return f": did you mean {dashes}{close}?" if close else "; --help lists all options"


def _read_yaml(path: Path, options: dict[str, _Option]) -> dict[str, Any]:
    """Values of a flat YAML mapping. Scalars are taken as text, so that 1e-4 reads as on the command line."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"broken YAML: {problem}", path=path, line=mark.line + 1 if mark else None) from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise InputError("expected lines of the form `option: value`", path=path, line=root.start_mark.line + 1)
    values: dict[str, Any] = {}
    for key, value in root.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name not in options:
            raise InputError(f"unknown option {key.value!r}{_hint(name, options)}", path=path, line=line)
        if name in values:
            raise InputError(f"{name} is given twice", path=path, line=line)
        if not isinstance(value, yaml.ScalarNode):
            raise InputError(f"{name}: expected {options[name].expected}, got a nested value", path=path, line=line)
        if value.tag == "tag:yaml.org,2002:null" and options[name].optional:
            values[name] = None
        else:
            values[name] = options[name].from_text(value.value, label=name, none=False, path=path, line=line)
    return values


def _help(options: dict[str, _Option], *, prog: str, description: str) -> str:
    width = min(120, shutil.get_terminal_size((120, 50)).columns)
    rows = [("--config FILE", "values from a YAML file; flags override them")]
    for name, o in options.items():
        kind = "" if bool in o.kinds else "FILE" if Path in o.kinds else name.rsplit("_", 1)[-1].upper()
        default = "required" if o.field.default is dataclasses.MISSING else str(o.field.default)
        default = default.lower() if default in ("None", "True", "False") else default
        choices = f" ({', '.join(map(str, o.choices))})" if o.choices else ""
        rows.append((f"--{name} {kind}".rstrip(), f"{o.field.metadata['help']}{choices} [{default}]"))
    left = min(42, max(len(flag) for flag, _ in rows) + 2)
    lines = [f"{prog} [--config FILE] [--option value ...]", *textwrap.wrap(description, width), ""]
    for flag, text in rows:
        first, *more = textwrap.wrap(text, width - left - 2)
        lines += [f"  {flag:<{left}}{first}", *(" " * (left + 2) + line for line in more)]
    return "\n".join(lines)
