"""ToolBench: DFSDT answer trees to step-wise pairs, the branch that led to an answer over its siblings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ttpa.data.build import Example, Limits, build_tree
from ttpa.data.jsonl import read_json
from ttpa.data.messages import Message, calls_of, tool_names, with_dict_arguments
from ttpa.data.report import DataReport
from ttpa.errors import InputError, OnError
from ttpa.tools.call import normal_json
from ttpa.trees.record import PreferenceTree

Nodes = list[dict[str, Any]]
FINAL_ANSWER = 3  # the observation_code of a given answer; is_terminal is false in every stored file
# Codes of timeout, not found, unauthorised, unsubscribed, too many requests, rate limit and request failed.
ENVIRONMENT = {5, 6, 7, 8, 9, 10, 12}


Thoughts = Literal["keep", "strip"]
Shapes = Literal["any", "equal"]
Failures = Literal["keep", "skip"]


@dataclass(frozen=True)
class ToolBenchOptions:
    """What is done about two things, beside the call, that tell the sides of ToolBench's pairs apart. The chosen branch
    is always the last one tried, under a prompt to do otherwise than before, so it mostly starts with a thought and the
    others with a call: `thoughts` strip leaves thoughts out of the history and of both sides, `shapes` equal takes only
    pairs in which both sides have a thought or neither has. And a call may have failed through no fault of its own:
    `failures` skip leaves out rejected calls whose observation is a failure of the environment (codes 5 to 10 and 12).
    The defaults are the rule of TP-LLaMA."""

    thoughts: Thoughts = "keep"
    shapes: Shapes = "any"
    failures: Failures = "keep"


AS_IN_TP_LLAMA = ToolBenchOptions()


def read_toolbench(
    path: Path,
    *,
    tokenizer: Any,
    limits: Limits,
    options: ToolBenchOptions = AS_IN_TP_LLAMA,
    on_error: OnError | None = None,
) -> tuple[list[PreferenceTree], DataReport]:
    """Preference trees from one ToolBench answer file, or from all *.json below a folder: one tree for each node on the
    way to the final answer at which the search branched, with the next decision on that way chosen over those of the
    other branches (the rule of TP-LLaMA, arXiv 2406.07115), as `options` say. Decisions that make the same call are
    dropped. Raises InputError for a file that is no answer tree, or gives it to `on_error` and goes on. The report also
    counts won files, pairs and their shapes as the files have them."""
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError("no *.json file in the folder; a folder is read as ToolBench answer trees", path=path)
    report = DataReport(path=str(path), format="toolbench", unit="files", counts={"files won": 0, "pairs": 0})
    trees = []
    for file in files:
        report.read += 1
        id = str((file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix(""))
        try:
            answer = _read_answer(file)
            for example in _examples(answer, id, file, options, report):
                tree = build_tree(example, tokenizer=tokenizer, limits=limits, report=report)
                if tree is not None:
                    trees.append(tree)
        except InputError as error:
            located = error if str(error).startswith(f"{file}:") else InputError(str(error), path=file)
            if on_error is None:
                raise located from None
            on_error(located)
    report.kept = len(trees)
    return trees, report


@dataclass(frozen=True)
class _Answer:
    start: list[Message]  # system prompt and query
    tools: list[dict[str, Any]]
    ways: list[Nodes]  # from the root to each final answer


def _read_answer(file: Path) -> _Answer:
    record = read_json(file)
    try:
        answer = record["answer_generation"]
        start = [{"role": "user", "content": answer["query"]}]
        for messages in answer.get("train_messages", [])[:1]:
            start[:0] = [{"role": m["role"], "content": m["content"]} for m in messages if m["role"] == "system"]
        return _Answer(start, [_tool(function) for function in answer["function"]], _ways(record["tree"]["tree"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not a ToolBench answer tree: {type(error).__name__}: {error}") from None


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    """`optional` is ToolBench's own key: the properties that `required` does not list."""
    parameters = {key: value for key, value in function["parameters"].items() if key != "optional"}
    bare = {"name": function["name"], "description": function.get("description", ""), "parameters": parameters}
    return {"type": "function", "function": bare}


def _ways(root: dict[str, Any]) -> list[Nodes]:
    ways: list[Nodes] = []
    stack: list[Nodes] = [[root]]
    while stack:
        way = stack.pop()
        node = way[-1]
        if node["node_type"] not in ("Thought", "Action", "Action Input") or not isinstance(node["description"], str):
            raise InputError(f"a node of unknown type {node['node_type']!r}, or without text")
        if node["node_type"] == "Action" and [child["node_type"] for child in node["children"]] != ["Action Input"]:
            raise InputError("an Action must have one child, its Action Input")
        if node.get("observation_code") == FINAL_ANSWER:
            ways.append(way)
        stack.extend([*way, child] for child in reversed(node["children"]))
    return ways


def _examples(answer: _Answer, id: str, file: Path, options: ToolBenchOptions, report: DataReport) -> Iterator[Example]:
    where = str(file)
    if not answer.ways:
        report.drop(id, where, "no final answer")
        return
    report.counts["files won"] += 1
    won = {_key(node) for way in answer.ways for node in way}
    way = answer.ways[0]
    branches = [depth for depth, node in enumerate(way) if len(node["children"]) > 1]
    if not branches:
        report.drop(id, where, "no branch on the way to the answer")
    for depth in branches:
        pair_id = f"{id}@{depth}"
        good = _decision(way[depth + 1])
        rejected: list[list[Message]] = []
        for child in way[depth]["children"]:
            if _key(child) in won:
                continue
            bad = _decision(child)
            report.count("pairs")
            report.count(f"pairs: {_shape(good)} over {_shape(bad)}")
            reason, detail = _why_not(good, bad, options)
            if reason:
                report.drop(pair_id, where, reason, detail)
            else:
                rejected.append(_messages(_used(bad, options), (pair_id, where), report, observed=False))
        if not rejected:
            continue
        chosen = _messages(_used(good, options), (pair_id, where), report, observed=False)
        unknown = [call["name"] for call in calls_of(chosen) if call["name"] not in tool_names(answer.tools)]
        if unknown:
            report.drop(pair_id, where, "chosen call names no tool", unknown[0])
            continue
        history = _messages(_used(way[1 : depth + 1], options), (pair_id, where), report)
        origin = {"format": "toolbench", "file": file.name, "depth": depth}
        yield Example(pair_id, where, answer.start + history, chosen, rejected, answer.tools, {}, origin)


def _why_not(good: Nodes, bad: Nodes, options: ToolBenchOptions) -> tuple[str, str]:
    """Why a pair is left out, and the detail; two empty texts where it is not."""
    if _written(good) == _written(bad):
        return "identical", "both decisions make the same call"
    if _call(good) and _call(good) == _call(bad):
        return "same call, written differently", ""
    if options.thoughts == "strip" and not (_used(good, options) and _used(bad, options)):
        return "a side is nothing but a thought", ""
    if options.shapes == "equal" and _shape(_used(good, options)) != _shape(_used(bad, options)):
        return "sides of different shape", f"{_shape(good)} over {_shape(bad)}"
    if options.failures == "skip" and bad[-1].get("observation_code") in ENVIRONMENT:
        return "rejected call failed through its environment", f"code {bad[-1]['observation_code']}"
    return "", ""


def _used(nodes: Nodes, options: ToolBenchOptions) -> Nodes:
    return [node for node in nodes if node["node_type"] != "Thought" or options.thoughts == "keep"]


def _key(node: dict[str, Any]) -> int:
    return id(node)  # nodes carry no names of their own, and equal siblings are different nodes


def _decision(node: dict[str, Any]) -> Nodes:
    """One reply of the model: a thought, a call, or a thought and a call."""
    nodes = [node]
    while node["node_type"] != "Action Input" and len(node["children"]) == 1:
        node = node["children"][0]
        if node["node_type"] == "Thought":
            break
        nodes.append(node)
    return nodes


def _written(decision: Nodes) -> list[str]:
    """The call as the model wrote it, or the thought where there is no call."""
    return [node["description"] for node in decision if node["node_type"] != "Thought" or len(decision) == 1]


def _call(decision: Nodes) -> str:
    """The call in a form in which equal ones are equal texts, empty where there is none."""
    messages, _ = with_dict_arguments(_as_messages(decision, observed=False))
    return normal_json(calls_of(messages)) if calls_of(messages) else ""


def _shape(decision: Nodes) -> str:
    thought, call = decision[0]["node_type"] == "Thought", decision[-1]["node_type"] == "Action Input"
    return "thought and call" if thought and call else "thought" if thought else "call"


def _messages(nodes: Nodes, place: tuple[str, str], report: DataReport, *, observed: bool = True) -> list[Message]:
    """Nodes below the root as messages, what was repaired in them listed."""
    messages, repairs = with_dict_arguments(_as_messages(nodes, observed=observed))
    for repair, detail in repairs:
        report.repair(*place, repair, detail)
    return messages


def _as_messages(nodes: Nodes, *, observed: bool) -> list[Message]:
    """Thought and call make one message, an observation the tool's."""
    messages: list[Message] = []
    thought, name = "", ""
    for node in nodes:
        text = node["description"]
        if node["node_type"] == "Action":
            name = text
        elif node["node_type"] == "Thought":
            if thought:
                messages.append({"role": "assistant", "content": thought})
            thought = text
        else:
            call = {"type": "function", "function": {"name": name, "arguments": text}}
            messages.append({"role": "assistant", "content": thought, "tool_calls": [call]})
            thought = ""
            if observed:
                messages.append({"role": "tool", "name": name, "content": node.get("observation", "")})
    if thought:
        messages.append({"role": "assistant", "content": thought})
    return messages
