"""What children that run systems import, read once by the process they are forked from."""

import diffusers.models.modeling_utils  # noqa: F401
import joblib  # noqa: F401
import matplotlib.backends.backend_svg  # noqa: F401
import sklearn.datasets  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

import stillhouse.workflow  # noqa: F401
from stillhouse.systems import all_systems

all_systems()
