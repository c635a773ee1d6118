from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

from ttpa.data.render import render_messages, render_texts
from ttpa.errors import InputError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
USER = {"role": "user", "content": "Rain in Łódź?"}
TOOL = {"role": "tool", "content": "2 mm"}
YES = {"role": "assistant", "content": "Yes."}


def call(city: str, content: str = "") -> dict:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def with_template(tokenizer, name: str):
    """The tokenizer with one of the chat templates that TRL brings along."""
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    return with_template_text(tokenizer, template)


def with_template_text(tokenizer, template: str | None):
    other = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, bos_token="<|endoftext|>"
    )
    other.chat_template = template
    return other


def trl_ids(tokenizer, rows: list[dict]) -> list[dict]:
    """What TRL's DPOTrainer makes of rows, by its own code."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOTrainer

    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    return list(DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "train"))


def parts(tokenizer, ids: list[int], trained: list[int]) -> list[tuple[int, str]]:
    """Runs of trained (1) and untrained (0) tokens, as text."""
    runs = groupby(zip(trained, ids, strict=True), key=lambda pair: pair[0])
    return [(one, tokenizer.decode([token for _, token in run])) for one, run in runs]


CONVERSATIONS = [
    ([USER], [call("Łódź")], [YES], [WEATHER]),
    ([USER], [YES], [{"role": "assistant", "content": "No."}], []),
    ([USER], [call("a"), TOOL, YES], [call("b"), TOOL, call("c"), TOOL, YES], [WEATHER]),
    ([{"role": "system", "content": "Be short."}, USER, call("a"), TOOL], [YES], [call("b", "Again.")], [WEATHER]),
]


@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen3", "qwen3_5_think", "llama3"])
def test_ids_of_conversations_are_those_of_trl(tokenizer, template):
    tokenizer = with_template(tokenizer, template) if template else tokenizer
    conversations = CONVERSATIONS[1:2] if template == "llama3" else CONVERSATIONS  # it has no tool calls
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": json.dumps(tools)}
        for prompt, chosen, rejected, tools in conversations
    ]
    for row, ids in zip(conversations, trl_ids(tokenizer, rows), strict=True):
        prompt, chosen, rejected, tools = row
        rendered = render_messages(tokenizer, prompt, [chosen, rejected], tools=tools)
        assert rendered.prompt_ids == ids["prompt_ids"]
        assert rendered.completions == [ids["chosen_ids"], ids["rejected_ids"]]
        assert rendered.moved == 0


def test_ids_of_texts_are_those_of_trl(tokenizer):
    rows = [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " green.<|im_end|>"},
        {"prompt": "A", "chosen": "", "rejected": "é"},
    ]
    for row, ids in zip(rows, trl_ids(tokenizer, rows), strict=True):
        rendered = render_texts(tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
        assert rendered.prompt_ids == ids["prompt_ids"]
        assert rendered.completions == [ids["chosen_ids"], ids["rejected_ids"]]
        assert rendered.trained == [None, None]


def test_a_completion_that_changes_the_end_of_the_prompt_starts_there_as_in_trl(tokenizer):
    other = with_template_text(
        tokenizer,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
    )
    no = {"role": "assistant", "content": "No."}
    (ids,) = trl_ids(other, [{"prompt": [USER], "chosen": [YES], "rejected": [no]}])
    rendered = render_messages(other, [USER], [[YES], [no]], tools=[])
    assert (rendered.prompt_ids, rendered.completions) == (ids["prompt_ids"], [ids["chosen_ids"], ids["rejected_ids"]])
    assert rendered.moved == len("<think>")


def test_one_turn_is_trained_to_its_end(tokenizer):
    rendered = render_messages(tokenizer, [USER], [[call("a")]], tools=[WEATHER])
    assert rendered.trained == [None]
    assert tokenizer.decode(rendered.completions[0]).endswith("</tool_call><|im_end|>\n")


@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen3"])
def test_what_stands_between_turns_is_not_trained(tokenizer, template):
    """Qwen3 writes an empty thought into the last turn, so there a turn alone does not render as it does inside."""
    tokenizer = with_template(tokenizer, template) if template else tokenizer
    completion = [call("ą", "One."), TOOL, call("b"), TOOL, YES, USER, YES]
    rendered = render_messages(tokenizer, [USER], [completion], tools=[WEATHER])
    found = parts(tokenizer, rendered.completions[0], rendered.trained[0])
    answer = "Yes.<|im_end|>"
    last = f"<think>\n\n</think>\n\n{answer}\n" if template == "qwen3" else f"{answer}\n"
    result = "\n<|im_start|>user\n<tool_response>\n2 mm\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    calls = [
        f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call><|im_end|>'
        for city in "ąb"
    ]
    question = f"\n<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert found == [
        *((1, f"One.\n{calls[0]}"), (0, result), (1, calls[1]), (0, result)),
        *((1, answer), (0, question), (1, last)),
    ]


def test_a_completion_may_begin_and_end_with_what_the_model_did_not_write(tokenizer):
    rendered = render_messages(tokenizer, [USER, call("a")], [[TOOL, YES, USER]], tools=[WEATHER])
    found = parts(tokenizer, rendered.completions[0], rendered.trained[0])
    assert [one for one, _ in found] == [0, 1, 0]
    assert "2 mm" in found[0][1] and found[0][1].endswith("<|im_start|>assistant\n")
    assert found[1][1] == "Yes.<|im_end|>"
    assert "Łódź" in found[2][1]


def test_tools_and_template_kwargs_reach_the_template(tokenizer):
    other = with_template_text(
        tokenizer,
        "{{ mood }}{% if tools is not none %}{{ tools | length }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    for tools, prefix in (([WEATHER], "glad1"), ([], "glad")):
        rendered = render_messages(other, [USER], [[YES]], tools=tools, template_kwargs={"mood": "glad"})
        assert other.decode(rendered.prompt_ids) == prefix + USER["content"]


UNSTABLE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role != 'assistant' else m.content[:2] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_changes_earlier_turns_is_refused_by_turn(tokenizer):
    other = with_template_text(tokenizer, UNSTABLE)
    with pytest.raises(InputError, match="message 0 of the completion cannot be told"):
        render_messages(other, [USER], [[YES, TOOL, YES]], tools=[])
    forgetful = UNSTABLE.replace("loop.last", "messages | length == 2")
    with pytest.raises(InputError, match="message 0 of the completion cannot be told"):
        render_messages(with_template_text(tokenizer, forgetful), [USER], [[YES, TOOL, YES]], tools=[])
    late = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>"
        "{{ 'late' if loop.first and messages | length > 3 }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(InputError, match="message 0 of the completion cannot be told"):
        render_messages(with_template_text(tokenizer, late), [USER, YES], [[YES, USER]], tools=[])
    renamed = late.replace("'late' if loop.first", "'late' if loop.index == 3")
    with pytest.raises(InputError, match="message 2 of the completion cannot be told"):
        render_messages(with_template_text(tokenizer, renamed), [USER], [[YES, TOOL, YES]], tools=[])
    assert render_messages(other, [USER], [[YES]], tools=[]).trained == [None]


def test_a_template_that_drops_calls_is_refused_where_there_are_calls(tokenizer):
    other = with_template(tokenizer, "llama3")
    assert render_messages(other, [USER], [[YES]], tools=[WEATHER]).repairs == []
    for prompt, completion in (([USER], call("a")), ([USER, call("a"), TOOL], YES)):
        with pytest.raises(InputError, match=r"drops tool calls \(weather\)"):
            render_messages(other, prompt, [[completion]], tools=[WEATHER])


def test_a_second_call_that_the_template_would_lose_is_refused(tokenizer):
    two = {**call("a"), "tool_calls": [*call("a")["tool_calls"], *call("b")["tool_calls"]]}
    for name in ("gptoss", "llama3_1"):
        other = with_template(tokenizer, name)
        text = tokenizer.decode(render_messages(other, [USER], [[call("a")]], tools=[WEATHER]).completions[0])
        assert '{"city": "a"}' in text
        with pytest.raises(InputError, match=r"more than one call in a message \(weather, weather\)"):
            render_messages(other, [USER], [[two]], tools=[WEATHER])
    text = tokenizer.decode(render_messages(tokenizer, [USER], [[two]], tools=[WEATHER]).completions[0])
    assert text.index('"a"') < text.index('"b"')


def test_arguments_are_fed_as_text_to_a_template_that_wants_text(tokenizer):
    other = with_template(tokenizer, "deepseekv3")
    rendered = render_messages(other, [USER, call("ą"), TOOL], [[call("ł")]], tools=[WEATHER])
    assert '\n{"city": "ą"}\n' in other.decode(rendered.prompt_ids)
    assert '\n{"city": "ł"}\n' in other.decode(rendered.completions[0])
    bare = {"role": "assistant", "content": "", "tool_calls": [call("ł")["tool_calls"][0]["function"]]}
    with pytest.raises(InputError, match="refuses the messages"):  # this template knows only the full form
        render_messages(other, [USER], [[bare]], tools=[WEATHER])


def test_arguments_that_are_no_object_are_written_as_they_are_or_refused(tokenizer):
    broken = call("a")
    broken["tool_calls"][0]["function"]["arguments"] = '{"city": '
    text = tokenizer.decode(render_messages(tokenizer, [USER], [[broken]], tools=[WEATHER]).completions[0])
    assert '"arguments": {"city": }\n' in text
    other = with_template(tokenizer, "qwen2_5")
    with pytest.raises(InputError, match="arguments of 'weather' are no JSON object"):
        render_messages(other, [USER], [[broken]], tools=[WEATHER])


def test_text_beside_a_call_that_the_template_leaves_out_is_listed(tokenizer):
    other = with_template(tokenizer, "llama3_1")
    sides = [[call("a", "Let me see.")], [call("b", "Let me see.")]]
    rendered = render_messages(other, [USER], sides, tools=[WEATHER])
    assert "Let me" not in other.decode(rendered.completions[0])
    assert rendered.repairs == [("text beside calls left out by the chat template", "'Let me see.'")]
    assert render_messages(tokenizer, [USER], sides, tools=[WEATHER]).repairs == []


NINE = "{% if id is not defined or id | length != 9 %}{{ raise_exception('length 9!') }}{% endif %}"
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% set id = m.tool_call_id %}@NINE@"
    "[TOOL_RESULTS] {{ m.content }}, {{ id }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{% set id = c.id %}@NINE@"
    "{{ (c.function | tojson)[:-1] }}, \"id\": \"{{ id }}\"}{{ ']' + eos_token if loop.last else ', ' }}"
    "{% endfor %}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
).replace("@NINE@", NINE)


def test_calls_and_results_get_the_ids_that_a_template_fails_without(tokenizer):
    other = with_template_text(tokenizer, MISTRAL)
    two = {**call("a"), "tool_calls": [*call("a")["tool_calls"], *call("b")["tool_calls"]]}
    rendered = render_messages(other, [USER, two, TOOL, TOOL], [[call("c"), TOOL, YES]], tools=[WEATHER])
    text = other.decode([*rendered.prompt_ids, *rendered.completions[0]])
    ids = [text[at : at + 9] for at in range(len(text)) if text.startswith("call0000", at)]
    assert ids == ["call00001", "call00002", "call00001", "call00002", "call00003", "call00003"]
    assert rendered.repairs == []


def test_ids_that_a_template_takes_are_kept_and_others_replaced_and_listed(tokenizer):
    other = with_template_text(tokenizer, MISTRAL)
    kept, long = call("a"), call("b")
    kept["tool_calls"][0]["id"], long["tool_calls"][0]["id"] = "a1B2c3D4e", "call_0123456789"
    answers = [{**TOOL, "tool_call_id": id} for id in ("call_0123456789", "a1B2c3D4e")]
    both = {**call("a"), "tool_calls": [*kept["tool_calls"], *long["tool_calls"]]}
    rendered = render_messages(other, [USER], [[both, *answers, YES]], tools=[WEATHER])
    text = other.decode(rendered.completions[0])
    assert text.index('{"city": "a"}, "id": "a1B2c3D4e"') < text.index('{"city": "b"}, "id": "call00002"')
    assert "2 mm, call00002[/TOOL_RESULTS][TOOL_RESULTS] 2 mm, a1B2c3D4e" in text
    assert rendered.repairs == [("id of a call replaced by one that the chat template takes", "call_0123456789")]
    assert both["tool_calls"][1]["id"] == "call_0123456789"


@pytest.mark.parametrize("message", [{**YES, "content": "Yes \ud83d"}, call("\ud83d")])
def test_half_a_character_is_refused(tokenizer, message):
    with pytest.raises(InputError, match="half a character"):
        render_messages(tokenizer, [USER], [[message]], tools=[WEATHER])
    with pytest.raises(InputError, match=r"half a character .*behind 'aYes '"):
        render_texts(tokenizer, "a", ["b", "Yes \ud83d"])


def test_reasoning_that_the_template_leaves_out_is_listed(tokenizer):
    says = {"role": "assistant", "content": "It rains.", "reasoning_content": "Look at the sky."}
    rendered = render_messages(tokenizer, [USER], [[says]], tools=[])
    assert rendered.repairs == [("reasoning left out by the chat template", "'Look at the sky.'")]
    other = with_template(tokenizer, "qwen3")
    rendered = render_messages(other, [USER], [[says]], tools=[])
    assert rendered.repairs == [] and "Look at the sky." in other.decode(rendered.completions[0])


def test_no_chat_template(tokenizer):
    with pytest.raises(InputError, match="need a tokenizer with a chat template"):
        render_messages(with_template_text(tokenizer, None), [USER], [[YES]], tools=[])


def test_messages_that_the_template_refuses(tokenizer):
    other = with_template_text(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"refuses the messages \(user\): TemplateError: roles must alternate"):
        render_messages(other, [USER], [[YES]], tools=[])


def test_a_completion_without_the_model(tokenizer):
    with pytest.raises(InputError, match="needs a message of the assistant"):
        render_messages(tokenizer, [USER], [[YES], [TOOL]], tools=[])


def test_empty_prompt_and_no_end_token(tokenizer):
    with pytest.raises(InputError, match="the prompt is empty"):
        render_texts(tokenizer, "", ["a", "b"])
    other = with_template_text(tokenizer, None)
    other.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        render_texts(other, "a", ["b", "c"])
