"""Generalisation and fidelity (card 172): what every student of the grid is given, asked of the system's own stages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import staged
import torch

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import Coder
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.rl.policies import PolicySource, Share
from stillhouse.rl.sampling import LiveSampler
from stillhouse.systems import get_system

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers

SIZES = ("layers=1", "layers=1;hidden_size=8;heads=2", "layers=2;hidden_size=8;heads=2")
METRICS = {"selection_loss": 1.0}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


def made(materials: helpers.Materials, **more: Any) -> Any:
    values = {**helpers.small_values(get_system("fidelity"), materials), "students": SIZES, "steps": 20, **more}
    return get_system("fidelity").make(**staged.fields(values))


@pytest.fixture(scope="module")
def grid(materials: helpers.Materials, tmp_path_factory: pytest.TempPathFactory) -> staged.Walked:
    ways = ("sft", "forward-kl", "reverse-kl", "gkd", "seq-kd")
    system = made(materials, objectives=ways, noises=(0.5,), temperatures=(4.0,), unaware=True, on_policy=0.3)
    return staged.walk(system, tmp_path_factory.mktemp("grid"), metrics=METRICS)


def rows_of(source: Any, count: int = 40) -> set[tuple[int, ...]]:
    """The rows of the next batches."""
    return {tuple(row) for _ in range(count) for row in next(source)["input_ids"].tolist()}


@pytest.fixture(scope="module")
def text(materials: helpers.Materials, grid: staged.Walked) -> set[tuple[int, ...]]:
    """All training windows, from the students that learn from them alone."""
    return rows_of(grid.train("sft-1").source, 200)


def test_the_order_of_the_grid(grid):
    names = list(grid.stages)
    plain = [f"{way}-{size}" for size in (1, 2, 3) for way in ("sft", "forward-kl", "reverse-kl", "gkd", "seq-kd")]
    disturbed = ["forward-kl-noise0.5-2", "forward-kl-t4-2", "forward-kl-unaware-2"]
    assert names == ["teacher", "teacher-text", *plain, *disturbed, "student", "evaluation", "fidelity"]


def test_all_students_have_one_budget_and_their_size(grid):
    stages = [grid.train(name) for name in grid.stages if name[-2:] in ("-1", "-2", "-3")]
    assert len(stages) == 18
    for stage in stages:
        course = staged.player(stage).lr
        assert (stage.steps, stage.accumulate, stage.best) == (20, 1, None)
        assert [course(Progress(step, 20)) for step in (0, 10)] == pytest.approx([1.0, 0.5])  # half a cosine
        config = staged.model(stage).config
        size = int(stage.name[-1])
        assert (config.num_hidden_layers, config.hidden_size) == [(1, 16), (1, 8), (2, 8)][size - 1]


@pytest.mark.parametrize(
    "name", ["sft-2", "forward-kl-2", "reverse-kl-2", "forward-kl-noise0.5-2", "forward-kl-unaware-2"]
)
def test_off_policy_students_read_the_text(grid, text, name):
    found = rows_of(grid.train(name).source)
    assert found <= text and len(found) > 20


def test_gkd_mixes_the_text_with_what_the_student_writes(grid, text):
    stage = grid.train("gkd-2")
    source = stage.source
    assert isinstance(source, PolicySource) and source.chooser == Share(0.3) and source.steps == stage.steps
    writer: Any = source.writer
    assert writer.model is staged.model(stage) and writer.temperature == 1.0
    assert list(writer.sharded) == [staged.player(stage).trained[0].tapped]  # under FSDP2 shards are gathered first
    own = {True: set(), False: set()}
    for _ in range(20):
        batch = next(source)
        own[bool(batch["own"].all())] |= {tuple(row) for row in batch["input_ids"].tolist()}
    assert own[False] <= text and not own[True] <= text
    assert {row[:6] for row in own[True]} <= {row[:6] for row in text}


def test_seq_kd_reads_what_the_teacher_wrote(grid, materials):
    records = pq.read_table(grid.artifacts["teacher-text"].data_file()).to_pylist()
    written = {(*record["prompt"], *record["response"]) for record in records}
    batch = next(grid.train("seq-kd-2").source)
    rows = [
        tuple(row[:end]) for row, end in zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(-1), strict=True)
    ]
    assert set(rows) <= written
    assert len(records) == 8
    said = []  # by the teacher that has learnt the task, and by the one that has not
    for where in (grid.artifacts["teacher"].path, materials.teacher):
        model, tokenizer = load_causal_lm(str(where))
        writer = LiveSampler(model, Coder(tokenizer), 6)
        said.append([list(one.ids) for one in writer.write([record["prompt"] for record in records], seed=0)])
    assert [record["response"] for record in records] == said[0] != said[1]


def expected(name: str, student: Any, taught: Any, before: Any, batch: Any) -> float:
    """The mean over all tokens of the divergence that a cell's name says."""
    T = 4.0 if "-t4" in name else 1.0
    q = staged.log_probabilities(student, batch, T)
    p = staged.log_probabilities(before if "unaware" in name else taught, batch, T)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if name.startswith("forward-kl"):
        return T * T * float(kl(p, q).mean())
    if name.startswith("reverse-kl"):
        return float(kl(q, p).mean())
    m = (0.5 * (p.exp() + q.exp())).log()
    return float((0.5 * kl(p, m) + 0.5 * kl(q, m)).mean())


CELLS = ["forward-kl-1", "reverse-kl-2", "gkd-3", "forward-kl-t4-2", "forward-kl-unaware-2"]


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_minimises_its_own_divergence_to_its_own_teacher(grid, materials, name):
    taught, _ = load_causal_lm(str(grid.artifacts["teacher"].path))
    before, _ = load_causal_lm(str(materials.teacher))
    stage = grid.train(name)
    student = staged.model(stage)
    batch = next(grid.train("sft-1").source)
    values = {cell: expected(cell, student, taught, before, batch) for cell in CELLS}
    assert staged.objective(stage)(batch).item() == pytest.approx(values[name], rel=1e-4)
    others = [value for cell, value in values.items() if cell != name and cell.split("-")[0] != "gkd"]
    assert min(abs(other / values[name] - 1) for other in others if other != values[name]) > 1e-3  # it can be told


def test_noise_is_in_the_taught_teachers_logits(grid):
    taught, _ = load_causal_lm(str(grid.artifacts["teacher"].path))
    stage = grid.train("forward-kl-noise0.5-2")
    student, batch = staged.model(stage), next(grid.train("sft-1").source)
    with torch.no_grad():
        student_V, teacher_V = (
            one.eval()(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1) for one in (student, taught)
        )
    torch.manual_seed(3)
    noisy = (teacher_V + 0.5 * torch.randn(teacher_V.shape)).log_softmax(-1)
    clean = teacher_V.log_softmax(-1)
    kl_noisy, kl_clean = ((p.exp() * (p - student_V.log_softmax(-1))).sum(-1).mean() for p in (noisy, clean))
    torch.manual_seed(3)
    assert staged.objective(stage)(batch).item() == pytest.approx(float(kl_noisy), rel=1e-4)
    assert abs(float(kl_noisy) / float(kl_clean) - 1) > 0.05


@pytest.mark.parametrize("name", ["sft-2", "seq-kd-2"])
def test_text_alone_is_learnt_by_cross_entropy(grid, name):
    stage = grid.train(name)
    batch = next(stage.source)
    log_q = staged.log_probabilities(staged.model(stage), batch)
    nll = -log_q.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    weight = batch.get("loss_mask", torch.ones_like(batch["input_ids"]))[:, 1:]
    assert staged.objective(stage)(batch).item() == pytest.approx(float((nll * weight).sum() / weight.sum()), rel=1e-4)


# -- sizes that are models --------------------------------------------------------------------------------------------


def saved(materials: helpers.Materials, folder: Path, *, words: int | None = None) -> Path:
    """A student on disk, wider than the teacher, with its tokenizer or with one of its own."""
    from transformers import LlamaConfig

    from stillhouse.models import new_causal_lm, train_bpe

    _, tokenizer = load_causal_lm(str(materials.teacher))
    if words:
        tokenizer = train_bpe([materials.text.read_text(encoding="utf-8")], vocab_size=words)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 40, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    new_causal_lm(
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids), seed=5
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_one_size_that_is_a_model_is_that_model(materials, tmp_path):
    """Not the shape that student= happens to say."""
    given = saved(materials, tmp_path / "given")
    found = staged.walk(
        made(materials, students=(str(given),), objectives=("sft",), noises=(), teacher_epochs=0.0),
        tmp_path / "run",
        metrics=METRICS,
    )
    student, _ = load_causal_lm(str(given))
    trained = staged.model(found.train("sft-1")).state_dict()
    assert all(torch.equal(trained[name], value) for name, value in student.state_dict().items())


def test_without_sizes_the_student_is_the_tasks(materials, tmp_path):
    """With all that was done to it: here it was pre-trained."""
    values = {"students": (), "student": "layers=1", "objectives": ("sft",), "noises": (), "teacher_epochs": 0.0}
    found = staged.walk(made(materials, **values, pretrain=0.1), tmp_path / "run", metrics=METRICS)
    begun, _ = load_causal_lm(str(found.artifacts["pretrain"].path))
    trained = staged.model(found.train("sft-1")).state_dict()
    assert all(torch.equal(trained[name], value) for name, value in begun.state_dict().items())


@pytest.mark.parametrize("several", [False, True])
def test_a_size_with_another_tokenizer_is_refused_before_anything_is_trained(materials, tmp_path, several):
    other = saved(materials, tmp_path / "other", words=280)
    students = ("layers=1", str(other)) if several else (str(other),)
    with pytest.raises(ModelError, match="different tokenizers"):
        staged.walk(made(materials, students=students), tmp_path / "run", metrics=METRICS)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_shape_of_a_teacher_behind_an_endpoint_is_refused(materials):
    from types import SimpleNamespace

    with pytest.raises(ConfigError, match="architecture"):
        made(materials).builders(SimpleNamespace(teacher=None, tokenizer=None))  # type: ignore[arg-type]


def test_an_encoder_that_is_not_there_is_refused_before_anything_is_trained(materials, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        staged.walk(made(materials, sentence_encoder=str(tmp_path / "nowhere")), tmp_path / "run", metrics=METRICS)
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"divergence": "tvd"}, "divergence=tvd"),
        ({"teacher_topk": 8, "lm_weight": 0.5}, "teacher_topk=8, lm_weight=0.5"),
        ({"students": ("layers=1",), "pretrain": 1.0}, "pretrain beside students"),
    ],
)
def test_fields_that_a_grid_does_not_read_are_refused(values, said):
    with pytest.raises(ConfigError, match="fidelity does not use") as found:
        get_system("fidelity").make(**values).refuse_unread()
    assert said in str(found.value)
    get_system("fidelity").make().refuse_unread()
