import pytest

from ttpa.errors import InputError
from ttpa.tools.dialects import DIALECTS
from ttpa.tools.dialects.detect import CallStyle, call_style, dialect_of, find_dialect

TURN = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}@CALLS@<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EACH = "{% for c in m.tool_calls or [] %}{% set f = c.function %}@CALL@{% endfor %}"
LIST = "{% if m.tool_calls %}@BEFORE@{% for c in m.tool_calls %}{% set f = c.function %}@CALL@{% endfor %}]{% endif %}"
NAME, ARGUMENTS = '{"name": "{{ f.name }}", ', "{{ f.arguments | tojson }}}"
HERMES = f'<tool_call>\n{NAME}"arguments": {ARGUMENTS}\n</tool_call>'
CALLS = {
    "hermes": EACH.replace("@CALL@", HERMES),
    "llama3_json": EACH.replace("@CALL@", f'{NAME}"parameters": {ARGUMENTS}{{{{ "" if loop.last else "; " }}}}'),
    "mistral": LIST.replace("@BEFORE@", "[TOOL_CALLS] [").replace(
        "@CALL@", f'{NAME}"arguments": {ARGUMENTS}{{{{ "" if loop.last else ", " }}}}'
    ),
    "pythonic": LIST.replace("@BEFORE@", "[").replace(
        "@CALL@",
        "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson if v is string else v }}"
        '{{ "" if loop.last else ", " }}{% endfor %}){{ "" if loop.last else ", " }}',
    ),
    "qwen3_coder": EACH.replace(
        "@CALL@",
        "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    ),
}
NEW_MISTRAL = EACH.replace("@CALL@", "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}")
PYTHON_WORDS = EACH.replace("@CALL@", HERMES.replace("tojson", "string | replace('\"', '`')"))


def with_template(tokenizer, calls: str | None):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    other.chat_template = None if calls is None else TURN.replace("@CALLS@", calls)
    return other


def test_the_embedded_template_writes_hermes(tokenizer):
    assert dialect_of(tokenizer).name == "hermes"


def test_the_cases_are_all_dialects():
    assert sorted(CALLS) == sorted(DIALECTS)


@pytest.mark.parametrize("end", ["<|im_end|>\n", "</s>", " ", ""])
@pytest.mark.parametrize(("name", "calls"), [*CALLS.items(), ("mistral", NEW_MISTRAL)])
def test_a_dialect_is_told_by_what_the_template_writes(tokenizer, name, calls, end):
    other = with_template(tokenizer, calls)
    other.chat_template = other.chat_template.replace("<|im_end|>\n", end)
    assert dialect_of(other) is find_dialect(other) is DIALECTS[name]
    style = call_style(other)
    assert style.objects and not style.texts and style.several and style.beside_text


def test_a_prompt_that_opens_a_thought_shares_no_part_of_the_tag_of_a_call(tokenizer):
    other = with_template(tokenizer, CALLS["hermes"])
    other.chat_template = other.chat_template.replace("assistant\n{%", "assistant\n<think>\n{%")
    assert dialect_of(other) is DIALECTS["hermes"]


def test_text_beside_calls_may_stand_in_tags_as_llama_4_writes_it(tokenizer):
    each = EACH.replace("@CALL@", f'{NAME}"parameters": {ARGUMENTS}')
    other = with_template(tokenizer, each)
    tagged = "{% if m.tool_calls %}<|python_start|>{{ m.content }}<|python_end|>{% else %}{{ m.content }}{% endif %}"
    other.chat_template = other.chat_template.replace("{{ m.content }}", tagged).replace("<|im_end|>\n", "<|eot|>")
    assert call_style(other) == CallStyle(DIALECTS["llama3_json"])


def test_a_template_may_want_ids_of_nine_characters(tokenizer):
    fails = "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}"
    for name, calls in CALLS.items():
        assert not call_style(with_template(tokenizer, calls)).ids
        strict = call_style(with_template(tokenizer, calls.replace("{% set f", fails + "{% set f")))
        assert strict == CallStyle(DIALECTS[name], ids=True)


def test_a_dialect_that_is_named_goes_before_the_template(tokenizer):
    other = with_template(tokenizer, CALLS["hermes"])
    other.tool_dialect = "mistral"
    assert dialect_of(other) is DIALECTS["mistral"]
    other.tool_dialect = "mistrall"
    with pytest.raises(InputError, match="did you mean mistral"):
        find_dialect(other)
    other.tool_dialect = None
    assert dialect_of(other) is DIALECTS["hermes"]


def test_a_tokenizer_without_template_is_for_plain_text_and_has_hermes(tokenizer):
    assert dialect_of(with_template(tokenizer, None)) is DIALECTS["hermes"]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("", "drops tool calls"),
        (PYTHON_WORDS, "in no known way"),
        ("{% if m.tool_calls %}{{ raise_exception('no calls') }}{% endif %}", "in no known way"),
    ],
)
def test_calls_that_nobody_can_read(tokenizer, calls, message):
    other = with_template(tokenizer, calls)
    assert find_dialect(other) is None
    with pytest.raises(InputError, match=f"{message}.*--dialect .*hermes.*qwen3_coder"):
        dialect_of(other)
    other.tool_dialect = "hermes"
    assert dialect_of(other) is DIALECTS["hermes"]


def test_a_response_template_is_for_what_no_dialect_reads(tokenizer):
    other = with_template(tokenizer, EACH.replace("@CALL@", "!{{ f.name }} {{ f.arguments | tojson }}!"))
    assert find_dialect(other) is None
    call = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
    calls = {"open_pattern": r"!(?P<name>\w+) ", "repeats": True, "content": "json", "transform": call}
    fields = {"tool_calls": {**calls, "close": "!"}, "content": {"close": "<|im_end|>", "content": "text"}}
    other.response_template = {"start_anchor": "assistant\n", "fields": fields}
    assert dialect_of(other).name == "response_template"
    fields["tool_calls"]["close"] = "?"  # it does not read what the chat template writes
    assert find_dialect(other) is None
    other.chat_template = TURN.replace("@CALLS@", CALLS["pythonic"])
    assert dialect_of(other) is DIALECTS["pythonic"]


def test_one_of_several_templates_is_for_tools(tokenizer):
    other = with_template(tokenizer, "")
    other.chat_template = {"default": other.chat_template, "tool_use": TURN.replace("@CALLS@", CALLS["mistral"])}
    assert dialect_of(other) is DIALECTS["mistral"]
    other.chat_template = {"rag": TURN}
    with pytest.raises(InputError, match=r"no chat template for tools: .*rag"):
        dialect_of(other)


def test_a_template_is_probed_once(tokenizer):
    other = with_template(tokenizer, CALLS["hermes"])
    style = call_style(other)
    assert call_style(with_template(tokenizer, CALLS["hermes"])) is style
    other.chat_template = TURN.replace("@CALLS@", CALLS["mistral"])
    assert call_style(other) is not style


def test_an_unset_end_of_text_token_is_another_case(tokenizer):
    other = with_template(tokenizer, CALLS["hermes"])
    other.chat_template = other.chat_template.replace("<|im_end|>", "{{ '' + eos_token }}")
    other.eos_token = None
    assert find_dialect(other) is None
    other.eos_token = "<|im_end|>"
    assert find_dialect(other) is DIALECTS["hermes"]


@pytest.mark.parametrize(
    ("calls", "objects", "texts", "several", "beside_text"),
    [
        (CALLS["hermes"].replace("f.arguments | tojson", "f.arguments"), False, True, True, True),
        (CALLS["hermes"].replace("f.arguments | tojson", "'' + f.arguments"), False, True, True, True),
        (CALLS["hermes"].replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), True, False, False, True),
        (
            CALLS["hermes"].replace("m.tool_calls or []", "([] if m.content else m.tool_calls or [])"),
            True,
            False,
            True,
            False,
        ),
    ],
)
def test_what_a_template_needs_and_loses(tokenizer, calls, objects, texts, several, beside_text):
    style = call_style(with_template(tokenizer, calls))
    assert style == CallStyle(DIALECTS["hermes"], objects, texts, several, beside_text)
