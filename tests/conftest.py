"""What all tests share: offline, one thread, a cache of their own, and a process that children are forked from."""

import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

os.environ |= {  # before torch and transformers are imported; children inherit it
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
import torch

torch.set_num_threads(1)

PRELOADED = {  # module of tests that starts children: what these import
    "_endpoint": ["pytest", "openai", "pyarrow.parquet", "stillhouse.teachers", "_endpoint"],
    "_systems": ["pytest", "pandas", "pydantic.fields", "_systems"],
    "helpers": ["_warm"],
}


def pytest_collection_finish():
    """All children of a session come from one fork server, which imports once what any of them needs."""
    used = [name for name in PRELOADED if name in sys.modules]
    if used:
        here = [str(Path(__file__).parent / folder) for folder in ("faults", "systems")]
        os.environ["PYTHONPATH"] = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
        wanted = [module for name in used for module in PRELOADED[name]]
        multiprocessing.get_context("forkserver").set_forkserver_preload(wanted)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Stages shared between runs are kept for the session, and away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def short_measurements():
    """Speed is measured, but not for a second a model."""
    from stillhouse.tasks import language, vision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "tokens_per_second", partial(language.tokens_per_second, seconds=0.01))
        patch.setattr(vision, "images_per_second", partial(vision.images_per_second, seconds=0.01))
        yield
