"""Documents in, packed token batches out."""
