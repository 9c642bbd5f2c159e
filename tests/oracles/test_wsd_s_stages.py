"""WSD-S (card 121): the system's own segments, one after the other, are the run that never stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import staged
import torch

from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate
from stillhouse.metrics.landscape import gradient_cosine
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.objectives.lr_schedules import Course, Piece, decay_form
from stillhouse.systems import get_system
from stillhouse.tasks.language import LanguageTask

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers

STEPS, WARMUP, ROWS = 20, 4, 4
INVERSE = decay_form("inverse", floor=0.1)


class Recorded(staged.Walked):
    """What the stages of a run were given, the evaluations among them left out unless they are asked for."""

    def __init__(self, system: Any, folder: Path, *, evaluate: bool = False) -> None:
        super().__init__()
        self.places: dict[str, Any] = {}
        run = Run(folder, quiet=True)

        def stages() -> Any:
            generator, sent = system.stages(run), None
            while True:
                try:
                    stage = generator.send(sent)
                except StopIteration:
                    return
                if isinstance(stage, Evaluate) and (stage.name == "evaluation" or not evaluate):
                    sent = None
                    continue
                self.stages[stage.name] = stage
                if not isinstance(stage, Evaluate):
                    self.places[stage.name] = stage.source.state_dict()
                sent = self.artifacts[stage.name] = yield stage

        run.execute(stages())


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


def made(materials: helpers.Materials, **more: Any) -> Any:
    usual = staged.fields(helpers.small_values(get_system("wsd-s"), materials))
    warmup = {"warmup": WARMUP / STEPS, "weight_decay": 0.1}
    return get_system("wsd-s").make(**{**usual, "steps": STEPS, "batch_size": ROWS, **warmup, **more})


@pytest.fixture(scope="module")
def recorded(materials: helpers.Materials, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(made(materials), tmp_path_factory.mktemp("run"))


NAMES = {
    "wsd-s": ["wsd-s-stable-1", "wsd-s-decay-1", "wsd-s-stable-2", "student"],
    "wsd": ["wsd-stable-1", "wsd-decay-1", "wsd-stable-2", "wsd-decay-2"],
}


def test_which_segment_goes_on_from_which(recorded):
    """WSD-S from the decayed weights, WSD from the stable ones: weights, moments, place in the text."""
    assert list(recorded.stages) == [*NAMES["wsd-s"], *NAMES["wsd"]]
    before = dict(zip(NAMES["wsd-s"], [None, *NAMES["wsd-s"]], strict=False))
    before |= {"wsd-stable-1": None, "wsd-decay-1": "wsd-stable-1", "wsd-stable-2": "wsd-stable-1"}
    before |= {"wsd-decay-2": "wsd-stable-2"}
    ends = {None: 0}
    for name, start in before.items():
        stage = recorded.train(name)
        carried = staged.player(stage).optimizer
        assert carried.start == (None if start is None else recorded.artifacts[start].path)
        place, length = recorded.places[name], len(stage.source)
        assert place["epoch"] * length + place["position"] == ends[start]
        ends[name] = ends[start] + stage.steps
        assert stage.best is None
    assert [ends[name] for name in NAMES["wsd-s"]] == [8, 10, 16, 20]  # decays of a fifth of 10 and of 20
    assert [ends[name] for name in NAMES["wsd"]] == [8, 10, 14, 18]  # whose first decay is charged


def pieces(method: str) -> list[tuple[int, int]]:
    return [(8, 10), (16, 20)] if method == "wsd-s" else [(14, 18)]


@pytest.mark.parametrize(("method", "last"), [("wsd-s", "student"), ("wsd", "wsd-decay-2")])
def test_the_segments_are_one_run_to_the_bit(recorded, materials, tmp_path, method, last):
    """The same student, AdamW and text under the whole course of the rate, never stopped."""
    preparing = LanguageTask.prepare(made(materials), run := Run(tmp_path / "whole", quiet=True))
    with pytest.raises(StopIteration) as done:
        next(preparing)
    task = done.value.value
    course = Course(tuple(Piece(begin, end, INVERSE) for begin, end in pieces(method)), WARMUP)
    stage = task.train("whole", task.cross_entropy, steps=pieces(method)[-1][1])
    player = staged.player(stage)
    player.lr, stage.best = course, None
    run.execute([stage])
    whole = staged.model(stage).state_dict()
    found, _ = load_causal_lm(str(recorded.artifacts[last].path), dtype=torch.float32)
    differ = [name for name, value in found.state_dict().items() if not torch.equal(value, whole[name])]
    assert differ == []


def test_every_step_has_the_rate_of_its_course(recorded):
    """As it was given to the stages: warm-up, one, decays; after the first decay of WSD-S one again, at once."""
    from stillhouse.core.schedule import Progress

    def rates(names: list[str]) -> list[float]:
        found = []
        for name in names:
            stage = recorded.train(name)
            found += [staged.player(stage).lr(Progress(step, stage.steps)) for step in range(stage.steps)]
        return found

    rising, falling = [0, 0.25, 0.5, 0.75], [INVERSE(step / 4) for step in range(4)]
    assert rates(NAMES["wsd-s"]) == pytest.approx([*rising, 1, 1, 1, 1, 1, INVERSE(0.5), *[1] * 6, *falling])
    assert rates(["wsd-stable-1", "wsd-stable-2", "wsd-decay-2"]) == pytest.approx([*rising, *[1] * 10, *falling])
    assert rates(["wsd-decay-1"]) == pytest.approx([1, INVERSE(0.5)])


@pytest.mark.parametrize("distil", [0.0, 0.3, 1.0])
def test_what_a_segment_minimises(materials, tmp_path, distil):
    stage = next(made(materials, distil=distil).stages(Run(tmp_path, quiet=True)))
    teacher, _ = load_causal_lm(str(materials.teacher))
    batch = next(stage.source)
    q, p = (staged.log_probabilities(one, batch) for one in (staged.model(stage), teacher))
    loss = -q.gather(-1, batch["input_ids"][:, 1:, None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    expected = (1 - distil) * loss + distil * kl
    assert staged.objective(stage)(batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_text_of_one_batch_has_gradients_without_noise(materials, tmp_path):
    """Batches that follow one another are then one batch: cosine 1, and no error at the end of the run."""
    model = torch.nn.Linear(2, 1, bias=False)
    assert gradient_cosine(model, [lambda: model.weight[0, 0] * 3]) == pytest.approx(1)
    system = made(materials, batch_size=500, schedules=("wsd-s",), steps=10)
    found = Recorded(system, tmp_path, evaluate=True)
    table = found.artifacts["wsd-s-landscape"].table()
    assert [row["cosine"] for row in table.rows] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_the_low_rate_starts_where_the_last_decay_does(materials, tmp_path):
    """Weights, moments, place in the text and number of steps; only the rate is another."""
    from stillhouse.core.schedule import Progress

    found = Recorded(made(materials, schedules=("wsd-s", "cyclic-cosine"), low=0.1), tmp_path / "run")
    assert [name for name in found.stages if "low" in name] == ["wsd-s-low"]
    low, decay = found.train("wsd-s-low"), found.train("student")
    assert found.places["wsd-s-low"] == found.places["student"] and low.steps == decay.steps
    begins = [staged.player(stage).optimizer.start for stage in (low, decay)]
    assert begins == [found.artifacts["wsd-s-stable-2"].path] * 2
    rate = staged.player(low).lr
    assert [rate(Progress(step, low.steps)) for step in range(low.steps)] == [0.1] * low.steps
