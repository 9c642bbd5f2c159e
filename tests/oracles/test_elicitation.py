"""The survey of distilling language models (card 165): six elicitations, ranking losses, and the map of the systems."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse import Batches, Observed
from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.base.taxonomy import AXES
from stillhouse.catalogue import row, rows
from stillhouse.data.images import Images, digits
from stillhouse.data.partly_labelled import UNLABELLED, ClassGaussians, PartlyLabelled
from stillhouse.losses.preference import dpo_loss, pairwise_loss, pro_loss, rrhf_loss
from stillhouse.navigation import (
    ACCESS,
    cells,
    coverage,
    coverage_lines,
    excluded,
    gaps,
    jaccard,
    least_access,
    nearest,
    problems,
    recipes_for,
    tags,
)
from stillhouse.objectives.elicitation import ExpectedReward, RankedGuesses, TeacherLabels, draw_guesses
from stillhouse.systems import all_systems, get_system
from stillhouse.systems.vision.elicitation import Elicitation
from stillhouse.tasks.elicitation import unlabelled
from stillhouse.teachers.licence import licence_of

LN2 = math.log(2)


class Logits(nn.Module):
    """A model whose output is what it is told to be."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def signal(logits: Tensor) -> tuple[Any, nn.Parameter]:
    model = Logits(logits)
    return Observed(model).output(), model.logits


def random(seed: int, rows: int = 5, classes: int = 4) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


BATCH = {"inputs": torch.zeros(5, 1)}


# -- ranking losses -------------------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    assert rrhf_loss(torch.tensor([[-1.0, -0.5]]), torch.tensor([[1.0, 0.0]])).item() == pytest.approx(0.5)
    assert rrhf_loss(torch.tensor([[-0.5, -1.0]]), torch.tensor([[1.0, 0.0]])).item() == 0.0
    equal = torch.tensor([0.3, -2.0])
    assert pairwise_loss(equal, equal).tolist() == pytest.approx([LN2, LN2])
    logp = torch.tensor([-3.0], requires_grad=True)
    loss = dpo_loss(logp, torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-1.0]), beta=1.0)
    loss.backward()
    assert (loss.item(), logp.grad.item()) == pytest.approx((LN2, -0.5))


def test_rrhf_is_the_sum_over_pairs_and_equal_rewards_ask_for_nothing():
    p, r = random(0, 3), torch.tensor([[0.0, 2.0, 1.0, 1.0]] * 3)
    expected = [
        sum(max(0.0, float(p[n, i] - p[n, j])) for i in range(4) for j in range(4) if r[n, i] < r[n, j])
        for n in range(3)
    ]
    assert rrhf_loss(p, r).tolist() == pytest.approx(expected)
    assert rrhf_loss(p, torch.ones_like(p)).abs().max() == 0


def test_pro_with_two_responses_is_the_pairwise_loss_of_scaled_scores():
    p, r = random(1, 6, 2), random(2, 6, 2)
    gap = (r[:, 0] - r[:, 1]).abs()
    first = r.argmax(1, keepdim=True)
    better, worse = p.gather(1, first)[:, 0], p.gather(1, 1 - first)[:, 0]
    torch.testing.assert_close(pro_loss(p, r), pairwise_loss(gap * better, gap * worse))
    torch.testing.assert_close(pro_loss(p, r, by_reward=False), pairwise_loss(better, worse))


def test_pro_without_rewards_is_the_likelihood_of_the_order():
    """Plackett-Luce: the chances of all orders add up to one; and the order of the columns does not matter."""
    from itertools import permutations

    p = random(3, 1)
    orders = torch.tensor(list(permutations(range(4))), dtype=torch.float32)
    chances = torch.exp(-pro_loss(p.expand(len(orders), -1), orders, by_reward=False))
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-5)
    r, turned = random(4, 1), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(pro_loss(p, r), pro_loss(p[:, turned], r[:, turned]))


def test_pro_by_hand():
    """Rewards 3, 1, 0: first against gaps 2 and 3 (own scale 3), then 1 against 0 (own scale 1)."""
    a, b, c = -0.4, -1.0, -0.2
    first = math.log(math.exp(3 * a) / (math.exp(3 * a) + math.exp(2 * b) + math.exp(3 * c)))
    second = math.log(math.exp(b) / (math.exp(b) + math.exp(c)))
    found = pro_loss(torch.tensor([[b, a, c]]), torch.tensor([[1.0, 3.0, 0.0]]))
    assert found.item() == pytest.approx(-first - second, abs=1e-6)


# -- what is elicited -----------------------------------------------------------------------------------------------


def test_answers_are_cross_entropy_to_the_teacher_s_class():
    student, weights = signal(random(0))
    teacher, asked = signal(random(1))
    loss = TeacherLabels(student, teacher)(BATCH)
    assert loss.item() == pytest.approx(F.cross_entropy(random(0), random(1).argmax(-1)).item())
    loss.backward()
    assert asked.grad is None and weights.grad.abs().sum() > 0
    hotter = TeacherLabels(signal(random(0))[0], signal(0.01 * random(1))[0])(BATCH)  # no soft knowledge passes
    assert hotter.item() == pytest.approx(loss.item())


def test_unsure_answers_count_nothing():
    logits = torch.tensor([[9.0, 0, 0, 0], [0.1, 0, 0, 0]])
    student, weights = signal(random(2, 2))
    loss = TeacherLabels(student, signal(logits)[0], confidence=0.9)({"inputs": torch.zeros(2, 1)})
    assert loss.item() == pytest.approx(F.cross_entropy(random(2, 2)[:1], torch.tensor([0])).item() / 2)
    loss.backward()
    assert weights.grad[1].abs().max() == 0 and weights.grad[0].abs().max() > 0


def test_guesses_are_drawn_from_the_guesser_without_repeats():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, -30.0]).expand(4000, 4)
    guess = draw_guesses(logits, 2)
    assert (guess[:, 0] != guess[:, 1]).all()
    share = torch.bincount(guess[:, 0], minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.03, rtol=0)


def test_feedback_moves_the_better_guess_up_and_tells_only_the_order():
    """Gradient of the pairwise loss on logits: -sigma(l - w) on the better, + on the worse, nothing elsewhere."""
    two = torch.tensor([[0.0, 0.0, -40.0, -40.0]])
    for teacher in (torch.tensor([[2.0, 1.0, 0.0, 5.0]]), torch.tensor([[0.2, 0.1, 0.0, 0.0]])):
        student, weights = signal(two)
        RankedGuesses(student, signal(teacher)[0], signal(two)[0])({"inputs": torch.zeros(1, 1)}).backward()
        torch.testing.assert_close(weights.grad, torch.tensor([[-0.5, 0.5, 0.0, 0.0]]))


@pytest.mark.parametrize("ranking", ["rrhf", "pro"])
def test_ranked_lists_of_all_classes(ranking):
    """With as many guesses as classes chance plays no part: the losses of the ranks, and the best one's likelihood."""
    student, teacher = random(5), random(6)
    own, _ = signal(student)
    found = RankedGuesses(own, signal(teacher)[0], own, ranking=ranking, guesses=9)(BATCH)
    ranks = teacher.argsort(1).argsort(1).float()
    loss = {"rrhf": rrhf_loss, "pro": pro_loss}[ranking](student.log_softmax(-1), ranks).mean()
    imitation = {"rrhf": 1.0, "pro": 0.05 * 3**2}[ranking]  # four classes
    expected = loss + imitation * F.cross_entropy(student, teacher.argmax(-1))
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_what_imitation_weighs_beside_pro_grows_with_the_list():
    """0.05 of two guesses, a sixteenth of what it is of five."""
    student, teacher = random(5, classes=5), random(6, classes=5)
    own, _ = signal(student)
    two = RankedGuesses(own, signal(teacher)[0], signal(torch.tensor([[9.0, 9, -60, -60, -60]] * 5))[0], ranking="pro")
    logp, ranks = student.log_softmax(-1)[:, :2], teacher[:, :2].argsort(1).argsort(1).float()
    best = logp.gather(1, ranks.argmax(1, keepdim=True)).mean()
    assert two(BATCH).item() == pytest.approx((pro_loss(logp, ranks).mean() - 0.05 * best).item(), abs=1e-5)
    five = RankedGuesses(own, signal(teacher)[0], own, ranking="pro", guesses=5)
    ranks = teacher.argsort(1).argsort(1).float()
    expected = pro_loss(student.log_softmax(-1), ranks).mean() + 0.8 * F.cross_entropy(student, teacher.argmax(-1))
    assert five(BATCH).item() == pytest.approx(expected.item(), abs=1e-5)


def test_every_algorithm_of_feedback_has_a_claim_of_its_own():
    """And the arms that were there before are what they were."""
    claims = {claim.method: claim for claim in Elicitation.make().claims()}
    for how, guesses in {"dpo": 2, "reward": 2, "rrhf": 4, "pro": 4}.items():
        claim = claims[how]
        assert (claim.scope, claim.baseline) == ("consequence", "seeds")
        fields = Elicitation.make(**claim.variants[how][1])
        assert (fields.ask, fields.learn, fields.guesses) == ("feedback", how, guesses)
    assert claims["feedback"].variants["feedback"][1] == {"ask": "feedback"}
    assert len({claim.statement for claim in Elicitation.make().claims()}) == len(Elicitation.make().claims())


def test_dpo_begins_at_ln_2_and_needs_a_reference():
    own, _ = signal(random(0))
    term = RankedGuesses(own, signal(random(1))[0], own, ranking="dpo", reference=signal(random(0))[0])
    assert term(BATCH).item() == pytest.approx(LN2)
    other = RankedGuesses(own, signal(random(1))[0], own, ranking="dpo", reference=signal(random(3))[0], beta=2.0)
    assert abs(other(BATCH).item() - LN2) > 1e-3
    with pytest.raises(ValueError, match="reference="):
        RankedGuesses(own, own, own, ranking="dpo")


def test_the_best_policy_is_the_reference_tilted_by_the_reward():
    """argmax of E r - beta KL is ref exp(r / beta) / Z, where the gradient is zero and the loss is -beta log Z."""
    reward, reference, beta = random(1), random(2), 0.5
    best = reference.log_softmax(-1) + reward / beta
    student, weights = signal(best)
    loss = ExpectedReward(student, signal(reward)[0], signal(reference)[0], beta=beta)(BATCH)
    loss.backward()
    assert weights.grad.abs().max() < 1e-6
    assert loss.item() == pytest.approx(-beta * best.logsumexp(-1).mean().item(), abs=1e-5)
    away = ExpectedReward(signal(reference)[0], signal(reward)[0], signal(reference)[0], beta=beta)(BATCH)
    assert away.item() == pytest.approx(-(reference.softmax(-1) * reward).sum(-1).mean().item(), abs=1e-6)
    assert away > loss


# -- inputs ---------------------------------------------------------------------------------------------------------


def test_labels_of_the_pool_do_not_reach_the_student():
    images = digits("train", size=50)
    source = PartlyLabelled(Batches(images, 4, gather=True), Batches(images, 8, seed=1, gather=True))
    first = next(source)
    assert first.keys() == {"pixel_values", "labels"}
    assert (first["labels"][4:] == UNLABELLED).all() and (first["labels"][:4] >= 0).all()
    state, expected = source.state_dict(), next(source)
    again = PartlyLabelled(Batches(images, 4, gather=True), Batches(images, 8, seed=1, gather=True))
    again.load_state_dict(state)
    assert torch.equal(next(again)["pixel_values"], expected["pixel_values"])

    def leaking(batch: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
        return {"pixel_values": batch["pixel_values"] + batch["labels"][:, None, None, None]}

    batch = next(Batches(images, 8, gather=True))
    assert torch.equal(unlabelled(leaking)(batch, None)["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("shrinkage", [0.0, 0.4, 1.0])
def test_curated_images_have_the_classes_means_and_their_covariance(shrinkage):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 40)
    mixing = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    pixels = torch.randn(80, 2, generator=generator) @ mixing.T + 10.0 * labels[:, None]
    images = Images(pixels.reshape(80, 1, 1, 2), labels, ("a", "b"))
    drawn = ClassGaussians(images, shrinkage=shrinkage).draw(20000, generator)["pixel_values"].reshape(-1, 2)
    near_b = drawn.sum(1) > 10
    assert near_b.float().mean().item() == pytest.approx(0.5, abs=0.02)
    rest = torch.cat([pixels[labels == n] - pixels[labels == n].mean(0) for n in (0, 1)])
    pooled = rest.T @ rest / 78
    wanted = (1 - shrinkage) * pooled + shrinkage * pooled.trace() / 2 * torch.eye(2)
    low = drawn[~near_b]
    torch.testing.assert_close(low.mean(0), pixels[labels == 0].mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(torch.cov(low.T), wanted, atol=0.2, rtol=0)


# -- the map --------------------------------------------------------------------------------------------------------


def test_every_elicitation_and_algorithm_of_the_survey_has_a_recipe():
    covered = coverage(rows())
    for kind in set(AXES["elicitation"]) - {"none"}:
        assert any(names for (e, _), names in covered.items() if e == kind), kind
    for algorithm in ("supervised fine-tuning", "divergence", "similarity", "reinforcement learning", "ranking"):
        assert any(names for (_, a), names in covered.items() if a == algorithm), algorithm
    assert not set(gaps(covered)) & set(Elicitation.recipes)


def test_the_matrix_is_an_independent_recount():
    covered = coverage(rows())
    for (elicitation, algorithm), names in covered.items():
        counted = []
        for name, system in all_systems().items():
            if system.recipes:
                here = (elicitation, algorithm) in system.recipes
            else:
                here = elicitation in system.meta.elicitation and algorithm in system.meta.algorithm
            counted += [name] if here else []
        assert sorted(names) == sorted(counted)
    lines = coverage_lines(covered)
    assert sum(int(count) for *_, count, _ in lines) == sum(map(len, covered.values()))
    single = [one for one in rows() if len(cells(one)) == 1 and "none" not in cells(one)[0] and one["name"] != "x"]
    assert sum(map(len, coverage(single).values())) == len(single) > 3


def test_filters_intersect():
    def names(**wanted: str) -> set[str]:
        return {one["name"] for one in rows(**wanted)}

    both = names(elicitation="labelling", algorithm="ranking")
    assert both == names(elicitation="labelling") & names(algorithm="ranking") and both


def test_no_black_box_is_looked_into():
    assert [said for one in rows() for said in problems(one)] == []
    wrong = {**row(get_system("seqkd")), "teacher_access": ("black-box",), "feedback": ("features",)}
    (said,) = problems(wrong)
    assert "seqkd" in said and "features" in said


def test_recipes_lie_within_their_systems_metadata_and_can_be_made():
    for system in all_systems().values():
        for (elicitation, algorithm), fields in system.recipes.items():
            assert elicitation in system.meta.elicitation and algorithm in system.meta.algorithm
            system.make(**fields)


def test_requirements():
    assert excluded("black-box", elicitation="labelling", algorithm="supervised fine-tuning") == []
    (why,) = excluded("black-box", elicitation="feature", algorithm="divergence")
    assert "probabilities" in why
    assert excluded("logits", elicitation="feature", algorithm="divergence") == []
    assert len(excluded("black-box", elicitation="feature", algorithm="similarity")) == 2
    assert excluded("teacher-free", elicitation="self-knowledge") == []
    for wanted in ("labelling", "expansion", "feature", "feedback"):
        counts = [len(excluded(access, elicitation=wanted)) for access in ACCESS]
        assert counts == sorted(counts, reverse=True) and counts[0] == 1 and counts[-1] == 0
    with pytest.raises(ConfigError, match="grey-box"):
        excluded("grey-box", elicitation="labelling")


def test_recipes_keep_to_the_access():
    assert least_access(row(get_system("kd"))) == "white-box"
    assert least_access(row(get_system("logit-leakage"))) == "logits"
    found = {one.system for one in recipes_for("labelling", "supervised fine-tuning", access="black-box")}
    assert {"seqkd", "elicitation"} <= found
    for access in ("logits", "white-box"):
        for one in recipes_for("feature", "divergence", access=access):
            assert ACCESS.index(one.access) <= ACCESS.index(access)
    ranked = recipes_for("feedback", "ranking", domain="vision")
    assert ranked[0].command() == "stillhouse run elicitation ask=feedback learn=dpo"
    assert recipes_for("expansion", "retrieval") == []
    with pytest.raises(ConfigError, match="probabilities"):
        recipes_for("feature", "divergence", access="black-box")
    with pytest.raises(ConfigError, match="not in the taxonomy"):
        recipes_for("labeling", "divergence")


def test_the_commands(capsys, tmp_path):
    import json

    from stillhouse.cli.main import main

    main(["systems", "--matrix", "--json"])
    found = {(one["elicitation"], one["algorithm"]): one["systems"] for one in json.loads(capsys.readouterr().out)}
    assert found == coverage(rows())
    main(["systems", "--matrix", "--domain", "vision"])
    table = capsys.readouterr().out
    assert "elicitation" in table and "seqkd" not in table
    main(["choose", "feedback", "ranking", "--access", "black-box", "--teacher", str(tmp_path)])
    said = capsys.readouterr().out
    assert "stillhouse run elicitation ask=feedback learn=dpo" in said and "states no licence" in said
    main(["choose", "expansion", "retrieval"])
    assert "no system" in capsys.readouterr().out
    main(["show", "kd", "--json"])
    assert json.loads(capsys.readouterr().out)["nearest"] == nearest("kd")
    with pytest.raises(SystemExit):
        main(["choose", "feature", "divergence", "--access", "black-box"])
    assert "probabilities" in capsys.readouterr().err


def test_nearest_systems():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5 and jaccard(set(), set()) == 1.0
    found = nearest("kd", 3)
    assert len(found) == 3 and "kd" not in found and list(found.values()) == sorted(found.values(), reverse=True)
    one, other = (tags(row(get_system(name))) for name in ("kd", next(iter(found))))
    assert next(iter(found.values())) == pytest.approx(len(one & other) / len(one | other))
    assert ("elicitation", "none") not in tags(row(get_system("sft")))


def test_the_new_axes_are_closed():
    meta = dataclasses.replace(get_system("kd").meta, skill=("code", "planning"), vertical="law")
    assert (meta.skill, meta.vertical, meta.role) == (("code", "planning"), ("law",), ("smaller models",))
    with pytest.raises(ConfigError, match=r"skill='coding'.*code"):
        dataclasses.replace(meta, skill="coding")


# -- licences -------------------------------------------------------------------------------------------------------


def test_a_teacher_s_licence_is_read_from_its_card(tmp_path):
    card = tmp_path / "README.md"
    assert "states no licence" in licence_of(str(tmp_path)).note
    card.write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert licence_of(str(tmp_path)).name == "apache-2.0" and "outputs" in licence_of(str(tmp_path)).note
    card.write_text("---\nlicense: other\nlicense_name: own-terms\nlicense_link: https://x.org/terms\n---\n")
    found = licence_of(str(tmp_path))
    assert (found.name, found.link) == ("own-terms", "https://x.org/terms")
    card.unlink()
    (tmp_path / "LICENSE").write_text("Terms")
    assert licence_of(str(tmp_path)).name == "LICENSE"
    with pytest.raises(ModelError, match="not a directory"):
        licence_of(str(tmp_path / "none"))


# -- the system -----------------------------------------------------------------------------------------------------

SMALL = {**Elicitation.smoke, "steps": 3, "trackers": []}


@pytest.mark.parametrize("ask", ["none", *Elicitation.meta.elicitation])
def test_every_arm_runs(ask, tmp_path):
    from stillhouse.workflow import run_system

    done = run_system("elicitation", {**SMALL, "ask": ask, "learn": "rrhf"}, output=tmp_path / "run", quiet=True)
    assert set(done.artifacts) - {"teacher"} == {"seeds", "student", "evaluation"}
    assert 0 <= done.artifacts["evaluation"].metrics["student/accuracy"] <= 1


def test_more_seeds_than_images(tmp_path):
    from stillhouse.workflow import run_system

    with pytest.raises(DataError, match="200 images wanted, it has 128"):
        run_system("elicitation", {**SMALL, "labelled": 200}, output=tmp_path / "run", quiet=True)
