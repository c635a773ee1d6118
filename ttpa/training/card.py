"""The model card of a trained model, and its upload to the Hugging Face Hub where the user asked for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ttpa.errors import InputError

TAGS = ["ttpa", "dpo", "preference-optimization", "tool-use", "function-calling"]
TOLD = {
    "steps": "optimizer steps",
    "pairs": "pairs",
    "tokens": "packed tokens",
    "skipped_steps": "steps left out",
    "processes": "processes",
    "seed": "seed",
}
"""What the card tells of summary.json, apart from the evaluations, the time and the versions."""


def model_card(
    *,
    source: str | None,
    summary: Mapping[str, Any],
    options: Mapping[str, Any],
    report: Mapping[str, Any],
    name: str | None = None,
) -> str:
    """The text of a README.md with metadata that the Hub reads.

    `source` is the folder or Hugging Face name of the model that was trained, None for the embedded one, `summary` and
    `report` are the contents of summary.json and data_report.json, `options` those of config.yaml, and `name` is the
    repository that the model will lie in. The license is that of `source`, where its own card, in its folder or
    downloaded before, says one. Of absolute paths only the last part is told.
    """
    on_hub = source is not None and not Path(source).is_dir()
    base = "The embedded model of ttpa" if source is None else source if on_hub else Path(source).name
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        **({} if source is None else _license(source)),
    )
    link = f"[{base}](https://huggingface.co/{base})" if on_hub else base
    plain = {key: _told(value) for key, value in options.items() if value is not None and key != "output"}
    numbers = [f"{label}: {summary[key]:,}" for key, label in TOLD.items() if key in summary]
    numbers.append(f"seconds, all phases: {sum(summary['seconds'].values()):,.0f}")
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name.rsplit('/', 1)[-1] if name else 'A model trained with ttpa'}",
        f"{link}, trained by `python -m ttpa.train` on preferences inside its tool calls.",
        "## Results",
        _results(summary["evaluations"]) or "Not evaluated.",
        "## Data",
        _list(_data(report)),
        "## Training",
        _list(numbers),
        f"```yaml\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)}```",
        "## Use",
        _USE.format(path=name or "path/to/this/folder"),
        "## Versions",
        _list([f"{package} {version}" for package, version in summary["versions"].items()]),
    ]
    return "\n\n".join(parts) + "\n"


def check_push(name: str) -> None:
    """Raise InputError where `--push_to_hub NAME` cannot succeed: the name is none for a repository, or there is no
    token. Nothing is sent."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {name}: {error}; give ORGANISATION/NAME or NAME") from error
    if get_token() is None:
        raise InputError("--push_to_hub needs a token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")


def push_to_hub(folder: Path, name: str, *, private: bool) -> str:
    """Upload a model folder to a repository, which is made where it is not there, and return its address. Raises
    InputError when that fails, with the command that tries it again; the folder stays as it is."""
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload of a model by ttpa")
    except Exception as error:  # the network and the Hub fail in many ways, and none of them may cost the run
        again = ["hf", "upload", name, str(folder), "."] + ["--private"] * private
        raise InputError(
            f"--push_to_hub {name}: the upload failed ({type(error).__name__}: {error}). The model is saved; try "
            f"again: {shlex.join(again)}",
            path=folder,
        ) from error
    return str(repository)


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}")
inputs = tokenizer.apply_chat_template(
    messages, tools=tools, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```"""


def _license(source: str) -> dict[str, Any]:
    """What the card of a model says of its license; nothing where there is no card on this machine."""
    path = Path(source) / "README.md" if Path(source).is_dir() else try_to_load_from_cache(source, "README.md")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        data = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}


def _results(evaluations: Mapping[str, Any]) -> str:
    """A table of all evaluations before and after; nothing where there are none."""
    rows = ["| set | | before | after | difference |", "|---|---|---|---|---|"]
    for name, parts in evaluations.items():
        before, after, change = parts["before"], parts["after"], parts["difference"]
        exact = [
            f"{100 * part['exact_share']:.1f} {_interval(part['exact_interval'], 100)}" for part in (before, after)
        ]
        points = f"{change['points']:+.1f} {_interval(change['interval'])}"
        rows.append(
            f"| {name}, {before['decisions']} decisions | exact calls, % | {exact[0]} | {exact[1]} | {points} |"
        )
        score = f"{change['esm_score']:+.4f} {_interval(change['esm_score_interval'], digits=4)}"
        rows.append(f"| | ESM score | {before['esm_score']:.4f} | {after['esm_score']:.4f} | {score} |")
    return "\n".join([*rows, "", "Brackets are 95 % intervals."]) if evaluations else ""


def _interval(ends: list[float], scale: float = 1, *, digits: int = 1) -> str:
    return f"[{scale * ends[0]:.{digits}f}, {scale * ends[1]:.{digits}f}]"


def _data(report: Mapping[str, Any]) -> list[str]:
    """What was read, or what the model sampled in each round."""
    if "rounds" in report:
        return [
            f"round {number}: {part['pairs']:,} pairs in {part['trees']:,} trees, sampled by the model at "
            f"{part['decisions']:,} tool calls"
            for number, part in enumerate(report["rounds"], start=1)
        ]
    return [
        f"{Path(report['path']).name} ({report['format']}): {report['read']:,} {report['unit']} read, "
        f"{report['kept']:,} trees kept",
        *(f"{name}: {number:,}" for name, number in report["counts"].items()),
        *(f"dropped, {reason}: {number:,}" for reason, number in report["dropped_by_reason"].items()),
        *(f"repaired, {kind}: {number:,}" for kind, number in report["repaired_by_kind"].items()),
    ]


def _list(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _told(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
