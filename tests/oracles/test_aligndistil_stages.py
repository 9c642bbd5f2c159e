"""AlignDistil (card 175): which models teach, with which text and weights, asked of the system's own stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import staged
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.core.schedule import Progress
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.rl.policies import PolicySource, Share
from stillhouse.systems import get_system

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers

GOOD, BAD = " a bird", " never never"


class Setting:
    """A tiny base model, a file of pairs, and the system on them."""

    def __init__(self, folder: Path) -> None:
        self.materials = helpers.make_materials(folder)
        self.file = folder / "pairs.jsonl"
        pairs = [{"prompt": f"the {word} sees", "chosen": GOOD, "rejected": BAD} for word in helpers.WORDS]
        self.file.write_text("\n".join(map(json.dumps, pairs)))
        self.base, self.tokenizer = load_causal_lm(str(self.materials.teacher), dtype=torch.float32)

    def walk(self, folder: Path, **more: Any) -> staged.Walked:
        values = {"model": str(self.materials.teacher), "data": str(self.file), "pairs": "given", "batch_size": 4}
        small = {"dpo_steps": 12, "steps": 10, "max_new_tokens": 6, "eval_problems": 4, "eval_samples": 2}
        rates = {"validation": 0.2, "lr": 1e-2, "dpo_lr": 2e-2, "ratio": 4.0, "beta0": 0.2}
        return staged.walk(get_system("aligndistil").make(**{**values, **small, **rates, **more}), folder)

    def left(self, walked: staged.Walked, name: str) -> Any:
        return load_causal_lm(str(walked.artifacts[name].path), dtype=torch.float32)[0]

    def responses(self, batch: Any) -> list[str]:
        return [
            self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
            for ids, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True)
        ]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def usual(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> staged.Walked:
    return setting.walk(tmp_path_factory.mktemp("usual"))


def test_the_stages_begin_as_the_base_model(setting, usual):
    assert list(usual.stages) == ["dpo", "reverse", "student", "evaluation"]
    for name in ("dpo", "reverse", "student"):
        begun = staged.model(usual.train(name)).state_dict()
        assert all(torch.equal(begun[key], value) for key, value in setting.base.state_dict().items())


def response_sums(model: Any, batch: Any) -> Tensor:
    """log p of each row's response: (B)."""
    log_p = staged.log_probabilities(model, batch)
    found = log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (found * batch["loss_mask"][:, 1:]).sum(-1)


@pytest.mark.parametrize("name", ["dpo", "reverse"])
def test_one_model_learns_the_preferences_and_one_their_opposite(setting, usual, name):
    stage = usual.train(name)
    batch = next(stage.source)
    better, worse = (GOOD, BAD) if name == "dpo" else (BAD, GOOD)
    assert setting.responses(batch) == [better] * 4 + [worse] * 4
    loss = staged.objective(stage)
    assert loss(batch).item() == pytest.approx(0.6931, abs=1e-4)  # it begins as its reference, the base model
    model = staged.model(stage)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    staged.moved(model, "elsewhere")
    ratio = response_sums(model, batch) - response_sums(setting.base, batch)
    expected = -F.logsigmoid(0.2 * (ratio[:4] - ratio[4:])).mean()
    assert loss(batch).item() == pytest.approx(expected.item(), rel=1e-4) and abs(expected.item() - 0.6931) > 1e-3
    model.load_state_dict(before)


def by_hand(student: Any, plus: Any, minus: Any, batch: Any, *, reference: bool = False, ratio: float = 4.0) -> float:
    """Mean over responses of their mean of beta0 / alpha KL(student || pi*), beta0 = 0.2."""
    q, p, r = (staged.log_probabilities(model, batch) for model in (student, plus, minus))
    alpha = ratio * 0.5 * (p.exp() - r.exp()).abs().sum(-1, keepdim=True) + 1e-3
    star = (alpha * p + (1 - alpha) * r if reference else p + alpha * (p - r)).log_softmax(-1)
    loss = 0.2 / alpha[..., 0] * (q.exp() * (q - star)).sum(-1)
    mask = batch["loss_mask"][:, 1:]
    return float(((loss * mask).sum(-1) / mask.sum(-1)).mean())


def test_the_policy_learns_from_the_dpo_model_pushed_away_from_the_reverse_one(setting, usual):
    stage = usual.train("student")
    dpo, reverse = setting.left(usual, "dpo"), setting.left(usual, "reverse")
    batch, student = next(usual.train("dpo").source), staged.model(stage)
    found = staged.objective(stage)(batch).item()
    assert found == pytest.approx(by_hand(student, dpo, reverse, batch), rel=1e-4)
    for others in ((dpo, dpo), (reverse, dpo), (dpo, setting.base), (reverse, reverse)):
        assert abs(by_hand(student, *others, batch) / found - 1) > 0.01


def test_without_a_reverse_model_the_reference_takes_its_place(setting, tmp_path):
    walked = setting.walk(tmp_path, contrast="reference")
    assert list(walked.stages) == ["dpo", "student", "evaluation"]
    stage, dpo = walked.train("student"), setting.left(walked, "dpo")
    batch, student = next(walked.train("dpo").source), staged.moved(staged.model(stage), "elsewhere")
    found = staged.objective(stage)(batch).item()
    assert found == pytest.approx(by_hand(student, dpo, setting.base, batch, reference=True), rel=1e-4)


@pytest.mark.parametrize("contrast", ["reverse", "reference"])
def test_the_ablation_keeps_to_the_same_reference(setting, tmp_path, contrast):
    walked = setting.walk(tmp_path, method="sequence", alpha=2.0, contrast=contrast)
    stage, batch = walked.train("student"), next(walked.train("dpo").source)
    plus, minus = setting.left(walked, "dpo"), setting.base
    if contrast == "reverse":
        minus = setting.left(walked, "reverse")
    student = staged.moved(staged.model(stage), "elsewhere")
    reward = 0.2 * (response_sums(plus, batch) - response_sums(minus, batch))
    q, r = (staged.log_probabilities(model, batch) for model in (student, plus if contrast == "reverse" else minus))
    mask = batch["loss_mask"][:, 1:]
    kl = ((q.exp() * (q - r)).sum(-1) * mask).sum(-1) / mask.sum(-1)
    logp = response_sums(student, batch) / mask.sum(-1)
    expected = -((reward - reward.mean()) * logp).mean() + 0.1 * kl.mean()  # beta = beta0 / alpha
    assert staged.objective(stage)(batch).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_whose_responses_it_learns_from(setting, usual, tmp_path, own):
    walked = usual if own else setting.walk(tmp_path, on_policy=False)
    stage = walked.train("student")
    source: Any = stage.source
    assert isinstance(source, PolicySource) and source.chooser == Share(1.0 if own else 0.0)
    assert source.writer.model is staged.model(stage) and source.writer.temperature == 1.0  # type: ignore[attr-defined]
    said = [text for _ in range(2) for text in setting.responses(next(source))]
    assert all(text == GOOD for text in said) != own and len(said) == 8


def test_steps_and_courses(setting, usual):
    for name, steps, rate in (("dpo", 12, 2e-2), ("reverse", 12, 2e-2), ("student", 10, 1e-2)):
        stage = usual.train(name)
        player = staged.player(stage)
        course = [player.lr(Progress(step, steps)) for step in range(steps)]
        assert stage.steps == steps and max(course) == pytest.approx(1, abs=0.03)
        assert course[0] < 0.9 and course[-1] < 0.2 and player.lr(Progress(steps, steps)) == pytest.approx(0.1)
        weight = torch.nn.Parameter(torch.zeros(1))
        assert player.optimizer([{"params": [weight]}]).param_groups[0]["lr"] == rate


def test_the_rewards_that_are_measured(usual, setting):
    evaluation: Any = usual.stages["evaluation"]
    models, rewards = evaluation.function.args
    dpo, reverse, base = usual.artifacts["dpo"], usual.artifacts["reverse"], str(setting.materials.teacher)
    assert models == {"base": base, "dpo": dpo, "reverse": reverse, "student": usual.artifacts["student"]}
    assert rewards == {"dpo": (dpo, base), "contrast": (dpo, reverse)}
