"""`dsv3 …`: the command line. Bad input ends with one sentence on stderr and exit code 2."""

import contextlib
import errno
import io
import itertools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import tyro

from dsv3_jax.cli.common import Convert, Demo, Eval, Generate, TokenizerArgs, Train
from dsv3_jax.cluster import supervisor
from dsv3_jax.config import DataConfig, replace

USAGE = """usage: dsv3 COMMAND …

  demo                 train the tiny model on text that this Python carries, look at it, and hear it speak
  train PRESET         train a model; the same command again goes on where it stopped
  eval RUN             held-out measures of a run's last checkpoint
  stats RUN            where its tokens go: routing statistics of held-out text, as numbers, pictures and a page
  generate RUN         continue a prompt with a run's last checkpoint
  bench decode RUN     how fast a run's last checkpoint decodes, by cache, batch, context and draft
  convert FOLDER OUT   released weights (Hugging Face format) into a run, a run into them, or FP8 into another dtype
  plan PRESET          what a mesh of devices would hold, compute and send, without one
  info PRESET          parameters, FLOPs and cache bytes of a model, without allocating it
  tokenizer OUT        train a byte-level BPE tokenizer

`dsv3 COMMAND --help` lists a command's options. Presets: {presets}.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dsv3`. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return _guarded(lambda: _dispatch(words))


def _guarded(command: Callable[[], int]) -> int:
    """A command's exit code, its errors told in one sentence."""
    try:
        return command()
    except BrokenPipeError:  # whoever read us, as `head` does, has had enough
        sys.stdout = open(os.devnull, "w")
        return 141
    except (ValueError, OSError) as error:
        return _fail(_sentence(error))
    except MemoryError as error:
        return _fail(f"not enough memory: {_sentence(error)}")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error):  # from inside XLA or Orbax
            return _fail(_sentence(error))
        raise


def _dispatch(words: list[str]) -> int:
    from dsv3_jax.presets import MODELS

    commands: dict[str, Callable[[list[str]], int]] = {
        "demo": _demo, "train": _train, "eval": _eval, "stats": _stats, "generate": _generate, "bench": _bench,
        "convert": _convert, "plan": _plan, "info": _info, "tokenizer": _tokenizer,
    }  # fmt: skip
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(presets=", ".join(MODELS)), end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("dsv3-jax"))
        return 0
    if words[0] not in commands:
        raise ValueError(f"command {words[0]!r} is not one of {', '.join(commands)}")
    return commands[words[0]](words[1:])


def _parse(kind, words: list[str], command: str, default=None):
    """tyro's parsing, its errors as one sentence."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=words, prog=f"dsv3 {command}", default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
        text = " ".join(re.sub(r"[╭╮╰╯│─]", " ", text).split())
        text = re.sub(r"^(Parsing error|Unrecognized options|Invalid \w+) ", "", text)
        raise ValueError(text.split(" For full helptext")[0]) from None


def _named_preset(words: list[str], command: str, look_up: Callable[[str], Any]):
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            return look_up("tiny"), words
        raise ValueError(f"dsv3 {command} needs the name of a preset first, as in: dsv3 {command} tiny")
    return look_up(words[0]), words[1:]


def _given(words: list[str], option: str) -> str | None:
    """An option's value, before the parser, whose defaults hang on it; what is wrong with it is the parser's to say."""
    for word, after in itertools.pairwise([*words, ""]):
        if word == option or word.startswith(option + "="):
            return word.removeprefix(option).removeprefix("=") or after
    return None


def _prepare() -> None:
    from dsv3_jax.kernels.cpu.memory import keep_memory

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    keep_memory()


def _train(words: list[str]) -> int:
    args = _train_args(words)
    cluster = _cluster(args)
    if cluster is not None:
        return supervisor.run(cluster, lambda line, port: [sys.executable, "-c", WORKER, str(line), str(port), *words])
    _prepare()
    from dsv3_jax.training.loop import fit

    fit(args.run, args.out, mesh=_mesh(args.mesh))
    return 0


def _train_args(words: list[str]) -> Train:
    from dsv3_jax.presets import recipe

    run, rest = _named_preset(words, "train", recipe)
    if trunk := _given(rest, "--trunk"):
        from dsv3_jax.training.frozen import on_trunk

        run = on_trunk(run, trunk, _given(rest, "--out"))
    elif start := _given(rest, "--start"):
        from dsv3_jax.training.warm_start import on_weights

        run = on_weights(run, start, _given(rest, "--out"))
    return _parse(Train, rest, "train PRESET", default=Train(out=tyro.MISSING, run=run))


def _cluster(args: Train) -> supervisor.Cluster | None:
    if args.cluster is not None:
        return supervisor.Cluster(args.cluster, args.processes, args.process_id, args.cluster_timeout)
    if args.processes is not None or args.process_id is not None:
        raise ValueError("--processes and --process-id need --cluster, which says where process 0 is")
    return None


WORKER = (
    "import sys; from dsv3_jax.cli import main; sys.exit(main.work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))"
)


def work(line: int, port: int, words: list[str]) -> int:
    """`dsv3 train … --cluster …` as the worker of a watch, see `watch`. Returns 0: it ends with any other code here."""
    supervisor.end_with_watch(line)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)  # ours alone: Gloo tells its connections on descriptor 1
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        code = _guarded(lambda: _train_in_cluster(line, port, words))
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        # At once: at the interpreter's exit JAX waits for its peers to come to theirs, for minutes, while they wait in
        # a collective for this one, and no watch sees that anything is wrong.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _train_in_cluster(line: int, port: int, words: list[str]) -> int:
    args = _train_args(words)
    found = _cluster(args)
    assert found is not None
    _prepare()
    from dsv3_jax.cluster import processes as cluster
    from dsv3_jax.mesh import sharding
    from dsv3_jax.training.loop import fit

    sizes = sharding.parse_mesh(args.mesh) if args.mesh else None
    supervisor.report(line, cluster.join(found, math.prod(sizes.values()) if sizes else None, port))
    try:
        fit(args.run, args.out, mesh=cluster.make_mesh(sizes))
    except Exception as error:
        if cluster.is_of_connection(error):
            return _fail(f"the processes lost each other: {_sentence(error)}", supervisor.LOST)
        raise
    return 0


def _mesh(text: str | None):
    if text is None:
        return None
    import jax

    from dsv3_jax.mesh import sharding

    sizes = sharding.parse_mesh(text)
    with contextlib.suppress(RuntimeError):  # too late where arrays were made before: what devices there are must do
        jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    return sharding.make_mesh(**sizes)


def _demo(words: list[str]) -> int:
    args = _parse(Demo, words, "demo")
    _prepare()
    from dsv3_jax.cli.demo import demo

    return demo(args.out, short=args.short)


def _eval(words: list[str]) -> int:
    args = _parse(Eval, words, "eval")
    if args.batches < 1:
        raise ValueError(f"batches={args.batches} is below 1")
    _prepare()
    from rich.console import Console

    from dsv3_jax.data import batches as data
    from dsv3_jax.data import tokenizer
    from dsv3_jax.training.checkpoint import load_model
    from dsv3_jax.training.evaluate import cache_quality, evaluate

    model, _, run, step = load_model(args.run)
    cfg = replace(run.data, paths=args.paths) if args.paths else run.data
    corpus, text = data.load_corpus(cfg), tokenizer.load(cfg.tokenizer)
    batches = data.val_batches(corpus, text, cfg, args.batches)
    found = evaluate(model, batches, text, corpus.domains)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"step {step}")
    for name, value in found.items():
        if name != "load":
            console.print(f"{name:24s} {_plain(value)}")
    if args.cache_dtype:
        by_dtype = cache_quality(model, batches, ("float32", *args.cache_dtype))
        exact = by_dtype["float32"].val_loss
        for name, quality in by_dtype.items():
            console.print(
                f"{f'through {name} cache':24s} {quality.val_loss:.4f} ({quality.val_loss / exact - 1:+.3%}), "
                f"greedy tokens the same {quality.agreement:.2%}, {quality.bytes_per_token} bytes a token"
            )
    return 0


def _stats(words: list[str]) -> int:
    from dsv3_jax.cli import stats as command

    args = _parse(command.Stats, words, "stats")
    _prepare()
    return command.stats(args)


def _plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4f}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(f"{v:.4f}" for v in value)
    return f"{value:.4f}"


def _generate(words: list[str]) -> int:
    args = _parse(Generate, words, "generate")
    _prepare()
    from dsv3_jax.data import tokenizer
    from dsv3_jax.decoding.generate import Sampling, generate_in_parts
    from dsv3_jax.report.progress import Speech
    from dsv3_jax.training.checkpoint import load_draft, load_model

    mesh = _mesh(args.mesh)
    model, _, run, _ = load_model(args.run, mesh)
    text = tokenizer.load(run.data.tokenizer)
    draft: Any = args.draft
    if draft not in (None, "mtp"):
        draft = load_draft(draft, run, mesh)
    parts = generate_in_parts(
        model,
        [text.encode(args.prompt)],
        args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p),
        stop_tokens=(text.eos_id,),
        cache=args.cache,
        cache_dtype=args.cache_dtype,
        draft=draft,
        draft_length=args.draft_length,
        seed=args.seed,
    )
    first = next(parts)  # bad requests end here, before the prompt is printed
    pieces, seen = text.stream(), 0
    with Speech(args.prompt) as speech:
        for made in itertools.chain([first], parts):
            speech.say(pieces.push(made.tokens[0][seen:]))
            speech.measured(made.acceptance, made.mean_accepted, made.tokens_per_s, made.steps)
            seen = len(made.tokens[0])
        speech.say(pieces.finish())
    return 0


def _bench(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("usage: dsv3 bench decode RUN …\n\n`dsv3 bench decode --help` lists its options.")
        return 0
    if not words or words[0] != "decode":
        said = f"benchmark {words[0]!r} is not there" if words else "dsv3 bench needs the name of a benchmark"
        raise ValueError(f"{said}: there is decode, as in: dsv3 bench decode RUN")
    from dsv3_jax.cli import bench

    args = _parse(bench.Decode, words[1:], "bench decode")
    _prepare()
    return bench.decode(args)


def _convert(words: list[str]) -> int:
    args = _parse(Convert, words, "convert")
    _prepare()
    from dsv3_jax import hf

    said = hf.convert(
        args.folder,
        args.out,
        to=args.to,
        dtype=args.dtype,
        shard_bytes=args.shard_mb * 1_000_000,
        mtp=args.mtp,
        allow_nonfinite=args.allow_nonfinite,
    )
    print(said)
    return 0


def _plan(words: list[str]) -> int:
    _prepare()
    from dsv3_jax.planning.plan import Plan, plan
    from dsv3_jax.presets import recipe

    run, rest = _named_preset(words, "plan", recipe)
    args = _parse(Plan, rest, "plan PRESET", default=Plan(run.model))
    return plan(args, run, words[0] if args.model == run.model else f"{words[0]}, changed")


def _info(words: list[str]) -> int:
    from dsv3_jax.config import ModelConfig
    from dsv3_jax.model.counting import describe
    from dsv3_jax.presets import preset

    cfg, rest = _named_preset(words, "info", preset)
    cfg = _parse(ModelConfig, rest, "info PRESET", default=cfg)
    name = words[0] if not rest else f"{words[0]}, changed"
    for what, amount in describe(cfg, name):
        print(f"{what:22s} {amount}")
    return 0


def _tokenizer(words: list[str]) -> int:
    args = _parse(TokenizerArgs, words, "tokenizer")
    if args.out.exists() and not args.force:
        raise ValueError(f"{args.out} is there already; --force writes over it")
    from dsv3_jax.data import batches as data
    from dsv3_jax.data import tokenizer

    corpus = data.load_corpus(DataConfig(paths=args.paths))
    made = tokenizer.train_bpe((d.text for d in corpus.train), args.vocab_size, str(args.out))
    sample = "".join(d.text for d in corpus.val)[:200_000]
    ratio = len(sample.encode()) / max(len(made.encode(sample)), 1)
    print(f"{args.out}: {made.vocab_size} tokens, {ratio:.2f} bytes a token on held-out text")
    return 0


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error.filename or error.strerror}; what was saved before is whole"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(sentence: str, code: int = 2) -> int:
    print(f"dsv3: {sentence}", file=sys.stderr)
    return code
