"""The card beside a distilled model: facts of its run, in the form the Hugging Face Hub reads."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from stillhouse.base.errors import RunError
from stillhouse.base.files import whole_file
from stillhouse.models import conversion, input_expansion, lsg, swiftkv
from stillhouse.models.own_types import base_type_in
from stillhouse.report.record import RunRecord, StageRecord, Table, read_run
from stillhouse.report.wording import command_line, duration, listed, mapping, number, plain, show, text


def write_model_card(
    run_dir: Path,
    model_dir: Path,
    *,
    base_model: str | None = None,
    dataset: str | None = None,
    teacher: str | None = None,
    figures: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model_dir/README.md`` from what the run recorded.

    Args:
        run_dir: the run that made the model.
        model_dir: the directory the model was saved in.
        base_model: what the student's weights started from; in the metadata if it is a hub id.
        dataset: what it was trained on; in the metadata if it is a hub id.
        teacher: what it was distilled from.
        figures: further figures of this very model, name to value.

    Raises:
        RunError: the run cannot be read, ``model_dir`` is not a directory, or the card cannot be written.
    """
    run, model_dir = read_run(run_dir), Path(model_dir)
    if not model_dir.is_dir():
        raise RunError(f"{model_dir} is not a directory: save the model there before its card")
    architecture = _architecture(model_dir)
    causal = architecture.endswith("ForCausalLM")
    data = ModelCardData(
        library_name=_library(model_dir, architecture),
        pipeline_tag="text-generation" if causal else None,
        base_model=base_model if _is_hub_id(base_model) else None,
        datasets=[dataset] if dataset and _is_hub_id(dataset) else None,
        tags=list(dict.fromkeys(["stillhouse", "distillation", *([run.system] if run.system else [])])),
    )
    parts = [
        f"# {_inline(run.name)}",
        _what(run, base_model, dataset, teacher),
        _how(run),
        _figures(run, figures or {}),
        _load(model_dir, causal=causal),
        _repeat(run),
        _limits(run, dataset),
    ]
    body = "\n\n".join(part for part in parts if part)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)
    readme = model_dir / "README.md"
    with whole_file(readme) as temporary:
        temporary.write_text(str(card), encoding="utf-8", errors="replace")
    return readme


def _what(run: RunRecord, base_model: str | None, dataset: str | None, teacher: str | None) -> str:
    source = _name(teacher) if teacher else "a teacher"
    method = _inline(run.title) + (f" ({_inline(run.citation)})" if run.citation else "")
    sentences = [f"A student distilled from {source} by {method}."]
    if base_model:
        sentences.append(f"Its weights started from {_name(base_model)}.")
    if dataset:
        sentences.append(f"It was trained on {_name(dataset)}.")
    system = f"system `{_code(run.system)}`, " if run.system else ""
    sentences.append(f"Made with Stillhouse, {system}run `{_code(run.name)}`.")
    return " ".join(sentences)


def _how(run: RunRecord) -> str:
    rows = [
        [
            _inline(stage.label),
            _inline(stage.kind),
            f"{stage.steps:,.0f}" if math.isfinite(stage.steps) else "–",
            duration(stage.seconds),
            "reused from an earlier run" if stage.reused else _inline(stage.status),
        ]
        for stage in run.stages
    ]
    parts = ["## How it was made"]
    if rows:
        parts.append(_markdown(["stage", "kind", "steps", "time", "status"], rows, numeric={2, 3}))
    if run.config:
        rows = [
            [f"`{_code(name)}`", f"`{_code(_away_from_home(plain(run.config[name])))}`", run.source(name)]
            for name in run.fields_by_source
        ]
        parts.append(
            "Configuration (*yours*: set for this run; *demo*: set by the embedded task's defaults; "
            "*default*: the system's own value):"
        )
        parts.append(_markdown(["field", "value", "from"], rows))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _figures(run: RunRecord, figures: Mapping[str, Any]) -> str:
    parts = []
    if figures:
        rows = [[_inline(str(name)), _inline(show(value))] for name, value in figures.items()]
        parts.append(_markdown(["figure", "value"], rows, numeric={1}))
    for table in _tables(run):
        if table.title:
            parts.append(f"**{_inline(table.title)}**")
        parts.append(_table(table))
        if table.marks:
            parts.append("Bold: best of the rows other than a teacher.")
        parts.extend(_inline(note) for note in table.notes)
        parts.extend(f"{_inline(one.label)}: {_inline(one.help)}" for one in table.columns if one.help)
    return "\n\n".join(["## Figures", *parts]) if parts else ""


def _tables(run: RunRecord) -> list[Table]:
    return [stage.table for stage in run.stages if stage.table]


def _table(table: Table) -> str:
    arrows = {"lower": " ↓", "higher": " ↑"}
    head = ["", *(_inline(column.label) + arrows.get(column.better or "", "") for column in table.columns)]
    rows = []
    for index, row in enumerate(table.rows):
        cells = [_inline(text(row.get("name")))]
        for column in table.columns:
            cell = _inline(table.cell(index, column))
            cells.append(f"**{cell}**" if index in table.best(column) else cell)
        rows.append(cells)
    return _markdown(head, rows, numeric=set(range(1, len(head))))


OWN_TYPES = {
    conversion.PREFIX: "conversion import load_converted",
    swiftkv.PREFIX: "swiftkv import load_swiftkv",
    input_expansion.PREFIX: "input_expansion import load_expanded",
    lsg.PREFIX: "efficient_attention import load_efficient",
}
"""What loads model types of our own, by their prefix, in ``stillhouse.models``."""


def _load(model_dir: Path, *, causal: bool) -> str:
    own = next((load for prefix, load in OWN_TYPES.items() if base_type_in(model_dir, prefix) is not None), None)
    if own:
        imports, names, load = [f"from stillhouse.models.{own}"], [], own.rpartition(" ")[2]
        lines = [f'model = {load}("path/to/this/directory")']
    elif causal:
        imports, names = [], ["AutoModelForCausalLM"]
        lines = ['model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")']
    else:
        return ""
    if any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        names.append("AutoTokenizer")
        lines.append('tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")')
    if names:
        imports.append(f"from transformers import {', '.join(names)}")
    code = "\n".join([*imports, "", *lines])
    return f"## How to load it\n\n```python\n{code}\n```"


def _repeat(run: RunRecord) -> str:
    parts = []
    if run.argv:
        command = _away_from_home(command_line(run.argv))
        fence = "`" * max(3, 1 + max((len(run_) for run_ in re.findall(r"`+", command)), default=0))
        parts.append(f"{fence}sh\n{command}\n{fence}")
    facts = [f"{_inline(package)} {_inline(text(version))}" for package, version in run.versions.items()]
    if facts:
        parts.append("Versions: " + ", ".join(facts) + ".")
    revision = text(run.git.get("revision"))
    if revision:
        state = ", with uncommitted changes" if run.git.get("dirty") else ""
        parts.append(f"Git revision: `{_code(revision)}`{state}.")
    return "\n\n".join(["## How to repeat it", *parts]) if parts else ""


def _limits(run: RunRecord, dataset: str | None) -> str:
    limits = []
    titles = [_inline(table.title) for table in _tables(run) if table.title]
    if titles:
        limits.append("Measured only on: " + "; ".join(titles) + ". Nothing is known about other data.")
    else:
        limits.append("The run holds no evaluation table: the quality of this model was not measured.")
    seed = run.raw.get("seed")
    which = f" (seed {_inline(text(seed))})" if seed is not None else ""
    limits.append(f"One run{which}: the spread between seeds is not known.")
    by_demo = [name for name in run.fields_by_source if run.source(name) == "demo"]
    if by_demo:
        fields = ", ".join(f"`{_code(name)}`" for name in by_demo)
        limits.append(f"Set by the defaults of the embedded task, not by the published method: {fields}.")
    if run.status != "done":
        limits.append(f"The run is not finished; its status was {_inline(run.status)} when this card was written.")
    limits.extend(_non_finite(stage) for stage in run.stages if _lost(stage))
    if not dataset:
        limits.append("The training data was not named when this card was written.")
    limits.append("No licence is stated: it depends on those of the teacher, the base model and the data.")
    return "## Limits\n\n" + "\n".join(f"- {one}" for one in limits)


def _lost(stage: StageRecord) -> int:
    """How many logged losses were not finite."""
    lines = (line for player in stage.train.values() for line in player)
    return sum("loss" in line and not math.isfinite(number(line["loss"])) for line in lines)


def _non_finite(stage: StageRecord) -> str:
    count = _lost(stage)
    noun = "loss was" if count == 1 else "losses were"
    return f"In stage {_inline(stage.label)}, {count:,} logged {noun} not finite."


def _architecture(model_dir: Path) -> str:
    try:
        config = json.loads((model_dir / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    named = listed(mapping(config).get("architectures"))
    return text(named[0]) if named else ""


def _library(model_dir: Path, architecture: str) -> str:
    if (model_dir / "model_index.json").is_file():
        return "diffusers"
    return "transformers" if architecture else "stillhouse"


def _is_hub_id(name: str | None) -> bool:
    """Whether ``name`` reads as ``owner/repository`` of the hub and is no path on this machine."""
    if not name or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _name(name: str) -> str:
    """A model or data set by its name; of a local path only the last part, the rest is nobody's business."""
    if _is_hub_id(name):
        return f"[{_inline(name)}](https://huggingface.co/{name})"
    return f"`{_code(Path(name).name or name)}`"


def _away_from_home(value: str) -> str:
    """``value`` without the path of the home folder: a card travels, and the user's name need not."""
    home = os.path.expanduser("~")
    return value.replace(f"{home}/", "~/") if len(home) > 1 else value


def _inline(value: str) -> str:
    """``value`` as one line of Markdown text, with no markup of its own."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(value.split())).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _code(value: str) -> str:
    """``value`` for a code span inside a table."""
    return " ".join(value.split()).replace("`", "ʼ").replace("|", "\\|")


def _markdown(head: Iterable[str], rows: Iterable[list[str]], *, numeric: Iterable[int] = ()) -> str:
    head, right = list(head), set(numeric)
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
