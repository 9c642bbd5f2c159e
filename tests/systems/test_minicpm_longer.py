"""The stages of minicpm that are off by default: longer contexts, and what is measured of the decay."""

from __future__ import annotations

import helpers
import pytest

from stillhouse.base.errors import ConfigError
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.systems import all_systems
from stillhouse.workflow import run_system

QUICK = {"tunnel_widths": (), "preferences": None, "experts": 0, "steps": 12, "dynamics": True, "long_steps": 4}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    made = helpers.make_materials(tmp_path_factory.mktemp("materials"))
    long = [helpers.sentences(count, seed).replace("\n\n", " ") for seed, count in enumerate([3, 8, 8, 16, 16, 16])]
    (made.folder / "long.txt").write_text("\n\n".join(long))
    return made


def values(materials, **more):
    base = helpers.small_values(all_systems()["minicpm"], materials)
    return {**base, **QUICK, "validation": 0.3, "window": 64, **more}


@pytest.mark.slow
def test_contexts_grow_from_the_stable_model(materials, tmp_path):
    given = {"long_windows": (128, 256), "long_data": str(materials.folder / "long.txt"), "long_base": 50.0}
    done = run_system("minicpm", values(materials, **given), output=tmp_path / "run", quiet=True)
    bases = []
    for name in ("stable", "long-1", "long-2"):
        config = load_causal_lm(str(done.artifacts[name].path))[0].config
        bases.append(config.rope_parameters["rope_theta"])
    dims = config.hidden_size // config.num_attention_heads
    assert bases == pytest.approx([1e4, 5e5, 5e5 * 2 ** (dims / (dims - 2))])
    assert config.max_position_embeddings == 256
    measured = done.artifacts["long-context"].metrics
    assert {f"{name}/loss at {n}" for name in ("stable", "long-1", "long-2") for n in (64, 128, 256)} == set(measured)
    dynamics = done.artifacts["dynamics"].metrics
    assert 0 < dynamics["decay/movement"] < dynamics["stable/movement"]
    assert dynamics["stable/gradient"] > 0 and -1 <= dynamics["decay/cosine"] <= 1


@pytest.mark.parametrize(
    ("windows", "said"), [((128, 128), "must rise"), ((64,), "must rise"), ((4096, 9000), "no doc")]
)
def test_lengths_that_cannot_be_are_refused(materials, tmp_path, windows, said):
    given = {"long_windows": windows, "long_data": str(materials.folder / "long.txt"), "steps": 4, "dynamics": False}
    if said == "no doc":
        given["long_windows"] = (2048, 4096)
    with pytest.raises(ConfigError, match=said):
        run_system("minicpm", values(materials, **given), output=tmp_path / "run", quiet=True)
