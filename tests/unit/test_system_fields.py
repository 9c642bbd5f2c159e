"""A system's fields: what is allowed, what is set for the demo, which ones a stage has read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.base.errors import ConfigError
from stillhouse.base.fields import check_fields, check_value, field_help, field_hints, field_type
from stillhouse.core.system import Meta, System
from stillhouse.runs import RunOptions, split_values
from stillhouse.systems import all_systems, get_system
from stillhouse.tasks.language import LanguageSystem


@dataclass(kw_only=True)
class Example(System):
    """For these tests."""

    meta = Meta(title="Example", domain="tests", family="tests")
    demo: ClassVar = {"steps": 10, "rate": "0.5"}

    teacher: str = "demo"
    steps: Annotated[int | None, "optimizer steps", Ge(1)] = 1000
    rate: Annotated[float, "learning rate", Gt(0), Le(1)] = 1e-4
    share: Annotated[float, "share held out", Gt(0), Lt(1)] = 0.05
    shape: Annotated[Literal["cosine", "linear"], "course"] = "cosine"
    keep: bool = False
    layers: Annotated[list[int], "layers"] = None  # type: ignore[assignment]
    pair: tuple[float, float] = (0.9, 0.99)
    folder: Path = Path("here")
    column: str | None = None

    def is_demo(self) -> bool:
        return self.__dict__["teacher"] == "demo"


def made(**values) -> dict:
    return Example.make(**values).config()


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("steps", "20", 20),
        ("steps", "none", None),
        ("steps", "Null", None),
        ("steps", 7, 7),
        ("rate", "1e-3", 1e-3),
        ("rate", "1", 1.0),
        ("shape", "linear", "linear"),
        ("keep", "true", True),
        ("keep", "no", False),
        ("keep", "0", False),
        ("layers", "1, 2,3", [1, 2, 3]),
        ("layers", "4", [4]),
        ("layers", "", []),
        ("layers", [5, 6], [5, 6]),
        ("pair", "0.1,0.2", [0.1, 0.2]),
        ("folder", "some/x", "some/x"),
        ("column", "none", None),
        ("column", "text", "text"),
        ("column", 12, "12"),
        ("teacher", "12", "12"),
        ("teacher", 12, "12"),
        ("teacher", "none", "none"),  # only an optional field can be none
    ],
)
def test_values_as_typed(name, typed, value):
    found = made(**{name: typed})[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "0"}, r"steps='0' is not allowed .*greater than or equal to 1.*expected int \| none \(>= 1\)"),
        ({"steps": "many"}, "steps='many' is not allowed"),
        ({"steps": 2.5}, "steps=2.5 is not allowed"),
        ({"rate": "none"}, "rate='none' is not allowed"),
        ({"rate": 0}, r"rate=0 is not allowed .*expected float \(> 0, <= 1\)"),
        ({"rate": "1.01"}, "rate='1.01' is not allowed"),
        ({"rate": "nan"}, "rate='nan' is not allowed"),
        ({"share": 1}, r"share=1 is not allowed.*\(> 0, < 1\)"),
        ({"shape": "cosin"}, r"shape='cosin' is not allowed .*'cosine' \| 'linear'"),
        ({"keep": "perhaps"}, "keep='perhaps' is not allowed"),
        ({"layers": "1,x"}, "layers=.* is not allowed"),
        ({"pair": "1,2,3"}, "pair=.* is not allowed"),
        ({"stepz": 3}, "has no field 'stepz'; did you mean 'steps'"),
        ({"Steps": 3}, "has no field 'Steps'; did you mean 'steps'"),
        ({"meta": 3}, "has no field 'meta'"),
        ({"demo": {}}, "has no field 'demo'"),
    ],
)
def test_errors_name_the_field_the_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        Example.make(**values)
    assert str(error.value).startswith(Example.name())
    assert "\n" not in str(error.value)


@given(value=st.integers() | st.floats() | st.text() | st.none() | st.booleans() | st.lists(st.integers(), max_size=2))
def test_any_value_is_taken_or_refused_cleanly(value):
    for name, hint in field_hints(Example).items():
        refused = ""
        try:
            found = check_value("example", name, value, hint)
        except ConfigError as error:
            refused = str(error)
        if refused:
            assert refused.startswith(f"example: {name}=")
        else:
            assert check_value("example", name, found, hint) == found or found != found


def test_help_and_types_in_words():
    hints = field_hints(Example)
    assert field_help(hints["steps"]) == "optimizer steps"
    assert field_help(hints["teacher"]) == ""
    assert field_type(hints["steps"]) == "int | none (>= 1)"
    assert field_type(hints["share"]) == "float (> 0, < 1)"
    assert field_type(hints["shape"]) == "'cosine' | 'linear'"
    assert field_type(hints["keep"]) == "bool"


def test_check_fields_of_any_dataclass():
    assert check_fields(RunOptions, {"devices": "2", "trackers": "wandb,mlflow"}, owner="run") == {
        "devices": 2,
        "trackers": ["wandb", "mlflow"],
    }
    with pytest.raises(ConfigError, match="run: devices='0' is not allowed"):
        check_fields(RunOptions, {"devices": "0"}, owner="run")


# -- the demo -------------------------------------------------------------------------------------------------------


def test_demo_values_fill_in_on_the_embedded_task_only():
    assert [made()[name] for name in ("steps", "rate", "share")] == [10, 0.5, 0.05]
    assert [made(teacher="mine")[name] for name in ("steps", "rate")] == [1000, 1e-4]
    assert [made(teacher="demo")[name] for name in ("steps", "rate")] == [10, 0.5]


def test_what_the_user_sets_wins_over_the_demo():
    assert [made(steps=3)[name] for name in ("steps", "rate")] == [3, 0.5]
    assert made(steps="1000")["steps"] == 1000  # the default, but said
    assert made(steps=None)["steps"] is None
    assert Example.make(steps=3).__dict__["explicit"] == {"steps"}


def test_plain_instances_have_the_papers_values():
    assert Example().config()["steps"] == 1000


@pytest.mark.parametrize("system", all_systems().values(), ids=all_systems())
def test_demo_values_of_all_systems_are_allowed(system):
    config = system.make().config()
    for name, value in system.demo.items():
        checked = check_value("", name, value, field_hints(system)[name])
        assert config[name] == (list(checked) if isinstance(checked, tuple) else checked)
    assert all(field_help(hint) for hint in field_hints(system).values()), "every field has a help text"


def test_language_systems_are_demos_only_without_the_users_things():
    kd = get_system("kd")
    assert kd.make().is_demo()
    for values in ({"teacher": "org/model"}, {"data": "text.txt"}, {"teacher": "org/model", "data": "text.txt"}):
        system = kd.make(**values)
        assert not system.is_demo()
        assert system.config()["lr"] == LanguageSystem.lr


# -- reading --------------------------------------------------------------------------------------------------------


def test_reads_are_recorded():
    system = Example.make()
    assert system.__dict__["read"] == set()
    _ = system.steps, system.rate
    assert system.__dict__["read"] == {"steps", "rate"}
    system.config()  # everything, but that is not a stage's doing
    system.is_demo()
    _ = system.meta, system.demo, system.name(), system.stages
    assert system.__dict__["read"] == {"steps", "rate"}
    assert Example.make().__dict__["read"] == set()


def test_reads_through_functions_are_recorded():
    system = get_system("kd").make(teacher="x", data="y")
    system.learning_rate()
    assert system.__dict__["read"] == {"lr_schedule", "warmup"}


# -- names and options ----------------------------------------------------------------------------------------------


def test_names_are_those_of_the_files():
    for name, system in all_systems().items():
        assert system.name() == name
        assert system.__module__.rpartition(".")[2].replace("_", "-") == name
    with pytest.raises(ConfigError, match="there is no system 'tiad'; did you mean 'taid'"):
        get_system("tiad")
    with pytest.raises(ConfigError, match=r"there is no file nowhere\.py"):
        get_system("nowhere.py")


def test_a_file_must_define_one_system(tmp_path):
    file = tmp_path / "mine_own.py"
    file.write_text("from stillhouse import System\n")
    with pytest.raises(ConfigError, match="mine_own must define exactly one System with a meta; it defines 0"):
        get_system(str(file))
    file.write_text(
        "from dataclasses import dataclass\nfrom stillhouse import Meta, System\n"
        "@dataclass(kw_only=True)\nclass Mine(System):\n    meta = Meta(title='Mine', domain='x', family='y')\n"
    )
    assert get_system(str(file)).name() == "mine-own"


def test_fields_and_options_are_told_apart():
    system, options = split_values(
        get_system("kd"), {"temperature": "3", "devices": "1", "trackers": "", "lr": 1e-3, "precision": "bf16-mixed"}
    )
    assert (system.config()["temperature"], system.config()["lr"]) == (3.0, 1e-3)
    assert (options.devices, options.trackers, options.precision) == (1, [], "bf16-mixed")
    with pytest.raises(ConfigError, match=r"kd has no field 'temprature'; did you mean 'temperature'"):
        split_values(get_system("kd"), {"temprature": 3})
    with pytest.raises(ConfigError, match=r"kd has no field 'device'; did you mean 'devices'"):
        split_values(get_system("kd"), {"device": 3})
