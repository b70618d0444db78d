"""What the commands of `dsv3` can be told: a dataclass each, whose fields are its options and whose words its help.

Those of `stats`, `plan` and `bench decode` stand with what they do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.config import CacheDtype, CacheKind, RunConfig


@dataclass
class Demo:
    """The main job, end to end, in about five minutes on two CPU cores: train, stop, resume, evaluate, generate."""

    out: Path = Path("runs/demo")
    """the run's folder"""
    short: bool = False
    """a few steps of a smaller run, for seconds rather than minutes"""


@dataclass
class Train:
    """Train a preset. Every key of the run can be given; the rest is the preset's recipe.

    With --start, model and data are those of the run whose weights training begins with; a converted run is one, too.
    With --trunk they are the trunk's: what remains to say is --model.mtp-kind and --model.mtp-depth.
    """

    out: Path
    """the run's folder: run.json, checkpoints, metrics, pictures"""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    mesh: str | None = None
    """devices to spread the run over, as data=N,expert=N; on a CPU each stands for a core; none: a single one, and with
    --cluster all of them along data"""
    cluster: str | None = None
    """train in several processes, one a host: process 0's HOST:PORT, with --processes and --process-id; or auto, where
    SLURM, Kubernetes, Open MPI or a TPU pod tells; every process runs the same command, and OUT is a shared folder"""
    processes: int | None = None
    """how many processes the cluster has"""
    process_id: int | None = None
    """which of them this is, from 0"""
    cluster_timeout: int = 60
    """seconds to wait for the others at the start"""


@dataclass
class Eval:
    """Held-out measures of a run's last checkpoint: loss, bits a byte, by domain, MaxVio, MTP acceptance."""

    run: Annotated[Path, tyro.conf.Positional]
    """a folder that `dsv3 train` made"""
    paths: tuple[str, ...] = ()
    """other text to measure on; none: the run's own validation text"""
    batches: int = 8
    """batches measured"""
    cache_dtype: tuple[CacheDtype, ...] = ()
    """measure the same text read through caches of these dtypes, too, against the exact one"""


@dataclass
class Generate:
    """Continue a prompt, token by token as they come."""

    run: Annotated[Path, tyro.conf.Positional]
    """a folder that `dsv3 train` made"""
    prompt: str = "def "
    """the text to continue"""
    max_new_tokens: int = 256
    temperature: float = 0.8
    """0 takes the likeliest token each time"""
    top_k: int | None = None
    top_p: float | None = 0.95
    cache: CacheKind | None = None
    """what is remembered of each token; not given: the model's own, latent rows if it can; the word none: nothing"""
    cache_dtype: CacheDtype | None = None
    """of cached rows; none given: the model's compute dtype"""
    draft: str | None = None
    """who drafts: "mtp" (the model's own multi-token heads), or the folder of a smaller run with the same tokenizer"""
    draft_length: int = 1
    """tokens drafted a step; the text is distributed as without"""
    seed: int = 0
    mesh: str | None = None
    """devices to spread the model over, as data=N,expert=N,tensor=N; the text is a single device's; none: that one"""


@dataclass
class Convert:
    """Convert a folder: Hugging Face format into a run for `dsv3 generate`, a run into that format, or its dtype."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """a released folder (config.json and safetensors), or one that `dsv3 train` made"""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """the folder to make; on failure nothing is left of it"""
    to: Literal["run", "hf"] | None = None
    """what to make; none: what FOLDER is not, or hf where --dtype is given"""
    dtype: Literal["float32", "bfloat16", "fp8"] | None = None
    """of weights in Hugging Face format; none: the source's, FP8 becoming what its other weights are"""
    shard_mb: int = 5000
    """a safetensors file holds at most so many megabytes"""
    mtp: bool = True
    """--no-mtp leaves out the multi-token prediction layers of a released folder"""
    allow_nonfinite: bool = False
    """take NaN and Inf weights as they are"""


@dataclass
class TokenizerArgs:
    """Train a byte-level BPE tokenizer and write it as a tokenizer.json."""

    out: Annotated[Path, tyro.conf.Positional]
    """the file to write"""
    vocab_size: int = 8192
    paths: tuple[str, ...] = ()
    """files or folders of text; none: the text that this Python carries"""
    force: bool = False
    """write over a file that is there"""
