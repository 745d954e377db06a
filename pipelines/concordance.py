"""How well predicted times rank rows of which some were not seen to their end. Pure.

F. E. Harrell et al., Evaluating the yield of medical tests, JAMA 247, 1982: of the pairs of which is known who had the
event first, the share that the predictions have in that order, ties counted half.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_ROWS = 256  # compared with all others at a time


def concordance(label: Floats, prediction: Floats) -> float:
    """The index, from 0 to 1, 0.5 by chance; nan where no pair can be compared.

    Args:
        label: Time, and 1 where the event was seen. Shape (rows, 2).
        prediction: Times. Shape (rows,).
    """
    pairs, won = 0.0, 0.0
    seen = np.flatnonzero(label[:, 1] > 0)
    for part in np.split(seen, range(_ROWS, len(seen), _ROWS)):
        known = comparable(label[part], label)
        pairs += float(known.sum())
        won += float(in_order(prediction[part], prediction)[known].sum())
    return won / pairs if pairs else float("nan")


def comparable(first: Floats, second: Floats) -> npt.NDArray[np.bool_]:
    """Whether the first row is known to have had its event before the second, shape (first, second).

    At one time an event comes before the end of looking.
    """
    time, event = first[:, :1], first[:, 1:] > 0
    known: npt.NDArray[np.bool_] = event & ((time < second[:, 0]) | ((time == second[:, 0]) & (second[:, 1] == 0)))
    return known


def in_order(first: Floats, second: Floats) -> Floats:
    """1 where the first prediction is the lower one, 0.5 where they are equal, shape (first, second)."""
    won: Floats = (first[:, None] < second) + 0.5 * (first[:, None] == second)
    return won
