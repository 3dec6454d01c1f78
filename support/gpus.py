"""GPUs that are not here: what `--gpus 8xH100` stands for, and the peaks that a roofline needs."""

import re
from typing import NamedTuple

NODE = 8  # GPUs of a node, where more than that are planned for


class Card(NamedTuple):
    """A GPU. Without peaks (0) no time is estimated."""

    name: str
    gigabytes: int  # by its label
    flops: float = 0  # dense products of bf16 with sums in fp32, a second
    bandwidth: float = 0  # of its memory, bytes a second

    def memory(self):
        """Bytes that torch finds on it: a GB of the label is 2^30 bytes, and the driver keeps 1 or 2 %."""
        return int(0.98 * self.gigabytes * 2**30)


# The vendor's peaks, of the SXM versions. 8x80 stands for the first with 80 GB: a bound has to hold for all.
CARDS = [
    Card("H100", 80, 989e12, 3.35e12),
    Card("A100", 80, 312e12, 2.04e12),
    Card("H200", 141, 989e12, 4.8e12),
    Card("4090", 24, 165e12, 1.01e12),
]


def parse_gpus(text):
    """What --gpus says: (number of GPUs, Card). Raises ValueError.

    >>> parse_gpus("4x4090")
    (4, Card(name='4090', gigabytes=24, flops=165000000000000.0, bandwidth=1010000000000.0))
    >>> parse_gpus("16x40")[1]
    Card(name='40 GB', gigabytes=40, flops=0, bandwidth=0)
    """
    names = {card.name: card for card in CARDS}
    match = re.fullmatch(r"([1-9]\d{0,3})x(\w+)", text, re.ASCII)
    count, kind = (int(match[1]), match[2].upper()) if match else (0, "")
    size = int(kind) if re.fullmatch(r"[1-9]\d{0,2}", kind) else 0
    if not (size or kind in names):
        raise ValueError(
            f"--gpus {text}: must be a number of GPUs, x, and the GB of each or {', '.join(names)}: 8x80"
        )
    if count > NODE and count % NODE:
        raise ValueError(
            f"--gpus {text}: more than {NODE} are planned as nodes of {NODE}, so {NODE} divides them"
        )
    of_size = [card for card in CARDS if card.gigabytes == size]
    return count, names.get(kind) or (of_size or [Card(f"{size} GB", size)])[0]


def card_called(device_name):
    """The card of which torch says device_name; None if it is none of these."""
    return next((card for card in CARDS if card.name in device_name), None)
