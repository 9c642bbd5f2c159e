"""BAI (card 030): merges of tensors, modules and directories; what PPO is made of; the diagnostics of a run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watching import watched

from stillhouse import Observed, Run
from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.reasoning import ArithmeticChain
from stillhouse.data.responses import pack_rows
from stillhouse.losses.value import clipped_value_loss
from stillhouse.metrics.stability import Stability, by_round, collapse_ratio, recovery_time, reward_dip
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.models.critic import Critic
from stillhouse.models.merging import balanced, merge_directories, merge_states, merge_tensor
from stillhouse.objectives import LanguageHead
from stillhouse.objectives.ppo import ClippedPolicy, ValueMatch
from stillhouse.rl.gae import generalised_advantages, shaped_rewards, whitened
from stillhouse.rl.rewards import Added, ShapedReward, Unclosed
from stillhouse.rl.sampling import Response
from stillhouse.systems import get_system
from stillhouse.tasks.reasoning import ReasoningTask
from stillhouse.tasks.rlhf import Family, StyleCorpus, long_trace

DOUBLE = torch.float64

# -- merging tensors ------------------------------------------------------------------------------------------------


def draws(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ends_of_the_merge_are_the_models_themselves(dtype):
    ancestor, instruct, reasoning = draws(3, 40, 7, dtype=dtype)
    for (share, alpha), expected in {(0.3, 0.0): ancestor, (1.0, 1.0): instruct, (0.0, 1.0): reasoning}.items():
        found = merge_tensor(ancestor, [instruct, reasoning], balanced(share, alpha))
        torch.testing.assert_close(found, expected, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=0)
    assert torch.equal(merge_tensor(ancestor, [instruct, reasoning], balanced(0.3, 0.0)), ancestor)
    for share, alpha in [(0.5, 0.6), (0.1, 0.9)]:
        assert torch.equal(merge_tensor(ancestor, [ancestor] * 2, balanced(share, alpha)), ancestor)


def test_the_card_s_numbers():
    scalar = lambda x: torch.tensor([x])  # noqa: E731
    assert merge_tensor(scalar(0.0), [scalar(2.0), scalar(4.0)], balanced(0.5, 1.0)).item() == 3.0
    assert merge_tensor(scalar(0.0), [scalar(2.0), scalar(4.0)], balanced(0.5, 0.6)).item() == pytest.approx(1.8)
    assert merge_tensor(scalar(1.0), [scalar(2.0), scalar(4.0)], balanced(0.5, 0.6)).item() == pytest.approx(2.2)


def test_two_steps_are_one():
    """alpha (w IT + (1 - w) DR) + (1 - alpha) W_0, and the three weights sum to 1."""
    ancestor, instruct, reasoning = draws(3, 5, 5, dtype=DOUBLE)
    for share in (0.0, 0.3, 1.0):
        for alpha in (0.0, 0.4, 1.0):
            first = share * instruct + (1 - share) * reasoning
            expected = alpha * first + (1 - alpha) * ancestor
            found = merge_tensor(ancestor, [instruct, reasoning], balanced(share, alpha))
            torch.testing.assert_close(found, expected)
            assert merge_tensor(torch.zeros(1), [torch.ones(1)] * 2, balanced(share, alpha)).item() == pytest.approx(
                alpha
            )


def test_of_linear_models_merging_is_mixing_the_outputs():
    models, x = [nn.Linear(4, 3).double() for _ in range(3)], torch.randn(6, 4, dtype=DOUBLE)
    merged = nn.Linear(4, 3).double()
    merged.load_state_dict(
        merge_states(models[0].state_dict(), [m.state_dict() for m in models[1:]], balanced(0.5, 0.6))
    )
    expected = 0.4 * models[0](x) + 0.3 * models[1](x) + 0.3 * models[2](x)
    torch.testing.assert_close(merged(x), expected)


def test_of_a_convex_loss_the_merge_is_no_worse_than_the_mean():
    loss = lambda w: float((w - 0.7) ** 2)  # noqa: E731
    ws = [torch.tensor([x]) for x in (-1.0, 2.0, 0.5)]
    weights = (0.4, 0.3, 0.3)
    merged = merge_tensor(ws[0], ws[1:], balanced(0.5, 0.6))
    assert loss(merged) <= sum(c * loss(w) for c, w in zip(weights, ws, strict=True))


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("inv_freq", torch.full((2,), float(seed)))


def test_counters_and_tables_are_copied_and_ties_stay():
    models = [Tied(seed) for seed in range(3)]
    state = merge_states(models[0].state_dict(), [m.state_dict() for m in models[1:]], (0.3, 0.3))
    assert state["steps"].item() == 0 and state["inv_freq"].tolist() == [0.0, 0.0]
    assert torch.equal(state["embed.weight"], state["head.weight"])
    models[0].load_state_dict(state)
    assert models[0].head.weight is models[0].embed.weight
    with pytest.raises(ModelError, match=r"its tensor bias is missing, that of the ancestor of shape \(3,\)"):
        merge_states(nn.Linear(2, 3).state_dict(), [nn.Linear(2, 3, bias=False).state_dict()], (1.0,))


# -- merging directories --------------------------------------------------------------------------------------------

TEXTS = ["the cat sees the old river and the dog finds a stone"] * 40


def save(folder: Path, seed: int, *, tied: bool = True, texts: list[str] = TEXTS, **changed: Any) -> str:
    from transformers import LlamaConfig

    tokenizer = train_bpe(texts, vocab_size=280)
    values = {
        "vocab_size": 280,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = new_causal_lm(LlamaConfig(**{**values, **changed}), seed=seed)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_directories_are_merged_shard_by_shard(tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = [save(tmp_path / str(seed), seed, tied=tied) for seed in range(3)]
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > 1
    out = tmp_path / "merged"
    merge_directories(names[0], names[1:], balanced(0.5, 0.6), out)
    models = [AutoModelForCausalLM.from_pretrained(name) for name in names]
    merged = AutoModelForCausalLM.from_pretrained(out)
    expected = merge_states(models[0].state_dict(), [m.state_dict() for m in models[1:]], balanced(0.5, 0.6))
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert AutoTokenizer.from_pretrained(out).eos_token_id == merged.config.eos_token_id
    merge_directories(names[0], names[1:], balanced(0.5, 0.6), out / "half", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(out / "half")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.model.norm.weight, merged.model.norm.weight.bfloat16())


def test_models_that_do_not_fit_are_refused_in_one_line(tmp_path):
    ancestor = save(tmp_path / "a", 0)
    rope = save(tmp_path / "rope", 1, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0})
    deep = save(tmp_path / "deep", 1, num_hidden_layers=3)
    words = save(tmp_path / "words", 1, texts=["wholly other words are written here, again and again"] * 40)
    for other, said in {rope: "rope", deep: "num_hidden_layers", words: "another tokenizer"}.items():
        with pytest.raises(ModelError, match=said) as caught:
            merge_directories(ancestor, [other], (1.0,), tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_added_tokens_are_allowed_on_demand(tmp_path):
    from transformers import AutoTokenizer

    ancestor, other = save(tmp_path / "a", 0), save(tmp_path / "b", 1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="special_tokens=false"):
        merge_directories(ancestor, [other], (0.5,), tmp_path / "out")
    merge_directories(ancestor, [other], (0.5,), tmp_path / "out", special_tokens=False)
    assert "<think>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


# -- advantages -----------------------------------------------------------------------------------------------------

ROW = torch.tensor([0, 0, 0, 1, 2, 2])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.97, 1.0), (1.0, 0.0)])
def test_generalised_advantages_against_their_sum(gamma, lam):
    reward, value = draws(2, 6, dtype=DOUBLE)
    expected = []
    for row in range(3):
        r, v = reward[row == ROW], value[row == ROW]
        delta = [float(r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0) - v[t]) for t in range(len(v))]
        expected += [sum((gamma * lam) ** k * delta[t + k] for k in range(len(v) - t)) for t in range(len(v))]
    advantage, returns = generalised_advantages(reward, value, ROW, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantage, torch.tensor(expected, dtype=DOUBLE))
    torch.testing.assert_close(returns, advantage + value)


def test_with_lambda_one_the_return_is_what_came():
    reward, value = draws(2, 6, dtype=DOUBLE)
    _, returns = generalised_advantages(reward, value, ROW, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.stack([reward[i:][ROW[i:] == ROW[i]].sum() for i in range(6)]))


def test_a_perfect_critic_leaves_nothing():
    """Where values are the returns to come, no action is better than another."""
    reward = draws(1, 6, dtype=DOUBLE)[0]
    value = torch.stack([reward[i:][ROW[i:] == ROW[i]].sum() for i in range(6)])
    for lam in (0.0, 0.5, 1.0):
        assert generalised_advantages(reward, value, ROW, gamma=1.0, lam=lam)[0].abs().max() < 1e-12


def test_rewards_of_tokens():
    logp, ref = draws(2, 6, dtype=DOUBLE)
    found = shaped_rewards(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE), logp, ref, ROW, kl=0.1)
    expected = -0.1 * (logp - ref) + torch.tensor([0, 0, 1.0, 2.0, 0, 3.0], dtype=DOUBLE)
    torch.testing.assert_close(found, expected)
    white = whitened(found)
    assert white.mean().abs() < 1e-12 and white.square().mean().item() == pytest.approx(1.0)


def test_the_value_loss_is_clipped_pessimistically():
    old, target = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 0.1])
    value = torch.tensor([0.1, 0.9, 0.9, 0.15], requires_grad=True)
    loss = clipped_value_loss(value, old, target, clip=0.2)
    assert loss.tolist() == pytest.approx([0.405, 0.32, 1.805, 0.00125], abs=1e-6)
    loss.sum().backward()
    assert value.grad.tolist() == pytest.approx([-0.9, 0.0, 1.9, 0.05], abs=1e-6)  # the second went far enough
    assert clipped_value_loss(value, old, target, clip=None)[1].item() == pytest.approx(0.005)


# -- the terms ------------------------------------------------------------------------------------------------------

V = 6
ROWS = [([1, 2], [3, 4, 0]), ([5], [0]), ([1], [2, 0])]


class TableModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(draws(1, V, V, dtype=DOUBLE)[0], freeze=False)
        self.head = nn.Linear(V, V, bias=False, dtype=DOUBLE)
        self.head.weight = nn.Parameter(torch.eye(V, dtype=DOUBLE), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def rollouts(policy: TableModel, *, moved: float = 0.0) -> dict[str, Any]:
    batch: dict[str, Any] = pack_rows(ROWS, 0)
    log_p = policy.embed.weight.detach().log_softmax(-1)
    steps = [pair for prompt, said in ROWS for pair in zip([prompt[-1], *said[:-1]], said, strict=True)]
    logp = torch.stack([log_p[state, token] for state, token in steps])
    shift, advantage, ref = draws(3, 6, dtype=DOUBLE)
    return {
        **batch,
        "old_logp": logp + moved * shift,
        "ref_logp": logp + 0.3 * ref,
        "token_advantages": advantage,
        "rewards": torch.ones(3),
        "finished": torch.ones(3),
        "logp": logp,
    }


def policy_term(policy: TableModel, **options: Any) -> ClippedPolicy:
    model = Observed(policy)
    return ClippedPolicy(LanguageHead(model.tap("head", of="input"), model.parameter("head.weight")), **options)


def test_the_policy_loss_against_a_loop():
    policy = TableModel()
    batch = rollouts(policy, moved=0.5)
    expected, clipped = 0.0, 0
    for logp, old, a in zip(*(batch[k].tolist() for k in ("logp", "old_logp", "token_advantages")), strict=True):
        rho = torch.exp(torch.tensor(logp - old, dtype=DOUBLE)).item()
        expected -= min(rho * a, min(max(rho, 0.8), 1.2) * a) / 6
        clipped += not 0.8 <= rho <= 1.2
    term = policy_term(policy)
    (value,) = term.evaluate(Turn(term.signals()), batch, Progress(0, 1))
    assert value.value.item() == pytest.approx(expected)
    assert 0 < clipped < 6 and float(value.extras["clipped"]) == pytest.approx(clipped / 6)


def test_on_fresh_rollouts_nothing_is_stale_and_the_gradient_is_the_policy_gradient():
    policy = TableModel()
    batch = rollouts(policy)
    term = policy_term(policy)
    (value,) = term.evaluate(Turn(term.signals()), batch, Progress(0, 1))
    assert float(value.extras["staleness"]) == 0.0 and float(value.extras["clipped"]) == 0.0
    gap = batch["ref_logp"] - batch["logp"]
    assert float(value.extras["kl"]) == pytest.approx(float((gap.exp() - 1 - gap).mean()))
    term(batch, 0.0).backward()
    found, policy.embed.weight.grad = policy.embed.weight.grad, None
    log_p = policy.embed.weight.log_softmax(-1)
    steps = [pair for prompt, said in ROWS for pair in zip([prompt[-1], *said[:-1]], said, strict=True)]
    logp = torch.stack([log_p[state, token] for state, token in steps])
    (-(batch["token_advantages"] * logp).mean()).backward()
    torch.testing.assert_close(found, policy.embed.weight.grad)


def test_a_penalty_in_the_loss_is_the_mean_kl():
    policy = TableModel()
    batch = rollouts(policy)
    term = policy_term(policy, kl=0.02, normalisation="sequence")
    values = term.evaluate(Turn(term.signals()), batch, Progress(0, 1))
    gap = batch["ref_logp"] - batch["logp"]
    kl = gap.exp() - 1 - gap
    assert values[1].weight == 0.02
    assert values[1].value.item() == pytest.approx(float((kl[:3].mean() + kl[3] + kl[4:].mean()) / 3))


def test_the_critic_reads_the_state_before_each_token(tmp_path):
    from transformers import AutoModelForCausalLM

    critic = Critic(AutoModelForCausalLM.from_pretrained(save(tmp_path / "m", 0)))
    batch = {**pack_rows(ROWS, 0), "returns": torch.arange(6.0), "old_values": torch.zeros(6)}
    term = ValueMatch(Observed(critic, name="critic").output(), clip=None)
    assert term(batch, 0.0).item() == pytest.approx(float(torch.arange(6.0).square().mean() / 2))  # it begins at 0
    nn.init.normal_(critic.head.weight)
    values = critic(batch["input_ids"], batch["attention_mask"]).detach()
    states = torch.stack([values[0, 1], values[0, 2], values[0, 3], values[1, 0], values[2, 0], values[2, 1]])
    batch["returns"] = states
    assert term(batch, 0.0).item() == pytest.approx(0.0, abs=1e-12)
    padded = pack_rows([*ROWS, ([1] * 9, [2])], 0)
    again = critic(padded["input_ids"], padded["attention_mask"]).detach()
    torch.testing.assert_close(again[0, :5], values[0, :5])


# -- rewards, styles and diagnostics --------------------------------------------------------------------------------


def test_the_embedded_reward():
    """1 for the answer, 0.15 less for every token beyond 12, 0.3 more for the closing mark."""
    puzzle, record = ArithmeticChain(), {"prompt": "3+5+2="}
    reward = ShapedReward(Unclosed(puzzle, "!"), len, free=12, per_token=0.15, closing="!", bonus=0.3)
    assert reward("1,3#3", record) == pytest.approx(1.0)
    assert reward("1,3#3!", record) == pytest.approx(1.3)
    assert reward("1,3#4!", record) == pytest.approx(0.3)
    assert reward("1,1,3,3,1,3~#3", record) == pytest.approx(1.0 - 0.15 * 2)
    assert Added((puzzle, lambda text, record: 0.25))("#3", record) == pytest.approx(1.25)


def test_the_styles_of_the_embedded_models():
    puzzle, rng = ArithmeticChain(), random.Random(0)
    assert long_trace("1,3#3") == "1,1,3,3~#3"
    kinds: dict[str, set[str]] = {}
    for style in ("ancestor", "instruct", "reasoning"):
        corpus = StyleCorpus(steps=1, style=style)
        kinds[style] = set()
        for _ in range(200):
            prompt, text = corpus.example(puzzle, rng, set())
            assert len((prompt or text).split("+")) in (3, 5)
            if prompt:
                assert Unclosed(puzzle, "!")(text, {"prompt": prompt}).correct
            kind = "prompt" if not prompt else "direct" if text.startswith("#") else "long" if "~" in text else "short"
            kinds[style].add(kind + "!" * text.endswith("!"))
    assert kinds == {
        "ancestor": {"prompt", "direct", "short"},
        "instruct": {"direct!", "short!"},
        "reasoning": {"long"},
    }


def test_the_card_s_diagnostics():
    reward, length = [1.0, 0.4, 0.2, 0.7, 1.1], [100.0, 40.0, 30.0, 80.0]
    found = Stability.of(reward, length)
    assert (found.dip, found.recovery, found.collapse) == (pytest.approx(0.8), 4, pytest.approx(0.3))
    assert recovery_time([1.0, 0.5, 0.9]) is None
    assert recovery_time([1.0, 1.1, 1.2]) == 0 and reward_dip([1.0, 1.1]) == 0
    assert reward_dip([1.0, 0.9, 0.0], horizon=1) == pytest.approx(0.1)  # later falls are no beginning
    assert collapse_ratio([10.0, 12.0, 1.0], horizon=1) == 1.0
    assert by_round([1.0, 3.0, 5.0, 7.0, 9.0], [1.0, 1.0, 2.0, 2.0, 3.0]) == [2.0, 6.0, 9.0]


def test_the_system_says_what_is_missing():
    system = get_system("bai")
    assert (system().share, system().alpha, system().lr, system().prompts, system().steps) == (
        0.5,
        0.6,
        1e-6,
        4096,
        1600,
    )
    with pytest.raises(ConfigError, match="model is 'demo'"):
        next(iter(system.make(instruct="x", reasoning="y").stages(None)))


def test_the_merge_s_index_names_every_tensor(tmp_path):
    names = [save(tmp_path / str(seed), seed) for seed in range(2)]
    merge_directories(names[0], names[1:], (0.5,), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    first = json.loads((tmp_path / "0" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == first["weight_map"]


# -- the system on models of one's own ------------------------------------------------------------------------------


def end_with(folder: str, token: int, template: str | None = None) -> str:
    """Give a saved model another end of text, and a chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = tokenizer.convert_ids_to_tokens(token), template
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        file = Path(folder) / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": token}))
    return folder


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three models with ends of text of their own, of which one has a chat template, and problems."""
    folder = tmp_path_factory.mktemp("relatives")
    rows = [{"prompt": f"the cat sees {'the old ' * n}river", "answer": str(n), "trace": f"#{n}"} for n in range(60)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    template = "{% for m in messages %}the dog {{ m['content'] }}{% endfor %}"
    return {
        "model": save(folder / "ancestor", 0),
        "instruct": end_with(save(folder / "instruct", 1), 5, template),
        "reasoning": end_with(save(folder / "reasoning", 2), 7),
        "data": str(folder / "problems.jsonl"),
    }


def own(relatives: dict[str, str], **more: Any) -> Any:
    values = {"prompts": 20, "minibatches": 8, "steps": 9, "max_new_tokens": 3, "eval_problems": 2, "eval_samples": 1}
    return get_system("bai").make(**relatives, **{**values, "validation": 0.2, **more})


def test_the_merge_is_what_is_reinforced_and_stayed_close_to(relatives, tmp_path):
    from transformers import AutoModelForCausalLM

    names = [relatives[role] for role in ("model", "instruct", "reasoning")]
    ancestor, *others = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in names)
    expected = merge_states(ancestor, others, balanced(0.25, 0.8))
    student = watched(own(relatives, share=0.25, alpha=0.8), tmp_path / "run", until="student")[0]["student"]
    actor, critic = student.players
    for module in (actor.trained[0].module, student.source.sampler.model):
        for name, value in module.state_dict().items():
            assert torch.equal(value, expected[name]), name
    body = critic.trained[0].module.state_dict()
    key = next(name for name in body if name.endswith("layers.1.mlp.up_proj.weight"))
    assert torch.equal(body[key], expected["model.layers.1.mlp.up_proj.weight"])
    rollouts = next(student.source)  # of the very weights that are stayed close to
    torch.testing.assert_close(rollouts["old_logp"], rollouts["ref_logp"])


@pytest.mark.parametrize(("merge", "giver", "end"), [((0.5, 0.6), "instruct", 5), ((0.0, 0.6), "reasoning", 7)])
def test_the_actor_ends_and_is_asked_as_the_merge_is(relatives, tmp_path, merge, giver, end):
    """Rollouts, rewards, the table and the result go by the merge's tokenizer, which ``share=0`` takes elsewhere."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    share, alpha = merge
    seen, left = watched(own(relatives, share=share, alpha=alpha), tmp_path / "run")
    student, text = seen["student"], "the cat"
    asked = student.source.sampler.coder
    assert asked is student.source.coder and asked.end == end
    expected = AutoTokenizer.from_pretrained(relatives[giver])
    read = expected("the dog the cat" if giver == "instruct" else "the cat")["input_ids"]
    assert asked.prompt(text) == read and student.source.coder.response(text)[-1] == end
    for stage in ("merged", "student"):
        found = AutoTokenizer.from_pretrained(left[stage].path)
        assert (found.eos_token_id, found.chat_template) == (end, expected.chat_template)
        assert AutoModelForCausalLM.from_pretrained(left[stage].path).generation_config.eos_token_id == end


def test_models_are_measured_by_their_own_tokenizers(relatives, tmp_path, monkeypatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "stillhouse.rl.sampling.LiveSampler._write",
        lambda self, rows, device: (
            asked.append((self.coder.end, len(rows[0]))) or [Response((self.coder.end,), "", True) for _ in rows]
        ),
    )
    family = next_family(own(relatives))
    family.task.run = Run(tmp_path / "run", quiet=True)
    models = {role: relatives[role] for role in ("model", "instruct", "reasoning")}
    family.task.run.execute([family.evaluation(models)])
    assert list(dict.fromkeys(end for end, _ in asked)) == [family.task.coder.end, 5, 7]
    lengths = dict(reversed(asked))
    assert lengths[5] == lengths[7] + len(family.task.coder.tokenizer(" the dog")["input_ids"])


def next_family(system: Any) -> Family:
    stages = Family.prepare(
        system, Run("unused", quiet=True), instruct=system.instruct, reasoning=system.reasoning, tuning={}, lr=1.0
    )
    with pytest.raises(StopIteration) as end:
        next(stages)
    return end.value.value


def test_of_what_nothing_is_taken_nothing_is_asked(relatives, tmp_path):
    """``share=0`` leaves out the sibling, even one that does not fit; ``alpha=0`` is the ancestor and its files."""
    from transformers import AutoTokenizer

    wide = save(tmp_path / "wide", 1, intermediate_size=48)
    system = own({**relatives, "instruct": wide}, share=0.0)
    assert "student" in watched(system, tmp_path / "one", until="student")[0]
    plain = watched(own(relatives, alpha=0.0), tmp_path / "two", until="student")[1]["merged"]
    assert AutoTokenizer.from_pretrained(plain.path).eos_token_id == AutoTokenizer.from_pretrained(
        relatives["model"]
    ).eos_token_id  # fmt: skip


def test_alpha_is_chosen_on_problems_that_are_not_reported_on(relatives, tmp_path, monkeypatch):
    looks: dict[str, list[str]] = {}
    plain = ReasoningTask.answers

    def answers(self: Any, model: Any, *, problems: Any = None, **how: Any) -> Any:
        chosen = self.test_problems if problems is None else problems
        looks.setdefault(model.name_or_path, []).extend(problem["prompt"] for problem in chosen)
        return plain(self, model, problems=problems, **how)

    monkeypatch.setattr(ReasoningTask, "answers", answers)
    system = own(relatives, sweep=(0.4, 0.8), sweep_steps=1, steps=1, eval_problems=200)
    seen, left = watched(system, tmp_path / "run")
    by_stage = {Path(folder).parent.name: set(prompts) for folder, prompts in looks.items()}
    tuned = by_stage["01-merged-0.4"]
    assert tuned == by_stage["03-merged-0.8"] and len(tuned) == 6  # half of the twelve that are held out
    reported = set(looks[str(left["student"].path)])
    trained = {problem["prompt"] for problem in seen["student"].source.source.data}
    assert len(reported) == 6 and not tuned & reported and not tuned & trained and not reported & trained
    single = next_family(own(relatives, validation=0.01))
    with pytest.raises(ConfigError, match="raise validation"):
        single.set_aside()


def test_the_embedded_sweep_leaves_what_is_reported_as_it_is():
    """100 of 200 held-out problems are reported on, with and without a sweep."""
    problems = [{"prompt": str(n)} for n in range(200)]
    system = get_system("bai").make(sweep=(0.4,))
    task = ReasoningTask(system, None, None, "", [], problems[:100], None, None, problems)  # type: ignore[arg-type]
    family = Family(task, system, "", "", None)  # type: ignore[arg-type]
    assert family.set_aside() == problems[150:] and family.task.test_problems == problems[:100]


def test_rounds_are_those_that_were_written(relatives, tmp_path):
    """Twenty rollouts into eight parts are seven: the eighth step begins the second round."""
    _, left = watched(own(relatives, steps=15), tmp_path / "run", until="stability")
    family = next_family(own(relatives))
    course = family.course(left["student"])
    assert len(course["reward"]) == 3
    lines = [json.loads(line) for line in (left["student"].path.parent / "metrics.jsonl").open()]
    steps = [line["values"] for line in lines if "Policy.tokens" in line.get("values", {})]
    assert [one["Policy.round"] for one in steps] == [1.0] * 7 + [2.0] * 7 + [3.0]
    tokens = [one["Policy.tokens"] for one in steps]
    assert course["tokens"] == pytest.approx([sum(tokens[:7]) / 7, sum(tokens[7:14]) / 7, tokens[14]])
