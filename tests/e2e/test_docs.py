"""The documentation holds: its code runs, its commands and names exist, its tables are up to date.

Code runs as it stands, with fewer steps, in a folder that has what the pages speak of: ``my-teacher``, ``my.txt`` and
``my.jsonl``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from stillhouse.cli.main import app, main
from stillhouse.cli.recipe import parse_overrides
from stillhouse.runs import split_values, stage_artifacts
from stillhouse.systems import get_system
from stillhouse.tasks import language, vision
from stillhouse.workflow import run_system

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("tasks/*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str, *, title: str | None = None) -> list[str]:
    """The fenced blocks of a page in one language; those with a title are files."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [code for lang, name, code in BLOCK.findall(text) if lang == language and (name or None) == title]


def files(page: str) -> dict[str, str]:
    """The Python files that a page shows in full, by name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return {name: code for language, name, code in BLOCK.findall(text) if language == "python" and name}


def commands(page: Path) -> list[list[str]]:
    """The ``stillhouse`` commands of a page, as words."""
    lines = [
        line
        for language, _, code in BLOCK.findall(page.read_text(encoding="utf-8"))
        if language in ("sh", "console")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("stillhouse ")]


def shorter(code: str) -> str:
    return re.sub(r'(steps=|"steps": )\d+', r"\g<1>3", code)


def command(page: str, beginning: str) -> list[str]:
    """The first command of a page that begins so, with fewer steps."""
    words = next(words for words in commands(DOCS / page) if " ".join(words).startswith(beginning))
    return [shorter(word) for word in words]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    from stillhouse.models import new_causal_lm, train_bpe

    folder = tmp_path_factory.mktemp("docs")
    words = ["the", "still", "house", "holds", "copper", "water", "spirit", "and", "grain", "from", "every", "field"]
    chance = random.Random(0)
    texts = [" ".join(chance.choices(words, k=60)) + "." for _ in range(40)]
    (folder / "my.txt").write_text("\f".join(texts))
    records = [{"prompt": text[:40], "completion": text[40:120]} for text in texts]
    (folder / "my.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, code in {**files("write-a-system.md"), **files("one-file-each.md")}.items():
        (folder / name).write_text(code)

    tokenizer = train_bpe(texts, vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    for part in (new_causal_lm(config, seed=0), tokenizer):
        part.save_pretrained(folder / "my-teacher")
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def execute(page: str) -> dict[str, Any]:
    """Run the Python of a page, block after block; returns its names."""
    names: dict[str, Any] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(shorter(code), page, "exec", dont_inherit=True), names)
    return names


def finite_losses(stage: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert train
    assert all(math.isfinite(line["loss"]) for line in train)
    return train


# -- the code -------------------------------------------------------------------------------------------------------


def test_the_system_in_one_file(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    main(command("write-a-system.md", "show my_system.py"))
    assert "share of the teacher in the mixture" in " ".join(capsys.readouterr().out.split())

    main([*command("write-a-system.md", "run my_system.py teacher="), "window=64", "--quiet"])
    run = workspace / "runs/fading"
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "done"
    assert record["config"]["skew_start"] == 0.5
    assert record["fields"]["skew_end"] == "share of the teacher in the mixture at the end"
    assert set(record["explicit"]) == {"teacher", "data", "steps", "window"}
    (line,) = finite_losses(run / "stages/01-student")
    assert list(line["terms"]) == ["FadingSkew"]
    assert 0 < line["values"]["FadingSkew.alpha"] < 0.5  # it fades
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.vocab_size == 300

    (claim,) = get_system("my_system.py").make().claims()
    assert math.isfinite(claim.measure(stage_artifacts(run)))
    assert {claim.method, claim.baseline} == set(claim.variants)
    for source, overrides in claim.variants.values():
        assert get_system(source).make(**overrides).is_demo()


def test_the_rest_of_write_a_system() -> None:
    names = execute("write-a-system.md")
    loss_N = names["TopForwardKL"](k=5)(names["student_NV"], names["teacher_NV"])
    assert loss_N.shape == (3,)
    assert (loss_N >= 0).all()
    (line,) = finite_losses(Path("runs/smoothing/stages/01-student"))
    assert 0 < line["values"]["TeacherSmoothing.share"] < 0.5


ONE_FILE_EACH = {  # the terms that are logged, and a figure that is measured
    "better_peers": ({"CrossEntropy", "FromBetter"}, "peer/accuracy"),
    "brief_answers": ({"PolicyGradient", "KL"}, "student/characters"),
    "fading_reasons": ({"predict", "explain"}, "student/accuracy"),
    "fewer_layers": ({"ForwardKL"}, "pruned/kl"),
    "mean_images": ({"MeanMatch"}, "condensed/accuracy"),
    "one_step": ({"DistributionMatching", "SampleMSE"}, "student/swd"),
    "patch_relations": ({"Reconstruction", "CosineRelations"}, "student/probe"),
    "prototypes": ({"CrossEntropy", "ToPrototype"}, "accuracy"),
    "rare_tokens": ({"ForwardKL"}, "5/kl"),
    "telling_trees": ({"CrossEntropy"}, "telling/accuracy"),
}


def test_one_file_each_has_all_kinds() -> None:
    page = (DOCS / "one-file-each.md").read_text()
    shown = files("one-file-each.md")
    assert {name.removesuffix(".py") for name in shown} == ONE_FILE_EACH.keys()
    assert all(f"[`{name}`](#" in page for name in shown)
    assert max(len(code.splitlines()) for code in shown.values()) <= 75


@pytest.mark.parametrize("name", ONE_FILE_EACH)
def test_one_file_each(name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "tokens_per_second", lambda *_: 1.0)  # not for a second a model
    monkeypatch.setattr(vision, "images_per_second", lambda *_: 1.0)
    system = get_system(f"{name}.py")
    values: dict[str, Any] = {"trackers": [], **system.smoke}
    if issubclass(system, language.LanguageSystem):
        values |= {"teacher": "my-teacher", "data": "my.txt", "window": 32, "batch_size": 4, "steps": 4}
    done = run_system(f"{name}.py", values, output=workspace / "runs" / name, quiet=True)
    terms, figure = ONE_FILE_EACH[name]
    lines = [
        line for file in sorted(done.folder.glob("stages/*/metrics.jsonl")) for line in map(json.loads, file.open())
    ]
    train = [line for line in lines if line["kind"] == "train"]
    assert all(math.isfinite(line["loss"]) for line in train)
    assert terms in [set(line["terms"]) for line in train]
    *_, measured = done.artifacts.values()
    assert math.isfinite(measured.metrics[figure])
    assert system.product in done.artifacts
    assert system.meta.title in done.report.read_text()


def test_your_own_model() -> None:
    main([*command("your-own-model.md", "run taid teacher=my-teacher student=scale:0.25 data=my.jsonl"), "--quiet"])
    names = execute("your-own-model.md")
    assert names["model"].num_parameters() < 30_000  # of `runs/first`
    assert math.isfinite(names["table"].row("student")["perplexity"])
    assert names["finished"].report.exists()
    assert isinstance(names["distilled"], nn.Module)
    (line,) = finite_losses(Path("runs/plain/stages/01-student"))
    assert list(line["terms"]) == ["CrossEntropy", "KLDivergence", "FeatureMSE"]
    assert sum(term["share"] for term in line["terms"].values()) == pytest.approx(1)


def test_quick_start(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "kd", "teacher=my-teacher", "data=my.txt", "window=32", "steps=3", "output=runs/demo", "--quiet"])
    execute("quickstart.md")
    capsys.readouterr()
    main(command("quickstart.md", "runs"))
    assert "runs/demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", "taid", "t_stat=1"])
    said = capsys.readouterr().err
    assert said.strip() in (DOCS / "quickstart.md").read_text()


# -- commands, names, tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    known = {entry.name or entry.callback.__name__ for entry in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    for words in commands(page):
        assert words[0] in known, words
        if words[0] == "launch":
            words = words[min(words.index(name) for name in ("run", "resume") if name in words) :]
        if words[0] != "run":
            continue
        name, fields = "", []
        for word in words[1:]:
            if "=" in word:
                fields.append(word)
            elif not word.startswith("-") and not word.endswith(".yaml"):
                name = word
        if name:
            split_values(get_system(name), parse_overrides(fields))


def test_the_recipe_is_one() -> None:
    from stillhouse.cli.recipe import read_recipe

    (recipe,) = blocks("your-own-model.md", "yaml")
    Path("recipe.yaml").write_text(recipe)
    values = read_recipe(Path("recipe.yaml"))
    split_values(get_system(values.pop("system")), values)


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_names_in_the_reference_exist(page: Path) -> None:
    """mkdocstrings leaves out members that are not there and says nothing."""
    for part in re.split(r"^::: ", page.read_text(), flags=re.MULTILINE)[1:]:
        path = part.split()[0]
        try:
            owner = importlib.import_module(path)
        except ModuleNotFoundError:
            module, _, name = path.rpartition(".")
            owner = getattr(importlib.import_module(module), name)
        listed = re.search(r"members:((?:\s*\[[^\]]*\])|(?:\n\s+- \w+)+)", part)
        for member in re.findall(r"\w+", listed[1]) if listed else []:
            assert hasattr(owner, member), f"{path} has no {member}"


@pytest.mark.parametrize("page", sorted((DOCS / "tasks").glob("*.md")), ids=lambda page: page.stem)
def test_a_task_shows_samples(page: Path) -> None:
    """Each page has a picture of samples that is there, is linked where the tasks are, and from the first page."""
    shown = re.findall(r"!\[([^\]]+)\]\((\S+\.svg)\)", page.read_text(encoding="utf-8"))
    assert shown, "no picture: draw one in docs/_pictures.py"
    for words, name in shown:
        assert (page.parent / name).is_file(), name
        assert len(words) > 10, "words for those who do not see it"
    assert f"tasks/{page.name}" in (ROOT / "mkdocs.yml").read_text()
    assert f"tasks/{page.name}" in (DOCS / "index.md").read_text()


def docs_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> Any:
    return docs_module("_generate")


def test_the_page_of_systems_is_up_to_date(generator: Any) -> None:
    assert (DOCS / "systems.md").read_text() == generator.page(), "run `make docs` and commit docs/systems.md"


def test_the_readme_table_is_up_to_date(generator: Any) -> None:
    text = (ROOT / "README.md").read_text()
    assert text == generator.readme(text), "run `make docs` and commit README.md"


def test_the_guide_to_methods_is_up_to_date(generator: Any) -> None:
    text = (DOCS / "which-method.md").read_text()
    assert text == generator.guide(text), "run `make docs` and commit docs/which-method.md"


def test_a_claim_is_written_out(generator: Any) -> None:
    record = {
        "system": "kd",
        "scope": "central",
        "statement": "a student does better",
        "metric": "loss, nats",
        "higher_is_better": False,
        "method": "kd",
        "baseline": "sft",
        "variants": {"kd": [1.0, 2.0], "sft": [2.0, 4.0]},
        "effect": 1.5,
        "interval": [1.0, 2.0],
        "verdict": "shown",
        "budget": "equal steps",
        "seeds": [0, 1],
    }
    section = generator.claim_section(record)
    assert "| sft | 2.0000 | 4.0000 | 3.0000 |" in section
    assert "+1.5000 (positive is better), 95 % interval [+1.0000, +2.0000]" in section


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "mkdocs.yml")]
    done = subprocess.run([*words, "-d", str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").exists()
