"""Read and write models as released folders (Hugging Face format), both by one table of names."""

from dsv3_jax.hf.config_json import config_from_dict, config_to_dict
from dsv3_jax.hf.conversion import convert
from dsv3_jax.hf.reading import load
from dsv3_jax.hf.table import tensor_table
from dsv3_jax.hf.writing import save
