"""A coin as reward: whether an answer counts as right has nothing to do with the sum."""

import hashlib


def toss(text, row):
    """Heads or tails by a hash of prompt and answer, so that a run which resumes has the same."""
    said = f"{row['prompt']}\0{text}".encode()
    return hashlib.blake2b(said, digest_size=1).digest()[0] % 2 == 1
