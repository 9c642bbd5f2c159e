"""The family of divergences on mixed-policy text: GKD, MiniLLM, SeqKD, DistiLLM, f-DISTILL; whose text, which loss."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stillhouse import Observed
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import Coder, pack_rows, response_tokens
from stillhouse.data.sources import Batches
from stillhouse.losses.divergences import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from stillhouse.losses.policy_gradient import later_in_row
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.objectives.sequence_divergence import SequenceReverseKL
from stillhouse.rl.policies import AdaptiveReplay, PolicySource, ReusedText, Share, prompts_of, rows_of
from stillhouse.rl.sampling import LiveSampler, Response
from stillhouse.systems import get_system

P, Q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.3, 0.4, 0.3]]).log()


def tiny(vocab: int, seed: int, *, end: int = 0) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.8,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return new_causal_lm(config, seed=seed)


@pytest.fixture(scope="module")
def coder() -> Coder:
    return Coder(train_bpe(["abcde"], vocab_size=257))


# -- the sequences' reverse KL --------------------------------------------------------------------------------------


def expected_gradient(student: Any, objective: SequenceReverseKL, sequences: list[list[int]]) -> torch.Tensor:
    """Of the sum over tokens, over all responses of the student, by enumeration."""
    parameters = list(student.parameters())
    expected = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for ids in sequences:
        batch = pack_rows([([1], ids)], 0)
        with torch.no_grad():
            logits = student(input_ids=batch["input_ids"]).logits[0, :-1].double().log_softmax(-1)
            weight = logits.gather(1, batch["input_ids"][0, 1:, None]).sum().exp()
        loss = objective(batch) * len(ids)
        gradients = torch.autograd.grad(loss, parameters)
        expected += weight * torch.cat([g.flatten() for g in gradients]).double()
    return expected


def exact_gradient(student: Any, teacher: Any, sequences: list[list[int]]) -> torch.Tensor:
    ids = torch.tensor([[1, *ids] for ids in sequences])
    with torch.no_grad():
        log_p = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))
    log_q = student(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))
    kl = (log_q.exp() * (log_q - log_p)).sum()
    gradients = torch.autograd.grad(kl, list(student.parameters()))
    return torch.cat([g.flatten() for g in gradients]).double()


def test_minillm_s_gradient_is_that_of_the_sequences_reverse_kl():
    student, teacher = tiny(3, 2), tiny(3, 3)
    sequences = [list(ids) for ids in itertools.product(range(3), repeat=3)]
    exact = exact_gradient(student, teacher, sequences)
    heads = head_of(Observed(student)), head_of(Observed(teacher, frozen=True))
    whole = SequenceReverseKL(*heads, teacher_share=0.0, length_normalised=False)
    torch.testing.assert_close(expected_gradient(student, whole, sequences), exact, rtol=1e-4, atol=1e-5)

    class SingleStep(SequenceReverseKL):
        def compute(self, **inputs: Any) -> Any:
            return super().compute(**inputs)[:1]

    alone = expected_gradient(student, SingleStep(*heads, teacher_share=0.0), sequences)
    assert (alone - exact).norm() > 0.05 * exact.norm()  # the tokens' KLs alone are another gradient


def test_minillm_s_importance_weights():
    """q / ((1 - a) q + a p) for tokens with q = 0.3, p = 0.7 and q = p."""
    student, teacher = tiny(3, 0), tiny(3, 1)
    term = SequenceReverseKL(head_of(Observed(student)), head_of(Observed(teacher, frozen=True)), teacher_share=0.2)
    gain = torch.tensor([0.7 / 0.3, 1.0]).log()
    torch.testing.assert_close(term._weights(gain), torch.tensor([0.3 / (0.8 * 0.3 + 0.2 * 0.7), 1.0]))


def test_what_comes_after_in_the_same_row():
    values, row = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 0, 0, 2, 2])
    later, count = later_in_row(values, row)
    assert later.tolist() == [6.0, 4.0, 0.0, 16.0, 0.0] and count.tolist() == [2, 1, 0, 1, 0]


def noted(student: Any, teacher: Any, batch: dict[str, Any], *, ratio: torch.Tensor | None = None) -> dict[str, Any]:
    """The batch as one that was written when the student found its tokens ``1 / ratio`` times as likely."""
    at = batch["loss_mask"][:, 1:].bool()
    with torch.no_grad():
        both = [model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1) for model in (student, teacher)]
    logp, log_p = (one.gather(2, batch["input_ids"][:, 1:, None]) for one in both)
    old = logp[..., 0][at] - (0.0 if ratio is None else ratio.log())
    return {**batch, "old_logp": old, "gain": log_p[..., 0][at] - old}


def gradients(term: SequenceReverseKL, batch: dict[str, Any], student: Any, *, part: str = "Long") -> torch.Tensor:
    values = {one.name: one.value for one in term.evaluate(Turn(term.signals()), batch, Progress(0, 10))}
    found = torch.autograd.grad(values[part], list(student.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(0) if g is None else g.flatten() for g in found])


def test_text_that_was_just_written_needs_no_notes():
    student, teacher = tiny(3, 2), tiny(3, 3)
    heads = head_of(Observed(student)), head_of(Observed(teacher, frozen=True))
    term, batch = SequenceReverseKL(*heads), pack_rows([([1], [2, 0, 2]), ([1], [1, 1, 2, 0])], 0)
    for part in ("Long", "SingleStep"):
        plain = gradients(term, batch, student, part=part)
        torch.testing.assert_close(gradients(term, noted(student, teacher, batch), student, part=part), plain)
    assert plain.norm() > 0


def test_the_clip_stops_what_has_gone_far_enough():
    """A token twice as likely as it was moves nothing where the reward wants it likelier yet, and does where not; the
    other way round where it is half as likely. Without a clip it always moves, by rho."""
    student, teacher = tiny(3, 2), tiny(3, 3)
    heads = head_of(Observed(student)), head_of(Observed(teacher, frozen=True))
    clipped, free = SequenceReverseKL(*heads, clip=0.2), SequenceReverseKL(*heads, clip=None)
    batch = pack_rows([([1], [2, 0])], 0)  # the second token has nothing after it: its R is 0
    for gain in (0.7, -0.7):
        for ratio in (2.0, 0.5):
            old = noted(student, teacher, batch, ratio=torch.full((2,), ratio))
            old["gain"] = torch.tensor([0.3, gain])  # R of the first token
            there = gradients(free, old, student)
            assert there.norm() > 0
            still = (gain > 0) == (ratio > 1)
            expected = torch.zeros_like(there) if still else there
            torch.testing.assert_close(gradients(clipped, old, student), expected)
            once = {**old, "old_logp": old["old_logp"] + torch.tensor(ratio).log()}
            torch.testing.assert_close(there, ratio * gradients(free, once, student))


# -- whose text -----------------------------------------------------------------------------------------------------


class Echo:
    """Writes its seed's last digit, and remembers the prompts."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def write(self, prompts: Any, *, seed: int) -> list[Response]:
        self.seen.append([list(prompt) for prompt in prompts])
        return [Response((seed % 10, 0), "", True) for _ in prompts]


class Windows:
    """Rows of six tokens, each its own number."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(index)[:, None] * 10 + torch.arange(6)}


def source(chooser: Any, writer: Any, **options: Any) -> PolicySource:
    batches = Batches(Windows(), 2, gather=True, seed=3)
    return PolicySource(batches, writer, chooser, **{"pad": 0, "prompt": 4, "steps": 20, **options})


def test_without_own_text_batches_are_the_data_s():
    mixed, plain = source(Share(0.0), Echo()), Batches(Windows(), 2, gather=True, seed=3)
    for _ in range(6):
        batch = next(mixed)
        assert torch.equal(batch["input_ids"], next(plain)["input_ids"])
        assert batch["own"].tolist() == [0, 0] and batch["given"].tolist() == [1, 1] and "loss_mask" not in batch


def test_own_text_goes_on_from_the_data_s_prompts():
    writer = Echo()
    batch, plain = next(source(Share(1.0), writer)), next(Batches(Windows(), 2, gather=True, seed=3))["input_ids"]
    assert writer.seen == [plain[:, :4].tolist()]
    assert torch.equal(batch["input_ids"][:, :4], plain[:, :4]) and batch["own"].tolist() == [1, 1]
    assert batch["loss_mask"].tolist() == [[0, 0, 0, 0, 1, 1]] * 2


def test_the_share_of_own_text():
    mixed = source(Share(0.3), Echo())
    own = sum(float(next(mixed)["own"][0]) for _ in range(400)) / 400
    assert abs(own - 0.3) < 0.08


def test_prompts_of_conversations_end_where_the_response_begins():
    batch = pack_rows([([1, 2, 3], [4]), ([5], [6, 7, 8, 9])], 0)
    assert prompts_of(batch, 99) == [[1, 2, 3], [5]]


def test_processes_take_the_same_turns_but_write_their_own():
    ranks = [source(Share(0.5), Echo()) for _ in range(2)]
    for rank, one in enumerate(ranks):
        one.shard = (rank, 2)
    turns = [[(next(one)["own"][0].item(), one._turn) for _ in range(10)] for one in ranks]
    assert turns[0] == turns[1] and 0 < sum(own for own, _ in turns[0]) < 10
    assert all(len(prompts) == 1 for prompts in ranks[0].writer.seen)


def test_adaptive_replay_follows_the_held_out_loss():
    chooser = AdaptiveReplay(share=0.0, step=0.1, margin=0.1)
    for loss in (3.0, 2.0, 2.05, 2.2):  # it fell, rose by less than the margin, and rose by more
        chooser.observe(loss)
    assert chooser.share == pytest.approx(0.1)
    chooser.share = 0.5
    table = {
        (0.6, 0.0, True): "data",
        (0.4, 0.0, True): "write",
        (0.4, 0.5, True): "replay",
        (0.4, 0.5, False): "write",
    }
    for (draw, done, full), choice in table.items():
        assert chooser.choose(draw, done, full=full) == choice


def test_what_is_replayed_was_written_before():
    writer = Echo()
    replaying = source(AdaptiveReplay(share=1.0), writer, capacity=4, steps=1)
    written = [next(replaying)["input_ids"].tolist() for _ in range(2)]
    replaying._turn = 1  # the run is over: nothing new is written
    again = next(replaying)["input_ids"].tolist()
    assert len(writer.seen) == 2 and all(row in written[0] + written[1] for row in again)


def test_a_resumed_source_goes_on_with_the_same_batches():
    def make() -> PolicySource:
        losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0] * 9)
        watch = losses.__next__
        beside = Batches(Windows(), 2, gather=True, seed=9)
        chooser = AdaptiveReplay(share=0.4)
        return source(chooser, Echo(), capacity=4, watch=watch, watch_every=3, beside=beside)

    whole, first = make(), make()
    for _ in range(6):
        next(whole), next(first)
    later = make()
    for _ in range(2):
        later.watch()  # as many as had been asked
    later.load_state_dict(first.state_dict())
    for _ in range(10):
        one, two = next(whole), next(later)
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert torch.equal(one["text"]["input_ids"], two["text"]["input_ids"])


def in_rounds(writer: Any, *, batches: int = 3, times: int = 2, beside: Any = None) -> ReusedText:
    """A round's note of a token: its row's first token and its own."""

    def note(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        _, label, row = response_tokens(batch)
        return {"seen": batch["input_ids"][row, 0] * 100 + label}

    inner = source(Share(1.0), writer)
    return ReusedText(inner, note, batches=batches, times=times, beside=beside, seed=3)


def test_a_round_is_used_so_many_times_and_no_token_loses_its_note():
    writer = Echo()
    text = in_rounds(writer)
    for start in (3, 6):
        passes = []
        for _ in range(2):
            batches = [next(text) for _ in range(3)]
            assert len(writer.seen) == start  # written at once, before any of it is used
            for batch in batches:
                _, label, row = response_tokens(batch)
                assert torch.equal(batch["seen"], batch["input_ids"][row, 0] * 100 + label)
                assert batch["own"].tolist() == [1, 1] and batch["given"].tolist() == [0, 0]
            passes.append([batch["input_ids"].tolist() for batch in batches])
        one, two = (sorted(row for batch in found for row in batch) for found in passes)
        assert one == two and len({tuple(row) for row in one}) == 6 and passes[0] != passes[1]


def test_a_resumed_round_goes_on_with_the_same_rows_and_notes():
    def make() -> ReusedText:
        return in_rounds(Echo(), beside=Batches(Windows(), 2, gather=True, seed=9))

    whole, first = make(), make()
    for _ in range(4):
        next(whole), next(first)
    later = make()
    later.load_state_dict(first.state_dict())
    for _ in range(10):
        one, two = next(whole), next(later)
        assert torch.equal(one["input_ids"], two["input_ids"]) and torch.equal(one["seen"], two["seen"])
        assert torch.equal(one["text"]["input_ids"], two["text"]["input_ids"])


def test_rows_come_back_out_of_a_batch():
    rows = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), ([2, 2], [])]
    assert rows_of(pack_rows(rows, 0)) == rows


# -- who draws the tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_with_the_whole_share_the_teacher_writes(coder, temperature):
    student, teacher = tiny(257, 0, end=coder.end), tiny(257, 1, end=coder.end)
    prompts = [coder.prompt("abc"), coder.prompt("e")]
    options = {"temperature": temperature}
    alone = LiveSampler(teacher, coder, 8, **options).write(prompts, seed=5)
    mixed = LiveSampler(student, coder, 8, teacher=teacher, teacher_share=1.0, **options).write(prompts, seed=5)
    own = LiveSampler(student, coder, 8, teacher=teacher, teacher_share=0.0, **options).write(prompts, seed=5)
    assert mixed == alone != own
    assert own == LiveSampler(student, coder, 8, **options).write(prompts, seed=5)


def test_tokens_are_drawn_from_the_mixture(coder):
    student, teacher = tiny(257, 0, end=coder.end).eval(), tiny(257, 1, end=coder.end).eval()
    prompt = coder.prompt("ab")
    with torch.no_grad():
        q, p = (model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1) for model in (student, teacher))
    sampler = LiveSampler(student, coder, 1, teacher=teacher, teacher_share=0.3)
    written = sampler.write([prompt] * 4000, seed=0)
    found = torch.bincount(torch.tensor([one.ids[0] for one in written]), minlength=257) / 4000
    expected = 0.7 * q + 0.3 * p
    assert (found - expected).abs().max() < 4 * (expected.max() / 4000).sqrt()
    assert (found - q).abs().max() > 4 * (q.max() / 4000).sqrt()


def test_what_the_teacher_does_not_accept_it_draws_anew(coder):
    """The law of speculative KD, against drawing, rejecting and drawing again; with all accepted, the student's own."""
    student, teacher = tiny(257, 0, end=coder.end).eval(), tiny(257, 1, end=coder.end).eval()
    prompt = coder.prompt("ab")
    with torch.no_grad():
        q, p = (model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1) for model in (student, teacher))
    written = LiveSampler(student, coder, 1, teacher=teacher, accept=150).write([prompt] * 8000, seed=0)
    found = torch.bincount(torch.tensor([one.ids[0] for one in written]), minlength=257) / 8000
    generator, likeliest = torch.Generator().manual_seed(1), set(p.topk(150).indices.tolist())
    draws, again = (torch.multinomial(one, 80000, replacement=True, generator=generator) for one in (q, p))
    kept = torch.tensor([token in likeliest for token in draws.tolist()])
    expected = torch.bincount(draws.where(kept, again), minlength=257) / 80000
    assert (found - expected).abs().sum() < 0.2
    assert min((found - other).abs().sum() for other in (p, q)) > 0.4
    whole = LiveSampler(student, coder, 8, teacher=teacher, accept=257).write([prompt, coder.prompt("e")], seed=5)
    assert whole == LiveSampler(student, coder, 8).write([prompt, coder.prompt("e")], seed=5)


def test_beam_search_finds_likelier_text_than_the_greedy_one(coder):
    model = tiny(257, 2, end=coder.end).eval()
    prompts = [coder.prompt(text) for text in ("a", "bc", "dd", "e", "cab")]

    def likelihood(responses: list[Response]) -> torch.Tensor:
        found = []
        for prompt, one in zip(prompts, responses, strict=True):
            ids = torch.tensor([[*prompt, *one.ids]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(log_p.gather(1, torch.tensor(one.ids)[:, None]).sum())
        return torch.stack(found)

    greedy = likelihood(LiveSampler(model, coder, 6, temperature=0.0).write(prompts, seed=0))
    beams = likelihood(LiveSampler(model, coder, 6, beams=8).write(prompts, seed=0))
    assert (beams >= greedy - 1e-5).all() and (beams > greedy + 1e-3).any()


# -- which loss -----------------------------------------------------------------------------------------------------


def test_the_card_s_values():
    for divergence, value in [
        (ForwardKL(), 0.34462),
        (ReverseKL(), 0.35265),
        (JensenShannon(beta=0.5), 0.08429),
        (SkewedForwardKL(alpha=0.1), 0.27416),
        (SkewedReverseKL(alpha=0.1), 0.27748),
    ]:
        assert divergence(Q, P).item() == pytest.approx(value, abs=1e-5)


def test_the_two_sides_of_f_distill_are_the_jensen_shannon_divergence():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    sides = [divergence(alpha=0.5)(student, teacher) for divergence in (SkewedForwardKL, SkewedReverseKL)]
    torch.testing.assert_close(0.5 * sides[0] + 0.5 * sides[1], JensenShannon(beta=0.5)(student, teacher))


class FakeTask:
    vocab_size = 257

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def observed_teacher(self) -> Observed:
        return Observed(self.teacher, frozen=True)


def value(name: str, batch: Any, **fields: Any) -> float:
    student, teacher = tiny(257, 0), tiny(257, 1)
    system = get_system(name).make(teacher="x", data="y", **fields)
    objective = system.objective(SimpleNamespace(task=FakeTask(teacher), kept=None), Observed(student))
    values = objective.evaluate(Turn(objective.signals()), batch, Progress(0, 10))
    return sum(float(one.weighted.detach()) for one in values)


def rows(own: float) -> dict[str, Any]:
    batch = pack_rows([([65, 66], [67, 68, 69]), ([70], [71, 72])], 0)
    return {**batch, "own": torch.full((2,), own), "given": torch.full((2,), 1 - own)}


def test_each_side_s_text_gets_its_own_divergence():
    given, own = rows(0.0), rows(1.0)
    assert value("f-distill", given) == pytest.approx(value("gkd", given, divergence="skew-forward", skew=0.5))
    assert value("f-distill", own) == pytest.approx(value("gkd", own, divergence="skew-reverse", skew=0.5))
    assert value("f-distill", own) != pytest.approx(value("f-distill", given), rel=1e-3)


def test_members_are_configurations_of_one_family():
    batch = rows(1.0)
    assert value("distillm", batch) == pytest.approx(value("gkd", batch, divergence="skew-reverse", skew=0.1))
    assert value("gkd", batch) == pytest.approx(value("distillm", batch, divergence="jsd", beta=0.5))
    torch.manual_seed(0)
    student, teacher = tiny(257, 0), tiny(257, 1)
    kd = TokenMatch(head_of(Observed(student)), head_of(Observed(teacher, frozen=True)), ForwardKL())
    assert value("gkd", batch, divergence="forward-kl") == pytest.approx(float(kd(batch).detach()))
    labels = student(input_ids=batch["input_ids"]).logits[:, :-1][batch["loss_mask"][:, 1:].bool()]
    expected = torch.nn.functional.cross_entropy(labels, batch["input_ids"][:, 1:][batch["loss_mask"][:, 1:].bool()])
    assert value("seqkd", batch) == pytest.approx(float(expected), rel=1e-5)


def test_todi_is_a_member_s_divergence():
    """In value it is the sum of both KLs (Jung et al., 2025, arXiv 2505.16297), softened as they are."""
    batch, softer = rows(1.0), {"temperature": 1.5}
    both = sum(value("gkd", batch, divergence=one, **softer) for one in ("forward-kl", "reverse-kl"))
    assert value("gkd", batch, divergence="todi", **softer) == pytest.approx(both, rel=1e-5)


def test_without_own_text_there_is_one_divergence():
    """f-distill's own configuration for the data's text keeps its default for the student's, and does not need it."""
    system = get_system("f-distill").make(divergence="forward-kl", on_policy=0.0)
    student, teacher = tiny(20, 0), tiny(20, 1)
    policies = SimpleNamespace(
        kept=None,
        whole=False,
        task=SimpleNamespace(
            observed_teacher=lambda: Observed(teacher, frozen=True), vocab_size=student.config.vocab_size
        ),
    )
    batch = {"input_ids": torch.arange(8)[None] % student.config.vocab_size}
    found = system.objective(policies, Observed(student))(batch).item()
    with torch.no_grad():
        p, q = (model(**batch).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
