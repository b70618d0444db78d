"""Documents in, packed token batches out."""

from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.source import from_corpus, open_source
