"""Generalisation and fidelity (card 172): objectives, disturbed teachers, fidelity figures, statistics, the sums."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from stillhouse.losses.perturbed import NoisyTeacher
from stillhouse.metrics.bleu import bleu
from stillhouse.metrics.fidelity import Said, answer_of, fidelity, fidelity_table
from stillhouse.metrics.ranking import rank_correlation
from stillhouse.metrics.significance import one_way_anova, paired_t_test
from stillhouse.tasks.fidelity import Cell, Scored, divergence_of, grid_table, parted

WAYS = ("forward-kl", "reverse-kl", "gkd")


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows).log()


# -- objectives -------------------------------------------------------------------------------------------------------


def test_the_divergences_are_those_of_the_study():
    half, sure = logits((0.5, 0.5)), logits((0.9, 0.1))
    assert float(divergence_of("forward-kl", temperature=1.0)(sure, half)) == pytest.approx(0.5108, abs=1e-4)
    assert float(divergence_of("reverse-kl", temperature=1.0)(sure, half)) == pytest.approx(0.3681, abs=1e-4)
    one, other = logits((1.0, 1e-30)), logits((1e-30, 1.0))
    gkd = divergence_of("gkd", temperature=5.0)
    assert float(gkd(one, other)) == pytest.approx(math.log(2))
    assert float(gkd(half, sure)) == pytest.approx(float(gkd(sure, half)))
    assert float(gkd(sure, sure)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_a_constant_in_the_logits_is_nothing(way, temperature):
    z = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    assert divergence_of(way, temperature=temperature)(z, z + 3.0) == pytest.approx(torch.zeros(6), abs=1e-5)


@pytest.mark.parametrize("way", ["forward-kl", "reverse-kl"])
def test_small_differences_pull_equally_at_every_temperature(way):
    """Around a flat teacher, tau^2 KL(p / tau || q / tau) has the gradient (z_S - z_T) / V whatever tau."""
    difference = 1e-5 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    difference -= difference.mean(-1, keepdim=True)
    for temperature in (1.0, 2.0, 5.0):
        student = difference.clone().requires_grad_()
        loss = divergence_of(way, temperature=temperature)(student, torch.zeros_like(difference))
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        torch.testing.assert_close(gradient, difference / 8, rtol=2e-3, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_no_noise_is_the_clean_teacher_and_draws_nothing(way):
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2))
    clean = divergence_of(way, temperature=2.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loss, gradient = NoisyTeacher(clean, 0.0).value_and_grad(student.clone(), teacher.clone())
    assert torch.equal(torch.get_rng_state(), before)
    expected, expected_gradient = clean.value_and_grad(student.clone(), teacher.clone())
    assert torch.equal(loss, expected) and torch.equal(gradient, expected_gradient)


def test_noise_is_added_to_the_teachers_logits_anew_each_time():
    student, teacher = torch.randn(2, 4000, 5, generator=torch.Generator().manual_seed(3))
    clean, noisy = (
        divergence_of("forward-kl", temperature=1.0),
        NoisyTeacher(divergence_of("forward-kl", temperature=1.0), 2.0),
    )
    torch.manual_seed(1)
    one, gradient = noisy.value_and_grad(student, teacher)
    two = noisy(student, teacher)
    assert not torch.equal(one, two)
    torch.manual_seed(1)
    disturbed = teacher + 2.0 * torch.randn_like(teacher)
    assert torch.equal(one, clean.value_and_grad(student, disturbed)[0])
    # q - E p: the gradient of an expectation, which is not that of the clean teacher.
    expected = student.softmax(-1) - disturbed.softmax(-1)
    torch.testing.assert_close(gradient, expected)


# -- fidelity ---------------------------------------------------------------------------------------------------------


def test_bleu_is_sacrebleus():
    """Expected values: sacrebleu 2.5 with tokenize=none, smooth_method=exp, computed once."""
    said = [text.split() for text in ("the cat sat on the mat", "there is a small dog here today")]
    known = [text.split() for text in ("the cat is on the mat", "a small dog is here today")]
    assert bleu(said, known) == pytest.approx(0.29256127307315066)
    assert bleu(said, known, n=2) == pytest.approx(0.6793662204867578)


def test_limits_of_bleu():
    assert bleu([[1, 2, 3]], [[1, 2, 3]]) == 1 and bleu([[1, 2]], [[3, 4]]) == 0 and bleu([[]], [[1]]) == 0
    assert bleu([[7, 7, 7, 7]], [[7, 8]], n=1) == 0.25  # clipped
    assert bleu([[1, 2]], [[1, 2, 3, 4]], n=1) == pytest.approx(math.exp(1 - 4 / 2))  # brevity
    assert bleu([[1, 2, 3], [4]], [[1, 2, 9], [4]], n=1) == pytest.approx(3 / 4)  # counted over the corpus
    assert bleu([[1, 2], [3]], [[1, 9], [3]], n=1) != pytest.approx((0.5 + 1) / 2)


def said(*texts: str, marker: str = "=") -> Said:
    return Said([[ord(sign) for sign in text] for text in texts], list(texts), marker)


def test_a_model_is_faithful_to_itself():
    teacher = said("1+2=3;3+4=7", "5+5=10;10+1=11")
    found = fidelity(teacher, teacher, ["1+2=3;3+4=7", "5+5=10;10+1=12"])
    assert (found.agreement, found.bleu, found.identical, found.accuracy) == (1, 1, 1, 0.5)


def test_an_answer_may_be_right_by_another_way():
    teacher, student = said("1+2=3;3+4=7"), said("2+4=6;6+1=7")
    found = fidelity(student, teacher, ["1+2=3;3+4=7"])
    assert (found.agreement, found.accuracy, found.identical) == (1, 1, 0) and found.bleu < 0.5
    wrong = fidelity(said("1+2=3;3+4=8"), teacher, ["1+2=3;3+4=7"])
    assert (wrong.agreement, wrong.accuracy) == (0, 0) and wrong.bleu > found.bleu  # near, and wrong
    nothing = said("no answer", marker="#")
    assert fidelity(nothing, nothing).agreement == 0 and answer_of("a  b ", "") == "a b"


def test_the_cosine_is_that_of_the_vectors_response_by_response():
    """And it can say that two responses mean the same where no word is."""
    vectors = {"one": (1.0, 0.0), "1": (1.0, 0.0), "so": (0.6, 0.8), "no": (-1.0, 0.0)}
    teacher, student, far = (
        Said(
            [[ord(sign) for sign in text] for text in texts], texts, embed=lambda ts: np.array([vectors[t] for t in ts])
        )
        for texts in (["one", "one"], ["1", "so"], ["no", "so"])
    )
    assert fidelity(teacher, teacher).cosine == pytest.approx(1)
    found = fidelity(student, teacher)
    assert found.cosine == pytest.approx((1 + 0.6) / 2) and found.bleu < 0.2
    assert fidelity(far, teacher).cosine == pytest.approx((-1 + 0.6) / 2)
    table = fidelity_table({"teacher": teacher, "student": student})
    assert table.row("student")["cosine"] == pytest.approx(0.8) and "cosine" not in table.row("teacher")
    assert "cosine" in [column.key for column in table.columns]
    plain = fidelity_table({"teacher": said("a"), "student": said("b")})
    assert "cosine" not in plain.row("student") and "cosine" not in [column.key for column in plain.columns]


def test_the_table_tests_students_against_the_baseline():
    right = [f"1+1=2;{n}" if n % 2 else "1=2" for n in range(8)]
    models = {"teacher": said(*right), "student": said(*right), "baseline": said(*right[:4], *["1=9"] * 4)}
    table = fidelity_table(models, right)
    row = table.row("student")
    expected = stats.ttest_rel([1.0] * 8, [1.0] * 4 + [0.0] * 4)
    assert (row["t"], row["p"]) == pytest.approx((expected.statistic, expected.pvalue))
    assert "t" not in table.row("baseline") and table.row("teacher").keys() == {"name", "accuracy"}
    assert "accuracy" not in fidelity_table(models).row("student")


# -- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_scipys_and_have_their_limits():
    falling = rank_correlation([1, 2, 3, 4], [9, 7, 3, 1])
    assert falling["spearman"] == pytest.approx(-1)
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 12))
    assert one_way_anova([a, b + 1, c]).p == pytest.approx(stats.f_oneway(a, b + 1, c).pvalue)
    assert one_way_anova([a, a, a]).statistic == 0 and one_way_anova([[1.0, 1.0], [1.0, 1.0]]).p == 1
    assert one_way_anova([[1.0, 1.0], [2.0, 2.0]]).p == 0 and math.isnan(one_way_anova([a]).p)
    assert paired_t_test(a, b).statistic == pytest.approx(stats.ttest_rel(a, b).statistic)
    assert paired_t_test(a, a).p == 1 and paired_t_test([2.0, 3.0], [1.0, 2.0]).statistic == math.inf
    assert math.isnan(paired_t_test([1.0], [0.0]).p)


def scored(size: int, way: str, accuracy: float, bleu: float) -> Scored:
    figures = {"accuracy": accuracy, "bleu": bleu, "agreement": accuracy, "identical": 0.0, "correlation": math.nan}
    return Scored(Cell(size, way, 1.0), 100 * (size + 1), figures, [accuracy - 0.01, accuracy + 0.01])  # type: ignore[arg-type]


def test_the_grid_has_its_statistics():
    """Gains that fall with size, and fidelity that falls where accuracy rises: the paradox."""
    found = [scored(size, "sft", 0.2 + 0.2 * size, 0.9 - 0.1 * size) for size in range(3)]
    found += [scored(size, "forward-kl", 0.5 + 0.1 * size, 0.6 - 0.1 * size) for size in range(3)]
    found += [scored(size, "reverse-kl", 0.5 + 0.1 * size, 0.6 - 0.1 * size) for size in range(3)]
    table, results = grid_table(found, ["small", "middle", "large"])
    assert table.row("forward-kl-1")["gain"] == pytest.approx(0.3)
    assert results["rho/size and gain"] == pytest.approx(-1)
    assert results["rho/fidelity and accuracy"] < -0.7 and results["rho/agreement and accuracy"] == pytest.approx(1)
    assert results["F"] == 0  # two ways that do the same
    pairs = [(0.5 + 0.1 * s + d, 0.2 + 0.2 * s + d) for s in range(3) for d in (-0.01, 0.01)] * 2
    assert results["t"] == pytest.approx(stats.ttest_rel(*zip(*pairs, strict=True)).statistic)
    assert "gain" not in table.row("sft-1") and len(table.notes) == 5
    alone, figures = grid_table(found[3:4], ["small"])
    embedded = [replace(one, figures={**one.figures, "cosine": 2 - one.figures["bleu"]}) for one in found]
    assert grid_table(embedded, ["small", "middle", "large"])[1]["rho/BLEU and cosine"] == pytest.approx(-1)
    assert "rho/BLEU and cosine" not in results
    assert alone.notes == [] and "gain" not in alone.rows[0] and figures["forward-kl-1/accuracy"] == 0.5


def test_parts_of_the_prompts():
    assert parted([1.0, 0.0, 1.0, 1.0], 2) == [1.0, 0.5] and parted([1.0], 3) == [1.0] and parted([], 3) == []


# -- the sums ---------------------------------------------------------------------------------------------------------


def test_both_ways_are_right_and_no_training_sum_is_held_out():
    from stillhouse.data.responses import Coder
    from stillhouse.models.symbol_tokenizer import symbol_tokenizer
    from stillhouse.tasks.sums import MARKER, SYMBOLS, Sums, solved, sum_rows

    assert solved((3, 5, 9), left=True) == ("3+5+9;", "3+5=8;8+9=17")
    assert solved((3, 5, 9), left=False) == ("3+5+9;", "5+9=14;14+3=17")
    assert answer_of(solved((3, 5, 9), left=False, modulus=7)[1], MARKER) == "3"
    coder = Coder(symbol_tokenizer(SYMBOLS))
    rows = sum_rows(Sums(), coder, seed=0)
    assert {name: len(part) for name, part in rows.items()} == {"train": 600, "selection": 50, "validation": 300}
    prompts = {name: {tuple(prompt) for prompt, _ in part} for name, part in rows.items()}
    assert not prompts["train"] & (prompts["selection"] | prompts["validation"])
    assert not prompts["selection"] & prompts["validation"] and len(prompts["validation"]) == 300
    other = sum_rows(Sums(), coder, seed=1)
    assert other["validation"] == rows["validation"] and other["train"] != rows["train"]
    left = 0
    for prompt, response in rows["train"]:
        numbers = [int(n) for n in coder.text(prompt).rstrip(";").split("+")]
        way = coder.text(response)
        assert answer_of(way, MARKER) == str(sum(numbers))
        for part in way.split(";"):
            terms, _, value = part.partition("=")
            assert sum(map(int, terms.split("+"))) == int(value)
        left += way.startswith(f"{numbers[0]}+{numbers[1]}=")
    assert 0.75 < left / 600 < 0.9  # four in five, and those that read the same both ways


def test_cells_of_the_grid():
    from stillhouse.base.errors import ConfigError
    from stillhouse.systems import get_system

    study = get_system("fidelity").make(objectives="sft,gkd", noises="0,5", temperatures="1,5", unaware="true")
    cells = study.cells(3)
    names = [cell.name for cell in cells]
    assert names[:6] == ["sft-1", "gkd-1", "sft-2", "gkd-2", "sft-3", "gkd-3"] and len(set(names)) == len(names)
    assert names[6:] == ["forward-kl-noise5-2", "forward-kl-t5-2", "forward-kl-unaware-2"]
    with pytest.raises(ConfigError, match="nothing to train"):
        get_system("fidelity").make(objectives="", noises="", temperatures="").cells(1)


@pytest.mark.slow
def test_the_embedded_study_from_end_to_end(tmp_path, monkeypatch):
    """With teachers of three steps: every objective and every disturbance has its row, and all figures are there."""
    from functools import partial

    from stillhouse.systems.language import fidelity as study
    from stillhouse.tasks import language
    from stillhouse.tasks.sums import Sums, sums_task
    from stillhouse.workflow import run_system

    tiny = Sums(train=40, selection=4, validation=12, taught=32, steps=3, batch_size=16, width=16)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "Sums", lambda: tiny)
    monkeypatch.setattr(study, "sums_task", partial(sums_task, recipe=tiny))
    monkeypatch.setattr(language, "tokens_per_second", partial(language.tokens_per_second, seconds=0.01))
    values = {"students": ("layers=1;hidden_size=8;heads=2",), "steps": 3, "batch_size": 8, "unaware": True}
    done = run_system("fidelity", {**values, "trackers": []}, output=tmp_path / "run", quiet=True)
    table = done.artifacts["fidelity"].table()
    ways = ("sft", "forward-kl", "reverse-kl", "gkd", "seq-kd")
    cells = [*(f"{way}-1" for way in ways), *(f"forward-kl{mark}-1" for mark in ("-noise5", "-t5", "-unaware"))]
    assert [row["name"] for row in table.rows] == ["teacher", *cells]
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["bleu"] <= 1 for row in table.rows[1:])
    assert "gain" in table.row("gkd-1") and table.notes
    assert "Generalisation and fidelity" in done.report.read_text()
