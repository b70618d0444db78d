"""Models as the folders that DeepSeek released them in (Hugging Face format), both ways, by one name table."""

from dsv3_jax.hf.config_json import config_from_dict, config_to_dict
from dsv3_jax.hf.convert import convert
from dsv3_jax.hf.reading import load
from dsv3_jax.hf.table import tensor_table
from dsv3_jax.hf.writing import save
