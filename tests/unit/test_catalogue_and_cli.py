"""The catalogue and the command line as a user types it: lists, recipes, errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stillhouse import catalogue, workflow
from stillhouse.base.errors import ConfigError
from stillhouse.base.fields import field_hints
from stillhouse.base.files import write_json
from stillhouse.base.taxonomy import AXES
from stillhouse.cli.main import main
from stillhouse.cli.recipe import parse_overrides, read_recipe, without_defaults
from stillhouse.core.system import Meta
from stillhouse.runs import RunOptions, split_values
from stillhouse.systems import all_systems, get_system

OWN = '''
"""A system of the user's own."""
from dataclasses import dataclass
from typing import Annotated
from annotated_types import Ge
from stillhouse import Evaluate, Meta, System, Transform

@dataclass(kw_only=True)
class Own(System):
    """Doubles a number."""
    meta = Meta(title="Own", domain="arithmetic", family="tests")
    number: Annotated[int, "what is doubled", Ge(0)] = 3
    word: Annotated[str, "printed beside it"] = "apples"

    def stages(self, run):
        doubled = yield Transform("double", lambda context: {"value": 2 * self.number, "word": self.word})
        yield Evaluate("again", lambda context: {"value": 2 * doubled.json()["value"]})
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What a command printed, as JSON if it asked for it."""
    main([str(word) for word in words])
    out = capsys.readouterr().out
    return json.loads(out) if "--json" in words else out


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """What a command that is refused says: one line."""
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert leaving.value.code == code
    assert printed.out == ""
    assert printed.err.startswith("stillhouse: ") and printed.err.count("\n") == 1
    return printed.err.removeprefix("stillhouse: ").strip()


# -- the catalogue --------------------------------------------------------------------------------------------------


def test_systems_are_listed(capsys):
    rows = typed(capsys, "systems", "--json")
    assert [row["name"] for row in rows] == sorted(all_systems())
    for row in rows:
        meta = get_system(row["name"]).meta
        assert {"name", "card", "title", "domain", "family", "verdict"} <= row.keys()
        assert (row["title"], row["domain"], row["card"]) == (meta.title, meta.domain, meta.card)
    table = typed(capsys, "systems")
    assert all(row["name"] in table and row["title"] in table for row in rows)


def test_systems_by_axis(capsys):
    def names(*words: str) -> list[str]:
        return [row["name"] for row in typed(capsys, "systems", "--json", *words)]

    assert "taid" in names("--domain", "language") and names("--domain", "nowhere") == []
    assert "taid" in names("--family", "Logit") and "sft" not in names("--family", "logit")
    assert "sft" in names("--access", "teacher-free", "--domain", "lang")
    for axis in catalogue.rows():
        wanted = {name: catalogue.in_words(axis[name]) for name in AXES if name != "teacher_access"}
        found = catalogue.rows(access=axis["teacher_access"][0], family=axis["family"], **wanted)
        assert axis["name"] in [row["name"] for row in found]


def test_a_word_outside_the_taxonomy_is_refused():
    with pytest.raises(ConfigError, match=r"feedback='logit' is not in the taxonomy.*logits"):
        Meta(title="x", domain="language", family="f", feedback="logit")


def test_verdicts_are_those_of_the_results(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogue, "CHECKOUT", tmp_path / "nowhere")
    assert all(row["verdict"] is None for row in typed(capsys, "systems", "--json"))
    write_json(Path("results/claims/kd.json"), {"verdict": "contradicted"})
    assert {row["name"]: row["verdict"] for row in typed(capsys, "systems", "--json")}["kd"] == "contradicted"
    assert typed(capsys, "show", "kd", "--json")["verdict"] == "contradicted"


@pytest.mark.parametrize("name", all_systems())
def test_a_system_is_shown_with_its_fields(capsys, name):
    shown = typed(capsys, "show", name, "--json")
    system = get_system(name)
    assert [field["name"] for field in shown["fields"]] == list(field_hints(system))
    fields = {field["name"]: field for field in shown["fields"]}
    for key, value in system.demo.items():
        assert fields[key]["demo"] == json.loads(json.dumps(value))
    assert fields["lr"]["default"] == system.__dataclass_fields__["lr"].default if "lr" in fields else True
    text = typed(capsys, "show", name)
    assert all(field in text for field in fields) and shown["doc"].splitlines()[0] in text


def test_runs_are_listed(capsys, tmp_path):
    assert typed(capsys, "runs", tmp_path, "--json") == []
    assert typed(capsys, "runs", tmp_path).strip() == f"no runs in {tmp_path}"
    record = {"name": "a", "system": "kd", "status": "done", "created": "2030-01-01", "seconds": 12.3}
    write_json(tmp_path / "a" / "run.json", record)
    write_json(tmp_path / "b" / "run.json", {**record, "name": "b", "system": "", "status": "failed"})
    assert typed(capsys, "runs", tmp_path, "--json") == [
        {**record, "folder": str(tmp_path / "a")},
        {**record, "name": "b", "system": "", "status": "failed", "folder": str(tmp_path / "b")},
    ]
    text = typed(capsys, "runs", tmp_path)
    assert "failed" in text and str(tmp_path / "a") in text


def test_doctor(capsys):
    found = typed(capsys, "doctor", "--json")
    assert found["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert {"versions", "optional", "machine", "places"} <= found.keys()
    assert "torch" in typed(capsys, "doctor")


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", all_systems())
def test_a_printed_recipe_is_read_back(capsys, name, tmp_path):
    """All fields and options with their help; left as it is, it is the plain run."""
    text = typed(capsys, "config", name)
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    values = read_recipe(file)
    assert list(values) == ["system", *field_hints(get_system(name)), *field_hints(RunOptions)]
    assert values.pop("system") == name
    system, options = split_values(get_system(name), values)
    assert system.config() == get_system(name)().config()  # the defaults are the paper's values
    assert options == RunOptions()
    for hint in field_hints(get_system(name)).values():
        assert hint.__metadata__[0].split(",")[0] in text
    untouched, _ = split_values(get_system(name), without_defaults(get_system(name), values))
    assert untouched.config() == get_system(name).make().config()


@pytest.fixture
def asked(monkeypatch):
    """What `run` asks the library for; nothing is run."""
    calls: list[tuple[str, dict[str, Any], str]] = []

    def run(name: str, values: Any, *, output: str, **_: Any) -> None:
        split_values(get_system(name), values)
        calls.append((name, dict(values), str(output)))
        raise SystemExit(0)

    monkeypatch.setattr(workflow, "run_system", run)
    return calls


def ran(*words: object) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    assert leaving.value.code == 0


def test_an_edited_recipe_runs_as_edited(capsys, asked, tmp_path):
    text = typed(capsys, "config", "kd")
    file = tmp_path / "recipe.yaml"
    edited = text.replace("teacher: demo", "teacher: org/model").replace("temperature: 2.0", "temperature: 3.5")
    assert edited.count("org/model") == edited.count("3.5") == 1
    file.write_text(edited.replace("output: null", "output: there").replace("steps: null", "steps: 12"))
    ran("run", "--config", file)
    ran("run", "kd", "--config", file, "steps=5", "alpha=0.25", "output=elsewhere")
    (name, values, output), (_, overridden, other) = asked
    config = split_values(get_system("kd"), values)[0].config()
    assert (name, output, other) == ("kd", "there", "elsewhere")
    assert (config["teacher"], config["temperature"], config["steps"], config["alpha"]) == ("org/model", 3.5, 12, 0.9)
    changed = split_values(get_system("kd"), overridden)[0].config()
    assert (changed["temperature"], changed["steps"], changed["alpha"]) == (3.5, 5, 0.25)


def test_words_of_a_run(asked, tmp_path):
    ran("run", "taid", "t_start=0.2", "teacher=a=b", "output=x", "trackers=", "-q")
    ((name, values, output),) = asked
    assert (name, output) == ("taid", "x")
    system, options = split_values(get_system("taid"), values)
    assert (system.config()["t_start"], system.config()["teacher"], options.trackers) == (0.2, "a=b", [])
    ran("run", "taid")
    assert asked[1][2].startswith("runs/taid-2")


def test_a_recipe_for_another_system(capsys, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("system: kd\n")
    assert "is a recipe for 'kd', not for 'taid'" in refused(capsys, "run", "taid", "-c", file)
    file.write_text("steps: 3\n")
    assert "which system?" in refused(capsys, "run", "-c", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing, not a mapping"),
        ("- a\n- b\n", "holds a list, not a mapping"),
        ("just text", "holds a str, not a mapping"),
        ("a: 1\nb: 2\na: 3\n", "line 3: .*a.*keep one"),
        ("a: [1, 2\nb: 3", "line 2: not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1: YAML tags .* are not allowed"),
        ("a: 1\nb: !!int '3'\n", "line 2: YAML tags"),
        ("1: 2\n", "the field name 1 is not text"),
        (": 2\n", "the field name None is not text"),
        ("system: 3\n", "system=3 is not text"),
    ],
)
def test_recipes_are_read_strictly(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_recipe(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_recipes_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*: No such file"):
        read_recipe(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 3\)"):
        read_recipe(tmp_path / "latin.yaml")


letters = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))  # YAML normalises line ends
plain = (
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(letters, max_size=9)
)
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)


names = st.from_regex(r"[^\W\d]\w{0,7}", fullmatch=True)  # of fields; ruamel cannot read some others that it writes


@given(values=st.dictionaries(names, plain | st.lists(plain, max_size=3), min_size=1))
@relaxed
def test_what_yaml_writes_recipes_read(values, tmp_path):
    values = {name: value for name, value in values.items() if name not in ("system", "output")} or {"a": 1}
    with (tmp_path / "recipe.yaml").open("w", encoding="utf-8") as handle:
        YAML(typ="safe", pure=True).dump(values, handle)
    assert read_recipe(tmp_path / "recipe.yaml") == values


@given(text=st.text(alphabet="ab: -[]{}#&*!|>'\"%@`\n\t1,?~é", max_size=40))
@relaxed
def test_any_text_is_a_mapping_or_a_clear_error(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    message = ""
    try:
        found = read_recipe(file)
    except ConfigError as error:
        message = str(error)
    if message:
        assert str(file) in message and "\n" not in message
    else:
        assert all(isinstance(name, str) for name in found)


names = st.text(alphabet="abc_", min_size=1, max_size=5)


@given(pairs=st.lists(st.tuples(names, st.text(max_size=10))))
def test_overrides(pairs):
    assert parse_overrides([f"{name}={value}" for name, value in pairs]) == dict(pairs)


def test_words_that_are_no_overrides():
    for word in ("steps", "=3", "", "-x"):
        with pytest.raises(ConfigError, match="is not of the form field=value"):
            parse_overrides([word])


# -- a run ----------------------------------------------------------------------------------------------------------


def test_a_system_of_one_s_own_runs(capsys, own, tmp_path):
    folder = tmp_path / "runs" / "first"
    out = typed(capsys, "run", own, "number=5", "word=pears", f"output={folder}", "trackers=", "-q")
    assert str(folder / "report.html") in out and (folder / "report.html").exists()
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["system"], record["explicit"]) == ("done", "own", ["number", "word"])
    assert json.loads((folder / "stages/01-double/artifact/value.json").read_text()) == {"value": 10, "word": "pears"}
    assert json.loads((folder / "stages/02-again/artifact/value.json").read_text()) == {"value": 20}
    assert [row["status"] for row in typed(capsys, "runs", tmp_path / "runs", "--json")] == ["done"]
    (folder / "report.html").unlink()
    assert typed(capsys, "report", folder).strip() == str(folder / "report.html")
    main(["resume", str(folder)])
    assert capsys.readouterr().err.splitlines() == ["double: done already", "again: done already"]


def test_a_recipe_of_one_s_own_system(capsys, own, tmp_path):
    """What `config FILE` prints, `run` takes."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(typed(capsys, "config", own).replace("number: 3", "number: 8"))
    typed(capsys, "run", own, "-c", recipe, f"output={tmp_path / 'one'}", "trackers=", "-q")
    assert json.loads((tmp_path / "one/stages/01-double/artifact/value.json").read_text())["value"] == 16
    typed(capsys, "run", "-c", recipe, f"output={tmp_path / 'two'}", "trackers=", "-q")
    assert json.loads((tmp_path / "two/stages/01-double/artifact/value.json").read_text())["value"] == 16


# -- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_one_line(capsys, own, tmp_path):
    assert refused(capsys, "run", "tiad") == "there is no system 'tiad'; did you mean 'taid' or 'ftd'?"
    assert refused(capsys, "show", "kdd").startswith("there is no system 'kdd'; did you mean 'kd'")
    assert "kd has no field 'temprature'; did you mean 'temperature'" in refused(capsys, "run", "kd", "temprature=3")
    assert "kd: alpha='2' is not allowed" in refused(capsys, "run", "kd", "alpha=2")
    assert "'alpha' is not of the form field=value" in refused(capsys, "run", "kd", "alpha")
    assert "run: devices='0' is not allowed" in refused(capsys, "run", "kd", "devices=0")
    assert "which system?" in refused(capsys, "run")
    assert "own: number='-1' is not allowed" in refused(capsys, "run", own, "number=-1")
    assert "is not a run: it has no run.json" in refused(capsys, "resume", tmp_path)
    assert "is not a run: it has no run.json" in refused(capsys, "report", tmp_path)
    assert "sft has no claim to check" in refused(capsys, "check", "sft", "--results", tmp_path)
    assert "launch starts `run` or `resume`, not show" in refused(capsys, "launch", "show", "kd")
    assert "need --address" in refused(capsys, "launch", "--nodes", "2", "run", "kd")
    assert "No such command 'rum'" in refused(capsys, "rum", "kd")
    assert "trackers: there is no 'tensorbord'; did you mean 'tensorboard'" in refused(
        capsys, "run", own, "trackers=tensorbord", f"output={tmp_path / 'run'}"
    )


def test_unexpected_errors_name_themselves_and_debug_shows_the_traceback(capsys, own):
    own.write_text(OWN.replace("2 * self.number", "1 / 0"))
    message = refused(capsys, "run", own, f"output={own.parent / 'run'}", "trackers=", "-q", code=1)
    assert message.startswith("unexpected ZeroDivisionError") and "--debug" in message
    record = json.loads((own.parent / "run/run.json").read_text())
    assert record["status"] == "failed" and record["error"].startswith("ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "run", str(own), f"output={own.parent / 'run'}", "trackers=", "-q"])


def test_as_a_program():
    """The installed entry, in a process of its own; listing needs neither torch nor transformers in memory."""
    code = "import sys; from stillhouse.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "run" in done.stdout and "systems" in done.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", "run", "tiad"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr == "stillhouse: there is no system 'tiad'; did you mean 'taid' or 'ftd'?\n"
    assert wrong.stdout == ""


def test_recipes_name_what_they_are_for(capsys):
    text = typed(capsys, "config", "taid")
    assert text.startswith("# TAID. Shing et al. (2025)")
    assert "# -- the method --" in text and "# -- the run --" in text
