"""The vocabulary of the demo CLIP: byte-level BPE in CLIP's merges format, learned on the captions of captioned shapes.

Every word of these captions becomes one token, and other text falls back to bytes. The tokens are 256 bytes, 256 bytes
that end a word, the merges and two special tokens, at most 1,024 in total.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode

from demo_encoders.data import TRAIN_SEED
from preprocess.shapes.drawing import scene

CAPTIONS = 20_000
CONTEXT_LENGTH = 32
LARGEST_VOCABULARY = 1024
WORD = regex.compile(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # as CLIP splits text, without English contractions


def learn_merges(counts: Counter[str]) -> list[tuple[str, str]]:
    """Learns byte-pair merges, most frequent first (ties in alphabetical order), until every word is one symbol."""
    symbols = bytes_to_unicode()
    words = {}
    for word, count in counts.items():
        letters = [symbols[byte] for byte in word.encode()]
        words[(*letters[:-1], letters[-1] + "</w>")] = count
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word_symbols, count in words.items():
            for pair in pairwise(word_symbols):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merge(word_symbols, best): count for word_symbols, count in words.items()}


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            merged.append(word[i] + word[i + 1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def build(folder: Path) -> SimpleTokenizer:
    """Learns the merges and writes `folder`/bpe.txt.gz with the same bytes every time."""
    counts: Counter[str] = Counter()
    for index in range(CAPTIONS):
        counts.update(WORD.findall(scene(TRAIN_SEED, index, "all").caption))
    merges = learn_merges(counts)
    assert 512 + len(merges) + 2 <= LARGEST_VOCABULARY
    # No newline at the end: open_clip would read the empty line after it as a merge.
    text = "\n".join(["#version: latentmill captioned shapes", *(" ".join(pair) for pair in merges)])
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "bpe.txt.gz.partial"
    partial.write_bytes(gzip.compress(text.encode(), mtime=0))
    os.replace(partial, folder / "bpe.txt.gz")
    tokenizer = load(folder)
    print(f"tokenizer: {len(counts)} words, {len(merges)} merges, vocabulary {tokenizer.vocab_size}", flush=True)
    return tokenizer


def load(folder: Path) -> SimpleTokenizer:
    """open_clip's tokenizer with the vocabulary in `folder`."""
    return SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"), context_length=CONTEXT_LENGTH)
