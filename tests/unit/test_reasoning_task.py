"""The reasoning task on the user's own model and problems, its embedded problems, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stillhouse import Run
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.data.reasoning import ArithmeticChain, draw_problems
from stillhouse.models import load_causal_lm
from stillhouse.systems import get_system
from stillhouse.tasks.reasoning import Corpus, ReasoningSystem, pretrain
from stillhouse.workflow import run_system

CHAIN = ArithmeticChain(operands=2)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's model directory and problem file (with traces), some of them right."""
    folder = tmp_path_factory.mktemp("own")
    held_out = draw_problems(CHAIN, 5, seed="held out")
    stage = pretrain("base", CHAIN, held_out, Corpus(steps=25, batch_size=16))
    stage.cache = None
    artifact = Run(folder / "run", quiet=True).execute([stage])["base"]
    model, tokenizer = load_causal_lm(str(artifact.path))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": p["prompt"], "answer": p["answer"], "traces": [p["flawed"], p["trace"]]}
        for p in draw_problems(CHAIN, 24, seed=1)
    ]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "mine.py").write_text("def last(text, record):\n    return text.strip()[-1:] == record['answer']\n")
    return folder


def fields(own: Path, **more: Any) -> dict[str, Any]:
    given = {
        "model": str(own / "model"),
        "data": str(own / "problems.jsonl"),
        "prompt_field": "question",
        "max_new_tokens": 8,
        "eval_problems": 2,
        "eval_samples": 2,
        "lr": 1e-3,
        "trackers": [],
    }
    return given | more


def test_redi_on_the_user_s_traces(own, tmp_path):
    verifier = f"numeric+{own / 'mine.py'}:last"
    values = fields(own, verifier=verifier, sft_batch=8, sft_epochs=2, batch_size=4, epochs=2.0)
    done = run_system("redi", values, output=tmp_path / "run", quiet=True)
    assert done.artifacts["traces"].metrics["records"] == 22  # two of 24 are held out
    figures = done.artifacts["evaluation"].metrics
    assert figures["student/rejected_logp"] < figures["sft/rejected_logp"]
    load_causal_lm(str(tmp_path / "run" / "model"))


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_redi_s_rivals(own, tmp_path, objective):
    values = fields(own, objective=objective, sft_batch=8, sft_epochs=1, batch_size=8, epochs=2.0, beta=1.0)
    figures = run_system("redi", values, output=tmp_path / "run", quiet=True).artifacts["evaluation"].metrics
    margin = {name: figures[f"{name}/chosen_logp"] - figures[f"{name}/rejected_logp"] for name in ("sft", "student")}
    assert margin["student"] > margin["sft"]


@pytest.mark.parametrize(
    ("variant", "more"),
    [("grpo", {"rollout_epochs": 2, "minibatches": 2}), ("srpo", {"rollout_epochs": 2}), ("sdpo", {}), ("mix", {})],
)
def test_srpo_s_variants(own, tmp_path, variant, more):
    values = fields(own, variant=variant, prompts=4, group=4, steps=5, **more)
    done = run_system("srpo", values, output=tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in next((tmp_path / "run").glob("stages/*-student/metrics.jsonl")).open()]
    (last,) = (line for line in lines if line["kind"] == "train" and line["step"] == 5)
    assert {"GroupRelative.reward", "GroupRelative.tokens"} <= last["values"].keys()
    assert ("GroupRelative.distilled" in last["values"]) == (variant != "grpo")
    assert "hinted" not in done.artifacts["evaluation"].table().rows[0]  # no traces of these problems are known


def test_what_cannot_be_done_is_said(own, tmp_path):
    for values, error, message in (
        ({"model": "demo"}, ConfigError, "model=demo knows the problems of data=demo only"),
        ({"teacher": "demo"}, ConfigError, "teacher=demo knows the problems of data=demo only"),
        ({"verifier": "exakt"}, ConfigError, "verifier='exakt' is not known"),
        ({"chat": True}, ConfigError, "chat=true"),
        ({"prompt_field": "prompt"}, DataError, "no 'prompt' in it; it has 'question'"),
        ({"max_response": 1}, DataError, "no problem has both a right and a wrong trace"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            run_system("redi", fields(own, **values), output=tmp_path / "run", quiet=True)
        assert isinstance(caught.value, error) or message == "chat=true"


@pytest.mark.parametrize("puzzle", ["chain", "knights"])
def test_embedded_problems_fit(puzzle):
    """Every trace ends within the demo's longest response, and hinted prompts within the model."""
    system = get_system("srpo").make(puzzle=puzzle)
    assert isinstance(system, ReasoningSystem) and system.is_demo()
    problems, rng = system.new_puzzle(), random.Random(0)
    held_out = draw_problems(problems, 200, seed="held out")
    corpus = Corpus(steps=1, short=0.3, hinted=0.5, flawed=0.5, hint=system.hint)
    stage = pretrain("base", problems, held_out, corpus)
    tokenizer = stage.save.keywords["tokenizer"]  # type: ignore[union-attr]
    longest = 0
    for _ in range(60):
        prompt, response = corpus.example(problems, rng, {p["prompt"] for p in held_out})
        assert len(tokenizer(response)["input_ids"]) < system.max_new_tokens
        longest = max(longest, len(tokenizer(prompt + response)["input_ids"]))
    assert longest < 512
    assert draw_problems(problems, 150, seed=0, without=held_out)


def test_the_corpus_is_what_it_says():
    rng, puzzle = random.Random(0), ArithmeticChain()
    examples = [Corpus(steps=1, flawed=0.5).example(puzzle, rng, set()) for _ in range(300)]
    right = sum(puzzle(response, {"prompt": prompt}).correct for prompt, response in examples)
    assert 120 < right < 180
    hinted = [Corpus(steps=1, hinted=1.0, hint="{solution}|{prompt}").example(puzzle, rng, set()) for _ in range(20)]
    assert all(prompt.startswith(response + "|") for prompt, response in hinted)
    short = [Corpus(steps=1, short=1.0).example(puzzle, rng, set())[0] for _ in range(20)]
    assert all(prompt.count("+") == 2 for prompt in short)
    without = {"1+1="}
    pairs = ArithmeticChain(operands=2, modulus=2)
    drawn = {Corpus(steps=1).example(pairs, rng, without)[0] for _ in range(40)}
    assert drawn == {"0+0=", "0+1=", "1+0="}
