"""AlignDistil (card 175): its theorem on a bandit, the card's numbers, the fused pass, the masks, the data."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Turn
from stillhouse.core.run import Run
from stillhouse.core.schedule import Progress
from stillhouse.core.stage import Context
from stillhouse.data.preferences import Scored, chain_score, ranked, read_preferences
from stillhouse.data.reasoning import ArithmeticChain
from stillhouse.data.responses import Coder, pack_rows
from stillhouse.losses.extrapolation import Extrapolation, linear_extrapolated_kl
from stillhouse.losses.linear_divergence import OutputLayer
from stillhouse.models.symbol_tokenizer import symbol_tokenizer
from stillhouse.objectives import LanguageHead
from stillhouse.objectives.alignment import ExtrapolatedTeacher, SequenceReward
from stillhouse.rl.sampling import Response
from stillhouse.systems import get_system
from stillhouse.tasks.preferences import NoisyCorpus, PreferenceTask

V, DOUBLE = 8, torch.float64


def logs(*p: float) -> Tensor:
    return torch.tensor([p], dtype=DOUBLE).log()


def distributions(seed: int, count: int, size: int = V) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * 1.5


# -- the theorem ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.03, 0.1, 0.4])
def test_rlhf_with_a_dpo_reward_is_this_distillation(beta):
    """One token: J = E[beta0 log(dpo/ref)] - beta KL(pi || ref) has the gradient of -beta KL(pi || pi*), and peaks
    where pi* is the softmax of (beta0/beta) z_dpo + (1 - beta0/beta) z_ref."""
    beta0 = 0.1
    z, dpo, ref = distributions(0, 3)
    z = z.clone().requires_grad_()
    log_dpo, log_ref = dpo.log_softmax(-1), ref.log_softmax(-1)
    log_pi = z.log_softmax(-1)
    pi = log_pi.exp()
    objective = (pi * beta0 * (log_dpo - log_ref)).sum() - beta * (pi * (log_pi - log_ref)).sum()
    (expected,) = torch.autograd.grad(objective, z, retain_graph=True)
    how = Extrapolation(fixed=beta0 / beta, beta0=beta0, origin="minus")
    loss = fused(z[None], dpo[None], ref[None], how).loss
    (found,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(-found, expected, rtol=0, atol=1e-10)
    best, _ = how.teacher(log_dpo[None], log_ref[None])
    mixed = (beta0 / beta) * dpo + (1 - beta0 / beta) * ref
    torch.testing.assert_close(best[0].exp(), mixed.softmax(-1))
    value = lambda p: float((p * (beta0 * (log_dpo - log_ref) - beta * (p.log() - log_ref))).sum())  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = (best[0] + 0.1 * torch.randn(V, generator=generator, dtype=DOUBLE)).softmax(-1)
        assert value(other) < value(best[0].exp())


def test_of_two_tokens_the_dropped_normaliser_makes_a_gap():
    """The true optimum weighs first tokens by the normaliser that follows them; token-wise teachers do not."""
    beta0, beta, size = 0.1, 0.05, 4
    first = distributions(2, 2, size).log_softmax(-1)
    second = distributions(3, 2 * size, size).view(2, size, size).log_softmax(-1)
    (dpo1, ref1), (dpo2, ref2) = first, second
    ratio = beta0 / beta
    joint = ref1[:, None] + ref2 + ratio * (dpo1[:, None] - ref1[:, None] + dpo2 - ref2)
    optimum = joint.flatten().softmax(0).view(size, size)
    token1, token2 = ((ratio * dpo + (1 - ratio) * ref).softmax(-1) for dpo, ref in ((dpo1, ref1), (dpo2, ref2)))
    torch.testing.assert_close(optimum / optimum.sum(1, keepdim=True), token2)  # the last token: exact
    assert (optimum.sum(1) - token1).abs().max() > 0.01  # an earlier one: not
    normaliser = (ratio * dpo2 + (1 - ratio) * ref2).logsumexp(-1)
    torch.testing.assert_close(optimum.sum(1), (token1.log() + normaliser).softmax(0))  # and this is all of the gap


# -- the teacher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "alpha", "teacher", "beta"),
    [(1.0, 0.401, [0.72563, 0.23354, 0.04083], 0.24938), (5.0, 2.001, [0.94676, 0.05254, 0.00070], 0.04998)],
)
def test_the_card_s_numbers(ratio, alpha, teacher, beta):
    how = Extrapolation(ratio=ratio, beta0=0.1)
    log_star, tvd = how.teacher(logs(0.6, 0.3, 0.1), logs(0.2, 0.3, 0.5))
    assert tvd.item() == pytest.approx(0.4)
    assert how.alpha(tvd).item() == pytest.approx(alpha)
    assert log_star.exp()[0].tolist() == pytest.approx(teacher, abs=6e-6)
    assert how.beta(how.alpha(tvd)).item() == pytest.approx(beta, abs=6e-6)


def test_the_theorem_s_form():
    dpo, ref = logs(0.6, 0.3, 0.1), logs(0.2, 0.3, 0.5)
    expected = {0.5: [0.39816, 0.34482, 0.25701], 0.0: [0.2, 0.3, 0.5], 1.0: [0.6, 0.3, 0.1]}
    for weight, teacher in expected.items():
        found = Extrapolation(fixed=weight, origin="minus").teacher(dpo, ref)[0]
        assert found.exp()[0].tolist() == pytest.approx(teacher, abs=6e-6)


def test_models_that_agree():
    """alpha = 0.001, teacher = the DPO model, pull 100; nothing to learn for a policy that is there."""
    how, z = Extrapolation(), distributions(0, 1)
    found = fused(z, z + 3.0, z, how)
    assert found.alpha.item() == pytest.approx(1e-3)
    assert how.beta(found.alpha).item() == pytest.approx(100.0)
    assert found.loss.item() == pytest.approx(0.0, abs=1e-10)
    torch.testing.assert_close(how.teacher(z.log_softmax(-1), z.log_softmax(-1))[0], z.log_softmax(-1))


def test_the_knobs():
    tvd = torch.tensor([0.0, 0.1, 0.4])
    assert Extrapolation(ratio=10.0, cap=2.0).alpha(tvd).tolist() == pytest.approx([0.001, 1.001, 2.0])
    assert Extrapolation(ratio=10.0, halved=False).alpha(tvd).tolist() == pytest.approx([0.001, 2.001, 8.001])
    assert Extrapolation(fixed=2.0).alpha(tvd).tolist() == [2.0, 2.0, 2.0]
    assert Extrapolation(strength=0.5).beta(tvd + 1).tolist() == [0.5] * 3


# -- the fused pass -------------------------------------------------------------------------------------------------


def layer(size: int = V) -> OutputLayer:
    return OutputLayer(torch.eye(size, dtype=DOUBLE), None, 1.0, None, size)


def fused(z: Tensor, plus: Tensor, minus: Tensor, how: Extrapolation, **options: Any) -> Any:
    size = z.shape[-1]
    return linear_extrapolated_kl(z, layer(size), plus, layer(size), minus, layer(size), how=how, **options)


@pytest.mark.parametrize("origin", ["plus", "minus"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_the_pass_equals_full_logits(origin, chunk):
    """Value and gradients in the hidden states, the matrix and the bias, with soft cap and scale, chunk by chunk."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)  # noqa: E731
    how, weight_N = Extrapolation(ratio=4.0, origin=origin), torch.rand(11, generator=generator, dtype=DOUBLE) + 0.1
    parts = [(draw(11, 5), draw(V + pad, 5), draw(V + pad)) for pad in (0, 3, 1)]  # paddings differ
    layers = [OutputLayer(w, b, 0.7, 5.0, len(w)) for _, w, b in parts]
    for tensor in parts[0]:
        tensor.requires_grad_()
    sides = [side for (hidden, *_), head in zip(parts, layers, strict=True) for side in (hidden, head)]
    found = linear_extrapolated_kl(*sides, how=how, weight_N=weight_N, chunk_tokens=chunk)
    logits = [5.0 * torch.tanh(0.7 * (h @ w.T + b)[:, :V] / 5.0) for h, w, b in parts]
    p, r = (one.softmax(-1) for one in logits[1:])
    tvd = 0.5 * (p - r).abs().sum(-1)
    alpha = 4.0 * tvd + 1e-3
    start = logits[1] if origin == "plus" else logits[2]
    star = (start + alpha[:, None] * (logits[1] - logits[2])).detach().log_softmax(-1)
    log_q = logits[0].log_softmax(-1)
    expected = (weight_N * 0.1 / alpha * (log_q.exp() * (log_q - star)).sum(-1)).sum()
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.alpha, alpha)
    torch.testing.assert_close(found.tvd, tvd)
    for one, other in zip(
        torch.autograd.grad(found.loss, parts[0]), torch.autograd.grad(expected, parts[0]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_constants_on_the_logits_change_nothing():
    z, plus, minus = (distributions(seed, 6) for seed in range(3))
    shift = torch.randn(3, 6, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) * 5
    one = fused(z, plus, minus, Extrapolation()).loss
    torch.testing.assert_close(one, fused(z + shift[0], plus + shift[1], minus + shift[2], Extrapolation()).loss)


# -- the objective --------------------------------------------------------------------------------------------------


class TableModel(nn.Module):
    """A language model whose logits after a token are a row of a table."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(distributions(seed, V), freeze=False)
        self.head = nn.Linear(V, V, bias=False, dtype=DOUBLE)
        self.head.weight = nn.Parameter(torch.eye(V, dtype=DOUBLE), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def heads(policy: TableModel) -> list[LanguageHead]:
    models = [Observed(policy), Observed(TableModel(1), frozen=True), Observed(TableModel(2), frozen=True)]
    return [LanguageHead(model.tap("head", of="input"), model.parameter("head.weight")) for model in models]


ROWS = [([1, 2], [3, 4, 0]), ([5], [6, 0]), ([1, 3, 5], [2, 2, 6, 7, 0])]


def token_loss(state: int, ratio: float = 3.0) -> float:
    q, p, r = (TableModel(seed).embed.weight.detach()[state].log_softmax(-1) for seed in (0, 1, 2))
    alpha = ratio * 0.5 * float((p.exp() - r.exp()).abs().sum()) + 1e-3
    star = (p + alpha * (p - r)).log_softmax(-1)
    return 0.1 / alpha * float((q.exp() * (q - star)).sum())


def test_the_objective_against_a_loop():
    """Mean over responses of the mean over their tokens; each is judged in the state before it."""
    expected = 0.0
    for prompt, response in ROWS:
        states = [prompt[-1], *response[:-1]]
        expected += sum(map(token_loss, states)) / len(states) / len(ROWS)
    policy = TableModel(0)
    term = ExtrapolatedTeacher(*heads(policy), Extrapolation(ratio=3.0))
    batch = pack_rows(ROWS, 0)
    assert term(batch, 0.0).item() == pytest.approx(expected)
    longer = pack_rows([*ROWS, ([1] * 9, [2])], 0)
    padded = {name: tensor[:3] for name, tensor in longer.items()}
    assert term(padded, 0.0).item() == pytest.approx(expected)
    turned = {name: tensor[[2, 0, 1]] for name, tensor in batch.items()}
    assert term(turned, 0.0).item() == pytest.approx(expected)
    other_prompt = pack_rows([([7, *prompt], response) for prompt, response in ROWS], 0)
    assert term(other_prompt, 0.0).item() == pytest.approx(expected)


def test_the_code_s_mask_moves_by_one():
    """Off-policy the authors' code judges at the places of all the response's tokens, each of which predicts the next:
    the first prediction is left out, and what would follow the end counts. Other rows and padding change nothing."""
    term = ExtrapolatedTeacher(*heads(TableModel(0)), Extrapolation(ratio=3.0), shifted=False)
    alone = [sum(map(token_loss, response)) / len(response) for _, response in ROWS]
    assert term(pack_rows(ROWS, 0), 0.0).item() == pytest.approx(sum(alone) / len(ROWS))
    for row, expected in zip(ROWS, alone, strict=True):
        beside = pack_rows([row, ([1] * 9, [2])], 0)
        padded = {name: tensor[:1] for name, tensor in beside.items()}
        for one in (pack_rows([row], 0), padded):
            assert term(one, 0.0).item() == pytest.approx(expected)


def test_an_empty_response_contributes_nothing():
    policy = TableModel(0)
    term = ExtrapolatedTeacher(*heads(policy), Extrapolation(ratio=3.0))
    with_empty = pack_rows([*ROWS, ([4, 2], [])], 0)
    assert term(with_empty, 0.0).item() == pytest.approx(term(pack_rows(ROWS, 0), 0.0).item() * 3 / 4)
    nothing = term(pack_rows([([4, 2], [])], 0), 0.0)
    nothing.backward()
    assert nothing.item() == 0 and policy.embed.weight.grad.abs().max() == 0


def test_gradients_reach_the_policy_alone():
    policy = TableModel(0)
    found = heads(policy)
    ExtrapolatedTeacher(*found, Extrapolation())(pack_rows(ROWS, 0), 0.0).backward()
    assert policy.embed.weight.grad.abs().sum() > 0
    for head in found[1:]:
        assert head.hidden.observed.module.embed.weight.grad is None


def test_training_on_it_ends_at_the_teacher():
    """Gradient descent on the table finds softmax(z_dpo + alpha (z_dpo - z_rev)) in the states that are visited."""
    policy = TableModel(0)
    how = Extrapolation(ratio=1.0)
    term = ExtrapolatedTeacher(*heads(policy), how)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    batch = pack_rows(ROWS, 0)
    for _ in range(400):
        optimizer.zero_grad()
        term(batch, 0.0).backward()
        optimizer.step()
    plus, minus = (TableModel(seed).embed.weight.detach().log_softmax(-1) for seed in (1, 2))
    star, _ = how.teacher(plus, minus)
    states = [2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(policy.embed.weight.detach().softmax(-1)[states], star.exp()[states], atol=2e-3, rtol=0)


def test_the_ablation_with_one_reward_a_response():
    """-(R - mean) log pi / |y| with R = beta0 sum log(plus/minus), and the KL to the DPO model."""
    with pytest.raises(ValueError, match="fixed alpha"):
        SequenceReward(*heads(TableModel(0)), Extrapolation())
    term = SequenceReward(*heads(TableModel(0)), Extrapolation(fixed=2.0))
    values = term.evaluate(Turn(term.signals()), pack_rows(ROWS, 0), Progress(0, 1))
    q, p, r = (TableModel(seed).embed.weight.detach().log_softmax(-1) for seed in (0, 1, 2))
    rewards, logps, kls = [], [], []
    for prompt, response in ROWS:
        steps = list(zip([prompt[-1], *response[:-1]], response, strict=True))
        rewards.append(0.1 * sum(float(p[s, t] - r[s, t]) for s, t in steps))
        logps.append(sum(float(q[s, t]) for s, t in steps) / len(steps))
        kls.append(sum(float((q[s].exp() * (q[s] - p[s])).sum()) for s, _ in steps) / len(steps))
    mean = sum(rewards) / 3
    expected = -sum((reward - mean) * logp for reward, logp in zip(rewards, logps, strict=True)) / 3
    assert values[0].value.item() == pytest.approx(expected)
    assert values[1].value.item() == pytest.approx(sum(kls) / 3)
    assert values[1].weight == pytest.approx(0.05)


@pytest.mark.parametrize("origin", ["plus", "minus"])
def test_the_ablation_s_reference_is_that_of_the_tokens(origin):
    """Its KL is nothing where the policy is the reference: the DPO model, or with contrast=reference the base model."""
    how = Extrapolation(fixed=2.0, origin=origin)
    kl = {}
    for name, seed in (("plus", 1), ("minus", 2)):
        term = SequenceReward(*heads(TableModel(seed)), how)
        kl[name] = term.evaluate(Turn(term.signals()), pack_rows(ROWS, 0), Progress(0, 1))[1].value.item()
    other = "minus" if origin == "plus" else "plus"
    assert kl[origin] == pytest.approx(0, abs=1e-10) and kl[other] > 0.5


@pytest.mark.parametrize("origin", ["plus", "minus"])
def test_of_one_token_the_ablation_has_the_gradient_of_the_distillation(origin):
    """The theorem: a policy without opinions writes every token equally often, so that each once is the expectation."""
    how, batch, gradients = Extrapolation(fixed=0.4, origin=origin), pack_rows([([1], [v]) for v in range(V)], 0), []
    for kind in (SequenceReward, ExtrapolatedTeacher):
        policy = TableModel(0)
        torch.nn.init.zeros_(policy.embed.weight)
        kind(*heads(policy), how)(batch, 0.0).backward()
        gradients.append(policy.embed.weight.grad)
    assert gradients[0][1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


# -- the pairs ------------------------------------------------------------------------------------------------------


def test_the_true_score():
    puzzle, record = ArithmeticChain(), {"prompt": "3+5+2+6+1="}  # 1, 3, 2, 3
    score = lambda text: chain_score(puzzle, text, record)  # noqa: E731
    assert score("1,3,2,3#3") == 6
    assert score("1,0,2,3#3") == 5
    assert score("1,3,2,4#4") == 3
    assert score("#3") == 2
    assert score("") == 0


def test_pairs_are_ranked_and_a_share_is_turned_round():
    two = [(("a", 1.0), ("b", 2.0)), (("c", 1.0), ("d", 1.0)), (("e", 3.0), ("f", 0.0))]
    scored = [[Scored(*one, cut=one[0] in "bf") for one in pair] for pair in two] * 400
    pairs = ranked(["p"] * 1200, scored, flip=0.1, seed=0)
    assert len(pairs) == 800  # ties are dropped
    assert all((pair.chosen in "be") != pair.mistaken for pair in pairs)
    assert 0.07 < sum(pair.mistaken for pair in pairs) / 800 < 0.13
    assert not any(pair.mistaken for pair in ranked(["p"] * 1200, scored, flip=0.0, seed=0))
    assert all(pair.cut == (pair.chosen in "bf", pair.rejected in "bf") for pair in pairs)


def reasoning_task(folder: Path, system: Any) -> PreferenceTask:
    """Sums for a model whose alphabet they are written in."""
    coder, puzzle = Coder(symbol_tokenizer("0123456789,#+-*=")), ArithmeticChain()
    problems = [{"prompt": "3+5+2+6+1="}, {"prompt": "1+1+1+1+1="}, {"prompt": "2+2+2+2+2="}]
    return PreferenceTask(system, Run(folder, quiet=True), coder, "", problems, [], puzzle, puzzle)


def test_a_response_that_was_cut_has_no_end(tmp_path, monkeypatch):
    """The model wrote none: it must not learn to stop there, nor be told that stopping there is bad."""
    system = get_system("aligndistil").make(max_new_tokens=9)
    task = reasoning_task(tmp_path, system)
    said = (
        [("1,3,2,3#3", True), ("1,3,2,0,0,", False)],
        [("2,3,4,5#5", True), ("0#0", True)],
        [("4,6", False), ("0", False)],
    )

    class Stub:
        def sample(self, prompts: Any, *, n: int, seed: int) -> list[list[Response]]:
            return [[Response((), text, finished) for text, finished in two] for two in said]

    monkeypatch.setattr(task, "load", lambda where: None)
    monkeypatch.setattr(task, "sampler", lambda model: Stub())
    writing = task._sampled(system)
    stage = next(writing)
    stage.execute(Context(task.run, tmp_path / "pairs", "pairs", seed=0))
    with pytest.raises(StopIteration) as done:
        writing.send(Artifact(tmp_path / "pairs" / "artifact", "data"))
    pairs = done.value.value
    assert [(pair.chosen, pair.rejected, pair.cut) for pair in pairs] == [
        ("1,3,2,3#3", "1,3,2,0,0,", (False, True)),
        ("2,3,4,5#5", "0#0", (False, False)),
        ("4,6", "0", (True, True)),
    ]
    end = task.coder.end
    for pair in pairs:
        for swapped in (False, True):
            rows = task._rows(pair, swapped=swapped)
            texts, cut = (pair.chosen, pair.rejected), pair.cut
            if swapped:
                texts, cut = texts[::-1], cut[::-1]
            assert [response[-1] != end for _, response in rows] == list(cut)
            assert [task.coder.text(response) for _, response in rows] == list(texts)
            assert all(end not in response[:-1] for _, response in rows)
    task._split(system, pairs)
    assert len(task.training) + len(task.kept) == 3  # of ten tokens with its end, or without


def test_the_noise_of_the_embedded_corpus():
    puzzle, rng, corpus = ArithmeticChain(), random.Random(0), NoisyCorpus(steps=1, noise=0.3)
    right = total = ends = 0
    for _ in range(500):
        prompt, text = corpus.example(puzzle, rng, set())
        said, _, answer = text.partition("#")
        ends += said.split(",")[-1] == answer
        right += chain_score(puzzle, said, {"prompt": prompt})
        total += 4
    assert ends == 500
    assert right / total == pytest.approx(0.7 + 0.3 / 7, abs=0.03)


def test_files_of_pairs(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    turns = lambda text: [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]  # noqa: E731
    lines = [
        {"prompt": "hi", "chosen": turns("good"), "rejected": turns("bad")},
        {"prompt": "ho", "chosen": "yes", "rejected": "no"},
        {"prompt": "same", "chosen": "x", "rejected": "x"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [(p.prompt, p.chosen, p.rejected) for p in read_preferences(str(file))] == [
        ("hi", "good", "bad"),
        ("ho", "yes", "no"),
    ]
    file.write_text(json.dumps({"prompt": "hi", "chosen": "a", "rejected": 3}))
    with pytest.raises(DataError, match=r"pair 1: 'rejected' must be a text"):
        read_preferences(str(file))
    file.write_text(json.dumps({"prompt": "hi", "rejected": "b"}))
    with pytest.raises(DataError, match="no 'chosen' in it"):
        read_preferences(str(file))


def test_the_paper_s_values_and_bad_ones():
    system = get_system("aligndistil")
    shown = system()
    assert (shown.beta0, shown.ratio, shown.floor, shown.lr, shown.batch_size) == (0.1, 15.0, 1e-3, 1e-6, 128)
    assert math.isclose(shown.final_lr, 0.1) and shown.warmup == 0.1
    with pytest.raises(ConfigError, match="needs alpha"):
        next(iter(system.make(method="sequence").stages(None)))
    with pytest.raises(ConfigError, match="pairs=given needs"):
        next(iter(system.make(pairs="given").stages(None)))
