"""Documents, whole or cut, to rows of T tokens.

Documents in memory and shards on disk have the same records.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from dsv3_jax.data.batches import Row

# rows that whole documents may still fill: more waste less padding, and search longer
_OPEN_ROWS = 64


class Piece(NamedTuple):
    """Tokens of one document, or of a part of it.

    Attributes:
        document: its number in the corpus.
        loss_mask: tokens that are targets. None means all.
    """

    tokens: Integer[np.ndarray, " n"]
    domain: int
    document: int
    loss_mask: Bool[np.ndarray, " n"] | None = None

    def split(self, size: int) -> tuple["Piece", "Piece"]:
        """Return the first `size` tokens, and the rest."""
        return self._part(slice(size)), self._part(slice(size, None))

    def _part(self, part: slice) -> "Piece":
        mask = None if self.loss_mask is None else self.loss_mask[part]
        return self._replace(tokens=self.tokens[part], loss_mask=mask)


def fill(pieces: Iterable[Piece], size: int, whole: bool) -> Iterator[list[Piece]]:
    """Yield the pieces of each row of `size` tokens.

    Args: whole: put each piece uncut into the first open row that has room. Otherwise pieces follow
        one another, and one that does not fit continues in the next row.

    Example:
        >>> pieces = [Piece(np.arange(n), 0, i) for i, n in enumerate((3, 2, 1))]
        >>> [[(p.document, len(p.tokens)) for p in row] for row in fill(pieces, 4, whole=True)]
        [[(0, 3), (2, 1)], [(1, 2)]]
        >>> [[(p.document, len(p.tokens)) for p in row] for row in fill(pieces, 4, whole=False)]
        [[(0, 3), (1, 1)], [(1, 1), (2, 1)]]
    """
    rows: list[list[Piece]] = []  # that are open
    room: list[int] = []  # tokens that still fit into each
    for piece in pieces:
        # A piece that is cut comes back here with its rest.
        while len(piece.tokens):
            # First fit: the oldest open row with room.
            least = len(piece.tokens) if whole else 1
            row = next((i for i, left in enumerate(room) if left >= least), None)

            # None has room, so a new one is opened; the oldest leaves if there are too many.
            if row is None:
                if len(rows) == (_OPEN_ROWS if whole else 1):
                    room.pop(0)
                    yield rows.pop(0)
                row = len(rows)
                rows.append([])
                room.append(size)

            part, piece = piece.split(room[row])
            rows[row].append(part)
            room[row] -= len(part.tokens)
    yield from rows


class Record(NamedTuple):
    """Tokens of documents, one after the other.

    Attributes:
        starts: index of the first token of each document, or of what this record has of it.
        domains, documents: numbers of each document's domain, and of it in the corpus.
        loss_mask: tokens that are targets. None means all.

    Example:
        >>> record = Record.of([Piece(np.array([104, 105, 256]), domain=0, document=7)])
        >>> Record.from_bytes(record.to_bytes()).tokens.tolist()
        [104, 105, 256]
        >>> record.row(1, 3, seq_len=4)["segment_ids"].tolist()
        [1, 1, 0, 0]
    """

    starts: Integer[np.ndarray, " d"]
    domains: Integer[np.ndarray, " d"]
    documents: Integer[np.ndarray, " d"]
    tokens: Integer[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"] | None

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Record":
        """Join pieces."""
        ends = np.cumsum([0, *(len(piece.tokens) for piece in pieces)])
        masks = [piece.loss_mask for piece in pieces if piece.loss_mask is not None]
        no_tokens = np.zeros(0, np.int32)
        return cls(
            starts=ends[:-1],
            domains=np.array([piece.domain for piece in pieces], np.int32),
            documents=np.array([piece.document for piece in pieces], np.int32),
            tokens=np.concatenate([piece.tokens for piece in pieces]) if pieces else no_tokens,
            loss_mask=np.concatenate(masks) if masks else None,
        )

    def to_bytes(self) -> bytes:
        """Return int32: domain, d, n, starts, documents, tokens; then the loss mask in bytes.

        All documents are of one domain.
        """
        head = np.array([self.domains[0], len(self.starts), len(self.tokens)])
        ids = np.concatenate([head, self.starts, self.documents, self.tokens]).astype("<i4")
        mask = b"" if self.loss_mask is None else self.loss_mask.tobytes()
        return ids.tobytes() + mask

    @classmethod
    def from_bytes(cls, data: bytes) -> "Record":
        """Read what `to_bytes` returns."""
        domain, d, n = np.frombuffer(data, "<i4", 3).tolist()
        ids = np.frombuffer(data, "<i4", 2 * d + n, offset=12).astype(np.int32, copy=False)

        # The mask follows the ids; text has none.
        end = 12 + ids.nbytes
        mask = np.frombuffer(data, bool, offset=end) if len(data) > end else None
        return cls(
            starts=ids[:d],
            domains=np.full(d, domain, np.int32),
            documents=ids[d : 2 * d],
            tokens=ids[2 * d :],
            loss_mask=mask,
        )

    def row(self, first: int, stop: int, seq_len: int, separate: bool = True) -> Row:
        """Return the tokens from `first` to `stop` as a row, with padding after them.

        Args: separate: as `DataConfig.separate_documents`.
        """
        stop = min(stop, len(self.tokens))
        n = stop - first

        # Documents a to b-1 have tokens in the row. The first may have begun in an earlier one.
        a, b = np.searchsorted(self.starts, [first, stop - 1], side="right") - [1, 0]
        begins = np.maximum(self.starts[a:b] - first, 0)
        segment = np.repeat(np.arange(b - a), np.diff([*begins, n]))

        # Each token's numbers. Without separation the whole row is one segment.
        position = np.arange(n)
        columns: dict[str, np.ndarray] = {
            "tokens": self.tokens[first:stop],
            "segment_ids": segment + 1 if separate else np.ones(n),
            "positions": position - begins[segment] if separate else position,
            "domains": self.domains[a:b][segment],
            "documents": self.documents[a:b][segment],
        }
        if self.loss_mask is not None:
            columns["loss_mask"] = self.loss_mask[first:stop]

        # Padding is zeros: segment 0 belongs to no document.
        row = {}
        for name, values in columns.items():
            row[name] = np.zeros(seq_len, bool if name == "loss_mask" else np.int32)
            row[name][:n] = values
        return row  # type: ignore[return-value]


class PackedRows:
    """`RowSequence` of pieces in memory.

    Args:
        seq_len: tokens of a row (T).
        whole: as in `fill`. Without it only the last row has padding.
        separate: as `DataConfig.separate_documents`.

    Example:
        >>> pieces = [Piece(np.arange(n), domain=0, document=n) for n in (3, 2)]
        >>> rows = PackedRows(pieces, seq_len=4)
        >>> [row["segment_ids"].tolist() for row in rows]
        [[1, 1, 1, 2], [1, 0, 0, 0]]
    """

    def __init__(
        self, pieces: Iterable[Piece], seq_len: int, *, whole: bool = False, separate: bool = True
    ):
        self._seq_len = seq_len
        self._separate = separate
        if whole:
            # Whole pieces leave rows of different lengths; they lie end to end in one record.
            filled = list(fill(pieces, seq_len, whole))
            self._record = Record.of([piece for row in filled for piece in row])
            sizes = [sum(len(piece.tokens) for piece in row) for row in filled]
            self._bounds = np.cumsum([0, *sizes])
        else:
            self._record = Record.of(list(pieces))
            self._bounds = np.arange(0, len(self._record.tokens) + seq_len, seq_len)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row={row} is not below {len(self)}")
        first, stop = self._bounds[row : row + 2].tolist()
        return self._record.row(first, stop, self._seq_len, self._separate)
