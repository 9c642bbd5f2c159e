"""Verdicts on hand-made values, and a whole check with runs that cost nothing."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse import claims
from stillhouse.base.errors import ConfigError
from stillhouse.base.files import write_json
from stillhouse.claims import judge
from stillhouse.core.system import Claim
from stillhouse.systems import get_system

BASE = [1.0, 1.2, 0.9, 1.1, 1.05]


def shifted(*by: float) -> list[float]:
    return [value + shift for value, shift in zip(BASE, itertools.cycle(by), strict=False)]


# -- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "higher", "verdict"),
    [
        (shifted(0.1, 0.2), True, "shown"),
        (shifted(0.1, 0.2), False, "contradicted"),
        (shifted(-0.1, -0.2), False, "shown"),
        (shifted(-0.1, -0.2), True, "contradicted"),
        (shifted(0.1, -0.1), True, "not shown"),
        (shifted(0.1, -0.1), False, "not shown"),
        (shifted(0.5, 0.5, 0.5, 0.5, -3.0), True, "not shown"),  # mostly better is not better
    ],
)
def test_verdicts(method, higher, verdict):
    found = judge(method, BASE, higher_is_better=higher)
    assert found.verdict == verdict
    assert found.low <= found.effect <= found.high
    sign = 1 if higher else -1
    assert found.effect == pytest.approx(sign * np.mean(np.subtract(method, BASE)))


def test_pairs_count_not_averages():
    """A small gain in every seed shows, however far the seeds are apart."""
    far = [1.0, 50.0, -30.0, 7.0, 900.0]
    assert (
        judge([value + 0.01 + 0.001 * i for i, value in enumerate(far)], far, higher_is_better=True).verdict == "shown"
    )


def test_constant_effects():
    same = judge(BASE, BASE, higher_is_better=True)
    assert (same.effect, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "not shown")
    assert judge([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], higher_is_better=True).verdict == "shown"
    assert judge([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], higher_is_better=False).verdict == "contradicted"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_show_nothing(bad):
    found = judge([bad, 2.0, 2.0], [1.0, 1.0, 1.0], higher_is_better=True)
    assert found.verdict == "not shown"
    assert math.isnan(found.effect) and math.isnan(found.low) and math.isnan(found.high)


def test_one_seed_shows_nothing():
    """There is no interval from one value."""
    assert judge([2.0], [1.0], higher_is_better=True).verdict == "not shown"


@given(
    effects=st.lists(st.floats(-10, 10).map(lambda value: round(value, 3)), min_size=3, max_size=6),
    higher=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_the_interval_against_another_bootstrap(effects, higher):
    zeros = [0.0] * len(effects)
    found = judge(effects if higher else [-e for e in effects], zeros, higher_is_better=higher)
    generator = np.random.default_rng(7)
    means = np.asarray(effects)[generator.integers(0, len(effects), (40_000, len(effects)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    tolerance = 0.05 * (np.ptp(effects) + 1e-9)
    assert abs(found.low - low) <= tolerance and abs(found.high - high) <= tolerance
    assert found.effect == pytest.approx(np.mean(effects), abs=1e-9)
    assert found.verdict == ("shown" if found.low > 0 else "contradicted" if found.high < 0 else "not shown")


def test_the_interval_of_three_values_by_enumeration():
    """All 27 resamples of three values, as likely as each other."""
    effects = [0.0, 1.0, 4.0]
    means = np.sort([np.mean(three) for three in itertools.product(effects, repeat=3)])
    found = judge(effects, [0.0] * 3, higher_is_better=True)
    # 2.5 % of 27 is less than one resample: the ends are the extremes
    assert (found.low, found.high) == (pytest.approx(means[0]), pytest.approx(means[-1]))


def test_verdicts_repeat_themselves():
    once, again = (judge(shifted(0.1, -0.05), BASE, higher_is_better=True) for _ in range(2))
    assert once == again


# -- a whole check --------------------------------------------------------------------------------------------------


class Pool:
    """Runs jobs here and now."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future: Future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def runs(monkeypatch):
    """Runs that only note what they were asked for, and leave a figure."""
    asked = []

    def run(source, values, *, output, quiet=False, **_):
        asked.append((source, dict(values), output))
        figure = {"kd": 2.0, "sft": 2.5}[source] + 0.01 * values["seed"]
        record = {"name": "evaluation", "status": "done", "fingerprint": "x", "artifact": {"kind": "table"}}
        write_json(
            output / "stages" / "01-evaluation" / "stage.json", {**record, "metrics": {"student/val_loss": figure}}
        )

    monkeypatch.setattr(claims, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(claims, "run_system", run)
    return asked


KEYS = (
    "system card scope statement metric higher_is_better variants effect interval verdict budget seeds versions seconds"
)


def test_check_runs_every_variant_with_every_seed_and_writes_the_verdict(runs, tmp_path):
    (record,) = claims.check("kd", seeds=3, folder=tmp_path / "runs", results=tmp_path / "results", quiet=True)
    asked = sorted((source, values["seed"]) for source, values, _ in runs)
    assert asked == [(source, seed) for source in ("kd", "sft") for seed in range(3)]
    assert len({output for _, _, output in runs}) == 6
    assert {name: pytest.approx(values) for name, values in record["variants"].items()} == {
        "kd": [2.0, 2.01, 2.02],
        "sft": [2.5, 2.51, 2.52],
    }
    assert record["verdict"] == "shown" and record["effect"] == pytest.approx(0.5)
    assert record["seeds"] == [0, 1, 2]
    written = json.loads((tmp_path / "results" / "kd.json").read_text())
    assert set(KEYS.split()) <= written.keys()
    assert written["verdict"] == "shown" and written["variants"] == record["variants"]


def test_check_reports_what_falls(runs, tmp_path, monkeypatch):
    """A claim whose method is worse is contradicted, and the file says so."""
    real = get_system("kd").make().claims()[0]
    swapped = Claim(**{**vars(real), "method": "sft", "baseline": "kd", "scope": "consequence"})
    monkeypatch.setattr(get_system("kd"), "claims", lambda self: [swapped, real])
    first, second = claims.check("kd", seeds=3, folder=tmp_path / "runs", results=tmp_path / "results", quiet=True)
    assert (first["verdict"], second["verdict"]) == ("contradicted", "shown")
    written = json.loads((tmp_path / "results" / "kd.json").read_text())
    assert written["verdict"] == "contradicted" and written["scope"] == "consequence"
    assert [further["verdict"] for further in written["further"]] == ["shown"]


def test_a_system_without_claims(tmp_path):
    with pytest.raises(ConfigError, match="sft has no claim to check"):
        claims.check("sft", folder=tmp_path, results=tmp_path, quiet=True)


def test_a_record_is_stale_when_what_was_run_would_be_run_otherwise(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "all_systems", lambda: {"kd": get_system("kd")})
    results = tmp_path / "results"
    assert claims.stale(results) == ["kd"]
    claims.check("kd", seeds=3, folder=tmp_path / "runs", results=results, quiet=True)
    assert claims.stale(results) == []
    file = results / "kd.json"
    record = json.loads(file.read_text())
    del record["configurations"]["kd"]["teacher_topk"]  # a field that came later, and has its default
    file.write_text(json.dumps(record))
    assert claims.stale(results) == []
    del record["configurations"]["kd"]["epochs"]  # set by the claim, so it was not run like this
    record["configurations"]["sft"]["lr"] = 0.1
    file.write_text(json.dumps(record))
    assert claims.stale(results) == ["kd"]
