"""Advice on teachers: sizes in words, the published law, a measured one, and the command line."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from stillhouse.advise import Law, advise_teacher, in_words, law_of_run, model_size
from stillhouse.base.errors import ConfigError, ModelError, RunError
from stillhouse.cli.main import main
from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate
from stillhouse.metrics.capacity_law import BestTeacher, fit_law
from stillhouse.models.scaling import config_parameters
from stillhouse.models.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "value"), [("1.1B", 1.1e9), ("350m", 3.5e8), ("7e9", 7e9), ("14_800", 14_800), ("30K", 3e4)]
)
def test_sizes_as_people_write_them(text, value):
    assert parse_size(text) == value
    assert parse_size(format_size(value)) == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize("text", ["", "0B", "big", "-1B", "1.1 GB"])
def test_what_is_no_size(text):
    with pytest.raises(ModelError, match="number of parameters"):
        parse_size(text)


def test_the_published_law_chooses_in_logarithm():
    advice = advise_teacher("1B", ["410M", "1.4B", "2.8B", "6.9B"])
    assert (advice.teacher, advice.wanted) == ("2.8B", 2.5e9) and not advice.notes
    assert "arXiv 2311.07052" in in_words(advice) and "-> 2.8B" in in_words(advice)
    assert advise_teacher("1B", ["410M", "6.9B"]).notes  # far from what is wanted
    assert "larger than the student" in advise_teacher("1B", ["410M"]).notes[0]
    assert advise_teacher("1B").teacher is None
    with pytest.raises(ConfigError, match="above 0"):
        advise_teacher("1B", law=Law(0.0, "nowhere"))


def test_a_model_has_the_size_of_its_config(tmp_path):
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "m")
    assert model_size(str(tmp_path / "m")) == config_parameters(config)  # no weights are needed


def test_the_law_of_a_run(tmp_path, capsys):
    law = fit_law([BestTeacher(1e6, 3e6, False), BestTeacher(2e6, 8e6, True), BestTeacher(4e6, 16e6, False)])
    stage = Evaluate("law", lambda _context: ({"k": law.k}, {"law.json": law.to_json()}))
    Run(tmp_path / "run", quiet=True, trackers=()).execute([stage])
    found = law_of_run(tmp_path / "run")
    assert found.k == law.k and found.interval == pytest.approx(law.interval) and "1 of them at an edge" in found.source
    main(["advise", "teacher", "1M", "2M", "4M", "--law", str(tmp_path / "run"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["teacher"] == "4M" and printed["law"]["k"] == pytest.approx(law.k)
    Run(tmp_path / "other", quiet=True, trackers=()).execute([Evaluate("figures", lambda _context: {"a": 1})])
    with pytest.raises(RunError, match="has no law"):
        law_of_run(tmp_path / "other")


def test_the_command_line(capsys):
    main(["advise", "teacher", "1B", "1.4B", "2.8B"])
    assert "-> 2.8B" in capsys.readouterr().out
    main(["advise", "teacher", "1B", "1.4B", "2.8B", "--k", "1.5"])
    assert "-> 1.4B" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["advise", "teacher", "1B", "--k", "2", "--law", "x"])
    assert left.value.code == 2 and "one of them" in capsys.readouterr().err
