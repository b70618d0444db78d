"""A released folder whose tensors match its configuration, read one at a time."""

import itertools
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig, replace
from dsv3_jax.hf import int4
from dsv3_jax.hf.config_json import config_from_dict
from dsv3_jax.hf.families import WRAPPERS, text_config
from dsv3_jax.hf.fp8 import E4M3, dequantize
from dsv3_jax.hf.places import find
from dsv3_jax.hf.tensor_files import CONFIG, StoredTensor, open_folder, read_tensor
from dsv3_jax.hf.tensor_names import BLOCK, SCALE_SUFFIX, Entry, entries
from dsv3_jax.model.parameters import Packed

BF16 = np.dtype(ml_dtypes.bfloat16)

READABLE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BF16)

# tensors of the model that may be absent: those of its MTP layers, or those that an error counts
_MAX_ABSENT = 20_000

_MAX_LISTED = 20  # wrong tensors that an error names

EMBED = "model.embed_tokens.weight"

# Prefixes of the language model in a wrapper's names, and names of the wrapper's vision parts,
# which are not read.
_PREFIXES = ("", "language_model.")

_BESIDE = re.compile(r"(model\.)?(vision\w*|mm_projector|multi_modal_projector)\.")

# transformers 5.24 saves a wrapper's layers under this name
_BLOCKS = re.compile(r"model\.blocks\.(?=\d)")

# Old files repeat what rope_theta gives; transformers does not read it either.
_INV_FREQ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class ReleasedFolder:
    """A released folder whose tensors match its configuration; tensors are read one at a time.

    Args:
        place: the folder, a hub snapshot, or a hub id in the local cache; see `places.find`.
        mtp: False leaves the MTP layers out. They are left out too where the files have none.
        allow_nonfinite: accept NaN and Inf.
        allow_unknown_keys: pass over keys of config.json that are not known.
    Attributes:
        notes: sentences on what is not read or bounded, for the user.
    Raises: ValueError (ConfigError) as `load`, except for the values of weights.

    Example:
        >>> import tempfile
        >>> import jax
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> ones = lambda x: jax.numpy.ones(x.shape, x.dtype)
        >>> model = jax.tree.map(ones, abstract(cfg))  # all weights are 1
        >>> with tempfile.TemporaryDirectory() as path:
        ...     ds.hf.save(model, path, fp8=True, quiet=True)
        ...     folder = ReleasedFolder(path)
        >>> folder.cfg.dim, folder.stored["model.norm.weight"].shape
        (128, (128,))
    """

    def __init__(
        self,
        place: str | Path,
        *,
        mtp: bool = True,
        allow_nonfinite: bool = False,
        allow_unknown_keys: bool = False,
    ):
        self.path = find(place)
        self.allow_nonfinite = allow_nonfinite
        self.config, stored = open_folder(self.path)
        self.notes: list[str] = []
        try:
            cfg = config_from_dict(self.config, allow_unknown_keys=allow_unknown_keys)
        except ConfigError as error:
            raise ConfigError(f"{self.path / CONFIG}: {error}") from error
        self.stored = self._of_the_language_model(stored)

        # Numbers of a 4-bit weight with one scale; 0 for other weights.
        quantization = text_config(self.config).get("quantization_config") or {}
        packed = quantization.get("quant_method") == int4.METHOD
        self._group = int4.group_size(quantization) if packed else 0

        # Released files may lack the multi-token heads that their config names.
        all_entries = self._entries_of(cfg)
        heads = [e for e in all_entries if e.mtp and not e.copy_of]
        if mtp and heads and not any(self.stored.keys() & self._wanted(e).keys() for e in heads):
            mtp = False
            self.notes.append(
                f"{CONFIG} names {cfg.mtp_depth} MTP layers, and the files have none: loaded "
                "without"
            )
        self.entries = {e.name: e for e in all_entries if mtp or not e.mtp}
        self.cfg = cfg if mtp else replace(cfg, mtp_depth=0)

        self._check_tensors(all_entries)
        self._check_copies()

    def _entries_of(self, cfg: ModelConfig) -> list[Entry]:
        """List a model's tensors, unless it needs far more than the files hold.

        Numbers of layers and experts may be anything, so the list is not made to its end.
        """
        most = len(self.stored) + _MAX_ABSENT
        found = list(itertools.islice(entries(cfg), most + 1))
        if len(found) > most:
            raise ValueError(
                f"{self.path} does not match its {CONFIG}: the files hold {len(self.stored)} "
                f"tensors, and num_layers={cfg.num_layers}, num_experts={cfg.num_experts}, "
                f"mtp_depth={cfg.mtp_depth} need more than {most}"
            )
        return found

    def _of_the_language_model(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors by DeepSeek's names, without those that this model does not compute with."""
        # A wrapper puts its own prefix before the names, and has tensors of pictures beside them.
        prefix = next((p for p in _PREFIXES if p + EMBED in stored), "")
        named = {
            name.removeprefix(prefix): tensor
            for name, tensor in stored.items()
            if not _BESIDE.match(name)
        }
        if self.config.get("model_type") in WRAPPERS:
            named = {_BLOCKS.sub("model.layers.", name): tensor for name, tensor in named.items()}
        if len(named) < len(stored):
            self.notes.append(f"{len(stored) - len(named)} tensors of pictures are not read")
        return {name: tensor for name, tensor in named.items() if not _INV_FREQ.fullmatch(name)}

    @property
    def four_bits(self) -> bool:
        """Whether some weights are of 4 bits."""
        return self._group > 0

    def own_dtype(self, entry: Entry) -> np.dtype:
        """The dtype that needs no wider copy: float32 of float32 and float16, else bfloat16.

        That rounds the products of FP8 or 4-bit numbers and their scales.
        """
        stored = self.stored[next(iter(self._wanted(entry)))].dtype
        return READABLE_DTYPES[0] if stored in READABLE_DTYPES[:2] else BF16

    def read(self, entry: Entry, dtype: np.dtype) -> np.ndarray:
        """Read one released tensor, dequantized, in `dtype` (float32 or bfloat16).

        Raises: ValueError naming file and tensor for NaN or Inf.
        """
        name, *rest = self._wanted(entry)
        stored = self.stored[name]
        value = read_tensor(stored)
        if rest:
            # number · scale, of FP8 or of 4 bits
            scales = np.array(read_tensor(self.stored[rest[0]]))
            if stored.dtype == E4M3:
                value = dequantize(value, scales)
            else:
                value = int4.unpack(value, scales, entry.shape, self._group)

        if not self.allow_nonfinite and not (finite := np.isfinite(value)).all():
            raise ValueError(f"{stored.file} holds {np.sum(~finite)} NaN or Inf in {entry.name}")
        return value.astype(dtype, copy=False)

    def packed(self, entry: Entry) -> Packed | None:
        """A feed-forward matrix [in, out] as stored, in FP8 or 4 bits; None for other tensors.

        None also if the last group of inputs with one scale is not whole.
        """
        name, *rest = self._wanted(entry)
        if not rest or ".mlp." not in name:
            return None
        fp8 = self.stored[name].dtype == E4M3
        num_inputs = entry.shape[1]
        if num_inputs % (BLOCK if fp8 else math.lcm(self._group, 2)):
            return None

        # Released matrices are [out, in], ours [in, out]. A block's scale serves 128 outputs.
        numbers, scales = (read_tensor(self.stored[x]) for x in (name, *rest))
        if fp8:
            return Packed(numbers.T, np.repeat(scales, BLOCK, axis=0)[: len(numbers)].T)
        return Packed(numbers.view(np.uint8)[:, : num_inputs // 2].T, scales.T)

    def _wanted(self, entry: Entry) -> dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]]:
        """The one or two tensors that store a released tensor: name → (shape, possible dtypes)."""
        # FP8, 4 bits or floats: the files say, and a folder may mix them.
        name = entry.name
        stored = self.stored.get(entry.name)
        if entry.quantized and stored is not None and stored.dtype == E4M3:
            return {
                name: (entry.shape, (E4M3,)),
                name + SCALE_SUFFIX: (entry.scale_shape, READABLE_DTYPES[:1]),
            }
        if entry.quantized and self._group and name + int4.PACKED in self.stored:
            packed, scales = int4.shapes(entry.shape, self._group)
            return {
                name + int4.PACKED: (packed, (np.dtype(np.int32),)),
                name + int4.SCALE: (scales, READABLE_DTYPES),
            }
        return {name: (entry.shape, READABLE_DTYPES)}

    def _check_tensors(self, all_entries: list[Entry]) -> None:
        """Raises: ValueError that lists all missing, unknown and wrong tensors (shape or dtype)."""
        # Go through what the model needs, then through what else the files hold.
        wrong = []
        known = set()
        for entry in all_entries:
            wanted = self._wanted(entry)
            known |= {*wanted, entry.name + int4.SHAPE}
            if entry.name not in self.entries:  # of heads that are left out
                continue
            for name, (shape, dtypes) in wanted.items():
                stored = self.stored.get(name)
                if stored is None:
                    if not entry.copy_of:
                        wrong.append(f"{name} is missing")
                elif stored.shape != shape or stored.dtype not in dtypes:
                    actual = (
                        f"{name} in {stored.file.name} is {stored.dtype.name} {list(stored.shape)}"
                    )
                    wrong.append(f"{actual}, not {dtypes[0].name} {list(shape)}")

        for name in self.stored.keys() - known:
            wrong.append(f"{name} in {self.stored[name].file.name} is unknown")
        if wrong:
            more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
            listed = "; ".join(sorted(wrong)[:_MAX_LISTED])
            raise ValueError(
                f"{self.path} does not match its {CONFIG}, {len(wrong)} tensors: {listed}{more}"
            )

    def _check_copies(self) -> None:
        """Raises: ValueError when a copied tensor differs: this model has only one of the two."""
        for entry in self.entries.values():
            if entry.copy_of is None or entry.name not in self.stored:
                continue
            copy = read_tensor(self.stored[entry.name])
            original = read_tensor(self.stored[entry.copy_of])
            for start in range(0, len(copy), 4096):  # by rows: no second array of the tensor's size
                left, right = (
                    tensor[start : start + 4096].astype(np.float32) for tensor in (copy, original)
                )
                if not np.array_equal(left, right, equal_nan=True):
                    raise ValueError(
                        f"{self.stored[entry.name].file} holds {entry.name} that differs from "
                        f"{entry.copy_of}, but this model uses one tensor for both"
                    )
