"""SPIN (Chen et al., 2024): where an iteration begins, where the game ends, and who plays against whom."""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import staged
import torch
from torch import Tensor

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import Coder, pack_rows
from stillhouse.data.text import load_text
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.objectives.responses import preferring
from stillhouse.systems import get_system
from stillhouse.tasks.self_play import given_responses

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers
from table_lm import Table, head

V, BETA = 4, 0.3


def table(seed: int) -> Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_p(z_VV: Tensor, prompt: int, response: tuple[int, ...]) -> Tensor:
    """log p(response | prompt), token by token from the table."""
    before = (prompt, *response[:-1])
    return torch.stack([z_VV[a].log_softmax(-1)[b] for a, b in zip(before, response, strict=True)]).sum()


def played(player: Tensor, opponent: Tensor, pairs: Any, weight_P: Tensor | None = None) -> tuple[float, Tensor]:
    """Loss and gradient of `preferring` on (data's, opponent's) responses to the prompt 0; in the mean, or weighed."""
    model = Table(player)
    term = preferring(head(Observed(model)), head(Observed(Table(opponent), frozen=True)), beta=BETA, name="SPIN")
    if weight_P is not None:
        plain = term.loss
        term.loss = lambda p: len(weight_P) * weight_P * plain(p)
    value = term(pack_rows([([0], r) for r, _ in pairs] + [([0], r) for _, r in pairs], 0), 0.0)
    value.backward()
    return value.item(), model.embed.weight.grad


# -- the loss -------------------------------------------------------------------------------------------------------


def test_an_iteration_begins_at_log_2_with_the_paper_s_gradient():
    """-(beta / 2) (grad log p of the data's response - that of the opponent's): eq. 4.7 at p = p_opp."""
    pairs = [((1, 2, 3), (2, 2)), ((3,), (1, 1, 0))]
    value, grad_VV = played(table(0), table(0), pairs)
    assert value == pytest.approx(math.log(2), abs=1e-12)
    z_VV = table(0).requires_grad_()
    gaps = [log_p(z_VV, 0, w) - log_p(z_VV, 0, x) for w, x in pairs]
    (expected_VV,) = torch.autograd.grad(-BETA / 2 * sum(gaps) / len(gaps), z_VV)
    torch.testing.assert_close(grad_VV, expected_VV)


def test_later_it_is_the_logistic_loss_of_whole_responses():
    """Sums over tokens, not means: a longer response counts for more."""
    (data, own), player, opponent = ((1, 2, 3), (2,)), table(1), table(0)
    gap_w, gap_l = (log_p(player, 0, r) - log_p(opponent, 0, r) for r in (data, own))
    value, _ = played(player, opponent, [(data, own)])
    assert value == pytest.approx(math.log1p(math.exp(-BETA * (gap_w - gap_l))))
    assert value != pytest.approx(math.log1p(math.exp(-BETA * (gap_w / 3 - gap_l))), rel=1e-3)


def game(player: Tensor, opponent: Tensor, data: Tensor) -> tuple[float, Tensor]:
    """The expected loss, exactly: over all responses of two tokens of data and opponent."""
    responses = list(product(range(V), repeat=2))
    p_data, p_own = ([log_p(z, 0, r).exp() for r in responses] for z in (data, opponent))
    pairs = list(product(responses, responses))
    weight_P = torch.stack([a * b for a, b in product(p_data, p_own)])
    assert weight_P.sum().item() == pytest.approx(1.0)
    return played(player, opponent, pairs, weight_P)


def test_an_opponent_that_writes_as_the_data_do_leaves_nothing_to_learn():
    """Theorem 5.2: the game ends where the model is the data's distribution, and wherever else one goes is worse."""
    data = table(2)
    value, grad_VV = game(data, data, data)
    assert value == pytest.approx(math.log(2)) and grad_VV.abs().max() < 1e-12
    for seed in range(3, 6):
        assert game(data + 0.5 * table(seed), data, data)[0] > math.log(2) + 1e-4
    value, grad_VV = game(table(6), table(6), data)
    assert value == pytest.approx(math.log(2)) and grad_VV.abs().max() > 1e-2  # it goes on for any other


def test_a_round_brings_the_player_nearer_to_the_data():
    data, player = table(2), table(7)

    def distance(z: Tensor) -> float:
        found = [log_p(data, 0, r) - log_p(z, 0, r) for r in product(range(V), repeat=2)]
        return float(
            sum(log_p(data, 0, r).exp() * one for r, one in zip(product(range(V), repeat=2), found, strict=True))
        )

    before = distance(player)
    for _ in range(3):
        player = player - game(player, player, data)[1]
        assert distance(player) < before
        before = distance(player)


# -- the stages -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    made = helpers.make_materials(tmp_path_factory.mktemp("materials"))
    turns = [
        [
            {"role": "user", "content": f"the {word} sees"},
            {"role": "assistant", "content": f" a {helpers.WORDS[place - 1]}"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": " never"},
        ]
        for place, word in enumerate(helpers.WORDS)
    ]
    (made.folder / "turns.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    return made


def walked(materials: helpers.Materials, folder: Path, **more: Any) -> staged.Walked:
    values = {"model": str(materials.teacher), "data": str(materials.folder / "turns.jsonl"), "batch_size": 4}
    small = {"max_new_tokens": 6, "iterations": 4, "steps": 5, "eval_problems": 2, "validation": 0.2, "lr": 1e-2}
    return staged.walk(get_system("spin").make(**{**values, **small, **more}), folder)


@pytest.fixture(scope="module")
def usual(materials: helpers.Materials, tmp_path_factory: pytest.TempPathFactory) -> staged.Walked:
    return walked(materials, tmp_path_factory.mktemp("usual") / "run")


PLAYERS = ["iteration-0", "iteration-1", "iteration-2", "student"]


def test_every_iteration_has_the_last_one_s_model_as_opponent_and_beginning(materials, usual):
    before = load_causal_lm(str(materials.teacher), dtype=torch.float32)[0].state_dict()
    for t, name in enumerate(PLAYERS):
        stage, term = usual.train(name), staged.objective(usual.train(name))
        assert list(usual.stages).index(name) == list(usual.stages).index(f"opponent-{t}") + 1
        begun = staged.model(stage).state_dict()
        assert all(torch.equal(begun[key], value) for key, value in before.items())
        assert float(term(next(stage.source), Progress(0, 5)).detach()) == pytest.approx(math.log(2), abs=1e-6)
        before = load_causal_lm(str(usual.artifacts[name].path), dtype=torch.float32)[0].state_dict()


def test_the_opponent_s_words_are_trained_on_as_it_wrote_them(materials, usual):
    """And those of the iteration before once more, against what is the opponent now."""
    import pyarrow.parquet as pq

    ids = []
    for t, name in enumerate(PLAYERS):
        rows = pq.read_table(usual.artifacts[f"opponent-{t}"].data_file()).to_pylist()
        ids.append([row["ids"] for row in rows])
        own = [list(worse[1]) for _, worse in usual.train(name).source.data]
        assert own == [one for past in ids[-2:] for one in past]
    assert ids[0] != ids[1]
    _, tokenizer = load_causal_lm(str(materials.teacher))
    said = [tokenizer.decode(better[1], skip_special_tokens=True) for better, _ in usual.train("student").source.data]
    assert len(set(said)) > 5 and all(one.split()[0] == "a" for one in said)
    assert all(better[0] == worse[0] for better, worse in usual.train("student").source.data)


def test_alone_an_iteration_has_its_own_pairs(materials, tmp_path):
    alone = walked(materials, tmp_path / "run", carried=0, iterations=2)
    counts = [len(alone.train(name).source.data) for name in ("iteration-0", "student")]
    assert counts[0] == counts[1] == len(alone.train("student").source.data)


def test_rates_and_betas_change_where_the_authors_change_them(usual):
    rates = []
    for name in PLAYERS:
        player = staged.player(usual.train(name))
        groups = [{"params": list(player.trained[0].module.parameters())}]
        rates.append(player.optimizer(groups).param_groups[0]["lr"])
    assert rates == [1e-2, 1e-2, 1e-7, 1e-7]
    paper = get_system("spin")()
    assert (paper.iterations, paper.beta, paper.late_beta, paper.lr, paper.late_lr) == (4, 0.1, 5.0, 5e-7, 1e-7)
    values = []
    for name in PLAYERS:
        term, batch = staged.objective(usual.train(name)), next(usual.train(name).source)
        with torch.no_grad():
            staged.moved(staged.model(usual.train(name)), "elsewhere")
        values.append(float(term(batch, Progress(0, 5)).detach()))
    assert max(abs(value - math.log(2)) for value in values[:3]) < 0.5 < abs(values[3] - math.log(2))


def test_as_many_further_steps_of_fine_tuning(materials, tmp_path):
    more = walked(materials, tmp_path / "run", method="sft", sft_steps=3)
    assert list(more.stages) == ["fine-tuned", "student", "evaluation"]
    assert more.train("student").steps == 20 and more.train("fine-tuned").steps == 3
    by_epochs = walked(materials, tmp_path / "other", method="sft", steps=None)
    pairs = len(by_epochs.train("student").source.data)
    assert by_epochs.train("student").steps == 2 * (pairs // 4 + 3 * (2 * pairs // 4))


# -- the data -------------------------------------------------------------------------------------------------------


def test_plain_text_is_cut_into_prompts_and_what_follows(materials):
    _, tokenizer = load_causal_lm(str(materials.teacher))
    coder = Coder(tokenizer, chat=False)
    text = load_text(str(materials.text))
    found = given_responses(text, coder, prompt_tokens=5, new_tokens=7)
    assert all(one.cut for one in found)
    whole = text.documents["text"][0]
    assert "".join(one.prompt + one.response for one in found).startswith(whole[:100])
    assert len(coder.response(found[0].response)) == 8  # its tokens, and an end that `cut` leaves out


def test_what_cannot_be_played_with(materials, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="1 prompts with responses"):
        walked(materials, tmp_path / "a", data=str(file))
    with pytest.raises(DataError, match="responses are short enough"):
        walked(materials, tmp_path / "b", max_prompt=1)
    with pytest.raises(ConfigError, match="for your own data pass a model"):
        walked(materials, tmp_path / "c", model="demo")
