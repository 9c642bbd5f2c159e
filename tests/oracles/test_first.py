"""FIRST (card 117): kept tokens re-scaled until they are calibrated, and a student that learns them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.schedule import Progress
from stillhouse.losses.concentrated import ConcentratedKL, Rescale, compared
from stillhouse.losses.divergences import ForwardKL, value_and_grad
from stillhouse.losses.sparse_divergence import linear_topk_divergence
from stillhouse.metrics.trust import candidates, fit_c, likeliest, trust
from stillhouse.models import load_causal_lm, new_causal_lm
from stillhouse.systems import get_system
from stillhouse.tasks import concentrated, language
from stillhouse.tasks.choices import Choices, World, as_windows, choice_tokenizer, dialect
from stillhouse.tasks.concentrated import kept_teacher, trustworthy, tuned
from stillhouse.teachers.scorer import Scored
from stillhouse.workflow import run_system

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers

P = torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)


def drawn(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- re-scaling -----------------------------------------------------------------------------------------------------


def test_the_power_form_has_its_limits():
    as_it_is, sharp, flat = (Rescale(c=c)(P.log()).exp() for c in (1.0, 1e-3, 1e6))
    torch.testing.assert_close(as_it_is, P)
    torch.testing.assert_close(sharp, torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(flat, torch.full((5,), 0.2, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(Rescale(c=2.0)(P.log()).exp(), P.sqrt() / P.sqrt().sum())


def test_the_released_form_flattens_strongly():
    """A softmax of (0.7, 0.1, 0.1, 0.05, 0.05), by hand."""
    raised = [math.exp(p) for p in P.tolist()]
    expected = [value / sum(raised) for value in raised]
    found = Rescale(form="probabilities")(P.log()).exp().tolist()
    assert found == pytest.approx(expected)
    assert found == pytest.approx([0.3183, 0.1747, 0.1747, 0.1662, 0.1662], abs=2e-4)


def test_smoothing_takes_from_the_likeliest_wherever_it_stands():
    expected = [0.6, 0.125, 0.125, 0.075, 0.075]
    assert Rescale(form="smoothing")(P.log()).exp().tolist() == pytest.approx(expected)
    turned = Rescale(form="smoothing")(P.flip(0).log()).exp().tolist()
    assert turned == pytest.approx(expected[::-1])
    little = torch.tensor([0.3, 0.3, 0.4]).log()
    all_of_it = Rescale(form="smoothing", delta=0.9)(little).exp()
    assert all_of_it.tolist() == pytest.approx([0.5, 0.5, 0.0])  # no more than there is


@given(seed=st.integers(0, 50), c=st.floats(0.05, 20), form=st.sampled_from(["power", "probabilities", "smoothing"]))
@settings(max_examples=30, deadline=None)
def test_the_order_stays_and_the_sum_is_one(seed, c, form):
    log_p = drawn(seed, 4, 6).log_softmax(-1)
    found = Rescale(form=form, c=c, delta=0.0)(log_p).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (found.gather(-1, log_p.argsort(-1)).diff() >= -1e-12).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [({"c": 0.0}, "c must be"), ({"c": float("inf")}, "c must be"), ({"delta": 1.0}, "delta must be")],
)
def test_impossible_rescalings_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Rescale(**values)


# -- the loss -------------------------------------------------------------------------------------------------------

V, K = 9, 3


def sparse(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p, tokens = t.log_softmax(-1).topk(K, -1)
    return tokens, log_p, (1 - log_p.exp().sum(-1)).log()


def fused(z: Tensor, t: Tensor, divergence: ConcentratedKL) -> Tensor:
    """Through the chunked pass, with an identity for an output layer, so that hidden states are logits."""
    eye = torch.eye(V, dtype=z.dtype)
    return linear_topk_divergence(z, eye, *sparse(t), divergence=divergence, chunk_tokens=2).loss


def by_hand(z: Tensor, t: Tensor, side: str, c: float) -> Tensor:
    """On whole distributions, term by term."""
    total = torch.zeros((), dtype=z.dtype)
    q = z.softmax(-1)
    for row, teacher in enumerate(t.softmax(-1)):
        best = teacher.argsort(descending=True)[:K]
        masses, own = list(teacher[best]), list(q[row][best])
        if side == "bucket":
            masses.append(1 - sum(masses))
            own.append(1 - sum(own))
        raised = [mass ** (1 / c) for mass in masses]
        for mass, mine in zip(raised, own, strict=True):
            p = mass / sum(raised)
            total = total + p * (p / (mine / sum(own) if side == "kept" else mine)).log()
    return total / len(z)


@pytest.mark.parametrize("side", ["kept", "bucket", "whole"])
@pytest.mark.parametrize("c", [0.5, 1.0, 3.0])
def test_the_fused_loss_and_its_gradient_against_whole_distributions(side, c):
    z, t = drawn(0, 7, V).requires_grad_(), drawn(1, 7, V)
    divergence = ConcentratedKL(kept=K, side=side, rescale=Rescale(c=c))
    loss, expected = fused(z, t, divergence), by_hand(z, t, side, c)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, z)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted)
    assert float(loss.detach()) > 0


def test_with_all_tokens_kept_it_is_the_forward_kl():
    z, t = drawn(2, 5, V), drawn(3, 5, V)
    divergence = ConcentratedKL(kept=V)
    loss, grad = value_and_grad(divergence, z, t.log_softmax(-1))
    expected, expected_grad = value_and_grad(ForwardKL(), z, t)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_it_is_zero_where_the_student_agrees_and_blind_to_what_it_gives_to_others():
    t = drawn(4, 4, V)
    agreeing, kept = t.clone(), t.topk(K, -1).indices
    agreeing.scatter_(-1, kept, t.gather(-1, kept) - 5.0)  # the same among the kept, most of the mass elsewhere
    blind, seeing = (fused(agreeing, t, ConcentratedKL(kept=K, side=side)) for side in ("kept", "bucket"))
    assert float(blind) == pytest.approx(0, abs=1e-12) and float(seeing) > 0.5
    assert float(fused(t, t, ConcentratedKL(kept=K, side="bucket"))) == pytest.approx(0, abs=1e-12)
    # a re-scaled teacher is matched by a student that is softened as much
    c = 2.5
    assert float(fused(t / c, t, ConcentratedKL(kept=K, rescale=Rescale(c=c)))) == pytest.approx(0, abs=1e-12)


def test_both_sides_through_the_released_softmax_of_probabilities():
    t = drawn(5, 4, V)
    same = ConcentratedKL(kept=K, rescale=Rescale(form="probabilities", c=0.3), student_c=0.3)
    assert float(fused(t, t, same)) == pytest.approx(0, abs=1e-12)
    other = ConcentratedKL(kept=K, rescale=Rescale(form="probabilities", c=0.3), student_c=0.6)
    assert float(fused(t, t, other)) > 1e-4
    with pytest.raises(ValueError, match="student_c"):
        ConcentratedKL(kept=K, side="whole", student_c=1.0)


def test_a_rest_of_nothing_is_no_trouble():
    log_q, log_p = torch.tensor([[-0.5, -1.5, -1.7]]).log_softmax(-1), torch.tensor([[0.7, 0.3, 0.0]]).log()
    loss, grad = value_and_grad(ConcentratedKL(kept=2, side="bucket"), log_q, log_p)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    assert compared(log_p[:, :2], log_p[:, 2], side="bucket").shape == (1, 3)


# -- calibration ----------------------------------------------------------------------------------------------------


def test_the_error_of_one_bin():
    found = trust(torch.full((10,), 0.9), torch.arange(10) < 6)
    assert found.ece == pytest.approx(0.3) and found.accuracy == pytest.approx(0.6)
    assert found.score == pytest.approx(0.3)


@pytest.mark.parametrize("true_c", [0.5, 1.0, 2.0])
def test_the_fit_finds_the_temperature_that_spoilt_a_calibrated_teacher(true_c):
    random = torch.Generator().manual_seed(7)
    honest = (1.5 * torch.randn(20_000, 5, generator=random, dtype=torch.float64)).sort(-1, descending=True).values
    log_p = honest.log_softmax(-1)
    correct = torch.multinomial(log_p.exp(), 1, generator=random)[:, 0] == 0
    spoilt = (log_p / true_c).log_softmax(-1)  # sharper for c < 1
    found, curve = fit_c(spoilt, correct, rescale=Rescale())
    assert found.c == pytest.approx(1 / true_c, rel=0.12)
    errors = dict(curve)
    assert errors[found.c] == min(errors.values()) and errors[found.c] < 0.02
    if true_c != 1:
        assert errors[1.0] > 3 * errors[found.c]


def test_forms_without_a_c_are_left_as_they_are():
    for form in ("none", "smoothing"):
        rescale = Rescale(form=form)
        assert fit_c(P.log()[None], torch.tensor([True]), rescale=rescale) == (rescale, [])
    assert candidates(Rescale())[0] == 1.0  # of equally good ones the nearest to 1 is taken


# -- a teacher of which this is kept --------------------------------------------------------------------------------

RECIPE = Choices()


@pytest.fixture(scope="module")
def world() -> World:
    return World(RECIPE)


def test_the_questions_are_as_hard_as_they_say(world):
    random = torch.Generator().manual_seed(5)
    questions = world.questions(4000, random)
    p = world.probabilities(questions)
    assert float(p.max(-1).values.mean()) == pytest.approx(0.75, abs=0.02)
    answers = torch.multinomial(p, 1, generator=random)[:, 0]
    assert float((p.argmax(-1) == answers).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert trust(p.max(-1).values, p.argmax(-1) == answers).ece < 0.03  # the truth is calibrated
    assert len(p.argmax(-1).unique()) > RECIPE.answers / 2
    rows = world.rows(100, random)
    assert torch.equal(rows, World(RECIPE).rows(100, _later(random, world)))
    tokenizer = choice_tokenizer(RECIPE)
    assert tokenizer(tokenizer.decode(rows[0, 1:]))["input_ids"] == rows[0, 1:].tolist()
    assert as_windows(rows)[[0, 1]]["loss_mask"].sum() == 2


def _later(random: torch.Generator, world: World) -> torch.Generator:
    """A generator where ``random`` stood before the last rows were drawn."""
    again = torch.Generator().manual_seed(5)
    torch.multinomial(world.probabilities(world.questions(4000, again)), 1, generator=again)
    return again


def test_the_dialect_is_half_understood(world):
    """Who knows the world answers its dialect worse than at home, better than by chance, and is too sure there."""
    rows = dialect(Choices())[:]["input_ids"]
    assert torch.equal(rows, dialect(Choices())[:]["input_ids"])
    words = rows[:, 1:-1] - world.recipe.answers - torch.arange(world.recipe.slots) * world.recipe.values
    assert words.min() == 0 and words.max() == world.recipe.values - 1
    said = world.probabilities(words)
    right = (said.argmax(-1) == rows[:, -1]).float().mean().item()
    assert 0.15 < right < 0.6 < said.max(-1).values.mean().item()
    same, other = (world.turned(share, torch.Generator().manual_seed(1)) for share in (0.0, 1.0))
    torch.testing.assert_close(same.probabilities(words), said)
    elsewhere = (other.probabilities(words).argmax(-1) == said.argmax(-1)).float().mean().item()
    assert elsewhere < 0.3


def test_every_set_from_elsewhere_is_judged_whole(tmp_path, monkeypatch):
    """Files by name; what the table says of each is what the model says of all of it."""
    materials = helpers.make_materials(tmp_path)
    (tmp_path / "far.txt").write_text(helpers.sentences(20, seed=5)[::-1], encoding="utf-8")
    rows = [{"prompt": "the cat", "completion": f" sees {word}"} for word in ("stone", "river", "bird")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr(language, "tokens_per_second", lambda *_: 1.0)
    values = {**helpers.small_values(get_system("first"), materials), "steps": 2, "teacher_epochs": 0.0, "window": 48}
    values |= {"elsewhere": f"far={tmp_path / 'far.txt'},asked={tmp_path / 'asked.jsonl'}"}
    done = run_system("first", values, output=tmp_path / "run", quiet=True)
    table = done.artifacts["evaluation"].table()
    assert {"far_token_accuracy", "far_trust_ece", "asked_trust"} <= {column.key for column in table.columns}
    student, tokenizer = load_causal_lm(str(done.artifacts["student"].path))
    stub: Any = SimpleNamespace(
        tokenizer=tokenizer,
        windows=SimpleNamespace(window=48),
        vocab_size=len(tokenizer),
        batches_of=lambda split: [split[:]],
    )
    sets = concentrated.own_sets(stub, values["elsewhere"])
    length = sum(len(tokenizer(one)["input_ids"]) + 1 for one in (tmp_path / "far.txt").read_text().split("\f"))
    assert len(sets["far"]) == length // 48 and len(sets["asked"]) == 3
    for name, split in sets.items():
        said = likeliest(student, [split[:]], k=1, vocab_size=len(tokenizer))
        found = trust(said.log_p[:, 0].exp(), said.correct)
        row = table.row("student")
        assert row[f"{name}_token_accuracy"] == pytest.approx(found.accuracy)
        assert row[f"{name}_trust_ece"] == pytest.approx(found.ece, abs=1e-5)
        assert row[f"{name}_trust"] == pytest.approx(found.accuracy - found.ece, abs=1e-5)
    assert concentrated.own_sets(stub, None) == {}
    assert list(concentrated.own_sets(stub, str(tmp_path / "far.txt"))) == ["far"]
    with pytest.raises(DataError, match="write NAME=SOURCE"):
        concentrated.own_sets(stub, "a=x,a=y")


def model(seed: int = 0) -> Any:
    config = LlamaConfig(
        vocab_size=RECIPE.end + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    made = new_causal_lm(config, seed=seed)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20)
    return made


def task(world: World, teacher: Any, name: str = "here") -> Any:
    split = as_windows(world.rows(48, torch.Generator().manual_seed(3)))
    parts = [split[list(range(start, start + 16))] for start in range(0, 48, 16)]
    return SimpleNamespace(
        teacher=teacher,
        vocab_size=RECIPE.end + 1,
        windows=SimpleNamespace(selection=split, train=split),
        system=SimpleNamespace(teacher=name),
        run=SimpleNamespace(fabric=SimpleNamespace(device="cpu")),
        batches=lambda: iter(parts),
        batches_of=lambda _: iter(parts),
    )


def test_the_likeliest_tokens_of_what_counts(world):
    teacher, found = model(), None
    made = task(world, teacher)
    found = likeliest(teacher, made.batches(), k=4, vocab_size=RECIPE.end + 1)
    rows = made.windows.train[:]["input_ids"]
    with torch.no_grad():
        whole = teacher(input_ids=rows).logits[:, -2].log_softmax(-1).double()
    assert torch.equal(found.labels, rows[:, -1]) and torch.equal(found.tokens, whole.topk(4).indices)
    torch.testing.assert_close(found.log_p, whole.topk(4).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.log_rest.exp(), 1 - found.log_p.exp().sum(-1), atol=1e-5, rtol=0)
    assert torch.equal(found.correct, whole.argmax(-1) == rows[:, -1])


class Says:
    """A scorer that asks a model in this process."""

    def __init__(self, url: str, name: str, *, k: int) -> None:
        self.k, self.model = k, model()

    @torch.no_grad()
    def score(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        log_p, tokens = self.model(input_ids=ids).logits[:, :-1].log_softmax(-1).topk(self.k, -1)
        return {"tokens": tokens, "log_p": log_p, "log_rest": (1 - log_p.double().exp().sum(-1)).log()}


def test_an_endpoint_is_calibrated_as_the_same_teacher_here(world, monkeypatch):
    monkeypatch.setattr(concentrated, "EndpointScorer", Says)
    there = task(world, None, "http://localhost:1/v1#teacher")
    with pytest.raises(StopIteration) as done:
        next(kept_teacher(there, k=5))
    kept = done.value.value
    assert isinstance(kept.source(None), Scored) and not kept.whole
    here = likeliest(model(), task(world, None).batches(), k=5, vocab_size=RECIPE.end + 1)
    said = kept.says()
    assert torch.equal(said.tokens, here.tokens) and torch.equal(said.labels, here.labels)
    torch.testing.assert_close(said.log_p.double(), here.log_p, atol=1e-5, rtol=1e-5)
    context: Any = SimpleNamespace(results={})
    stage = trustworthy(there, kept, Rescale(), fit=True, side="kept", bins=10)
    found = stage.function(context)
    assert found["c"] > 1 and found["ece"] < found["ece_before"]  # random weights are never right, and sure
    assert found["mass"] == pytest.approx(float(here.log_p.exp().sum(-1).mean()), abs=1e-5)
    assert context.results["c"] == found["c"]
    given = trustworthy(there, kept, Rescale(c=0.4), fit=False, side="kept", bins=10).function(context)
    assert given["c"] == 0.4 and given["curve"] == []


def test_a_teacher_behind_an_endpoint_cannot_be_fine_tuned(world):
    with pytest.raises(ConfigError, match="teacher_epochs"):
        next(tuned(task(world, None), 1.0))


def test_a_student_descends_to_the_rescaled_teacher():
    """Fifty steps on one batch bring a student's five to the re-scaled teacher's, not to the teacher's own."""
    from stillhouse.objectives.cached import CachedTokenMatch
    from stillhouse.objectives.language import head_of
    from stillhouse.teachers.scorer import GIVEN, given_teacher

    student, rows = Observed(model(1)), torch.randint(77, (4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": rows, GIVEN: Says("", "", k=5).score(rows)}
    divergence = ConcentratedKL(kept=5, rescale=Rescale(c=3.0), side="bucket")
    term = CachedTokenMatch(head_of(student), given_teacher(), divergence)
    optimizer = torch.optim.Adam(student.module.parameters(), lr=1e-2)
    losses = []
    for step in range(80):
        optimizer.zero_grad()
        loss = term(batch, Progress(step, 80))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]
    with torch.no_grad():
        log_q = student.module(input_ids=rows).logits[:, :-1].log_softmax(-1)
    q = log_q.gather(-1, batch[GIVEN]["tokens"]).exp()
    told = compared(batch[GIVEN]["log_p"].double(), batch[GIVEN]["log_rest"], side="bucket")
    towards = (q - Rescale(c=3.0)(told)[..., :5].exp()).abs().mean()
    assert towards < 0.3 * (q - batch[GIVEN]["log_p"].exp()).abs().mean()
