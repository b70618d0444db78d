"""How a model is computed: dtypes, kernels, what the backward pass keeps, and the mesh."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from dsv3_jax.config.fields import check_fields, require

# Kinds and dtypes of the cache that decoding keeps; see `model/cache.py`.
CacheKind = Literal["latent", "expanded", "none"]
CacheDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3"]
# of linear layers; see `kernels/low_precision.py`
Precision = Literal["none", "fp8", "fp8_ue8m0", "mxfp8"]


@dataclass(frozen=True)
class Layout:
    """How a model is sharded over a mesh of devices.

    Example:
        >>> Layout(fsdp=True)
        Layout(fsdp=True, expert_comm='auto', capacity_slack=1.25, expert_nodes=1, length='none')
    """

    # shard weights and optimizer state along data too; each layer is gathered when it is computed
    fsdp: bool = False
    # how tokens reach the experts of other devices. gather sends all tokens. all_to_all sends a
    # token once to each device that needs it. auto is the cheaper of the two
    expert_comm: Literal["auto", "gather", "all_to_all"] = "auto"
    # for all_to_all: slots and rows of the first round, over what even load needs
    capacity_slack: Annotated[float, "[1, 1000000]"] = 1.25
    # nodes along "expert", if they are several: a token goes once to each node that has one of its
    # experts, and from there to its devices
    expert_nodes: Annotated[int, "[1, 65536]"] = 1
    # the mesh axis that shards the length of rows, for rows too long for one device. expert: rows
    # are sharded by data alone, and each device attends with its own heads. For training
    length: Literal["none", "expert"] = "none"

    def __post_init__(self) -> None:
        check_fields(self, "layout ")
        require(
            self.expert_nodes == 1 or self.expert_comm != "gather",
            f"layout expert_nodes={self.expert_nodes} needs all_to_all, not expert_comm='gather'",
        )


@dataclass(frozen=True)
class Execution:
    """How a model is computed. A run may resume under another execution: it changes rounding only.

    Example:
        >>> Execution(compute_dtype="bfloat16", remat="full").kernels
        'auto'
    """

    # dtype of activations; what trains is always float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # what the backward pass keeps of a layer, most memory first. none recomputes nothing. dots
    # keeps products and attention. queries keeps attention's results, the factors of norms, and on
    # a TPU the queries. attention keeps its results alone and so computes it once. full keeps
    # nothing
    remat: Literal["none", "dots", "queries", "attention", "full"] = "none"
    # which kernels compute: auto takes the fastest, xla those that XLA compiles; `dsv3 info PRESET
    # --kernels` lists other names. OP=NAME forces the kernel of one op; commas join several
    kernels: str = "auto"
    # how the model is sharded over a mesh of devices
    layout: Layout = field(default_factory=Layout)
    # 8-bit operands for the products of linear layers in training. fp8 is DeepSeek-V3's recipe,
    # fp8_ue8m0 V3.1's, whose scales are powers of two, and mxfp8 that of the MX formats. none
    # multiplies in compute_dtype. Emulated, so slower: it shows what the rounding does to the loss.
    # GPUs and TPUs multiply the numbers of fp8_ue8m0 and mxfp8 in bfloat16, which holds them
    # exactly
    precision: Precision = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            re.fullmatch(r"\w+(=\w+)?(,\w+=\w+)*", self.kernels) is not None,
            f"kernels={self.kernels!r} is not of the form NAME, OP=NAME or NAME,OP=NAME",
        )
