"""AlignDistil and BAI on a user's own models and files, and killed in the middle of their last training stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from stillhouse.base.errors import ModelError
from stillhouse.rl.rewards import RewardModel
from stillhouse.workflow import resume, run_system

QUIET: dict[str, Any] = {"trackers": [], "checkpoint_minutes": 1e-9}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


def lines(file: Path, records: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


def common(materials: helpers.Materials) -> dict[str, Any]:
    return {
        **QUIET,
        "model": str(materials.teacher),
        "max_new_tokens": 6,
        "eval_problems": 4,
        "eval_samples": 2,
        "validation": 0.2,
        "lr": 1e-2,
    }


def test_aligndistil_on_given_pairs(materials, tmp_path):
    pairs = [{"prompt": f"the {word} sees", "chosen": " a bird", "rejected": " never never"} for word in helpers.WORDS]
    fields = {"data": lines(tmp_path / "pairs.jsonl", pairs), "pairs": "given", "batch_size": 4, "dpo_steps": 12}
    done = run_system("aligndistil", {**common(materials), **fields, "steps": 4}, output=tmp_path / "run", quiet=True)
    figures = done.artifacts["evaluation"].metrics
    assert "student/score" not in figures  # nobody said what a response is worth
    assert figures["dpo/reward_accuracy"] == figures["contrast/reward_accuracy"] == 1.0
    assert figures["base/kl"] == 0.0 < figures["student/kl"]
    assert {"dpo", "reverse", "student"} <= done.artifacts.keys()


def relatives(materials: helpers.Materials, folder: Path) -> dict[str, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for seed, name in enumerate(("instruct", "reasoning")):
        model = AutoModelForCausalLM.from_pretrained(materials.teacher)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(materials.teacher).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("instruct", "reasoning")}


def test_bai_on_given_models_with_a_sweep_and_groups(materials, tmp_path):
    problems = [{"prompt": f"the {word} sees", "answer": "the"} for word in helpers.WORDS]
    fields = {
        **relatives(materials, tmp_path),
        "data": lines(tmp_path / "problems.jsonl", problems),
        "algorithm": "grpo",
        "group": 2,
        "prompts": 4,
        "minibatches": 1,
        "sweep": [0.4, 0.8],
        "sweep_steps": 2,
        "steps": 3,
    }
    done = run_system("bai", {**common(materials), **fields}, output=tmp_path / "run", quiet=True)
    assert {"merged-0.4", "alpha-0.4", "merged-0.8", "alpha-0.8", "merged", "student"} <= done.artifacts.keys()
    assert sum(done.artifacts["merged"].metrics.values()) == pytest.approx(1.0)
    figures = done.artifacts["stability"].metrics
    assert {name.partition("/")[0] for name in figures} == {"alpha-0.4", "alpha-0.8", "student"}
    pictures = {file.name for file in done.artifacts["stability"].path.glob("*.svg")}
    assert pictures == {"reward.svg", "tokens.svg", "kl.svg", "staleness.svg"}
    ends = {"share": 0.0, "alpha": 1.0, "sweep": []}
    alone = run_system("bai", {**common(materials), **fields, **ends}, output=tmp_path / "alone", quiet=True)
    merged, reasoning = (helpers.weights(Path(p)) for p in (alone.artifacts["merged"].path, fields["reasoning"]))
    for name, tensor in reasoning.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


def test_ppo_goes_on_where_it_was_killed(materials, tmp_path):
    """In the middle of the reinforced stage, between the minibatches of a round: same weights, same curves."""
    problems = [{"prompt": f"the {word} sees", "answer": "the"} for word in helpers.WORDS]
    fields = {
        **common(materials),
        **relatives(materials, tmp_path),
        "data": lines(tmp_path / "problems.jsonl", problems),
        "prompts": 4,
        "minibatches": 2,
        "critic_lr": 1e-2,
        "token_cost": 0.1,
        "steps": 8,
    }
    whole = run_system("bai", fields, output=tmp_path / "whole", quiet=True)
    helpers.run_and_kill("bai", fields, tmp_path / "cut", after=4)  # the merge, then three steps
    done = resume(tmp_path / "cut", quiet=True)
    for stage in ("merged", "student"):
        expected, found = (helpers.weights(run.artifacts[stage].path) for run in (whole, done))
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert whole.artifacts["stability"].metrics == done.artifacts["stability"].metrics
    assert whole.artifacts["stability"].metrics["student/staleness"] > 0


def test_reward_models(materials, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(materials.teacher)
    config = LlamaConfig.from_pretrained(materials.teacher, num_labels=1)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    reward = RewardModel(str(tmp_path / "reward"))
    one, other = reward("a bird", {"prompt": "the cat sees"}), reward("a dog", {"prompt": "the cat sees"})
    expected = reward.model(**tokenizer("the cat sees\na bird", return_tensors="pt")).logits.item()
    assert one == pytest.approx(expected) and one != other
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="has 3 outputs"):
        RewardModel(str(tmp_path / "three"))


def test_spin_on_conversations_plain_text_and_problems(materials, tmp_path):
    turns = [{"role": "user", "content": "the cat sees"}, {"role": "assistant", "content": " a bird"}]
    talks = [{"messages": [{**turns[0], "content": f"the {word} sees"}, turns[1]]} for word in helpers.WORDS]
    sums = [{"prompt": f"the {word} sees", "answer": "a bird"} for word in helpers.WORDS]
    small = {"iterations": 2, "steps": 3, "batch_size": 4, "prompt_tokens": 4, "problems": 12}
    for kind, more in {
        "talks": {"data": lines(tmp_path / "talks.jsonl", talks)},
        "text": {"data": str(materials.text)},
        "sums": {"data": lines(tmp_path / "sums.jsonl", sums), "verifier": "exact", "sft_steps": 2},
    }.items():
        done = run_system("spin", {**common(materials), **small, **more}, output=tmp_path / kind, quiet=True)
        figures = done.artifacts["evaluation"].metrics
        assert ("student/score" in figures) == (kind == "sums")  # else nobody says what a response is worth
        assert figures["base/kl"] == 0.0 < figures["iteration-0/kl"] != figures["student/kl"]
        assert ("fine-tuned" in done.artifacts) == (kind == "sums")
