"""What a value of a dataset's stored format may be, as types for `pipeline.parsing.typed.build`."""

from __future__ import annotations

import re
from typing import Annotated

from pipeline.parsing.bounds import LONGEST_NAME, Real, Text, Whole

MOST_SAMPLES = 2**31 - 1
"""Records of one tar, and samples of one input shard: a row is an int32 in the list of excluded records."""
MOST_BYTES = 2**44
"""Bytes of one tar."""
MOST_SIDE = 1 << 16
"""Pixels or positions along a side, and tokens or values of a text state."""
MOST_ELEMENTS = 2**28
"""Elements of one array of a record."""
MOST_UNITS = 10**8
"""Input shards and tars of a dataset."""
LONGEST_PATTERN = 1 << 20
"""Characters of a source pattern, whose braces may name thousands of paths."""
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
TAR_NAME = re.compile("(?:(?!\\.{1,2}/)[^/\x00-\x1f\x7f-\x9f]+/)*[^/\x00-\x1f\x7f-\x9f]+\\.tar")
SHA256 = re.compile("[0-9a-f]{64}")


Digest = Annotated[str, Text(SHA256, "a SHA-256 of 64 hexadecimal digits", 64)]
MaybeDigest = Annotated[str, Text(re.compile("(?:[0-9a-f]{64})?"), 'a SHA-256 of 64 hexadecimal digits or ""', 64)]
Name = Annotated[str, Text(re.compile("[^\0]+"), f"text of 1 to {LONGEST_NAME} characters without zeros")]
Pattern = Annotated[str, Text(re.compile("[^\0]+"), "a pattern", LONGEST_PATTERN)]
TarName = Annotated[str, Text(TAR_NAME, "the key of a .tar below the dataset, without control characters,")]
Samples = Annotated[int, Whole(0, MOST_SAMPLES)]
Bytes = Annotated[int, Whole(0, MOST_BYTES)]
Side = Annotated[int, Whole(1, MOST_SIDE)]
Channels = Annotated[int, Whole(1, 4096)]
Shift = Annotated[float, Real(-1e6, 1e6)]
Scale = Annotated[float, Real(1e-6, 1e6)]
