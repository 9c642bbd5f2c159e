"""ALM (card 124): chunks, their likelihoods, the divergences between them, and what moves to another tokenizer."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.objective import Term
from stillhouse.core.observed import Turn, as_batch
from stillhouse.core.run import Run
from stillhouse.core.schedule import Progress
from stillhouse.data.alignment import (
    Paired,
    PairedConversations,
    PairedWindows,
    Pairing,
    Placed,
    Translator,
    chunks_of,
    kept_within,
    paired_conversations,
)
from stillhouse.data.token_bytes import PairBias, Vocabulary, compositions, nearest_spelling, token_counts
from stillhouse.losses.chunks import (
    ChunkDivergence,
    chunk_sums,
    last_positions,
    likelihoods,
    log1mexp,
    merge_chunks,
    sorted_distance,
)
from stillhouse.losses.divergences import ForwardKL
from stillhouse.losses.token_logprobs import Head
from stillhouse.metrics.cross_tokenizer import Ensemble, begin_alike, compare_across_tokenizers
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.models.tokenizer_transfer import bpe_like, byte_tokenizer, put_embeddings, transplant
from stillhouse.objectives.cross_tokenizer import (
    ChunkHidden,
    ChunkMatch,
    DualSpaceMatch,
    SortedMatch,
    SpellingMatch,
    paired_head,
)
from stillhouse.objectives.gradient_balance import GradientBalance
from stillhouse.objectives.language import TokenCrossEntropy, TokenMatch, head_of
from stillhouse.systems.language.alm import ALM
from stillhouse.tasks.cross_tokenizer import decoder_layers, embeddings_path

TEXT = "the cat sees the other dog, and then the weather is better than that; résumé, naïve — über.\n" * 4
START = Progress(0, 10)


@pytest.fixture(scope="module")
def tokens() -> SimpleNamespace:
    """A teacher's tokenizer, a student's with other merges, and bytes."""
    first = train_bpe([TEXT], vocab_size=300)
    second = bpe_like(first, [TEXT[::-1]], vocab_size=290)
    made = {"first": first, "second": second, "bytes": byte_tokenizer(first)}
    return SimpleNamespace(**made, words={name: Vocabulary(one) for name, one in made.items()})


def model(size: int, seed: int, width: int = 16, **more: Any) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = new_causal_lm(LlamaConfig(vocab_size=size, max_position_embeddings=512, **sizes, **more), seed=seed).eval()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(30)  # opinions
    return made


def windows(tokens: Any, other: str, texts: list[str], **options: Any) -> dict[str, Any]:
    """A paired batch of some texts, each a window."""
    first, second = tokens.words["first"], tokens.words[other]
    rows = [np.array([*ids, tokens.first.eos_token_id]) for ids in first.encode(texts)]
    return Pairing(first, second, **options).batch(Translator(first, second)(rows))


def log_probabilities(network: Any, text: Any) -> Tensor:
    """(B, T) log p(token | before it), from whole logits; 0 for the first."""
    with torch.no_grad():
        log_q = network(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits.log_softmax(-1)
    found = log_q[:, :-1].gather(2, text["input_ids"][:, 1:, None])[..., 0]
    return nn.functional.pad(found, (1, 0))


# -- chunks ---------------------------------------------------------------------------------------------------------


def placed(pieces: list[str]) -> Placed:
    return Placed(np.arange(len(pieces)), np.cumsum([len(piece) for piece in pieces]))


def test_the_card_s_chunks():
    first, second = chunks_of(placed(["a", "bc", "d"]), placed(["ab", "c", "d"]))
    assert (first.tolist(), second.tolist()) == ([0, 0, 1], [0, 0, 1])


def cuts() -> Any:
    return st.lists(st.integers(1, 3), min_size=1, max_size=12)


@given(cuts(), cuts())
@settings(deadline=None)
def test_chunks_are_the_smallest_that_both_cover(one, other):
    """Against the walk along both sequences that the paper describes."""
    expected: tuple[list[int], list[int]] = ([], [])
    i = j = reached_i = reached_j = number = 0
    open_i, open_j = [], []
    while i < len(one) or j < len(other):
        if i < len(one) and (reached_i <= reached_j or j == len(other)):
            reached_i += one[i]
            open_i.append(i)
            i += 1
        else:
            reached_j += other[j]
            open_j.append(j)
            j += 1
        if reached_i == reached_j:
            expected[0].extend([number] * len(open_i))
            expected[1].extend([number] * len(open_j))
            open_i, open_j, number = [], [], number + 1
    found = chunks_of(*(Placed(np.arange(len(cut)), np.cumsum(cut)) for cut in (one, other)))
    for want, have, left in zip(expected, found, (open_i, open_j), strict=True):
        assert have.tolist() == [*want, *[-1] * len(left)]


def test_one_tokenizer_on_both_sides_gives_a_chunk_a_token(tokens):
    batch = windows(tokens, "first", [TEXT])
    assert torch.equal(batch["chunks"], batch["teacher"]["chunks"])
    assert batch["chunks"][0].tolist() == [-1, *range(1, batch["chunks"].shape[1])]  # the first is not predicted


@pytest.mark.parametrize("other", ["second", "bytes"])
def test_chunks_hold_the_same_bytes_on_both_sides(tokens, other):
    batch = windows(tokens, other, [TEXT, "naïve über", "x"])
    seen = 0
    for row in range(3):
        theirs, ours = batch["teacher"]["chunks"][row], batch["chunks"][row]
        assert set(theirs[theirs >= 0].tolist()) == set(ours[ours >= 0].tolist())
        for number in set(ours[ours >= 0].tolist()):
            first = tokens.words["first"].text(batch["teacher"]["input_ids"][row][theirs == number].tolist())
            second = tokens.words[other].text(batch["input_ids"][row][ours == number].tolist())
            assert first == second
            seen += len(first)
    assert seen == int(batch["bytes"].sum()) > len(TEXT.encode()) * 0.9
    assert batch["loss_mask"].equal((batch["chunks"] >= 0).long())


def test_documents_end_together_and_padding_counts_nowhere(tokens):
    batch = windows(tokens, "bytes", ["the cat", "the other dog"])
    ends = [
        (text["input_ids"] == tokens.first.eos_token_id) & (text["attention_mask"] == 1)
        for text in (batch["teacher"], batch)
    ]
    assert [int(end.sum()) for end in ends] == [2, 2]
    assert batch["teacher"]["chunks"][ends[0]].equal(batch["chunks"][ends[1]])
    assert (batch["chunks"][batch["attention_mask"] == 0] == -1).all()


def test_a_window_that_cuts_a_character_leaves_only_that_out(tokens):
    """Windows begin and end anywhere, also within a character."""
    first, byte = tokens.words["first"], tokens.words["bytes"]
    letters = {piece: number for number, piece in enumerate(byte.pieces) if piece and len(piece) == 1}
    ids = np.array([letters[bytes([value])] for value in "éab é".encode()])
    [(ours, theirs)] = Translator(byte, first)([ids[1:-1]])  # half an é at each end
    assert first.text(theirs.ids) == b"ab "
    one, other = chunks_of(ours, theirs)
    assert one.tolist()[0] == -1 and one.tolist()[-1] == -1 and (one >= 0).sum() == 3
    assert set(one[one >= 0]) == set(other[other >= 0])


def test_cut_windows_keep_whole_chunks_only():
    first, second = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
    one, other = kept_within(first, second, (4, 3))  # the last chunk's second token does not fit
    assert (one.tolist(), other.tolist()) == ([-1, 1, 1, -1], [-1, 1, -1])


# -- biases ---------------------------------------------------------------------------------------------------------


def small_bpe(merges: list[tuple[str, str]]) -> Any:
    """A BPE of single letters and some merges, nothing else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    vocabulary = {token: n for n, token in enumerate(["<end>", *sorted(letters), *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_a_token_rules_out_the_longer_ones_it_begins():
    """After ``th`` as a token, ``e`` cannot follow; a byte's model may well write it."""
    first, second = (Vocabulary(small_bpe(merges)) for merges in ([("t", "h"), ("th", "e")], []))
    known = {piece: number for number, piece in enumerate(first.pieces)}
    counts = np.zeros(first.size)
    counts[[known[b"th"], known[b"the"], known[b"x"]]] = 1, 3, 6
    bias = PairBias(first, second, (counts, np.ones(second.size)))
    byte = {piece: number for number, piece in enumerate(second.pieces)}
    assert bias(known[b"th"], byte[b"h"]) == pytest.approx(0.3)
    assert bias(known[b"the"], byte[b"e"]) == 0.0  # nothing longer begins with it
    assert bias(known[b"x"], byte[b"x"]) == 0.0
    assert bias(known[b"t"], byte[b"t"]) == pytest.approx(0.4)  # th and the are both ruled out
    assert bias(known[b" "], byte[b" "]) == 1.0
    assert bias(0, 0) == 0.0  # nothing is written into <end>


def test_a_tokenizer_is_not_biased_against_itself(tokens):
    first = tokens.words["first"]
    bias = PairBias(first, first, (np.ones(first.size), np.ones(first.size)))
    solid = [number for number, piece in enumerate(first.pieces) if piece and piece.strip()]
    assert max(bias(number, number) for number in solid) == 0.0


def test_biased_chunks_go_on_into_the_next(tokens):
    free = windows(tokens, "bytes", [TEXT])
    first, second = tokens.words["first"], tokens.words["bytes"]
    counts = [token_counts(side, side.encode([TEXT])) for side in (first, second)]
    bias = PairBias(first, second, (counts[0], counts[1]))
    bound = windows(tokens, "bytes", [TEXT], unbiased=lambda one, other: bias(one, other) <= 1e-3)
    few, many = (set(batch["chunks"][0].tolist()) - {-1} for batch in (bound, free))
    assert 0 < len(few) < len(many)
    theirs = bound["teacher"]
    for number in few:
        last = int((theirs["chunks"][0] == number).nonzero()[-1])
        ours = int((bound["chunks"][0] == number).nonzero()[-1])
        assert bias(int(theirs["input_ids"][0, last]), int(bound["input_ids"][0, ours])) <= 1e-3


# -- likelihoods ----------------------------------------------------------------------------------------------------


def test_likelihoods_without_whole_logits():
    """A chunk of logits at a time gives what whole logits give, gradients included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (2, 6), generator=generator)
    boundary = torch.tensor([1, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    wanted = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]])
    found = likelihoods(hidden, Head(weight, scale=0.5, softcap=3.0), ids, wanted, boundary, chunk_tokens=2)
    log_q = (3.0 * torch.tanh(0.5 * hidden @ weight.T / 3.0)).log_softmax(-1)
    label = nn.functional.pad(log_q[:, :-1].gather(2, ids[:, 1:, None])[..., 0], (1, 0))
    ends = log_q.exp()[..., boundary].sum(-1).log()
    place = wanted.bool()
    torch.testing.assert_close(found.token[place], label[place])
    torch.testing.assert_close(found.boundary[place], ends[place])
    mine, theirs = (
        torch.autograd.grad((one * place).sum() + 2 * (two * place).sum(), (hidden, weight), retain_graph=True)
        for one, two in ((found.token, found.boundary), (label, ends))
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("other", ["second", "bytes"])
def test_the_chunks_make_up_the_likelihood_of_the_text(tokens, other):
    """Chain rule, on both sides: all chunks, and the one with the first token, are the whole text."""
    batch = windows(tokens, other, [TEXT, "the other dog"])
    for text, name in ((batch["teacher"], "first"), (batch, other)):
        log_q = log_probabilities(model(tokens.words[name].size, 1), text)
        sums = chunk_sums(log_q, text["chunks"], batch["chunks"].shape[1])
        outside = (text["chunks"] < 0) & (text["attention_mask"] == 1)
        whole = (log_q * text["attention_mask"]).sum(1)
        torch.testing.assert_close(sums.sum(1) + (log_q * outside).sum(1), whole)
        assert int(outside.sum()) < 8


def test_sums_and_last_positions():
    chunks = torch.tensor([[-1, 1, 1, 3, -1], [0, 0, 2, -1, -1]])
    values = torch.tensor([[9.0, 1, 2, 4, 9], [1, 2, 3, 9, 9]])
    assert chunk_sums(values, chunks, 5).tolist() == [[0, 3, 0, 4, 0], [3, 0, 3, 0, 0]]
    assert last_positions(chunks, 5).tolist() == [[0, 2, 0, 3, 0], [1, 0, 2, 0, 0]]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=10))
@settings(deadline=None)
def test_merging_against_a_loop(flags):
    closed, valid = ([flag[n] for flag in flags] for n in (0, 1))
    expected, group = [], []
    for place, (end, counts) in enumerate(flags):
        if not counts:
            group = []
            continue
        group.append(place)
        if end:
            expected.append(group)
            group = []
    found = merge_chunks(torch.tensor([closed]), torch.tensor([valid]))
    groups = [
        [place for place in range(len(flags)) if int(found.number[0, place]) == number and valid[place]]
        for number in range(len(flags))
        if found.valid[0, number]
    ]
    assert groups == expected
    assert [int(found.closer[0, n]) for n in range(len(flags)) if found.valid[0, n]] == [one[-1] for one in expected]


# -- divergences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, 0.1355), (10.0, 0.3494), (100.0, 0.3824), (1000.0, 0.3859)]
)
def test_the_card_s_limit(temperature, expected):
    a, b = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    found = temperature * ChunkDivergence("binary-kl", temperature)(a, b)
    assert found.item() == pytest.approx(expected, abs=4e-4)
    assert ChunkDivergence("limit")(a, b).item() == pytest.approx(-1 + 2 * math.log(2), abs=1e-5)


@given(st.floats(-20, -1e-3), st.floats(-20, -1e-3), st.sampled_from([1.0, 3.0, 100.0]))
@settings(deadline=None)
def test_divergences_against_their_formulas(a, b, temperature):
    def event(log: float) -> float:
        return math.exp(log / temperature - 1e-6)

    p, q = event(a), event(b)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    p1, q1 = math.exp(a - 1e-6), math.exp(b - 1e-6)
    bhattacharyya = math.sqrt(p1 * q1) + math.sqrt((1 - p1) * (1 - q1))
    expected = {
        "binary-ce": kl - p * math.log(p) - (1 - p) * math.log(1 - p),
        "binary-kl": kl,
        "reverse-binary-kl": q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
        "binary-tv": abs(p - q),
        "absolute": abs(a - b),
        "half-square": math.log(p / q) ** 2 / 2,
        "k3": p / q - 1 - math.log(p / q),
        "renyi": -2 * math.log(bhattacharyya),
    }
    for name, value in expected.items():
        found = ChunkDivergence(name, temperature)(*(torch.tensor(x, dtype=torch.float64) for x in (a, b)))
        assert found.item() == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_renyi_near_order_one_is_kl_and_its_order_counts():
    a, b = torch.tensor(-0.7, dtype=torch.float64), torch.tensor(-1.9, dtype=torch.float64)
    kl = ChunkDivergence("binary-kl", 1.0)(a, b).item()
    assert ChunkDivergence("renyi", order=1 - 1e-6)(a, b).item() == pytest.approx(kl, rel=1e-4)
    p, q = math.exp(-0.7), math.exp(-1.9)
    expected = math.log(p**2 / q + (1 - p) ** 2 / (1 - q))
    assert ChunkDivergence("renyi", order=2.0)(a, b).item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="order 1"):
        ChunkDivergence("renyi", order=1.0)


@pytest.mark.parametrize("name", ["binary-ce", "binary-kl", "reverse-binary-kl", "limit", "renyi", "half-square", "k3"])
def test_nothing_pulls_where_the_likelihoods_agree(name):
    """The gradient is zero there, and leads there from both sides."""
    a = torch.full((3,), -3.0, dtype=torch.float64)
    b = torch.tensor([-3.0, -2.0, -5.0], dtype=torch.float64, requires_grad=True)
    ChunkDivergence(name, 10.0)(a, b).sum().backward()
    assert b.grad[0].abs() < 1e-9 and b.grad[1] > 1e-4 and b.grad[2] < -1e-4


def test_the_cross_entropy_s_least_value_is_the_event_s_entropy():
    a = torch.tensor(-1.5, dtype=torch.float64)
    p = math.exp(-1.5 / 2 - 1e-6)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert ChunkDivergence("binary-ce", 2.0)(a, a).item() == pytest.approx(entropy, rel=1e-9)


def test_at_temperature_one_improbable_chunks_teach_nothing():
    """The reason for the high temperature: there the pull depends on the ratio of the surprises alone."""
    a, b = torch.tensor([-30.0]), torch.tensor([-20.0], requires_grad=True)
    pulls = {}
    for temperature in (1.0, 100.0):
        [pulls[temperature]] = torch.autograd.grad(ChunkDivergence("binary-ce", temperature)(a, b).sum(), b)
    assert pulls[1.0].abs().item() < 1e-8
    assert 100.0 * pulls[100.0].item() == pytest.approx(30 / 20 - 1, abs=0.1)


def test_log1mexp_is_exact_at_both_ends_and_its_gradient_finite():
    x = torch.tensor([-1e-6, -1e-3, -0.5, -0.7, -5.0, -80.0], dtype=torch.float64, requires_grad=True)
    expected = [math.log(-math.expm1(x)) if x > -0.6 else math.log1p(-math.exp(x)) for x in x.tolist()]
    found = log1mexp(x)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    found.sum().backward()
    slopes = [-math.exp(value) / -math.expm1(value) for value in x.tolist()]
    torch.testing.assert_close(x.grad, torch.tensor(slopes, dtype=torch.float64))


# -- the objective --------------------------------------------------------------------------------------------------


def pair(tokens: Any, other: str = "second", **options: Any) -> tuple[Any, Any, Observed, Observed]:
    teacher, student = model(tokens.words["first"].size, 1), model(tokens.words[other].size, 2, **options)
    return teacher, student, Observed(teacher, frozen=True, name="teacher"), Observed(student, name="student")


def alm(tokens: Any, student: Observed, teacher: Observed, other: str = "second", **options: Any) -> ChunkMatch:
    first, second = tokens.words["first"], tokens.words[other]
    divergence = options.pop("divergence", ChunkDivergence("binary-kl", 5.0))
    return ChunkMatch(
        head_of(student),
        paired_head(teacher),
        divergence,
        vocab_sizes=(second.size, first.size),
        boundaries=(second.boundaries(), first.boundaries()),
        special=first.special,
        **options,
    )


@pytest.mark.parametrize("merge", [None, 0.05, 0.15])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("weighting", ["chunks", "tokens"])
def test_the_loss_against_a_loop_over_chunks(tokens, merge, append, weighting):
    teacher, student, t, s = pair(tokens)
    batch = windows(tokens, "second", [TEXT[:60], "the other dog"])
    found = alm(tokens, s, t, merge=merge, append=append, weighting=weighting)(batch)
    first, second = tokens.words["first"], tokens.words["second"]
    sides = []
    for network, text, words in ((teacher, batch["teacher"], first), (student, batch, second)):
        log_q = network(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits.log_softmax(-1)
        ends = log_q.exp()[..., torch.tensor(words.boundaries())].sum(-1).log()
        sides.append((log_probabilities(network, text), ends, text))
    total = weights = 0.0
    for row in range(2):
        numbers = sorted(set(batch["chunks"][row].tolist()) - {-1})
        a = b = size = 0.0
        for number in numbers:
            where = [text["chunks"][row] == number for _, _, text in sides]
            a += float(sides[0][0][row][where[0]].sum())
            b += float(sides[1][0][row][where[1]].sum())
            size += int(where[0].sum())
            last = [int(place.nonzero()[-1]) for place in where]
            over = bool(first.special[int(batch["teacher"]["input_ids"][row, last[0]])])
            a_end, b_end = (float(side[1][row, place].detach()) for side, place in zip(sides, last, strict=True))
            if merge is not None and not over and math.exp(a_end) <= merge:
                continue
            if append and not over:
                a, b = a + a_end, b + b_end
            weight = size if weighting == "tokens" else 1.0
            p, q = math.exp(a / 5 - 1e-6), math.exp(b / 5 - 1e-6)
            total += weight * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
            weights += weight
            a = b = size = 0.0
    assert weights > 1
    assert found.item() == pytest.approx(total / weights, rel=2e-4)


def test_only_the_student_learns_and_it_learns_the_teacher_s_likelihoods(tokens):
    teacher, student, t, s = pair(tokens, "bytes")
    batch = windows(tokens, "bytes", [TEXT[:80]])
    objective = alm(tokens, s, t, "bytes", divergence=ChunkDivergence("binary-ce", 100.0))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    gaps = []
    for _ in range(60):
        optimizer.zero_grad()
        turn = Turn(objective.signals())
        [value] = objective.evaluate(turn, as_batch(batch), START)
        value.value.backward()
        gaps.append(float(value.extras["gap"]))
        optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert gaps[-1] < 0.5 * gaps[0]


def test_how_a_chunk_is_cut_into_tokens_does_not_matter(tokens):
    """Only sums enter: likelihood moved between the tokens of a chunk changes nothing; plain KD would notice."""
    generator = torch.Generator().manual_seed(0)
    chunks = torch.tensor([[-1, 1, 1, 2, 2]])
    log_q = -torch.rand(1, 5, generator=generator)
    moved = log_q + torch.tensor([[0.0, 0.1, -0.1, -0.05, 0.05]])
    torch.testing.assert_close(chunk_sums(log_q, chunks, 5), chunk_sums(moved, chunks, 5))


def test_one_model_and_one_tokenizer_have_nothing_to_learn(tokens):
    teacher, _, t, _ = pair(tokens, "first")
    twin = Observed(model(tokens.words["first"].size, 1), name="student")
    batch = windows(tokens, "first", [TEXT])
    loss = alm(tokens, twin, t, "first", merge=0.1, append=True)(batch)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(float(p.grad.abs().max()) for p in twin.module.parameters() if p.grad is not None) < 1e-4
    del teacher


def test_batches_without_a_chunk_give_zero_not_nan(tokens):
    _, student, t, s = pair(tokens)
    batch = windows(tokens, "second", ["x"])
    for text in (batch, batch["teacher"]):
        text["chunks"].fill_(-1)
        text["loss_mask"].zero_()
    loss = alm(tokens, s, t, merge=0.1, append=True)(batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_hidden_states_at_the_ends_of_chunks(tokens):
    teacher, student, t, s = pair(tokens, width=12)
    batch = windows(tokens, "second", [TEXT[:60], "the dog"])
    term = ChunkHidden([head_of(s).hidden], [paired_head(t).hidden], (12, 16))
    [project] = term.project
    found = term(batch)
    states = [
        network.model(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).last_hidden_state
        for network, text in ((teacher, batch["teacher"]), (student, batch))
    ]
    above = below = 0.0
    for row in range(2):
        for number in set(batch["chunks"][row].tolist()) - {-1}:
            h_t = states[0][row, int((batch["teacher"]["chunks"][row] == number).nonzero()[-1])]
            h_s = project(states[1][row, int((batch["chunks"][row] == number).nonzero()[-1])])
            above += float((h_s - h_t).detach().square().sum())
            below += float(h_t.square().sum())
    assert found.item() == pytest.approx(above / below, rel=1e-4)
    assert list(term.parameters())  # W is learned with the student


def test_equal_hidden_states_cost_nothing_in_any_layer(tokens):
    _, _, t, _ = pair(tokens, "first")
    twin = Observed(model(tokens.words["first"].size, 1), name="student")
    paths = [embeddings_path(twin.module), *decoder_layers(twin.module)]
    view = t.view("teacher")
    term = ChunkHidden([twin.tap(path) for path in paths], [view.tap(path) for path in paths], (16, 16))
    assert not list(term.parameters())
    assert term(windows(tokens, "first", [TEXT])).item() < 1e-10


# -- balanced terms -------------------------------------------------------------------------------------------------


class Pull(Term):
    """(factor * w)^2 / 2 of a parameter: its gradient is factor^2 * w."""

    def __init__(self, weight: Any, factor: float, name: str) -> None:
        super().__init__(name=name, weight=weight)
        self.factor = factor

    def compute(self, *, weight: Tensor, **_: Any) -> Tensor:
        return (self.factor * weight).square().sum() / 2


def test_balanced_terms_pull_equally_hard():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    observed = Observed(layer)
    weight = observed.parameter("weight")
    objective = GradientBalance([Pull(weight, 1.0, "one"), Pull(weight, 10.0, "ten")], [layer.weight])
    turn = Turn(objective.signals())
    values = objective.evaluate(turn, {"inputs": torch.zeros(1, 2)}, START)
    norms = [float(torch.autograd.grad(v.weighted, layer.weight, retain_graph=True)[0].norm()) for v in values]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert [value.weight for value in values] == pytest.approx([100 / 101, 1 / 101])  # gradients 5 and 500
    with torch.no_grad():
        even = objective.evaluate(Turn(objective.signals()), {"inputs": torch.zeros(1, 2)}, START)
    assert [value.weight for value in even] == [0.5, 0.5]


def test_balance_of_the_real_terms(tokens):
    """The cross-entropy computes its gradient on the way, the match in chunks: both can be asked for theirs."""
    _, student, t, s = pair(tokens, "bytes")
    batch = windows(tokens, "bytes", [TEXT[:80]])
    terms = [
        alm(tokens, s, t, "bytes", merge=0.1, append=True),
        TokenCrossEntropy(head_of(s)),
        ChunkHidden([head_of(s).hidden], [paired_head(t).hidden], (16, 16)),
    ]
    last = list(student.get_submodule(decoder_layers(student)[-1]).parameters())
    objective = GradientBalance(terms, last)
    values = objective.evaluate(Turn(objective.signals()), batch, START)
    assert sum(value.weight for value in values) == pytest.approx(1.0)
    norms = []
    for value in values:
        found = torch.autograd.grad(value.weighted, last, retain_graph=True, allow_unused=True)
        norms.append(float(torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt()))
    assert max(norms) == pytest.approx(min(norms), rel=1e-3)


# -- baselines ------------------------------------------------------------------------------------------------------


def test_sorted_distance():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.9]])
    assert sorted_distance(p.log(), q.log()).item() == pytest.approx(0.4 + 0.2 + 0.2)
    assert sorted_distance(p.log(), p[:, [2, 0, 1]].log()).item() == pytest.approx(0.0, abs=1e-6)


def test_uld_compares_place_by_place(tokens):
    teacher, student, t, s = pair(tokens)
    batch = windows(tokens, "second", [TEXT[:60], "the dog"])
    found = SortedMatch(
        head_of(s), paired_head(t), vocab_sizes=(tokens.words["second"].size, tokens.words["first"].size)
    )(batch)
    total, count = 0.0, 0
    for row in range(2):
        places = [(text["loss_mask"][row, 1:] == 1).nonzero()[:, 0] for text in (batch, batch["teacher"])]
        logits = [
            network(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits[row]
            for network, text in ((student, batch), (teacher, batch["teacher"]))
        ]
        for one, other in zip(*places, strict=False):
            total += float(sorted_distance(logits[0][one][None], logits[1][other][None]).detach())
            count += 1
    assert found.item() == pytest.approx(total / count, rel=1e-4)


def test_mined_with_one_tokenizer_is_plain_kd(tokens):
    teacher, student, t, s = pair(tokens, "first")
    batch = windows(tokens, "first", [TEXT])
    words = tokens.words["first"]
    nearest = nearest_spelling(words, words)
    assert nearest.tolist() == list(range(words.size))
    found = SpellingMatch(head_of(s), paired_head(t), nearest=nearest, vocab_sizes=(words.size, words.size))(batch)
    plain = TokenMatch(head_of(s), head_of(t), ForwardKL())(batch)
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    del teacher, student


def test_mined_takes_the_text_s_token_where_chunks_are_longer(tokens):
    _, student, t, s = pair(tokens, "bytes")
    batch = windows(tokens, "bytes", ["the other then the"])
    words = tokens.words
    term = SpellingMatch(
        head_of(s),
        paired_head(t),
        nearest=nearest_spelling(words["first"], words["bytes"]),
        vocab_sizes=(words["bytes"].size, words["first"].size),
    )
    sizes = [
        chunk_sums((text["chunks"] >= 0).float(), text["chunks"], batch["chunks"].shape[1])
        for text in (batch, batch["teacher"])
    ]
    single = (sizes[0] == 1) & (sizes[1] == 1)
    longer = (batch["chunks"] >= 0) & ~single.gather(1, batch["chunks"].clamp(min=0))
    assert longer.any() and single.any()
    found = term(batch)
    log_q = log_probabilities(student, batch)
    nats = -float(log_q[longer].sum())
    assert found.item() * int(batch["loss_mask"].sum()) > nats  # the KL of the single ones comes on top


def test_dskd_against_whole_logits(tokens):
    teacher, student, t, s = pair(tokens, width=12)
    batch = windows(tokens, "second", [TEXT[:60], "the dog"])
    own, theirs = s.tap(embeddings_path(student)), t.view("teacher").tap(embeddings_path(teacher))
    sizes = (tokens.words["second"].size, tokens.words["first"].size)
    term = DualSpaceMatch(head_of(s), paired_head(t), embedded=(own, theirs), widths=(12, 16), vocab_sizes=sizes)
    with torch.no_grad():  # let the carried teacher be right somewhere
        term.to_student.bias.copy_(student.get_output_embeddings().weight[batch["input_ids"][0, 5]] * 9)
    found = term(batch)
    found.backward()
    x, h, z = {}, {}, {}
    for side, network, text in (("s", student, batch), ("t", teacher, batch["teacher"])):
        x[side] = network.get_input_embeddings()(text["input_ids"])
        options = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
        h[side] = network.model(**options).last_hidden_state[:, :-1]
        z[side] = network(**options).logits[:, :-1].log_softmax(-1)
    total = torch.zeros(3)
    counts = torch.zeros(3)
    keys = torch.cat([x["t"][:, :-1], x["t"][:, 1:]], -1)
    values = term.to_student(h["t"] / h["t"].std() + x["t"][:, 1:] / x["t"][:, 1:].std())
    for row in range(2):
        lengths = [int(text["attention_mask"][row].sum()) - 1 for text in (batch, batch["teacher"])]
        query = term.query(torch.cat([x["s"][row, :-1], x["s"][row, 1:]], -1))[: lengths[0]]
        scores = query @ (keys[row, : lengths[1]] / keys.std()).T / math.sqrt(32)
        carried = (
            scores.softmax(1) @ values[row, : lengths[1]] @ student.get_output_embeddings().weight.T
        ).log_softmax(-1)
        back = scores.T.softmax(1) @ term.to_teacher(h["s"][row, : lengths[0]])
        back = (back @ teacher.get_output_embeddings().weight.T).log_softmax(-1)
        for place in range(lengths[0]):
            if batch["loss_mask"][row, place + 1]:
                label = int(batch["input_ids"][row, place + 1])
                total[0] -= carried[place, label].detach()
                counts[0] += 1
                if int(carried[place].argmax()) == label:
                    p = carried[place]
                    total[1] += (p.exp() * (p - z["s"][row, place])).sum().detach()
                    counts[1] += 1
        for place in range(lengths[1]):
            if batch["teacher"]["loss_mask"][row, place + 1]:
                p = z["t"][row, place]
                total[2] += (p.exp() * (p - back[place])).sum().detach()
                counts[2] += 1
    assert (counts > 0).all()
    assert found.item() == pytest.approx(float((total / counts).sum()), rel=1e-3)
    assert all(parameter.grad is not None for parameter in term.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_nearest_spelling_against_every_distance(tokens, data):
    words = tokens.words
    nearest = nearest_spelling(words["first"], words["second"])
    number = data.draw(st.sampled_from([n for n, piece in enumerate(words["second"].pieces) if piece]))
    piece = words["second"].pieces[number]
    distances = [levenshtein(piece, other) if other else 99 for other in words["first"].pieces]
    assert distances[nearest[number]] == min(distances)


def levenshtein(one: bytes, other: bytes) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


# -- another tokenizer for a model ----------------------------------------------------------------------------------


def test_embeddings_are_means_of_what_a_token_is_made_of(tokens):
    first, second = tokens.words["first"], tokens.words["second"]
    teacher = model(first.size, 1)
    parts = compositions(first, second)
    made = transplant(teacher, parts, tokens.second)
    old, new = (one.get_input_embeddings().weight for one in (teacher, made))
    old_head, new_head = (one.get_output_embeddings().weight for one in (teacher, made))
    kinds = set()
    for number, piece in enumerate(second.pieces):
        if piece is None:
            wanted = [tokens.first.eos_token_id]
        elif piece in first.pieces:
            wanted = [first.pieces.index(piece)]
        else:
            wanted = [
                token.id
                for token in tokens.first.backend_tokenizer.model.tokenize(tokens.second.convert_ids_to_tokens(number))
            ]
        kinds.add(min(len(wanted), 2))
        torch.testing.assert_close(new[number], old[wanted].mean(0))
        torch.testing.assert_close(new_head[number], old_head[wanted].mean(0))
    assert kinds == {1, 2}
    assert made.config.vocab_size == second.size == len(new)
    for name, parameter in made.named_parameters():
        if parameter.shape[0] != second.size:
            assert torch.equal(parameter, dict(teacher.named_parameters())[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("untie", [False, True])
def test_the_same_tokenizer_changes_nothing(tokens, tied, untie, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    words = tokens.words["first"]
    teacher = model(words.size, 1, tie_word_embeddings=tied)
    made = transplant(teacher, compositions(words, words), tokens.first, untie=untie)
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(made(input_ids=ids).logits, teacher(input_ids=ids).logits)
    shared = made.get_input_embeddings().weight is made.get_output_embeddings().weight
    assert shared == (tied and not untie)
    with torch.no_grad():
        made.get_output_embeddings().weight.add_(0.1)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, made(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_predicted_embeddings_are_put_in(tied, tmp_path: Path):
    net, given = model(6, 0, tie_word_embeddings=tied), {"input": torch.randn(6, 16)}
    given |= {} if tied else {"output": torch.randn(6, 16)}
    assert given["input"].shape == net.get_input_embeddings().weight.shape
    before = net.get_output_embeddings().weight.clone()
    save_file({"input": given["input"]}, tmp_path / "input.safetensors")
    put_embeddings(net, tmp_path / "input.safetensors")
    assert torch.equal(net.get_input_embeddings().weight, given["input"])
    assert torch.equal(net.get_output_embeddings().weight, given["input"] if tied else before)
    save_file(given, tmp_path / "both.safetensors")
    put_embeddings(net, tmp_path / "both.safetensors")
    assert torch.equal(net.get_output_embeddings().weight, given.get("output", given["input"]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"input": torch.ones(5, 16)}, r"input has shape \(5, 16\)"),
        ({"output": torch.ones(6, 16)}, "this model takes input alone"),
        ({"input": torch.ones(6, 16), "output": torch.ones(6, 16)}, "its head shares them, see untie"),
        (None, "give a safetensors file"),
    ],
)
def test_predicted_embeddings_that_do_not_fit(given, said, tmp_path: Path):
    file = tmp_path / "given.safetensors"
    if given is None:
        file.write_text("no tensors")
    else:
        save_file(given, file)
    with pytest.raises(ModelError, match=said):
        put_embeddings(model(6, 0, tie_word_embeddings=True), file)


def test_bytes_that_no_old_token_writes_are_drawn_alike_for_a_seed():
    weight = torch.arange(12.0).reshape(4, 3)
    net = model(4, 0)
    with torch.no_grad():
        net.get_input_embeddings().weight[:, :3] = weight
    tokenizer = small_bpe([])
    made = [
        transplant(net, [[], [1], [0, 2], [99]], tokenizer, seed=seed).get_input_embeddings().weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0][0], made[2][0])
    assert torch.equal(made[0][1, :3], weight[1]) and torch.equal(made[0][2, :3], weight[[0, 2]].mean(0))


def test_a_tokenizer_of_bytes(tokens):
    byte = tokens.bytes
    assert len(byte) == 257 and byte.eos_token == tokens.first.eos_token
    for text in (TEXT, "日本 👩‍🚀"):
        ids = byte(text)["input_ids"]
        assert len(ids) == len(text.encode()) and byte.decode(ids) == text


def test_sentencepiece_style_tokens_are_read_as_bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        *((f"<0x{n:02X}>", -20.0) for n in range(256)),
        ("▁", -3.0),
        ("▁the", -2.0),
        ("▁cat", -2.0),
        ("s", -4.0),
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    words = Vocabulary(tokenizer)
    assert words.pieces[tokenizer.convert_tokens_to_ids("<0xC3>")] == b"\xc3"
    assert words.pieces[tokenizer.convert_tokens_to_ids("▁cat")] == b" cat"
    byte = Vocabulary(byte_tokenizer(tokenizer))
    ids = np.array(byte.encode(["the cats é"])[0])
    [(ours, theirs)] = Translator(byte, words)([ids])
    one, other = chunks_of(ours, theirs)
    texts = [byte.text(ids[one == n]) for n in sorted(set(one.tolist()) - {-1})]
    assert b"".join(texts).decode() == "the cats é" and texts[:3] == [
        b"the",
        b" cat",
        b"s",
    ]  # the blank put before is no text
    assert set(one.tolist()) == set(other.tolist())


# -- measurement ----------------------------------------------------------------------------------------------------


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tokens):
    """A model that knows nothing: log2 of its vocabulary a token, whatever a token writes."""
    batch = windows(tokens, "bytes", [TEXT])
    known = {name: model(tokens.words[name].size, 0) for name in ("first", "bytes")}
    with torch.no_grad():
        for network in known.values():
            network.get_output_embeddings().weight.zero_()
    pieces = tuple(tokens.words[name].pieces for name in ("first", "bytes"))
    found = compare_across_tokenizers(
        Ensemble([known["first"]], tokens.words["first"].size),
        {"bytes": Ensemble([known["bytes"]], 257)},
        [batch],
        pieces=pieces,
    )
    size = int(batch["bytes"].sum())
    assert found["bytes"].bytes == found["teacher"].bytes == size
    assert found["bytes"].bits_per_byte == pytest.approx(math.log2(257) * (size + 1) / size)  # and the end
    count = int(batch["teacher"]["loss_mask"].sum())
    assert found["teacher"].bits_per_byte == pytest.approx(math.log2(tokens.words["first"].size) * count / size)


def test_gap_and_agreement_of_a_model_with_itself(tokens):
    words = tokens.words["first"]
    batch = windows(tokens, "first", [TEXT, "the cat"])
    one, other = model(words.size, 1), model(words.size, 2)
    found = compare_across_tokenizers(
        Ensemble([one], words.size),
        {"same": Ensemble([one], words.size), "other": Ensemble([other], words.size)},
        [batch],
        pieces=(words.pieces, words.pieces),
    )
    assert (found["same"].gap, found["same"].agreement) == (0.0, 1.0)
    masked = batch["loss_mask"].bool()
    gaps = (log_probabilities(one, batch) - log_probabilities(other, batch))[masked].abs()
    assert found["other"].gap == pytest.approx(float(gaps.mean()), rel=1e-4)
    assert found["same"].nats == pytest.approx(-float(log_probabilities(one, batch)[masked].sum()), rel=1e-5)


def test_models_together_are_the_mean_of_their_probabilities(tokens):
    words = tokens.words["first"]
    batch = windows(tokens, "first", [TEXT[:60]])
    networks = [model(words.size, seed) for seed in (1, 2)]
    said = Ensemble(networks, words.size).read(batch)
    keep = batch["loss_mask"].bool()
    mean = torch.stack([log_probabilities(network, batch)[keep].exp() for network in networks]).mean(0)
    torch.testing.assert_close(said.log_q.exp(), mean.double(), rtol=1e-4, atol=1e-9)
    twice = Ensemble([networks[0]] * 2, words.size).read(batch)
    alone = Ensemble(networks[:1], words.size).read(batch)
    torch.testing.assert_close(twice.log_q, alone.log_q)
    assert said.log_q.sum() >= min(log_probabilities(network, batch)[keep].sum() for network in networks)


def test_alike():
    assert begin_alike(b" the", b" ") and begin_alike(b"t", b"the") and begin_alike(None, None)
    assert not begin_alike(b"the", b"that") and not begin_alike(None, b"x")


# -- conversations and a student's own text ---------------------------------------------------------------------------

CHATS = [
    {
        "messages": [
            {"role": "user", "content": "who?"},
            {"role": "assistant", "content": "the cat sees"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": "the other dog"},
        ]
    },
    {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "naïve weather"}]},
]


def test_conversations_are_aligned_in_their_responses_under_different_templates(tokens):
    import datasets

    student = bpe_like(tokens.first, [TEXT], vocab_size=280)
    student.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    first, second = tokens.words["first"], Vocabulary(student)
    paired = paired_conversations(
        datasets.Dataset.from_list(CHATS), Pairing(first, second), windows=(200, 200), name="chats", seed=0
    )
    assert isinstance(paired, PairedConversations) and len(paired) == 2
    batch = paired[[0, 1]]
    said = []
    for row in range(2):
        for text, words in ((batch["teacher"], first), (batch, second)):
            inside = text["chunks"][row] >= 0
            said.append(words.text(text["input_ids"][row][inside].tolist()).decode())
            assert int((text["input_ids"][row][inside] == 0).sum()) == said[-1].count("weather") + 2 * said[-1].count(
                "dog"
            )
    assert sorted(set(said)) == ["naïve weather", "the cat seesthe other dog"]
    assert batch["bytes"].sum() == sum(len(one.encode()) for one in set(said))


def test_a_student_s_own_text_is_read_by_the_teacher(tokens):
    first, second = tokens.words["first"], tokens.words["bytes"]
    rows = [np.array(ids) for ids in second.encode(["the cat sees the dog", "the weather"])]
    ids = torch.zeros(2, 24, dtype=torch.long)
    mask, responses = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, one in enumerate(rows):
        ids[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
        responses[row, 8 : len(one)] = 1

    class Written:
        epoch = 0
        shard = (0, 1)

        def __next__(self) -> dict[str, Tensor]:
            return {"input_ids": ids, "attention_mask": mask, "loss_mask": responses, "own": torch.ones(2)}

        def state_dict(self) -> dict[str, Any]:
            return {"at": 3}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state

    source = Paired(Written(), Pairing(first, second))
    batch = next(source)
    assert torch.equal(batch["input_ids"][0, :20], ids[0, :20]) and batch["own"].tolist() == [1, 1]
    inside = batch["chunks"] >= 0
    assert not inside[:, :8].any()
    said = [second.text(batch["input_ids"][row][inside[row]].tolist()) for row in range(2)]
    theirs = [
        first.text(batch["teacher"]["input_ids"][row][batch["teacher"]["chunks"][row] >= 0].tolist())
        for row in range(2)
    ]
    assert said == theirs and said[0].endswith(b" the dog") and b"cat" not in said[0]
    assert batch["bytes"][:, 0].tolist() == [len(one) for one in said]
    assert source.state_dict() == {"at": 3}
    teacher, student = model(first.size, 1), model(second.size, 2)
    loss = alm(tokens, Observed(student), Observed(teacher, frozen=True), "bytes")(batch)
    assert torch.isfinite(loss) and loss.item() > 0


# -- the system -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tokens, tmp_path_factory) -> Path:
    """A teacher with a tokenizer of its own, a model with another, and conversations."""
    place = tmp_path_factory.mktemp("alm")
    for name, tokenizer, seed in (("teacher", tokens.first, 1), ("other", tokens.second, 2)):
        model(len(tokenizer), seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "text.txt").write_text(TEXT * 12, encoding="utf-8")
    chats = "\n".join(json.dumps(CHATS[number % 2]) for number in range(30))
    (place / "chats.jsonl").write_text(chats, encoding="utf-8")
    return place


def run(folder: Path, output: Path, **values: Any) -> dict[str, float]:
    small = {"teacher": str(folder / "teacher"), "data": str(folder / "text.txt"), "window": 24, "batch_size": 4}
    small |= {"steps": 3, "lr": 1e-3, "validation": 0.2, "selection": 0.1}
    system = ALM.make(**{**small, **values})
    return Run(output, quiet=True).execute(system)["evaluation"].metrics


def test_conversations_pairs_and_another_student(folder, tmp_path):
    found = run(
        folder,
        tmp_path / "run",
        data=str(folder / "chats.jsonl"),
        student=str(folder / "other"),
        window=96,
        debias="pairs",
        hidden_layers="all",
        ensemble=str(folder / "other"),
    )
    assert all(math.isfinite(found[f"{name}/bits_per_byte"]) for name in ("teacher", "student", "partner", "ensemble"))


def test_a_student_begins_with_the_embeddings_that_were_predicted(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    def embedded(name: str, **more: Any) -> torch.Tensor:
        run(folder, tmp_path / name, tokenizer="bpe:280", steps=1, lr=1e-12, **more)
        (left,) = (tmp_path / name / "stages").glob("*-student/artifact")
        student = AutoModelForCausalLM.from_pretrained(left)
        return student.get_input_embeddings().weight.detach()

    ruled = embedded("ruled")
    save_file({"input": torch.full_like(ruled, 0.5)}, tmp_path / "predicted.safetensors")
    predicted = embedded("predicted", embeddings=str(tmp_path / "predicted.safetensors"))
    assert torch.allclose(predicted, torch.full_like(predicted, 0.5)) and not torch.allclose(ruled, predicted, atol=0.1)


def test_text_alone_and_dskd_as_arms(folder, tmp_path):
    for match in ("none", "dskd"):
        found = run(folder, tmp_path / match, match=match, hidden_weight=0.0, student="layers=1", tokenizer="bpe:280")
        assert math.isfinite(found["student/bits_per_byte"])


def test_a_student_with_the_teacher_s_tokenizer_begins_as_the_teacher(folder, tmp_path):
    found = run(folder, tmp_path / "run", tokenizer=str(folder / "teacher"), lr=1e-12, untie=True)
    # Windows begin within words, which a tokenizer may then cut in other ways: all but the same.
    assert found["student/bits_per_byte"] == pytest.approx(found["teacher/bits_per_byte"], rel=1e-2)
    assert found["student/gap"] < 0.1 and found["student/agreement"] > 0.95


def test_a_student_of_bytes_sees_subwords_and_is_loaded_as_it_was_left(folder, tmp_path):
    from stillhouse.models import load_causal_lm

    values = {"tokenizer": "bytes", "expand": True, "student": str(folder / "other"), "hidden_layers": "all"}
    found = run(folder, tmp_path / "run", **values)
    left = next((tmp_path / "run" / "stages").glob("*-student")) / "artifact"
    student, tokenizer = load_causal_lm(str(left))
    first, _ = load_causal_lm(str(folder / "other"))
    expansion: Any = student.get_input_embeddings().expansion  # type: ignore[operator]
    ids = torch.tensor(tokenizer("the weather")["input_ids"])[None]
    rows = expansion.table[expansion.find(ids)][0]
    old = first.get_input_embeddings().weight  # type: ignore[operator]
    assert all((old == row).all(1).any() for row in rows)  # after training still rows of the student's own old table
    assert math.isfinite(found["student/bits_per_byte"])
    with torch.no_grad():
        assert not torch.allclose(
            student(input_ids=ids).logits, student(inputs_embeds=student.get_input_embeddings().weight[ids]).logits
        )


def test_audits_that_compare_token_by_token_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="two tokenizers"):
        run(folder, tmp_path / "run", audits=["fidelity"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packing": True}, "packed conversations"),
        ({"expand": True, "student": "layers=1"}, "expand needs a student"),
        ({"expand": True, "tokenizer": "bpe:280"}, "tokenizers of bytes"),
        ({"embeddings": "x.safetensors", "student": "layers=1"}, "embeddings needs a student"),
        ({"embeddings": "x.safetensors", "tokenizer": "bpe:280"}, "give a safetensors file"),
        ({"tokenizer": "bpe:many"}, "write bpe:N"),
        ({"tokenizer": "bpe:20"}, "vocab_size=20"),
        ({"teacher": "http://localhost:1/v1#m"}, "likelihoods"),
        ({"student_window": 8}, "student_window"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(folder, tmp_path, values, message):
    with pytest.raises((ConfigError, ModelError), match=message) as error:
        run(folder, tmp_path / "run", **values)
    assert "\n" not in str(error.value)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="not a fast one"):
        Vocabulary(SimpleNamespace(is_fast=False))


def test_windows_are_the_teacher_s(folder, tokens):
    """What is held out is what the language task holds out: the paired windows keep the teacher's rows."""
    rows = torch.randint(1, 250, (5, 12), generator=torch.Generator().manual_seed(0))

    class Split:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: Any) -> dict[str, Tensor]:
            return {"input_ids": rows[index]}

    paired = PairedWindows(Split(), Pairing(tokens.words["first"], tokens.words["bytes"], window=64))
    assert torch.equal(paired[[3, 1]]["teacher"]["input_ids"], rows[[3, 1]]) and len(paired) == 5
    assert len(list(itertools.islice(iter(range(len(paired))), 9))) == 5
