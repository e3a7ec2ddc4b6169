"""Which pieces share a row: best fit, longest first, decided once from the lengths alone."""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Put pieces of these lengths into rows of `size`, none cut, and return the pieces of each row.

    Best-fit decreasing: a piece goes where it leaves the least room, the longest pieces first; at most 11/9 of the
    fewest rows possible, and one more (Johnson 1973). The same lengths give the same rows.

    Raises:
        ValueError: a piece that is empty or longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= size:
        raise ValueError(f"pieces must have 1 to {size} tokens, not {lengths.min()} to {lengths.max()}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows with that room
    rooms = 0  # bit r is set where open_rows[r] is not empty: the best fit is the lowest set bit from `length` up
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
