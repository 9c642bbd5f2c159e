"""Claims: a paper's statement as an experiment, and its verdict.

Every variant runs under the same budget for every seed; a seed's effect is the paired difference between method and
baseline, and the verdict follows from the 95 % bootstrap interval of the mean effect.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from stillhouse.base.errors import ConfigError
from stillhouse.base.facts import code_fingerprint, machine, versions
from stillhouse.base.files import read_json, write_json
from stillhouse.base.monitor import progress_bar
from stillhouse.catalogue import RESULTS
from stillhouse.core.system import Claim, System
from stillhouse.runs import stage_artifacts
from stillhouse.systems import all_systems, get_system
from stillhouse.workflow import run_system


@dataclass(frozen=True)
class Verdict:
    """The mean paired effect (positive: the method is better), its 95 % interval, and what follows."""

    effect: float
    low: float
    high: float
    verdict: str


def judge(method: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool, seed: int = 0) -> Verdict:
    """Verdict from paired values by seed: *shown* if the interval lies above zero, *contradicted* if below."""
    sign = 1.0 if higher_is_better else -1.0
    effects = sign * (np.asarray(method, float) - np.asarray(baseline, float))
    if len(effects) < 2 or not np.isfinite(effects).all():
        return Verdict(math.nan, math.nan, math.nan, "not shown")
    if np.ptp(effects) == 0:
        low = high = float(effects[0])
    else:
        found = stats.bootstrap(
            (effects,),
            np.mean,
            confidence_level=0.95,
            method="percentile",
            n_resamples=9999,
            rng=np.random.default_rng(seed),
        )
        low, high = map(float, found.confidence_interval)
    verdict = "shown" if low > 0 else "contradicted" if high < 0 else "not shown"
    return Verdict(float(effects.mean()), low, high, verdict)


def check(
    name: str,
    *,
    seeds: int | None = None,
    workers: int | None = None,
    folder: Path = Path("runs/claims"),
    results: Path = RESULTS,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Run all claims of a system and write ``results/NAME.json``; returns the records.

    Runs are kept under ``folder``, by a fingerprint of this code, and gone on with after an interruption.
    """
    if seeds is not None and seeds < 3:
        raise ConfigError(f"seeds={seeds}: an interval needs at least 3 seeds")
    system = get_system(name)
    claims = system.make().claims()
    if not claims:
        raise ConfigError(f"{name} has no claim to check")
    records = []
    for claim in claims:
        records.append(_check_one(system, claim, seeds or claim.seeds, workers or os.cpu_count() or 1, folder, quiet))
    first, *more = records
    write_json(results / f"{system.name()}.json", {**first, **({"further": more} if more else {})})
    return records


def configurations(claim: Claim) -> dict[str, dict[str, Any]]:
    """What each variant of a claim is run with, in full."""
    return {
        variant: {"system": source, **get_system(source).make(**overrides).config()}
        for variant, (source, overrides) in _compared(claim).items()
    }


def _compared(claim: Claim) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The two variants a claim is about, of those it may share with others."""
    return {name: claim.variants[name] for name in (claim.method, claim.baseline)}


def stale(results: Path = RESULTS) -> list[str]:
    """Systems whose claims have not been checked, or not as they are configured now."""
    found = []
    for name, system in all_systems().items():
        claims = system.make().claims()
        file = results / f"{name}.json"
        if not claims or (file.exists() and _up_to_date(read_json(file), claims)):
            continue
        found.append(name)
    return found


def _up_to_date(record: dict[str, Any], claims: list[Claim]) -> bool:
    checked = [record, *record.get("further", [])]
    now = [configurations(claim) for claim in claims]
    return len(checked) == len(now) and all(map(_still_so, (one["configurations"] for one in checked), now))


def _still_so(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether variants are configured as they were; a field that is new since then must have its default."""
    if recorded.keys() != now.keys():
        return False
    for name, values in now.items():
        plain = get_system(values["system"]).make().config()
        new = values.keys() - recorded[name].keys()
        if {**recorded[name], **{field: plain[field] for field in new}} != values:
            return False
    return True


def _check_one(
    system: type[System], claim: Claim, seeds: int, workers: int, folder: Path, quiet: bool
) -> dict[str, Any]:
    begun = time.monotonic()
    jobs = {
        (variant, seed): (
            source,
            {**values, "seed": seed},
            folder / f"{system.name()}-{code_fingerprint()}" / f"{variant}-{seed}",
        )
        for variant, (source, values) in _compared(claim).items()
        for seed in range(seeds)
    }
    first, *rest = jobs.values()
    with (
        ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool,
        progress_bar(f"check {system.name()}", len(jobs), unit="runs", quiet=quiet) as bar,
    ):
        pool.submit(_run_one, *first).result()  # alone: it puts the stages that all share into the cache
        bar.update(1)
        for count, done in enumerate(as_completed([pool.submit(_run_one, *job) for job in rest]), start=2):
            done.result()
            bar.update(count)
    values: dict[str, list[float]] = {variant: [] for variant in _compared(claim)}
    for (variant, _), (_, _, where) in jobs.items():
        values[variant].append(float(claim.measure(stage_artifacts(where))))
    found = judge(values[claim.method], values[claim.baseline], higher_is_better=claim.higher_is_better)
    return {
        "system": system.name(),
        "card": system.meta.card,
        "scope": claim.scope,
        "statement": claim.statement,
        "metric": claim.metric,
        "higher_is_better": claim.higher_is_better,
        "method": claim.method,
        "baseline": claim.baseline,
        "variants": values,
        "effect": found.effect,
        "interval": [found.low, found.high],
        "verdict": found.verdict,
        "budget": claim.budget,
        "configurations": configurations(claim),
        "seeds": list(range(seeds)),
        "versions": versions(),
        "machine": machine(),
        "seconds": time.monotonic() - begun,
    }


def _run_one(source: str, values: dict[str, Any], where: Path) -> None:
    import torch

    torch.set_num_threads(1)
    run_system(source, {**values, "trackers": []}, output=where, quiet=True)
