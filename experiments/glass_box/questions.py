"""Ask a served demo: which expert knows indentation, what happens without it, where drafts fail.

dsv3 serve runs/demo --draft mtp
python experiments/glass_box/questions.py runs/demo

All numbers come through the server's interface, as the page has them. The text is held-out code.
"""

import argparse
import itertools
import json
import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import dsv3_jax as ds
from dsv3_jax.data.corpus import load_corpus

TOKENS = 768  # of each text
CUTS = 64, 256, 448, 640  # after so many tokens of a text, new ones are written
NEW = 32
OFF = [[1, 13], [2, 0], [0, 4]]  # (sparse layer, expert): the demo's, by `which_expert`
SPACE = re.compile(r"\n *|  +")  # a line's end with the spaces after it, or spaces


class Server:
    """The interface that the page uses."""

    def __init__(self, address: str):
        self.address = address

    def open(self, path: str, body: dict[str, Any]) -> Any:
        """Post a body."""
        kind = {"content-type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), kind)
        return urllib.request.urlopen(request)

    def read(self, ids: list[int], off: list[list[int]]) -> "Seen":
        """Read a text in one pass, without some experts."""
        with self.open("/glass/read", {"ids": ids, "off": off}) as answer:
            found = json.load(answer)
        tokens = found["tokens"][1:]  # the first has no log p
        return Seen(
            nats=-np.array([token["logprob"] for token in tokens]),
            right=np.array([token["alternatives"][0][0] == token["id"] for token in tokens]),
            texts=[token["text"] for token in found["tokens"]],
            experts=np.array(found["experts"]),
        )

    def new(
        self, texts: list[list[int]], off: list[list[int]], temperature: float = 0.8
    ) -> Iterator[list[dict[str, Any]]]:
        """Continue each text at all `CUTS`. Yields the new tokens of each, with their drafts."""
        settings = {"max_tokens": NEW, "temperature": temperature, "seed": 0, "stream": True}
        for ids, cut in itertools.product(texts, CUTS):
            body = {"prompt": ids[:cut], "glass": {"off": off}, **settings}
            with self.open("/v1/completions", body) as answer:
                events = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
            yield [token for event in events for token in event["glass"]["tokens"]]


class Seen(NamedTuple):
    """What a model makes of n tokens."""

    nats: np.ndarray  # [n-1]: -log p of the tokens but the first
    right: np.ndarray  # [n-1]: it is the likeliest one
    texts: list[str]  # [n]
    experts: np.ndarray  # [n, sparse layers, K]


def is_indentation(text: str) -> bool:
    """Whether a token is a line's end with the spaces after it, or spaces alone."""
    return SPACE.fullmatch(text) is not None


def which_expert(server: Server, texts: list[list[int]], layers: int, experts: int) -> None:
    """Print what each expert is worth for indentation, and how often indentation goes to it."""
    served = [server.read(ids, []) for ids in texts]
    nats = np.concatenate([seen.nats for seen in served])
    goes = np.concatenate([seen.experts[1:] for seen in served])
    space = np.array([is_indentation(text) for seen in served for text in seen.texts[1:]])
    colon = np.array([text.endswith(":") for seen in served for text in seen.texts[:-1]])
    behind = space & colon
    print(f"{len(texts)} texts; of {len(nats)} tokens {space.sum()} are indentation, "
          f"{behind.sum()} of them behind a colon")  # fmt: skip
    print(f"-log p: indentation {nats[space].mean():.3f}, behind a colon "
          f"{nats[behind].mean():.3f}, other tokens {nats[~space].mean():.3f} nats")  # fmt: skip

    rows = []
    for layer in range(layers):
        for expert in range(experts):
            other = np.concatenate([server.read(ids, [[layer, expert]]).nats for ids in texts])
            more = other - nats
            error = more[behind].std() / behind.sum() ** 0.5
            has = (goes[:, layer] == expert).any(-1)
            worth = more[behind].mean(), error, more[space].mean(), more[~space].mean()
            rows.append((*worth, has[space].mean(), has[~space].mean(), layer, expert))

    print("without it, nats a token: behind a colon (standard error), indentation, others; "
          "it receives of indentation, of others")  # fmt: skip
    for row in sorted(rows, reverse=True):
        behind_colon, error, inside, others, has, has_other, layer, expert = row
        print(f"layer {layer + 1} expert {expert:2}: {behind_colon:+.3f} ({error:.3f}) "
              f"{inside:+.3f} {others:+.3f}; {has:4.0%} {has_other:4.0%}")  # fmt: skip


def without_it(server: Server, texts: list[list[int]]) -> None:
    """Print how often indentation behind a colon is right, and new lines that are indented."""
    for count in range(len(OFF) + 1):
        off = OFF[:count]
        seen = [server.read(ids, off) for ids in texts]
        right = np.concatenate([each.right for each in seen])
        pairs = [pair for each in seen for pair in zip(each.texts, each.texts[1:], strict=False)]
        behind = np.array([before.endswith(":") and is_indentation(text) for before, text in pairs])

        new = ["".join(t["text"] for t in tokens) for tokens in server.new(texts, off)]
        lines = [line for text in new for line in text.split("\n")[1:] if line.strip()]
        print(f"off {off}: the likeliest token is right at {right[behind].sum()} of "
              f"{behind.sum()} places behind a colon; {sum(x[0] == ' ' for x in lines)} of "
              f"{len(lines)} new lines are indented")  # fmt: skip

    layer, expert = OFF[0]
    seen = [server.read(ids, []) for ids in texts]
    read = [np.array([text.endswith(":") for text in each.texts]) for each in seen]
    has = [(each.experts[:, layer] == expert).any(-1) for each in seen]
    both = sum((colon & goes).sum() for colon, goes in zip(read, has, strict=True))
    print(f"expert {expert} of layer {layer + 1} receives {both} of {sum(map(sum, read))} colons")


def kind_of(text: str) -> str:
    """The kind of a token by its text."""
    if is_indentation(text):
        return "indentation"
    if re.fullmatch(r" [A-Za-z]+", text):
        return "begins a word"
    return "inside a word" if re.fullmatch(r"[A-Za-z]+", text) else "signs and digits"


def where_drafts_fail(server: Server, texts: list[list[int]]) -> None:
    """Print accepted drafts by kind of token, and by how sure the model is at that place."""
    for temperature in (0.0, 0.8):
        counts: dict[str, list[bool]] = defaultdict(list)
        for tokens in server.new(texts, [], temperature):
            for token in filter(lambda token: token["draft"], tokens):
                most = 100 * np.exp(token["alternatives"][0][2])
                sure = "below 20 %" if most < 20 else "20 to 50 %" if most < 50 else "above 50 %"
                for name in ("all", kind_of(token["text"]), f"likeliest token {sure}"):
                    counts[name].append(token["draft"]["id"] == token["id"])
        for name, found in sorted(counts.items()):
            print(f"temperature {temperature}, {name}: {sum(found)} of {len(found)} drafts "
                  f"accepted, {np.mean(found):.0%}")  # fmt: skip


def main() -> None:
    """Ask the three questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--texts", type=int, default=24)
    args = parser.parse_args()
    server = Server(args.address)
    try:
        with urllib.request.urlopen(args.address + "/glass/model") as answer:
            model = json.load(answer)
    except (OSError, ValueError) as error:  # nobody serves there, or it is no address
        words = "; start dsv3 serve in another terminal"
        parser.error(f"--address={args.address} does not answer: {error}{words}")

    tokenizer = ds.load_text(args.run).tokenizer
    documents = load_corpus(ds.read_run(args.run).data).val
    code = [tokenizer.encode(each.text)[:TOKENS] for each in documents if each.domain == "code"]
    texts = [ids for ids in code if len(ids) == TOKENS][: args.texts]
    where_drafts_fail(server, texts)
    without_it(server, texts)
    which_expert(server, texts, model["layers"], model["experts"])


if __name__ == "__main__":
    main()
