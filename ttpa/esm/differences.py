"""How the arguments of a call differ from its schema and from the gold arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema.exceptions import ValidationError
from referencing.exceptions import Unresolvable

from ttpa.errors import InputError
from ttpa.esm.schemas import schemas_at, unknown_keys
from ttpa.tools.call import normal_json
from ttpa.tools.schema import allows_key, validator

Path = tuple[str | int, ...]
_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One thing wrong with the arguments: an error code, the path to it, and the two sides that disagree."""

    code: str
    path: Path
    expected: Any
    got: Any


def schema_differences(arguments: dict[str, Any], parameters: dict[str, Any]) -> list[Difference]:
    """Everything in which the arguments break the schema, at most one difference per code class and path.

    `expected` is the schema keyword that was broken, as in `{"type": "integer"}`. A key that the schema does not allow
    is param.unknown. Raises InputError if the schema refers to something that is not in it.
    """
    found: dict[Path, Difference] = {}
    try:
        for error in validator(parameters).iter_errors(arguments):
            for cause in _causes(error):
                for difference in _from_schema_error(cause):
                    known = found.get(difference.path)
                    if known is None or (known.code == "value.constraint" and difference.code == "value.type"):
                        found[difference.path] = difference
    except (Unresolvable, RecursionError) as error:
        raise InputError(f"a JSON Schema refers to something that it does not contain: {error}") from None
    for path in unknown_keys(arguments, parameters):
        whole = found.get(path[:-1])
        if whole and whole.expected in (False, {"unevaluatedProperties": False}):
            del found[path[:-1]]  # the same complaint, without the name of the key
        found.pop(path, None)
        found[path] = Difference("param.unknown", path, None, _at(arguments, path))
    return list(found.values())


def gold_differences(output: Any, gold: Any, path: Path = ()) -> Iterator[Difference]:
    """Everything in which the arguments differ from the gold arguments; numbers compare by value, bools do not."""
    if isinstance(output, dict) and isinstance(gold, dict):
        for key in gold:
            if key not in output:
                yield Difference("param.missing_expected", (*path, key), gold[key], None)
        for key in output:
            if key not in gold:
                yield Difference("param.unexpected", (*path, key), None, output[key])
            else:
                yield from gold_differences(output[key], gold[key], (*path, key))
    elif isinstance(output, list) and isinstance(gold, list) and len(output) == len(gold):
        for index, (part, gold_part) in enumerate(zip(output, gold, strict=True)):
            yield from gold_differences(part, gold_part, (*path, index))
    elif normal_json(output) != normal_json(gold):
        yield Difference("value.near" if _is_near(output, gold) else "value.wrong", path, gold, output)


def all_differences(
    by_schema: list[Difference], output: dict[str, Any], gold: dict[str, Any], parameters: dict[str, Any] | None = None
) -> list[Difference]:
    """Differences from the schema and from the gold arguments, each path once, what the schema says first.

    The gold arguments are right by definition: where the output does as they do, the schema's complaint is dropped. A
    parameter that is left out on one side is no difference if the other side gives the default of its schema.
    """
    by_schema = [d for d in by_schema if not _gold_does_it_too(d, output, gold)]
    named = {difference.path for difference in by_schema}
    by_gold = [d for d in gold_differences(output, gold) if d.path not in named]
    return by_schema + [d for d in by_gold if not _is_default(d, parameters or {})]


def _is_default(difference: Difference, parameters: dict[str, Any]) -> bool:
    if difference.code == "param.missing_expected":
        value = difference.expected
    elif difference.code == "param.unexpected":
        value = difference.got
    else:
        return False
    defaults = [schema["default"] for schema in schemas_at(parameters, difference.path) if "default" in schema]
    return normal_json(value) in map(normal_json, defaults)


def _gold_does_it_too(difference: Difference, output: dict[str, Any], gold: dict[str, Any]) -> bool:
    theirs = _at(gold, difference.path)
    if difference.code == "param.unknown":
        return theirs is not _ABSENT
    if difference.code == "param.missing_required":
        return theirs is _ABSENT and _at(gold, difference.path[:-1]) is not _ABSENT
    return theirs is not _ABSENT and normal_json(theirs) == normal_json(_at(output, difference.path))


def _causes(error: ValidationError) -> Iterator[ValidationError]:
    """The error itself, or what the one branch of anyOf or oneOf that fits the type of the value objects to."""
    branches = _fitting_branches(error)
    if len(branches) == 1:
        for part in branches[0]:
            yield from _causes(part)
    else:
        yield error


def _fitting_branches(error: ValidationError) -> list[list[ValidationError]]:
    branches: dict[Any, list[ValidationError]] = {}
    for part in error.context or ():
        branches.setdefault(part.schema_path[0], []).append(part)
    return [branch for branch in branches.values() if not any(p.validator == "type" and not p.path for p in branch)]


def _from_schema_error(error: ValidationError) -> Iterator[Difference]:
    path, keyword = tuple(error.absolute_path), str(error.validator)
    value: Any = error.validator_value
    instance: Any = error.instance
    schema: Any = error.schema
    if keyword == "required":
        for key in value:
            if key not in instance:
                yield Difference("param.missing_required", (*path, key), {keyword: key}, None)
    elif keyword == "additionalProperties" and value is False:
        for key in instance:
            if not allows_key(schema, key):
                yield Difference("param.unknown", (*path, key), None, instance[key])
    else:
        wrong_type = keyword == "type" or (bool(error.context) and not _fitting_branches(error))
        expected = {keyword: value} if error.validator else False  # broken is the schema `false`
        yield Difference("value.type" if wrong_type else "value.constraint", path, expected, instance)


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if not inside:
            return _ABSENT
        value = value[part]
    return value


def _is_near(output: Any, gold: Any) -> bool:
    """Whether two texts are equal but for case, punctuation and white space."""
    if not isinstance(output, str) or not isinstance(gold, str):
        return False
    words = re.findall(r"[^\W_]+", output.casefold())
    return bool(words) and words == re.findall(r"[^\W_]+", gold.casefold())
