"""What a run directory holds for a report, read strictly: others may have written or damaged every byte of it.

What is not as latentmill writes it is a ParseError, so that a page is drawn from finite numbers, short texts and small
counts alone. Names that this version does not know are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar

from pipeline.config.tasks.found import all_figures
from pipeline.config.values.bounds import Between
from pipeline.errors import ParseError
from pipeline.parsing.text import one_line
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json

LARGEST = 1e30
"""Largest size of a metric. None comes near it, and sums and ratios of such numbers stay finite."""
FILE_BYTES = 1 << 24
"""Largest JSON file of an evaluation."""
PICTURE_BYTES = 1 << 27
"""Largest picture of an evaluation."""
MOST_FIGURES, MOST_GROUPS, MOST_STEPS, MOST_TILES = 200, 64, 100_000, 4096
"""Figures of an evaluation, entries of one of its tables or of a row's, step times of a row, and tiles of a picture."""

PART_NUMBERS = frozenset(("rec", "perceptual", "kl", "quantisation", "codes_used", "perplexity", "lambda", "gan")) | (
    frozenset(("discriminator", "logits_real", "logits_fake", "grad_norm_discriminator"))
)
"""Numbers of a row of an autoencoder's training."""
ROW_NUMBERS = (
    PART_NUMBERS
    | frozenset(
        (
            "loss",
            "lr",
            "grad_norm",
            "grad_norm_max",
            "weight_norm",
            "images_per_s",
            "step_s",
            "data_wait_s",
            "memory_gb",
        )
    )
    | frozenset(("tflops", "mfu", "stall_s", "write_s", "bytes", "world"))
)
ROW_TEXTS = frozenset(("alert", "text", "engine"))
LAST_SECOND = 1e11
"""Latest Unix time of a row."""

FIGURE_TABLES = (
    *("attribute_accuracy_by_objects", "attribute_accuracy_by_attribute"),
    *("latent_mean_by_channel", "latent_std_by_channel"),
)
KNOWN_FIGURE = re.compile(
    r"n|images|images_not_finite|guidance|seconds|"
    rf"({'|'.join(figure.name for figure in all_figures())})(_\w+)?|"
    r"latent_mean|latent_std|latent_std_error|posterior_std|"
    r"(fid|fid_infinity|rfid|kid|precision|recall|cmmd|inception_score)(_\w+)?"
)

PNG = b"\x89PNG\r\n\x1a\n"
Side = Annotated[int, Between(1, 65_536, says="a number of pixels from 1 to 65536 is wanted")]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a page shows of card.json."""

    line: str = ""
    sampler: str = ""
    steps: int | None = None
    guidance_settings: dict[str, float] = field(default_factory=dict)
    images: int | None = None
    weights: str = ""
    weights_sha256: str = ""
    seed: int | None = None
    captions: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] | None = None
    judge: dict[str, Any] = field(default_factory=dict)
    steering: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    pictures: dict[str, Any] = field(default_factory=dict)
    perceptual: dict[str, Any] = field(default_factory=dict)
    vae_sha256: str = ""


def said(steering: Mapping[str, Any]) -> str:
    """What a card says that images were given besides their conditioning, in words; "" for nothing."""
    return one_line(", ".join(name if value is True else f"{name} {value}" for name, value in sorted(steering.items())))


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """grid.json: where the tiles lie in grid.png, in reading order. width, height: of a tile in pixels. gap: pixels
    between tiles."""

    captions: list[str]
    columns: Annotated[int, Between(1, 1024)]
    width: Side
    height: Side
    gap: Annotated[int, Between(0, 1024)]

    @property
    def rows(self) -> int:
        return -(-len(self.captions) // self.columns)

    @property
    def sheet(self) -> tuple[int, int]:
        """Width and height of the whole picture in pixels."""
        return self.columns * (self.width + self.gap) - self.gap, self.rows * (self.height + self.gap) - self.gap


@dataclass(frozen=True, kw_only=True)
class Step:
    """An entry of steps.json: a finished step of `latentmill demo`, and how long it took."""

    heading: str
    command: str
    seconds: Annotated[float, Between(0, 1e9)]


@dataclass(frozen=True)
class _Steps:
    steps: tuple[Step, ...]


class Evaluated(Protocol):
    """An evaluation of a run (run.py)."""

    @property
    def n(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def metrics(self) -> dict[str, Any]: ...
    @property
    def card(self) -> dict[str, Any]: ...


E = TypeVar("E", bound=Evaluated)
MOST_PLAIN, MOST_STEERED = 4, 6
"""Rows of evaluations whose pictures stand side by side, and of each those that were steered."""
WEIGHTS = ("guide.classifier", "guide.clip", "guide.image")


def steered_beside_plain(evaluations: Sequence[E]) -> list[tuple[E, list[E]]]:
    """Evaluations by `latentmill eval` of a model alone, each with those of the same weights, noise and sampler whose
    images were given something besides (card.json, steering)."""
    groups: dict[str, tuple[list[E], list[E]]] = {}
    for e in evaluations:
        if e.name:
            made = [e.card.get(name) for name in ("sampler", "steps", "guidance_settings", "seed", "weights")]
            key = repr((e.n, e.metrics.get("images"), e.metrics.get("guidance"), made))
            groups.setdefault(key, ([], []))[is_steered(e.card.get("steering"))].append(e)
    pairs = [(plain[0], steered[-MOST_STEERED:]) for plain, steered in groups.values() if plain and steered]
    return pairs[-MOST_PLAIN:]


def is_steered(steering: Any) -> bool:
    """Whether images were given something: a weight of 0 is a guide that measures and does not lead."""
    facts = steering if isinstance(steering, Mapping) else {}
    weights = [facts[name] for name in WEIGHTS if name in facts]
    others = [name for name in facts if not name.startswith("guide.")]
    return any(weights) or bool(others)


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether the values that a page draws of a row of metrics.jsonl are what they should be, or null."""
    if not 0 <= row["time"] <= LAST_SECOND:
        return False
    for name, value in row.items():
        if value is None:
            continue
        if name in ROW_NUMBERS:
            wanted = is_number(value)
        elif name in ROW_TEXTS:
            wanted = type(value) is str
        elif name == "loss_by_noise":
            wanted = _is_table(value) and all(_is_share(key) for key in value)
        elif name == "steps_s":
            wanted = type(value) is list and len(value) <= MOST_STEPS and all(map(is_number, value))
        else:
            continue
        if not wanted:
            return False
    return True


def parse_figures(data: bytes) -> dict[str, Any]:
    """The figures in metrics.json: numbers or null by name, tables of numbers, and the name of the weights. Raises
    ParseError."""
    return checked_figures(parse_json(data, FILE_BYTES))


def checked_figures(tree: Any) -> dict[str, Any]:
    """Figures as in parse_figures, of plain data. Raises ParseError."""
    if type(tree) is not dict or not tree or len(tree) > MOST_FIGURES:
        raise ParseError(f"it holds no figures: 1 to {MOST_FIGURES} names with numbers are wanted")
    figures = {}
    for name, value in tree.items():
        if "_by_" in name:
            wanted, is_known = value is None or _is_table(value), name in FIGURE_TABLES
        elif name == "weights":
            wanted, is_known = type(value) is str, True
        else:
            wanted, is_known = value is None or is_number(value), KNOWN_FIGURE.fullmatch(name) is not None
        if not (wanted or is_known):
            continue  # of another version
        if not wanted:
            raise ParseError(f"it holds {name[:60]} of another type or size than a figure has")
        figures[name] = value
    return figures


def parse_card(data: bytes) -> dict[str, Any]:
    """The facts of card.json that a page shows, those that are there. Raises ParseError."""
    tree = parse_json(data, FILE_BYTES)
    card = build(CardFacts, tree, unknown="pass")
    if not all(map(is_number, card.guidance_settings.values())):
        raise ParseError("it holds guidance_settings that are no settings")
    return {name: value for name, value in vars(card).items() if name in tree}


def parse_tiles(data: bytes) -> Tiles:
    """The content of grid.json. Raises ParseError."""
    tiles = build(Tiles, parse_json(data, FILE_BYTES), unknown="pass")
    if not 1 <= len(tiles.captions) <= MOST_TILES:
        raise ParseError(f"it holds {len(tiles.captions)} captions; 1 to {MOST_TILES} are wanted")
    return tiles


def require_sheet(png: bytes, tiles: Tiles) -> None:
    """Raise ParseError unless the bytes begin as a PNG of the size that the tiles need."""
    size = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    if png[:8] != PNG or png[12:16] != b"IHDR":
        raise ParseError("it is not a PNG")
    if size != tiles.sheet:
        wide, high = tiles.sheet
        raise ParseError(f"it has {size[0]} x {size[1]} pixels, and grid.json tells of {wide} x {high}")


def parse_steps(data: bytes) -> list[Step]:
    """The steps in steps.json. Raises ParseError."""
    return list(build(_Steps, {"steps": parse_json(data, FILE_BYTES)}, unknown="pass").steps)


def _is_table(value: Any) -> bool:
    """Whether a value is a small group of numbers by name."""
    return (
        type(value) is dict
        and len(value) <= MOST_GROUPS
        and all(len(key) <= 100 for key in value)
        and all(entry is None or is_number(entry) for entry in value.values())
    )


def _is_share(key: str) -> bool:
    """Whether a name is a number from 0 to 1."""
    return re.fullmatch(r"0(\.[0-9]{1,20})?|1(\.0{1,20})?", key) is not None
