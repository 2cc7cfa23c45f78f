"""Large numbers as people write them: 100M, 1.5B."""

from __future__ import annotations

import re
from decimal import Decimal

from pipeline.errors import ConfigError

SIZES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
LARGEST = 10**15


def parse_count(text: str, key: str) -> int:
    """The whole number >= 1 that `text` names. key: that gave it, for the message. Raises ConfigError."""
    match = re.fullmatch(r"(?P<number>\d{1,18}(?:\.\d{1,9})?)(?P<size>[kKMBG]?)", text.strip().replace("_", ""))
    number = Decimal(match["number"]) * SIZES[match["size"]] if match else Decimal(0)
    if not 1 <= number <= LARGEST or number != int(number):
        raise ConfigError(f"{key}={text[:40]}: a whole number of 1 to 10^15 is wanted, such as 250000, 100M or 1.5B")
    return int(number)
