"""Sequence packing: which pieces share a row, by best-fit decreasing on their lengths."""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Pack pieces of these lengths [N] into rows of `size` without cutting any; return the pieces of each row.

    Best-fit decreasing: longest piece first, each into the row where it leaves the least room. Uses at most
    11/9 · optimum + 1 rows (Johnson 1973) and is deterministic.

    Raises:
        ValueError: a piece is empty or longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= size:
        raise ValueError(f"pieces must have 1 to {size} tokens, not {lengths.min()} to {lengths.max()}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows with that room
    rooms = 0  # bit r is set if open_rows[r] is not empty: the best fit is the lowest set bit >= `length`
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
            rows[row].append(piece)
        else:
            room, row = size, len(rows)
            rows.append([piece])
        left = room - length
        if left:
            open_rows.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows
