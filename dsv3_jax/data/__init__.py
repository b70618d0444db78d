"""Documents in, packed token batches out."""

from dsv3_jax.data.batches import train_batches, val_batches
from dsv3_jax.data.corpus import load_corpus
