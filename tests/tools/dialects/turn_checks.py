"""Calls to write in a dialect, and what must hold for what is read of them."""

import json

from hypothesis import strategies as st

MARKS = ["</tool_call>", "<tool_call>{}</tool_call>", "<|python_tag|>", '; {"name": "f"}', "[TOOL_CALLS]f[ARGS]{}", "}"]
KEYS = st.text(max_size=6) | st.sampled_from(["name", "arguments", "parameters", "a/b", "~", *MARKS])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS | st.sampled_from(MARKS),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(KEYS, parts, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)
CALLS = st.lists(st.tuples(st.text(), ARGUMENTS), max_size=3)


def value_at(arguments, pointer):
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        arguments = arguments[int(key)] if isinstance(arguments, list) else arguments[key]
    return arguments


def check_text_arguments(turn, arguments):
    """The arguments of its one call came as JSON text, and each value stands where it stands in that text."""
    (call,) = turn.calls
    assert json.dumps(call.arguments) == json.dumps(arguments)
    for pointer, field in call.fields.items():
        raw = json.loads(f'"{turn.text[slice(*field.value_span)]}"')
        assert json.dumps(json.loads(raw)) == json.dumps(value_at(arguments, pointer))


def check_spans(turn):
    """Spans lie in the text and nest, whatever the text is."""
    done = 0
    for i, call in enumerate(turn.calls):
        assert call.index == i
        assert done <= call.span[0] <= call.inner_span[0] <= call.inner_span[1] <= call.span[1] <= len(turn.text)
        done = call.span[1]
        for inner in [call.name_span, call.close_span, *(f.value_span for f in call.fields.values())]:
            if inner is not None:
                assert call.inner_span[0] <= inner[0] < inner[1] <= call.inner_span[1]
        for pointer, field in call.fields.items():
            parent = pointer.rpartition("/")[0]
            if pointer:
                outer = call.fields[parent].value_span
                assert outer[0] < (field.key_span or field.value_span)[0] and field.value_span[1] <= outer[1]
    for error in turn.errors:
        assert -1 <= error.call < len(turn.calls)
        assert 0 <= error.span[0] <= error.span[1] <= len(turn.text)


def check_exact(turn, calls):
    """The turn makes exactly these calls, without an error, and each part stands where it is said to stand."""
    assert turn.errors == [] and len(turn.calls) == len(calls)
    check_spans(turn)
    for call, (name, arguments) in zip(turn.calls, calls, strict=True):
        assert call.complete and call.duplicates == [] and call.name == name
        assert turn.text[slice(*call.name_span)] == name or json.loads(turn.text[slice(*call.name_span)]) == name
        assert json.dumps(call.arguments) == json.dumps(arguments)
        assert turn.text[slice(*call.close_span)] == "}"
        assert call.close_span[1] == call.fields[""].value_span[1]
        for pointer, field in call.fields.items():
            value = json.loads(turn.text[slice(*field.value_span)])
            assert json.dumps(value) == json.dumps(field.value) == json.dumps(value_at(arguments, pointer))
            if field.key_span is not None:
                key = json.loads(turn.text[slice(*field.key_span)])
                assert pointer.endswith("/" + key.replace("~", "~0").replace("/", "~1"))


def check_no_call_is_broken_in_silence(turn):
    check_spans(turn)
    for call in turn.calls:
        readable = call.name is not None and call.arguments is not None and call.complete
        assert readable or any(error.call == call.index for error in turn.errors)


def mutated(data, text):
    """The text with up to 8 of its characters replaced by up to 3 others."""
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    return text[:start] + data.draw(st.text(max_size=3)) + text[end:]


def found(turn):
    """The errors of a turn by code, call and the text at which they stand."""
    return [(e.code.removeprefix("format."), e.call, turn.text[slice(*e.span)]) for e in turn.errors]
