"""latentmill reconstruct: measures any autoencoder on the pictures of a cache, and shows its worst reconstructions.

    latentmill reconstruct dataset=CACHE encoders=sd1 dest=FOLDER

FOLDER then holds card.json (the figures and all that they depend on), metrics.json (the figures), pairs.png and
report.html (the worst pairs), and the sheets grid.png and given.png with their grid.json. An evaluation that is there
is not made again. A run's own autoencoder is measured by `latentmill eval`.
"""

from __future__ import annotations

import sys

from pipeline.config import ReconstructConfig
from pipeline.distributed.world import World, pick_device
from pipeline.errors import DestinationExists, NotFound, ParseError
from pipeline.evaluation.reconstruction.card import Card, parse_card, table
from pipeline.evaluation.reconstruction.kept import differing
from pipeline.evaluation.reconstruction.pairs import write_drawn
from pipeline.evaluation.reconstruction.pictures import Pictures
from pipeline.evaluation.reconstruction.runs import load_reconstructing
from pipeline.evaluation.stored import write_files
from pipeline.log import show
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.report import reconstruction as page
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

COMPLETE, CARD = "metrics.json", "card.json"


def main(config: ReconstructConfig) -> int:
    """Run the verb. Raises DestinationExists where `dest` holds anything but this evaluation, ContractMismatch for a
    cache without pictures or with sizes that the autoencoder does not take, WeightsError, StorageError."""
    dest = open_storage(config.dest)
    there = _card_at(dest, config.dest)
    pictures = Pictures.at(config.dataset, "dataset")
    device = pick_device(config.device)
    stage = load_autoencoder(config.encoders, device)
    pictures.require_sizes(stage.downsampling)
    reconstructing = load_reconstructing(
        pictures,
        device,
        reference=config.reference,
        features=config.features,
        features_weights=config.features_weights,
        perceptual=config.perceptual,
        batch=config.batch,
        most_pairs=config.pairs,
        world=World(device=device),
    )
    images = min(config.images, len(pictures))
    if there is not None:
        others = differing(there, reconstructing, stage)
        others += [f"images: {there.images} on the card, {images} here"] if there.images != images else []
        if others:
            raise DestinationExists(
                f"dest={config.dest} holds another evaluation ({'; '.join(others)}): give another dest=, or delete it"
            )
    card = there
    if card is None or not dest.exists(COMPLETE):
        result = reconstructing(stage, images=images)
        write_drawn(dest, "", result.pairs)
        write_files(dest, "", result)
        card = result.card
    page.write(config.dest)
    show(table(card), end="")
    show(card.line())
    show(f"reconstruct: {config.dest}")
    return 0


def _card_at(dest: Storage, url: str) -> Card | None:
    """The card of an evaluation that is at `url`; None where nothing is. Raises DestinationExists for all else."""
    path = dest.local_path(CARD)
    above = path.parent if path is not None else None
    if above is not None and above.exists() and not above.is_dir():
        raise DestinationExists(f"dest={url} is a file: name a folder")
    try:
        return parse_card(dest.get(CARD))
    except NotFound:
        if any(info.key not in page.PARTIAL for info in dest.list()):
            raise DestinationExists(
                f"dest={url} is not empty, and holds no evaluation of an autoencoder: name a new folder"
            ) from None
        return None
    except ParseError as error:
        raise DestinationExists(
            f"{dest.locate(CARD)} is no card of an autoencoder ({error}): give another dest=, or delete it"
        ) from None


if __name__ == "__main__":
    from pipeline import cli

    raise SystemExit(cli.main(["reconstruct", *sys.argv[1:]]))
