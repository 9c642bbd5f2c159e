"""FedD2S (card 157): which blocks are shared, what travels, who learns from whom, and what stays private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse import CrossEntropy, Observed, Player, Run, Train, sgd
from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.schedule import Progress
from stillhouse.data.rows import TensorRows
from stillhouse.data.sources import Batches
from stillhouse.models.exit_heads import Continuation, ExitHead, block_shapes, blocks_of
from stillhouse.objectives.stored import StoredMatch
from stillhouse.systems.vision.fedd2s import FedD2S
from stillhouse.tasks.federation import Federation, Server, cut_at, summary
from stillhouse.tasks.vision import VisionTask

STUDENT = "hidden_sizes=4-6-8,depths=1-1-1,embedding_size=4"


def system(**more: Any) -> FedD2S:
    fields = {"student": STUDENT, "train_size": 60, "batch_size": 16, "clients": 2, "rounds": 2, "local_epochs": 2.0}
    made = FedD2S.make(**{**fields, "alpha": 5.0, "drop_every": 1, **more})
    assert isinstance(made, FedD2S)
    return made


def federation(folder: Path, **more: Any) -> Federation:
    one = system(**more)
    stages = VisionTask.prepare(one, Run(folder, quiet=True), teacher=False)
    try:
        next(stages)
    except StopIteration as end:
        return Federation(end.value, clients=one.clients, alpha=one.alpha, permuted=one.permuted)
    raise AssertionError("a stage was asked for")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


# -- which blocks ---------------------------------------------------------------------------------------------------


def test_the_card_s_schedule():
    """L = 4, r = 10, l_min = 1: rounds 0-9 share 4, 10-19 share 3, 20-29 share 2, and from 30 on 1."""
    found = [cut_at(round, blocks=4, every=10, least=1) for round in range(60)]
    assert found == [4] * 10 + [3] * 10 + [2] * 10 + [1] * 30
    assert [cut_at(t, blocks=4, every=1, least=2) for t in range(5)] == [4, 3, 2, 2, 2]
    assert [cut_at(t, blocks=4, every=2, least=1, order="shallow-to-deep") for t in range(9)] == [
        *(1, 1, 2, 2, 3, 3, 4, 4, 4)
    ]
    assert {cut_at(t, blocks=4, every=1, least=1, order="none") for t in range(50)} == {4}


def test_blocks_and_their_shapes(tmp_path):
    one = federation(tmp_path)
    model = one.clients[0].model
    assert [path.rpartition(".")[2] for path in blocks_of(model)] == ["0", "1", "2"]
    assert one.shapes == block_shapes(model, (1, 8, 8)) == [(4, 2, 2), (6, 1, 1), (8, 1, 1)]
    with pytest.raises(ModelError, match="no list of blocks"):
        blocks_of(nn.Linear(2, 2))


def test_heads_pool_over_places():
    images, tokens = torch.randn(3, 5, 2, 4), torch.randn(3, 7, 5)
    head = ExitHead((5, 2, 4), 2)
    torch.testing.assert_close(head(images), head.linear(images.flatten(2).mean(2)))
    other = ExitHead((7, 5), 2)
    torch.testing.assert_close(other(tokens), other.linear(tokens.sum(1) / 7))


def test_a_longer_continuation_is_the_shorter_one_behind_a_block():
    blocks = [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1)]
    rest = Continuation(blocks, ExitHead((3, 2, 2), 4))
    features = torch.randn(5, 2, 2, 2)
    torch.testing.assert_close(rest(features), rest(blocks[0](features), start=1))
    torch.testing.assert_close(rest(blocks[1](blocks[0](features)), start=2), rest(features))


# -- the objective of a client --------------------------------------------------------------------------------------


def soft_labels(client: Any, seed: int = 0) -> TensorRows:
    count = len(client.images)
    soft = torch.randn(count, 10, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    return TensorRows({"client": torch.full((count,), client.number), "row": torch.arange(count), "soft": soft})


def gradients(one: FedD2S, client: Any, cut: int, then: int, soft: TensorRows | None) -> dict[str, Tensor | None]:
    client.model.zero_grad()
    client.heads.zero_grad()
    client.model.eval()
    objective, _ = one.objective(cut, then, soft)(client, Observed(client.model, mode="eval"))
    objective(client.images[[0, 1, 2, 3]]).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in client.model.named_parameters()}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_personal_layers_take_nothing_from_the_server(tmp_path, cut):
    """The soft labels move the first ``cut`` blocks; the gradient of everything behind them is exactly the same."""
    client = federation(tmp_path).clients[0]
    one = system(mu=3.0)
    plain = gradients(one, client, cut, cut, None)
    taught = gradients(one, client, cut, cut, soft_labels(client))
    places = blocks_of(client.model)
    for name, gradient in taught.items():
        block = next((number for number, path in enumerate(places, 1) if name.startswith(path + ".")), None)
        personal = (block is not None and block > cut) or name.startswith("classifier")
        before = plain[name]
        assert gradient is not None and before is not None
        assert torch.equal(gradient, before) if personal else not torch.equal(gradient, before), name


def test_the_head_of_the_next_cut_is_warmed_up_without_touching_the_model(tmp_path):
    client = federation(tmp_path).clients[0]
    one = system()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            gradients(one, client, 3, 3, None).values(), gradients(one, client, 3, 2, None).values(), strict=True
        )
        if a is not None and b is not None
    )
    assert client.heads[1].linear.weight.grad is not None and client.heads[0].linear.weight.grad is None


def test_nothing_is_learnt_from_one_s_own_opinion(tmp_path):
    """One client, and the server says what its head says: the KL is 0, and so is its gradient."""
    client = federation(tmp_path).clients[0]
    client.model.eval()
    student = Observed(client.model, mode="eval")
    _, logits = client.opinion(student, 2)
    batch = client.images[list(range(len(client.images)))]
    with torch.no_grad():
        table = (logits(batch) / 2.0).softmax(-1)
    term = StoredMatch(logits, table, temperature=2.0)
    loss = term(batch)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in client.model.parameters() if p.grad is not None) < 1e-6


def test_stored_match_by_hand():
    z, p = torch.tensor([[1.0, -0.5, 0.2], [0.0, 0.3, 2.0]]), torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.1, 0.9]])
    holder = nn.Module()
    holder.forward = lambda inputs: z  # type: ignore[method-assign]
    term = StoredMatch(Observed(holder).output(), p, temperature=3.0)
    q = (z / 3).softmax(-1)
    expected = sum(
        float(p[n, k]) * float(torch.log(p[n, k] / q[n, k])) for n in range(2) for k in range(3) if p[n, k] > 0
    )
    found = term({"inputs": z, "index": torch.tensor([0, 1])})
    assert found.item() == pytest.approx(9 * expected / 2, rel=1e-5)


# -- what travels ---------------------------------------------------------------------------------------------------


def test_the_upload_holds_what_the_card_says(tmp_path):
    one = federation(tmp_path)
    for cut, shape in enumerate(one.shapes, 1):
        told = one.upload(one.clients, cut, temperature=2.0)
        columns = told.columns
        assert len(told) == 60 and columns["inputs"].shape[1:] == shape
        for client in one.clients:
            mine = told.select(columns["client"] == client.number).columns
            assert torch.equal(mine["labels"], client.images.labels)
            path = blocks_of(client.model)[cut - 1]
            seen: list[Tensor] = []
            hook = client.model.get_submodule(path).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            with torch.no_grad():
                client.model.eval()(pixel_values=client.images[list(range(len(client.images)))]["pixel_values"])
                hook.remove()
                torch.testing.assert_close(mine["inputs"], seen[0])
                soft = (client.heads[cut - 1](seen[0]) / 2.0).softmax(-1)
            torch.testing.assert_close(mine["soft"], soft)


def test_uploads_can_be_clipped_and_blurred(tmp_path):
    one = federation(tmp_path)
    plain = one.upload(one.clients, 1, temperature=1.0).columns["inputs"].flatten(1)
    most = plain.norm(dim=1).median().item()
    clipped = one.upload(one.clients, 1, temperature=1.0, clip=most).columns["inputs"].flatten(1)
    assert clipped.norm(dim=1).max().item() <= most * (1 + 1e-5)
    small = plain.norm(dim=1) < most
    assert torch.equal(clipped[small], plain[small])  # what was small enough is sent as it is
    noisy = one.upload(one.clients, 1, temperature=1.0, noise=0.5).columns["inputs"].flatten(1)
    assert (noisy - plain).std().item() == pytest.approx(0.5, rel=0.1)


def test_rows_come_back_from_their_file_bit_for_bit(tmp_path):
    rows = TensorRows(
        {"a": torch.randn(5, 2, 3), "b": torch.arange(5), "c": torch.rand(5), "d": torch.randn(5, 4).double()}
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    again = TensorRows.read(tmp_path / "rows.parquet").columns
    assert again.keys() == rows.columns.keys()
    for name, column in rows.columns.items():
        assert again[name].dtype == column.dtype and torch.equal(again[name], column)


def test_two_clients_that_contradict_each_other_are_answered_with_a_half(tmp_path):
    """Equal representations with opposite labels: the best head says 0.5 and 0.5."""
    features = torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    labels = torch.cat([torch.zeros(20), torch.ones(20)]).long()
    rows = TensorRows({"inputs": features, "labels": labels, "index": torch.arange(40)})
    head = Observed(Continuation([], ExitHead((3, 1, 1), 2)))
    player = Player("server", head, CrossEntropy(head.output()), optimizer=sgd(0.5))
    Run(tmp_path, quiet=True).execute([Train("server", player, source=Batches(rows, 40, gather=True), steps=300)])
    with torch.no_grad():
        torch.testing.assert_close(head.module(features).softmax(-1), torch.full((40, 2), 0.5), atol=2e-3, rtol=0)


def test_with_folds_no_head_labels_what_it_was_trained_on(tmp_path):
    one = federation(tmp_path)
    told = one.upload(one.clients, 2, temperature=1.0, folds=2)
    server = Server(one, folds=2)
    now = Progress(1, 4)
    stage = server.train("server", told, 2, epochs=2.0, mu=1.0, temperature=1.0, now=now)
    assert callable(stage.players)
    players = stage.players()
    assert isinstance(players, list)
    for fold, player in enumerate(players):
        seen = torch.cat([next(player.source)["index"] for _ in range(len(player.source))])
        assert len(seen) and not (told.columns["fold"][seen] == fold).any()
    answer = server.labels(told, 2, temperature=1.0).columns["soft"]
    for fold, head in enumerate(server.weights):
        mine = told.columns["fold"] == fold
        with torch.no_grad():
            expected = head.eval()(told.columns["inputs"][mine], start=1).softmax(-1)
        torch.testing.assert_close(answer[mine], expected)


# -- averages -------------------------------------------------------------------------------------------------------


def test_fedavg_weighs_clients_by_their_images(tmp_path):
    one = federation(tmp_path, clients=3, alpha=0.5)
    sizes = [len(client.images) for client in one.clients]
    assert len(set(sizes)) > 1 and sum(sizes) == 60
    with torch.no_grad():
        for client in one.clients:
            for parameter in client.model.parameters():
                parameter.fill_(float(client.number))
    one.average(one.clients[:2])
    expected = sizes[1] / (sizes[0] + sizes[1])
    for client in one.clients:  # the one that took no part gets the mean too
        assert all(parameter.flatten()[0].item() == pytest.approx(expected) for parameter in client.model.parameters())


def test_figures_over_clients():
    found = summary([0.9, 0.5, 0.7, 0.7], [{"accuracy": 0.2, "bytes": 10.0}, {"accuracy": 0.4, "bytes": 30.0}])
    assert found == pytest.approx(
        {"accuracy": 0.7, "spread": 0.02**0.5, "worst": 0.5, "area": 0.3, "bytes": 40.0}, abs=1e-9
    )


# -- the system -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``fields -> (folder, artifacts)``, each run once."""
    known: dict[str, Any] = {}

    def run(**fields: Any) -> Any:
        key = json.dumps(fields, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("run")
            known[key] = folder, Run(folder, quiet=True).execute(system(**fields))
        return known[key]

    return run


def model_of(artifacts: Any, number: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    folder = artifacts["student"].path
    return load_file((folder / f"client-{number}" if number else folder) / "model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_stages_and_what_is_sent(runs):
    folder, done = runs()
    names = [path.name.split("-", 1)[1] for path in sorted((folder / "stages").iterdir())]
    assert names == [
        *("warm-up", "upload-1", "server-1", "labels-1", "clients-1"),
        *("upload-2", "server-2", "labels-2", "student", "evaluation"),
    ]
    rounds = done["evaluation"].json("rounds.json")
    assert [one["cut"] for one in rounds] == [3, 2]
    assert [one["bytes"] for one in rounds] == [4 * 60 * (8 + 1 + 10), 4 * 60 * (6 + 1 + 10)]
    assert done["evaluation"].metrics["bytes"] == sum(one["bytes"] for one in rounds)
    assert (done["student"].path / "client-1" / "config.json").exists()


def test_clients_become_different_models(runs):
    _, done = runs()
    first, second = model_of(done, 0), model_of(done, 1)
    assert [name for name in first if torch.equal(first[name], second[name])] == [
        name for name in first if name.endswith("num_batches_tracked")
    ]


def test_knowledge_comes_from_the_others_and_only_through_the_soft_labels(runs):
    """With mu = 0 a client becomes what it becomes whatever the server knows; with mu = 1 it does not."""
    _, taught = runs()
    _, untaught = runs(mu=0.0)
    _, other_server = runs(mu=0.0, server_epochs=5.0)
    _, taught_otherwise = runs(server_epochs=5.0)
    assert equal(model_of(untaught, 0), model_of(other_server, 0))
    assert not equal(model_of(taught, 0), model_of(untaught, 0))
    assert not equal(model_of(taught, 0), model_of(taught_otherwise, 0))


def test_on_its_own_no_client_hears_of_another(runs):
    """The second client's labels are renamed: the first one's model stays the same, bit for bit."""
    _, apart = runs(exchange="none")
    _, renamed = runs(exchange="none", permuted=True)
    assert equal(model_of(apart, 0), model_of(renamed, 0)) and not equal(model_of(apart, 1), model_of(renamed, 1))
    _, taught = runs()
    _, confused = runs(permuted=True)
    assert not equal(model_of(taught, 0), model_of(confused, 0))


def test_fedavg_leaves_one_model_and_tuning_makes_it_personal(runs):
    _, averaged = runs(exchange="weights")
    assert equal(model_of(averaged, 0), model_of(averaged, 1))
    _, tuned = runs(exchange="weights", fine_tune=1.0)
    assert not equal(model_of(tuned, 0), model_of(tuned, 1))


def test_some_take_part(runs, tmp_path):
    one = federation(tmp_path, clients=4)
    chosen = [tuple(c.number for c in one.taking_part(round, 0.5)) for round in range(20)]
    assert all(len(numbers) == 2 for numbers in chosen) and len(set(chosen)) > 3
    assert chosen == [tuple(c.number for c in one.taking_part(round, 0.5)) for round in range(20)]
    before = tensors(one.weights)
    run = Run(tmp_path / "run", quiet=True)
    alone = system(exchange="none").objective(3, 3, None)
    run.execute([one.train("student", one.clients[1:2], alone, epochs=1.0, now=Progress(0, 2))])
    assert changed(before, one.weights) and all(name.startswith("1.0.") for name in changed(before, one.weights))


def test_too_many_clients_and_blocks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="too few for so many"):
        federation(tmp_path, clients=50)
    with pytest.raises(ConfigError, match="has 3 blocks"):
        Run(tmp_path / "run", quiet=True).execute(system(least_shared=4))
