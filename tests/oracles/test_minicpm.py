"""MiniCPM (card 116): schedules, transfer over width and depth, laws, mixed batches, upcycling."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, GraniteConfig, LlamaConfig

from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.core.schedule import Progress
from stillhouse.data.docstrings import docstrings, load_preferences
from stillhouse.data.length_curriculum import TokenShares, documents_of, padded, rows_between
from stillhouse.data.mixing import Mixed, all_tokens, stacked
from stillhouse.data.sources import Batches
from stillhouse.losses.routing import load_balance
from stillhouse.metrics.curvature import movement, slope
from stillhouse.metrics.scaling_law import ScalingLaw, batch_size_law, fit_scaling_law
from stillhouse.models.causal_lm import new_causal_lm
from stillhouse.models.mup import hidden_matrices, mup_adamw, mup_config, new_mup_lm, router_paths, upcycled
from stillhouse.models.rope import ntk_base, rope_base, with_rope_base
from stillhouse.objectives.language import head_of
from stillhouse.objectives.lr_schedules import decay_form, plan
from stillhouse.objectives.routing import LoadBalance
from stillhouse.tasks.context_extension import held_out_rows, phase_base
from stillhouse.tasks.pretraining import best_rate, law_cost


def llama(width=32, layers=2, **sizes):
    return LlamaConfig(
        vocab_size=60, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, tie_word_embeddings=True, **sizes,
    )  # fmt: skip


def granite(width=32, layers=2, base=16):
    return mup_config(llama(width, layers), base_width=base)


# -- the schedule ---------------------------------------------------------------------------------------------------


def test_the_schedule_is_continuous_where_its_parts_meet():
    stable, decay = plan("wsd-s", [1000], form=decay_form("exponential", floor=0.1), floor=0.1, decay=0.1, warmup=50)
    rates = [part.rate(Progress(s, 1)) for part in (stable, decay) for s in range(part.end - part.begin)]
    assert len(rates) == 1000 and rates[0] == 0 and rates[50] == 1 and rates[900] == 1
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < 0.03
    assert all(b < a for a, b in itertools.pairwise(rates[900:]))
    assert rates[950] == pytest.approx(math.sqrt(0.1))


# -- scaling over width and depth ------------------------------------------------------------------------------------


def test_at_the_base_width_all_factors_of_width_are_one():
    config = mup_config(llama(256, 40), base_width=256)
    assert config.logits_scaling == 1 and config.embedding_multiplier == 12
    assert config.residual_multiplier == pytest.approx(1.4 / math.sqrt(40)) == pytest.approx(0.2214, abs=1e-4)
    assert config.attention_multiplier == pytest.approx((256 / 4) ** -0.5)
    assert mup_config(llama(512), base_width=256).logits_scaling == 2


def test_the_factors_are_where_they_should_be():
    """Granite with MiniCPM's factors against a Llama whose weights and forward carry them by hand."""
    config = granite(32, 3, base=16)
    model = new_mup_lm(config, seed=0).eval()
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    plain = new_causal_lm(llama(32, 3), seed=1).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in plain.model.layers:  # the residual factor folded into what writes to the stream
            layer.self_attn.o_proj.weight.mul_(1.4 / math.sqrt(3))
            layer.mlp.down_proj.weight.mul_(1.4 / math.sqrt(3))
        hidden = plain.model(inputs_embeds=12 * plain.model.embed_tokens(ids)).last_hidden_state
        expected = plain.lm_head(hidden) / (32 / 16)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_initial_weights_and_rates_follow_the_width():
    model = new_mup_lm(granite(128, base=32), seed=0)
    ratio = 4
    inside = hidden_matrices(model)
    assert len(inside) == 2 * 7
    for weight in inside:
        assert float(weight.detach().std()) == pytest.approx(0.1 / math.sqrt(ratio), rel=0.06)
    assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(128))
    optimizer = mup_adamw(model, 0.01)([{"params": list(model.parameters())}])
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in inside} == {0.0025}
    others = [p for p in model.parameters() if id(p) not in {id(q) for q in inside}]
    assert {rates[id(p)] for p in others} == {0.01} and len(rates) == len(list(model.parameters()))
    at_base = mup_adamw(new_mup_lm(granite(32, base=32), seed=0), 0.01)
    groups = at_base([{"params": list(model.parameters())}]).param_groups
    assert {group["lr"] for group in groups} == {0.01}


def test_first_steps_change_logits_alike_at_every_width():
    """What the scaling is for: one rate moves wide and narrow models by about as much; without it wide ones more."""

    def change(make, width):
        model = make(width)
        config_is_mup = isinstance(model.config, GraniteConfig)
        lr = 0.01
        build = mup_adamw(model, lr, weight_decay=0.0) if config_is_mup else None
        parameters = list(model.parameters())
        optimizer = build([{"params": parameters}]) if build else torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
        ids = torch.randint(3, 60, (8, 24), generator=torch.Generator().manual_seed(0))
        before = model(input_ids=ids).logits.detach()
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return float((model(input_ids=ids).logits.detach() - before).abs().mean())

    scaled = [change(lambda w: new_mup_lm(granite(w, base=32), seed=0), width) for width in (32, 256)]
    plain = [change(lambda w: new_causal_lm(llama(w), seed=0), width) for width in (32, 256)]
    assert scaled[1] / scaled[0] < 1.6 < plain[1] / plain[0]


# -- laws -----------------------------------------------------------------------------------------------------------


def grid():
    return [(n, d) for n in np.geomspace(1e7, 1e9, 5) for d in np.geomspace(1e8, 1e11, 6)]


def test_the_fit_recovers_a_law():
    true = ScalingLaw(400, 0.3, 300, 0.25, 1.7)
    n, d = zip(*grid(), strict=True)
    law = fit_scaling_law(n, d, [true.loss(*point) for point in grid()], resamples=0)
    found = (law.c_n, law.alpha, law.c_d, law.beta, law.floor)
    assert found == pytest.approx((400, 0.3, 300, 0.25, 1.7), rel=1e-2) and law.residual < 1e-4


def test_intervals_hold_the_true_constants_of_noisy_losses():
    true = ScalingLaw(400, 0.3, 300, 0.25, 1.7)
    rng = np.random.default_rng(0)
    n, d = zip(*grid(), strict=True)
    losses = [true.loss(*point) * math.exp(0.002 * rng.standard_normal()) for point in grid()]
    law = fit_scaling_law(n, d, losses, resamples=20)
    for name in ("alpha", "beta", "floor"):
        low, high = law.intervals[name]
        assert low < high and low - (high - low) < getattr(true, name) < high + (high - low)


def test_the_best_split_of_compute():
    same = ScalingLaw(10, 0.3, 10, 0.3, 1)
    assert same.optimum(6e12) == pytest.approx((1e6, 1e6))
    law = ScalingLaw(400, 0.3, 300, 0.25, 1.7)
    split = law.optimum(1e20)
    assert 6 * split.n * split.d == pytest.approx(1e20)
    for factor in (0.9, 1.1):
        assert law.loss(split.n * factor, split.d / factor) > law.loss(*split)


def test_too_few_losses_fix_no_law():
    with pytest.raises(DataError, match="5 constants"):
        fit_scaling_law([1, 2], [1, 2], [3, 2])


def test_the_batch_law():
    assert batch_size_law(2) == pytest.approx(1.60e7, rel=1e-2) and batch_size_law(3) == pytest.approx(1.27e6, rel=1e-2)


def test_the_widest_of_the_tunnel_chooses():
    assert best_rate({(32, 0.1): 1.0, (32, 0.2): 3.0, (64, 0.1): 2.0, (64, 0.2): 1.5}) == 0.2


# -- better data ----------------------------------------------------------------------------------------------------


class Rows:
    def __init__(self, count, length, **masks):
        self.columns = {"input_ids": torch.arange(count)[:, None].expand(count, length), **masks}

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def test_a_mixed_batch_holds_both_in_their_shares():
    mask = torch.zeros(10, 4, dtype=torch.long)
    mask[:, :2] = 1
    answers = Rows(10, 4, attention_mask=mask, loss_mask=torch.zeros(10, 4, dtype=torch.long))
    mixed = Mixed([Batches(Rows(50, 6), 3, gather=True), Batches(answers, 1, gather=True, collate=all_tokens)])
    batch = next(mixed)
    assert batch["input_ids"].shape == (4, 6)
    assert batch["loss_mask"][:3].all() and batch["loss_mask"][3].tolist() == [1, 1, 0, 0, 0, 0]  # all its tokens count
    state = mixed.state_dict()
    expected = [next(mixed)["input_ids"] for _ in range(20)]
    mixed.load_state_dict(state)
    assert all(torch.equal(next(mixed)["input_ids"], ids) for ids in expected)


def test_rows_without_masks_get_none_they_do_not_need():
    assert stacked([{"input_ids": torch.ones(1, 3)}, {"input_ids": torch.ones(2, 2)}]).keys() == {"input_ids"}


def test_docstrings_are_the_same_every_time():
    pairs = dict(docstrings())
    assert pairs == dict(docstrings()) and len(pairs) > 500
    assert pairs["What is math.sqrt?"] == "Return the square root of x."
    assert not any("transformers" in question for question in pairs)


def test_preferences_are_read_and_checked(tmp_path):
    found = load_preferences("demo", seed=0)
    assert all(p.chosen != p.rejected for p in found) and found == load_preferences("demo", seed=0)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(DataError, match="no rejected"):
        load_preferences(str(file))
    with pytest.raises(DataError, match="no such"):
        load_preferences(str(tmp_path / "q.jsonl"))


# -- experts --------------------------------------------------------------------------------------------------------


def test_upcycling_changes_nothing_at_first(tmp_path):
    model = new_mup_lm(granite(), seed=0).eval()
    made = upcycled(model, experts=4, active=2)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    router = made.get_submodule(router_paths(made)[0]).weight
    assert len(router_paths(made)) == 2 and 0.005 < float(router.detach().std()) < 0.02
    assert id(router) not in {id(p) for p in hidden_matrices(made)}
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())
    with pytest.raises(ModelError, match="cannot be upcycled"):
        upcycled(new_causal_lm(llama(), seed=0))
    with pytest.raises(ModelError, match="active=5"):
        upcycled(model, experts=4, active=5)


def test_the_balance_loss_is_one_when_balanced_and_grows_to_the_number_of_experts():
    even_NE = torch.eye(4).repeat(6, 1)
    assert float(load_balance(even_NE, active=1)[0]) == pytest.approx(1)
    one_NE = torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1)
    loss, shares = load_balance(one_NE, active=1)
    assert float(loss) == pytest.approx(4) and shares.tolist() == [1, 0, 0, 0]


def test_the_balance_term_reads_all_routers():
    made = upcycled(new_mup_lm(granite(), seed=0), experts=4)
    student = Observed(made, options={"use_cache": False})
    term = LoadBalance([student.tap(path, index=0) for path in router_paths(made)], active=2)
    batch = {"input_ids": torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))}
    logits = made(**batch, output_router_logits=True).router_logits
    expected = sum(float(load_balance(part, active=2)[0].detach()) for part in logits) / 2
    assert float(term(batch).detach()) == pytest.approx(expected, rel=1e-5)
    head_of(student)
    term(batch).backward()
    assert all(made.get_submodule(path).weight.grad is not None for path in router_paths(made))


def test_a_mix_that_is_no_whole_row_is_refused():
    from stillhouse.tasks.pretraining import Pretraining

    class System:
        batch_size, accumulate, seed = 4, 1, 0

    work = Pretraining.__new__(Pretraining)
    work.task = type("Task", (), {"system": System()})()
    with pytest.raises(ConfigError, match=r"mix=0.05: a batch of 4 would hold 0"):
        work.mixed(0.05, 0)


def test_a_law_costs_one_stable_run_and_the_decays():
    """Card 116: the largest amount of data once, and 10 % for each, instead of the sum of all."""
    targets = [250, 500, 750, 1000]
    assert law_cost(targets, 0.1) == 900 + 25 + 50 + 75 + 100 < sum(targets) / 2
    assert law_cost([1000], 0.1) == 1000


# -- longer contexts ------------------------------------------------------------------------------------------------


def test_ntk_stretches_the_lowest_frequency_by_the_factor_and_keeps_the_highest():
    base, factor, dims = 10_000.0, 4.0, 64
    larger = ntk_base(base, factor, dims)
    assert larger == pytest.approx(10_000 * 4 ** (64 / 62))

    def frequency(of, pair):
        return of ** (-2 * pair / dims)

    assert frequency(larger, 0) == frequency(base, 0) == 1
    assert frequency(larger, dims // 2 - 1) == pytest.approx(frequency(base, dims // 2 - 1) / factor)
    middle = frequency(base, 16) / frequency(larger, 16)
    assert 1 < middle < factor
    assert ntk_base(base, 1, dims) == base


def test_the_base_is_adjusted_first_and_scaled_by_ntk_afterwards():
    config = llama(64)  # heads of 16
    assert phase_base(config, 1, factor=8, adjusted=50) == 500_000
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 500_000.0}
    assert phase_base(config, 2, factor=4, adjusted=50) == pytest.approx(500_000 * 4 ** (16 / 14))
    partly = GPTNeoXConfig(hidden_size=64, num_attention_heads=4)  # a quarter of 16 dimensions turns
    assert rope_base(partly) == (10_000.0, 4)


def test_another_base_is_in_the_frequencies_and_factor_one_changes_nothing():
    model = new_mup_lm(granite(32), seed=0).eval()
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        base, dims = rope_base(model.config)
        same = with_rope_base(model, ntk_base(base, 1, dims), positions=128)
        assert torch.equal(same(input_ids=ids).logits, plain)
        other = with_rope_base(model, 50 * base, positions=128)
        assert not torch.allclose(other(input_ids=ids).logits, plain)
    expected = (50 * base) ** (-torch.arange(0, dims, 2) / dims)
    torch.testing.assert_close(other.model.rotary_emb.inv_freq, expected)
    assert other.config.max_position_embeddings == 128 and model.config.max_position_embeddings == 64
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_positions_that_are_not_rotary_are_refused():
    with pytest.raises(ModelError, match="gpt2: no plain rotary positions"):
        rope_base(GPT2Config())
    scaled = llama(64, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0})
    with pytest.raises(ModelError, match="no plain rotary"):
        rope_base(scaled)


def test_documents_are_found_again_and_those_of_a_phase_are_of_its_lengths():
    lengths = [3, 40, 5, 21, 11, 9, 50, 5]
    stream = torch.cat([torch.cat([torch.full((n - 1,), n), torch.tensor([1])]) for n in lengths])
    documents = documents_of(stream.view(-1, 12), end=1)
    assert [len(one) for one in documents] == lengths and torch.equal(torch.cat(documents), stream)
    first, second = rows_between(documents, 4, 16), rows_between(documents, 16, 64)
    assert all(4 < len(row) <= 16 for row in first) and all(16 < len(row) <= 64 for row in second)
    assert sorted(len(row) for row in second) == [21, 40, 50]
    assert [len(row) for row in first] == [16, 16, 8, 5, 16, 5, 11, 9, 16, 16, 16, 5]  # longer ones are cut
    with pytest.raises(DataError, match=r"more than 50 tokens \(the longest: 50\)"):
        rows_between(documents, 50, 100)


def test_long_documents_get_their_share_of_tokens_whatever_their_lengths():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.full((int(n),), 7) for n in torch.randint(33, 129, (40,), generator=generator)]

    def made():
        return TokenShares(Batches(rows, 2, collate=padded), Batches(Rows(60, 32), 8, gather=True), 0.44)

    source, long, total, largest = made(), 0, 0, 0
    for _ in range(150):
        batch = next(source)
        is_long = "attention_mask" in batch
        count = int(batch["attention_mask"].sum()) if is_long else batch["input_ids"].numel()
        long, total, largest = long + count * is_long, total + count, max(largest, count)
        assert abs(long - 0.44 * total) <= largest
    assert long / total == pytest.approx(0.44, abs=0.01)
    state = source.state_dict()
    expected = [next(source)["input_ids"] for _ in range(20)]
    again = made()
    again.load_state_dict(state)
    assert all(torch.equal(next(again)["input_ids"], ids) for ids in expected)


def test_padding_of_long_rows_is_neither_read_nor_predicted():
    batch = padded([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == batch["loss_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_held_out_windows_are_read_on_in_longer_rows():
    class Split(Rows):
        def __init__(self):
            self.columns = {"input_ids": torch.arange(35).view(7, 5)}

    assert held_out_rows(Split(), 10).tolist() == torch.arange(30).view(3, 10).tolist()
    assert len(held_out_rows(Split(), 36)) == 0


# -- dynamics of the decay ------------------------------------------------------------------------------------------


def test_the_curvature_of_a_quadratic_is_its_hessian_along_the_gradient():
    model = torch.nn.Linear(3, 1, bias=False)
    hessian = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, -2.0]])
    before = model.weight.detach().clone()
    found = slope(model, lambda: 0.5 * (model.weight @ hessian @ model.weight.T).squeeze())
    gradient = (before @ hessian).flatten()
    assert found.norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    expected = float(gradient @ hessian @ gradient / gradient.square().sum())
    assert found.curvature == pytest.approx(expected, rel=1e-3)
    assert torch.equal(model.weight, before)
    assert slope(model, lambda: 0.0 * model.weight.sum()) == (0.0, 0.0)


def test_movement_is_the_root_mean_square_of_all_weights():
    one = {"a": torch.zeros(3), "b": torch.zeros(1, 1), "steps": torch.tensor(1)}
    other = {"a": torch.tensor([3.0, 0.0, 0.0]), "b": torch.tensor([[4.0]]), "steps": torch.tensor(9)}
    assert movement(one, other) == 2.5
