"""Read and write models as released folders (Hugging Face format), both by one table of names."""

import importlib

from dsv3_jax.hf.config_json import config_from_dict
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.hf.loading import load
from dsv3_jax.hf.tensor_names import tensor_table
from dsv3_jax.hf.writing import save


def __getattr__(name: str):
    """Hand on `convert`, which makes runs too: it belongs to a floor above."""
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("dsv3_jax.runs.convert").convert
