"""transformers' results on a folder: logits, loss, gradients, ids, greedy tokens, MTP logits.

`python tests/parity/parity_reference.py` writes the golden files that `make test` compares our
results with.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers
from released import (
    GOLDEN,
    GRID,
    MTP_WEIGHT,
    NEW,
    Cell,
    dequantized,
    file_name,
    probed,
    stored,
    without_int4,
    write_folder,
)
from released import tokens as tokens_of
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import MtpModel

from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.hf.tensor_files import CONFIG, SINGLE, write_json

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def plain_folder(folder: Path, cell: Cell) -> Path:
    """Write a cell's folder for transformers.

    It is dequantized, since transformers reads neither FP8 nor 4 bits on CPU, and labelled
    DeepSeek-V3 where transformers does not know the label.
    """
    if cell.file != "fp8" and not cell.name.startswith(("Kimi", "Moonlight")):
        return write_folder(folder, cell)
    arrays = without_int4(stored(cell))
    plain = {}
    for k, v in arrays.items():
        if k + "_scale_inv" in arrays:
            plain[k] = dequantized(v, arrays[k + "_scale_inv"])
        elif not k.endswith("_scale_inv"):
            plain[k] = v.astype(np.float32)
    folder.mkdir(parents=True)
    write_json(folder / CONFIG, config_to_dict(cell.cfg, dtype="float32"))
    save_file(plain, folder / SINGLE, metadata={"format": "pt"})
    return folder


def load_theirs(folder: Path, num_layers: int, mtp_depth: int, tied: bool):
    """Load the model and its MTP part (or None), and check that every tensor was used."""
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"}
    settings |= {"dtype": torch.float32, "output_loading_info": True}
    main, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    missing = set(report["missing_keys"]) - ({"lm_head.weight"} if tied else set())
    assert not missing and not report["mismatched_keys"], report
    later = tuple(f"model.layers.{num_layers + k}." for k in range(mtp_depth))
    assert all(key.startswith(later) for key in report["unexpected_keys"])
    return main, _mtp(main, folder, num_layers, mtp_depth) if mtp_depth else None


def _mtp(main: nn.Module, folder: Path, num_layers: int, depth: int) -> MtpModel:
    # what `get_mtp_config` asks for, and the released files leave out
    if hasattr(main.config, "index_topk"):
        main.config.mtp_layer_types = ["indexed_attention"] * depth
        main.config.mtp_mlp_layer_types, main.config.num_mtp_layers = ["sparse"] * depth, depth
    mtp, state = MtpModel(main, depth), {}
    for layer in mtp.layers:  # GLM's block returns its choice too, which `MtpLayer` does not expect
        layer.mtp_block.register_forward_hook(
            lambda _m, _i, out: out[0] if isinstance(out, tuple) else out
        )
    arrays = {
        k: v.float()
        for file in sorted(folder.glob("*.safetensors"))
        for k, v in load_file(file).items()
    }
    for k in range(depth):
        layer = {n.removeprefix(f"model.layers.{num_layers + k}."): v for n, v in arrays.items()}
        layer = {n: v for n, v in layer.items() if not n.startswith(("model.", "lm_head."))}
        del layer["embed_tokens.weight"], layer["shared_head.head.weight"]
        for name, value in layer.items():
            outer = name.startswith(("enorm", "hnorm", "eh_proj"))
            inner = "post_norm.weight" if name == "shared_head.norm.weight" else f"mtp_block.{name}"
            state[f"layers.{k}.{name if outer else inner}"] = value
        block = f"layers.{k}.mtp_block.mlp.experts"
        count = sum(name.startswith(block) for name in state) // 3
        gate, up, down = (
            torch.stack([state.pop(f"{block}.{e}.{w}_proj.weight") for e in range(count)])
            for w in ("gate", "up", "down")
        )
        state |= {f"{block}.gate_up_proj": torch.cat([gate, up], dim=1), f"{block}.down_proj": down}
    state = {n.removeprefix("layers."): v for n, v in state.items()}
    mtp.layers.load_state_dict(state)  # it raises for any missing or unexpected key
    return mtp


def _gates(module: nn.Module) -> tuple[list[torch.Tensor], list]:
    """Return a list that collects the routers' next choices in layer order, and the hooks."""
    chosen: list[torch.Tensor] = []
    gates = [m for n, m in module.named_modules() if n.endswith("mlp.gate")]

    def note(_module, _inputs, out):
        chosen.append(out[2])

    return chosen, [gate.register_forward_hook(note) for gate in gates]


def theirs(folder: Path, cell: Cell) -> dict[str, np.ndarray]:
    """Compute transformers' results on the grid's tokens; `folder` is one that it reads."""
    cfg = cell.cfg
    main, mtp = load_theirs(folder, cfg.num_layers, cfg.mtp_depth, cfg.tie_embeddings)
    tokens = torch.tensor(tokens_of(cfg), dtype=torch.long)
    batch, length = tokens.shape
    chosen, hooks = _gates(main)
    h = main.model(tokens, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    logits = main.lm_head(h)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    # without a sparse layer
    ids = torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.long)
    results = {"logits": logits, "expert_ids": ids.view(-1, batch, length, cfg.experts_per_token)}
    for k in range(cfg.mtp_depth):
        short = length - k - 1
        embedded, positions = main.model.embed_tokens(tokens[:, k + 1 :]), torch.arange(short)[None]
        mask = torch.full((short, short), -torch.inf).triu(1)[None, None]
        chosen, hooks = _gates(mtp.layers[k])
        rotary = main.model.rotary_emb(embedded, positions)
        h = mtp.layers[k](embedded, h[:, :short], rotary, mask, positions, None)
        hooks[0].remove()
        logits = main.lm_head(h)
        nats = cross_entropy(logits[:, : short - 1].flatten(0, 1), tokens[:, k + 2 :].flatten())
        loss = loss + MTP_WEIGHT / cfg.mtp_depth * nats
        results |= {
            f"mtp_logits.{k}": logits,
            f"mtp_expert_ids.{k}": chosen[0].view(batch, short, -1),
        }
    loss.backward()
    results = {
        k: (v.sort(-1).values if "ids" in k else v).detach().numpy() for k, v in results.items()
    }
    results = {k: v.astype(np.uint8) if "ids" in k else v for k, v in results.items()}
    results["loss"] = loss.detach().numpy()
    results |= {f"grad.{k}": v for k, v in _gradients(main, mtp, cfg.num_layers).items()}
    prompts = tokens[:, :8]
    how = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": NEW, "do_sample": False}
    results["greedy"] = main.generate(prompts, **how)[:, 8:].numpy().astype(np.int32)
    return results


def _gradients(main: nn.Module, mtp: nn.Module | None, num_layers: int) -> dict[str, np.ndarray]:
    """Return gradients by released name, one for each expert."""
    named = dict(main.named_parameters())
    if mtp is not None:
        for name, value in mtp.layers.named_parameters():
            k, rest = name.split(".", 1)
            rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            named[f"model.layers.{num_layers + int(k)}.{rest}"] = value
    gradients = {}
    for name, value in named.items():
        # none is an indexer's
        grad = np.zeros(value.shape, np.float32) if value.grad is None else value.grad.numpy()
        lead, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(grad):
                gate, up = np.split(both, 2)
                gradients[f"{lead}.{e}.gate_proj.weight"] = gate
                gradients[f"{lead}.{e}.up_proj.weight"] = up
        elif last == "down_proj":
            gradients |= {f"{lead}.{e}.down_proj.weight": expert for e, expert in enumerate(grad)}
        else:
            gradients[name] = grad
    return gradients


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        for name, cell in GRID.items():
            reference = theirs(plain_folder(Path(root) / file_name(name), cell), cell)
            np.savez_compressed(GOLDEN / (file_name(name) + ".npz"), **probed(reference))


if __name__ == "__main__":
    main()
