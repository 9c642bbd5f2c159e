"""MiniCPM (card 116): what each stage is given, that both arms of its claim read the same better rows, the tunnel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from watching import watched

from stillhouse import Run
from stillhouse.base.errors import ConfigError, RunError
from stillhouse.core.artifact import Artifact
from stillhouse.core.schedule import Progress
from stillhouse.core.stage import Evaluate
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.systems import get_system
from stillhouse.tasks.pretraining import Pretraining, best_rate, tunnel_table

WORDS = [
    *("the", "a", "cat", "dog", "bird", "river", "stone", "sees"),
    *("hears", "finds", "old", "small", "bright", "and", "then", "never"),
]
FLOOR = 0.25


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny teacher (whose tokenizer is all that is taken), a text, 60 better rows, preferences over all of them."""
    folder = tmp_path_factory.mktemp("minicpm")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (700, 12), generator=generator).tolist()
    text = "\n\n".join(" ".join(WORDS[place] for place in row) + "." for row in drawn)
    (folder / "text.txt").write_text(text)
    tokenizer = train_bpe([text], vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    new_causal_lm(config, seed=0).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    rows = [{"prompt": f"the {WORDS[n % 16]} ?", "completion": f"{WORDS[n // 16]} {WORDS[n % 16]}"} for n in range(60)]
    (folder / "better.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "never"} for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return {name: str(folder / file) for name, file in FILES.items()}


FILES = {"teacher": "teacher", "data": "text.txt", "quality": "better.jsonl", "preferences": "pairs.jsonl"}


def small(materials: dict[str, str], **more: Any) -> Any:
    values = {
        "student": "layers=1", "steps": 10, "decay": 0.4, "halvings": 2.0, "mix": 0.5, "batch_size": 4, "accumulate": 2,
        "window": 64, "sft_steps": 2, "base_width": 8, "warmup": 0.2, "eval_windows": 2, "validation": 0.1,
        "selection": 0.05, "lr": 1e-2, "sft_lr": 2e-3,
    }  # fmt: skip
    return get_system("minicpm").make(**{**materials, "preferences": None, **values, **more})


def rows_of(stage: Any) -> list[list[tuple[int, ...]]]:
    """What a stage will read, batch by batch; its source is put back."""
    state = stage.source.state_dict()
    batches = [next(stage.source) for _ in range(stage.steps * stage.accumulate)]
    stage.source.load_state_dict(state)
    return [[tuple(ids[: int(n)].tolist()) for ids, n in zip(b["input_ids"], lengths(b), strict=True)] for b in batches]


def lengths(batch: Any) -> torch.Tensor:
    return (
        batch["attention_mask"].sum(-1) if "attention_mask" in batch else torch.tensor([64] * len(batch["input_ids"]))
    )


def looked_at(system: Any, folder: Path, until: str) -> dict[str, dict[str, Any]]:
    """What each stage of training is given when its turn comes."""
    given: dict[str, dict[str, Any]] = {}

    def look(stage: Any, left: dict[str, Artifact]) -> None:
        if stage.name not in ("stable", "decay", "student"):
            return
        player = stage.players
        rates = {
            group["lr"]
            for group in player.optimizer([{"params": list(player.trained[0].module.parameters())}]).param_groups
        }
        given[stage.name] = {
            "rows": rows_of(stage),
            "weights": {key: value.clone() for key, value in player.trained[0].module.state_dict().items()},
            "rates": [player.lr(Progress(step, stage.steps)) for step in range(stage.steps + 1)],
            "peak": max(rates),
            "moments": getattr(player.optimizer, "start", None),
            "left": {name: artifact.path for name, artifact in left.items()},
            "learnt": next(iter_masks(stage)),
        }

    watched(system, folder, look, until=until)
    return given


def iter_masks(stage: Any) -> Any:
    """Which tokens of the first batch count, of those that are none of the padding."""
    state = stage.source.state_dict()
    batch = next(stage.source)
    stage.source.load_state_dict(state)
    yield None if "loss_mask" not in batch else (batch["loss_mask"].bool() == batch["attention_mask"].bool()).all(-1)


def test_the_decay_mixes_better_rows_in_and_goes_on_from_the_stable_phase(materials, tmp_path):
    given = looked_at(small(materials), tmp_path / "run", "quality")
    stable, decay, student = given["stable"], given["decay"], given["student"]
    assert len(stable["rows"]) == 12 and all(len(batch) == 4 for batch in stable["rows"])
    better = {row for batch in student["rows"] for row in batch}
    text = {row for batch in stable["rows"] for row in batch}
    assert all(len(batch) == 4 for batch in decay["rows"]) and len(decay["rows"]) == 8
    mixed_in = [row for batch in decay["rows"] for row in batch[2:]]
    assert len(set(mixed_in)) == 16 and not set(mixed_in) & text
    assert all(len(row) == 64 for batch in decay["rows"] for row in batch[:2]) and decay["learnt"].all()
    assert all(len(row) < 64 for row in mixed_in) and not student["learnt"].any()  # only answers count afterwards
    for name, before in (("decay", "stable"), ("student", "decay")):
        saved = load_file(given[name]["left"][before] / "model.safetensors")
        assert all(torch.equal(given[name]["weights"][key], value) for key, value in saved.items())
    assert stable["moments"] is None and decay["moments"] == decay["left"]["stable"]
    assert stable["rates"][:-1] == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert decay["rates"][:-1] == pytest.approx([FLOOR ** (step / 4) for step in range(4)])
    assert (stable["peak"], decay["peak"], student["peak"]) == (0.01, 0.01, 0.002) and student["rates"][-1] == 0.0
    assert not better & set(mixed_in)  # fine-tuning goes on where the decay stopped


def test_both_arms_read_the_same_better_rows_once_each(materials, tmp_path):
    """Sixteen in the decay and sixteen afterwards, or all of them afterwards; the decay's text is the plain run's."""
    mixed = looked_at(small(materials), tmp_path / "mixed", "student")
    plain = looked_at(small(materials, mix=0.0, sft_steps=4), tmp_path / "plain", "student")
    in_decay = [row for batch in mixed["decay"]["rows"] for row in batch[2:]]
    rows = {
        "mixed": in_decay + [row for batch in mixed["student"]["rows"] for row in batch],
        "plain": [row for batch in plain["student"]["rows"] for row in batch],
    }
    assert len(rows["mixed"]) == len(set(rows["mixed"])) == 32
    assert sorted(rows["mixed"]) == sorted(rows["plain"])
    assert mixed["stable"]["rows"] == plain["stable"]["rows"]
    assert not {row for batch in plain["decay"]["rows"] for row in batch} & set(in_decay)
    as_text = [row for batch in mixed["decay"]["rows"] for row in batch[:2]]
    assert as_text == [row for batch in plain["decay"]["rows"] for row in batch][: len(as_text)]
    budget = get_system("minicpm")().claims()[0].budget
    told = ("the same 320 rows", "400 steps of pre-training", "40 more steps", "160 more rows")
    assert all(part in budget for part in told)


def test_preferences_do_not_hold_answers_that_are_held_out(materials, tmp_path):
    seen, _ = watched(small(materials, preferences=materials["preferences"]), tmp_path / "run", until="dpo")
    tokenizer = seen["dpo"].save.keywords["tokenizer"]
    chosen = {tuple(pair[0][1]) for pair in seen["dpo"].source.data}
    sft = seen["student"].source.data
    taught = sft[torch.arange(len(sft))]
    answers = {
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(taught["input_ids"], taught["loss_mask"], strict=True)
    }
    said = {tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in chosen}
    assert said == {tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers} and 40 < len(said) < 60


# -- the tunnel -----------------------------------------------------------------------------------------------------


def test_a_rate_that_diverges_is_infinitely_bad_and_ends_nothing(materials, tmp_path):
    system = small(materials, tunnel_widths=(8,), tunnel_rates=(1e-2, 1e30), tunnel_steps=4, clip=None)
    seen, left = watched(system, tmp_path / "run", until="stable")
    assert "selection_loss" in left["tunnel-8-0.01"].metrics and not left["tunnel-8-1e+30"].metrics
    assert "became" in left["tunnel-8-1e+30"].json()["diverged"]
    row = left["wind-tunnel"].table().rows[0]
    assert row["best"] == 0.01 and "1e+30" not in row and math.isfinite(row["0.01"])
    player = seen["stable"].players
    assert (
        max(g["lr"] for g in player.optimizer([{"params": list(player.trained[0].module.parameters())}]).param_groups)
        == 0.01
    )


def test_other_errors_of_a_trial_are_errors(materials, tmp_path, monkeypatch):
    def fails(stage: Any, context: Any) -> str:
        raise RunError("the disk became full")

    monkeypatch.setattr("stillhouse.core.train.Train.execute", fails)
    with pytest.raises(RunError, match="disk became full"):
        watched(small(materials, tunnel_widths=(8,), tunnel_steps=2), tmp_path / "run", until="wind-tunnel")


def test_where_all_rates_diverge_the_advice_is_lower_ones(tmp_path):
    losses = {(8, 0.1): 3.0, (8, 0.2): math.inf, (16, 0.1): math.inf, (16, 0.2): math.inf}
    with pytest.raises(ConfigError, match=r"tunnel_rates=0.1, 0.2: all diverge at width 16; add lower"):
        best_rate(losses)
    made = Run(tmp_path / "run", quiet=True).execute([Evaluate("t", lambda context: tunnel_table(losses, context))])
    rows = made["t"].table().rows
    assert rows[0]["best"] == 0.1 and "best" not in rows[1] and made["t"].metrics == {"8/best lr": 0.1}


def test_no_rows_are_counted_where_nothing_is_mixed(materials):
    work = Pretraining.__new__(Pretraining)
    work.task = type("Task", (), {"system": small(materials)})()  # type: ignore[assignment]
    assert (work.better_rows(0.5), work.better_rows(0.5, 4), work.better_rows(0.0, 4)) == (2, 16, 0)
