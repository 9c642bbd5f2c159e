"""A made-up run directory: realistic curves, hostile strings, holes and half lines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = '<script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(2)> & "quoted" $x_1$'
SECRET = "sk-abcdefghijklmnop1234567890"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")


def _teacher_lines() -> list[dict[str, Any]]:
    noise, lines = random.Random(1), []
    for step in range(10, 4010, 10):
        loss = 2.1 + 4.2 * math.exp(-step / 700) + noise.gauss(0, 0.07)
        lines.append(
            {
                "step": step,
                "kind": "train",
                "player": "teacher",
                "loss": loss,
                "terms": {"CrossEntropy": {"value": loss, "weight": 1.0}},
                "lr": 3e-3 * min(1.0, step / 300) * (0.55 + 0.45 * math.cos(math.pi * step / 4000)),
                "grad_norm": 0.5 + abs(noise.gauss(0, 0.2)) + 2 * math.exp(-step / 200),
                "seconds": step * 0.031,
                "tokens_per_second": 41_000 + noise.gauss(0, 900),
            }
        )
        if step % 400 == 0:
            value = 2.2 + 3.9 * math.exp(-step / 650) + noise.gauss(0, 0.01)
            lines.append({"step": step, "kind": "eval", "metrics": {"val_loss": value, "perplexity": math.exp(value)}})
    return lines


def _student_lines() -> list[dict[str, Any]]:
    noise, lines = random.Random(2), []
    for step in range(5, 1205, 5):
        kl = 1.9 * math.exp(-step / 350) + 0.31 + noise.gauss(0, 0.04)
        ce = 2.6 + 3.1 * math.exp(-step / 260) + noise.gauss(0, 0.06)
        t = 0.4 + 0.6 * (1 - math.exp(-step / 500))
        share = 0.62 + 0.2 * t + noise.gauss(0, 0.02)
        lines.append(
            {
                "step": step,
                "kind": "train",
                "player": "student",
                "loss": float("nan") if step in (400, 405, 410) else t * kl + (1 - t) * ce,
                "terms": {
                    "KLDivergence": {"value": kl, "weight": t, "share": share},
                    "CrossEntropy": {
                        "value": None if step == 400 else ce,
                        "weight": 1 - t,
                        "share": 1 - share,
                    },
                },
                "lr": 1e-3 * (0.55 + 0.45 * math.cos(math.pi * step / 1200)),
                "grad_norm": 0.8 + abs(noise.gauss(0, 0.15)),
                "values": {"t": t, "temperature": 2.0},
                "seconds": step * 0.044,
                "tokens_per_second": 72_000 + noise.gauss(0, 1500),
            }
        )
        if step % 10 == 0:
            lines.append(
                {
                    "step": step,
                    "kind": "train",
                    "player": "critic",
                    "loss": 0.69 * math.exp(-step / 900) + 0.02 + abs(noise.gauss(0, 0.01)),
                    "terms": {"Hinge": {"value": 0.69 * math.exp(-step / 900), "weight": 1.0}},
                    "lr": 5e-4,
                    "grad_norm": 0.2 + abs(noise.gauss(0, 0.05)),
                }
            )
        if step % 100 == 0:
            value = 2.7 + 2.4 * math.exp(-step / 300) + noise.gauss(0, 0.01)
            lines.append({"step": step, "kind": "eval", "metrics": {"val_loss": value, "perplexity": math.exp(value)}})
    return lines


def _bins(bend: float, total: int) -> dict[str, Any]:
    bins, gap = [], 0.0
    for index in range(10):
        confidence = index / 10 + 0.05
        accuracy = max(0.0, min(1.0, confidence - bend * confidence * (1.3 - confidence)))
        count = round(total * (0.02 + 0.3 * abs(confidence - 0.4) ** 1.5))
        bins.append({"confidence": confidence, "accuracy": accuracy, "count": count})
        gap += abs(confidence - accuracy) * count
    bins[0]["accuracy"] = None
    return {"bins": bins, "ece": gap / sum(one["count"] for one in bins)}


def make_run(root: Path, *, status: str = "done", error: str | None = None) -> Path:
    """Write ``root/taid-demo``: a cached teacher, a student stage of two players, an evaluation, an audit."""
    run, cache = root / "taid-demo", root / "cache" / "3f9a"
    write_json(
        run / "run.json",
        {
            "name": "taid-demo",
            "system": "taid",
            "title": "Temporally adaptive interpolated distillation",
            "citation": "Shing et al., 2025, arXiv 2501.16937",
            "card": 48,
            "status": status,
            "seed": 0,
            "created": "2025-11-24T05:38:12+00:00",
            "finished": "2025-11-24T05:42:31+00:00" if status == "done" else None,
            "seconds": 259.4 if status == "done" else None,
            "config": {
                "t_start": 0.4,
                "t_end": 1.0,
                "alpha": 5e-4,
                "beta": 0.99,
                "steps": 1200,
                "lr": 1e-3,
                "batch_size": 16,
                "betas": [0.9, 0.95],
                "prompt_prefix": HOSTILE,
                "api_key": SECRET,
                "endpoint": "https://user:hunter2@models.example/v1",
                "teacher": None,
                "compile": False,
            },
            "explicit": ["steps", "prompt_prefix", "api_key"],
            "demo": ["steps", "lr", "batch_size"],
            "fields": {
                "t_start": "Interpolation at the first step: 0 is the student itself, 1 is the teacher.",
                "alpha": "Step size of the adaptive interpolation.",
                "beta": "Momentum of the adaptive interpolation.",
                "steps": "Optimizer steps of the student stage.",
                "lr": f"Peak learning rate. {HOSTILE}",
                "batch_size": "Sequences per optimizer step.",
            },
            "versions": {
                "stillhouse": "0.1.0",
                "torch": "2.11.0",
                "transformers": "5.2.0",
                "python": "3.11.7",
            },
            "machine": {
                "platform": "Linux-6.8.0-x86_64",
                "processor": "x86_64",
                "cores": 2,
                "memory_gb": 7.75,
                "devices": ["cpu"],
            },
            "git": {"revision": "94867a6", "dirty": True},
            "argv": [
                "/opt/venv/bin/stillhouse",
                "run",
                "taid",
                "steps=1200",
                f"api_key={SECRET}",
                "name=taid demo",
            ],
            "stages": ["01-teacher", "02-student", "03-evaluate", "04-leakage"],
            "error": error,
        },
    )
    stages = run / "stages"
    write_json(
        stages / "01-teacher" / "stage.json",
        {
            "name": "teacher",
            "kind": "Train",
            "status": "done",
            "seconds": 124.6,
            "peak_memory_mb": 1430.2,
            "steps": 4000,
            "metrics": {"val_loss": 2.213, "perplexity": 9.14},
            "artifact": {"kind": "model", "path": "artifact"},
            "reused": True,
            "cache": str(cache),
        },
    )
    write_lines(cache / "metrics.jsonl", _teacher_lines())
    write_json(
        stages / "02-student" / "stage.json",
        {
            "name": "student",
            "kind": "Train",
            "status": "done" if status == "done" else "running",
            "seconds": 53.1,
            "peak_memory_mb": 812.0,
            "steps": 1200,
            "metrics": {"val_loss": 2.741, "perplexity": float("nan")},
            "artifact": {"kind": "model", "path": "artifact", "files": ["model.safetensors"]},
        },
    )
    write_lines(
        stages / "02-student" / "metrics.jsonl",
        _student_lines(),
        tail='{"step": 1205, "kind": "train", "play',
    )
    if status != "done":
        return run

    evaluate = stages / "03-evaluate"
    write_json(
        evaluate / "stage.json",
        {
            "name": "evaluate",
            "kind": "Evaluate",
            "status": "done",
            "seconds": 9.7,
            "peak_memory_mb": 905.5,
            "metrics": {},
            "artifact": {"kind": "table", "path": "artifact"},
            "reused": False,
        },
    )
    write_json(
        evaluate / "artifact" / "table.json",
        {
            "title": "Held-out text",
            "columns": [
                {"key": "parameters", "label": "parameters", "format": ",d", "better": None},
                {"key": "perplexity", "label": "perplexity", "format": ".2f", "better": "lower"},
                {"key": "accuracy", "label": "next-token accuracy", "format": ".1%", "better": "higher"},
                {
                    "key": "ece",
                    "label": "ECE",
                    "format": ".3f",
                    "better": "lower",
                    "help": "Expected calibration error, ten equal bins of confidence.",
                },
                {"key": "forward", "label": "forward KL", "format": ".999999999f", "better": None},
            ],
            "rows": [
                {
                    "name": "teacher",
                    "parameters": 12_582_912,
                    "perplexity": 9.14,
                    "accuracy": 0.478,
                    "ece": 0.012,
                },
                {
                    "name": "student, taid",
                    "parameters": 1_179_648.0,
                    "perplexity": 15.502,
                    "accuracy": 0.401,
                    "ece": 0.021,
                    "forward": 0.3127,
                },
                {
                    "name": "student, no teacher",
                    "parameters": 1_179_648,
                    "perplexity": 17.93,
                    "accuracy": 0.402,
                    "ece": float("nan"),
                    "forward": None,
                },
            ],
            "notes": ["512 sequences of 128 tokens, never seen in training.", HOSTILE],
        },
    )
    write_json(
        evaluate / "artifact" / "reliability.json",
        {"teacher": _bins(0.05, 9000), "student, taid": _bins(0.25, 9000), "broken": {"bins": "none"}},
    )
    write_json(
        evaluate / "artifact" / "samples.json",
        [
            {
                "prompt": "def parse(line):",
                "outputs": {
                    "teacher": '\n    """Split a header line."""\n    name, _, value = line.partition(":")\n'
                    "    return name.strip(), value.strip()",
                    "student": "\n    if not line:\n        return None\n    return line.split(':')",
                    "student, no teacher": "\n    return line.line(line)\n    return line",
                },
            },
            {
                "prompt": HOSTILE,
                "outputs": {"teacher": HOSTILE, "student": "x" * 400, "student, no teacher": "\ud800 lone"},
            },
            *(
                {
                    "prompt": f"Sample {index}",
                    "outputs": {"teacher": "one\n  two", "student": "one two", "student, no teacher": ""},
                }
                for index in range(6)
            ),
            "not an object",
        ],
    )
    (evaluate / "artifact" / "picture & co.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><rect width="40" height="20" fill="red"/>'
        "<script>document.title='owned'</script></svg>"
    )
    audit = stages / "04-leakage"
    write_json(
        audit / "stage.json",
        {
            "name": "leakage",
            "kind": "Audit",
            "status": "done",
            "seconds": 2.4,
            "artifact": {"kind": "table", "path": "artifact"},
        },
    )
    write_json(
        audit / "artifact" / "table.json",
        {
            "title": "Verbatim recall of training text",
            "columns": [{"key": "recall", "label": "recalled at 32 tokens", "format": ".2%", "better": "lower"}],
            "rows": [{"name": "teacher", "recall": 0.0312}, {"name": "student, taid", "recall": 0.0041}],
            "notes": [],
        },
    )
    return run
