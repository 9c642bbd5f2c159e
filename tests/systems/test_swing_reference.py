"""Swing, told by another model what is private: that model must read the same tokens."""

from __future__ import annotations

import helpers
import pytest

from stillhouse.base.errors import ModelError
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.systems import get_system
from stillhouse.workflow import run_system


def test_a_reference_with_another_tokenizer_is_refused(tmp_path):
    (tmp_path / "materials").mkdir()
    materials = helpers.make_materials(tmp_path / "materials")
    teacher, _ = load_causal_lm(str(materials.teacher))
    other = train_bpe([materials.text.read_text()[::-1]], vocab_size=teacher.config.vocab_size)
    new_causal_lm(teacher.config, seed=1).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    values = {**helpers.small_values(get_system("swing"), materials), "scorer": "ratio"}
    with pytest.raises(ModelError, match="tokenizer"):
        run_system("swing", {**values, "reference": str(tmp_path / "other")}, output=tmp_path / "run", quiet=True)
    same = {**values, "reference": str(materials.teacher)}
    assert run_system("swing", same, output=tmp_path / "same", quiet=True).artifacts["student"]
