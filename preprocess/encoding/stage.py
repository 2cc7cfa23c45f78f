"""Runs units of work through the encoders. Reading, decoding, encoding, writing and uploading run concurrently.

    reader thread -> decoding workers -> (batches) -> the calling thread: autoencoder, text -> publisher's threads

A batch holds samples of one unit only, and the last batch of each dataset and bucket is padded to the full size, so the
bytes of a unit do not depend on what was encoded before it.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.errors import ShardCorrupt, SourceError
from pipeline.log import log
from pipeline.tracking.progress import Progress
from preprocess.encoding.census import THUMBNAILS, Census, class_words, thumbnail
from preprocess.encoding.encoder import Batch, Encoded, Encoder, Item, item
from preprocess.encoding.output import Destination, UnitFacts
from preprocess.encoding.plan import Unit
from preprocess.encoding.publisher import Publisher
from preprocess.encoding.rejects import Rejects, hints
from preprocess.encoding.tally import Tally
from preprocess.filters.clip import ClipFilter
from preprocess.gathering.unit import SourceUnit
from preprocess.source.decoders import Decoders
from preprocess.source.recipe import Recipe
from preprocess.source.rejected import Rejected, bounded
from preprocess.source.sample import FILTERED, Prepared
from preprocess.source.shard import Sample
from preprocess.source.worker import CHUNK, CHUNK_BYTES, Prepares
from preprocess.units.naming import option

QUEUED = 3  # batches that are read ahead of the encoders


@dataclass
class _Finished:
    """Marks the end of a unit, after its last batch."""

    facts: UnitFacts


@dataclass
class _Damaged:
    """Marks a unit whose input shard is damaged."""

    error: ShardCorrupt
    unit: Unit


class Stage:
    """Encodes units in the order in which `run` is given them.

    similar: the filter on the similarity of picture and caption, if there is one.
    max_rejects: share of defective samples beyond which it stops before everything has been read. total_bytes: size of
    the input shards that it will read, as far as that is known. label: of the progress bar; "" shows none.
    """

    def __init__(
        self,
        destinations: list[Destination],
        recipe: Recipe,
        encoder: Encoder,
        decoders: Decoders,
        *,
        similar: ClipFilter | None = None,
        max_rejects: float = 1.0,
        total_bytes: int = 0,
        label: str = "",
    ) -> None:
        self.destinations, self.recipe, self.encoder, self.decoders = destinations, recipe, encoder, decoders
        self.similar = similar
        self.max_rejects, self.total_bytes, self.label = max_rejects, total_bytes, label
        self.tally = Tally()
        self._defects: collections.Counter[str] = collections.Counter()
        self._stopped = threading.Event()
        self._hinted = False

    def run(
        self,
        next_unit: Callable[[], Unit | None],
        done: Callable[[Unit], None] = lambda unit: None,
        stop: Callable[[], None] = lambda: None,
    ) -> str:
        """Encodes the units that `next_unit` returns, until it returns None. Calls `done` with each published unit.

        stop: called at the end, so that a waiting `next_unit` returns. Returns a line about the time that each stage
        took. Nothing of a damaged input shard is published; ShardCorrupt is raised for it once all other units are
        done. Any other error in any thread is raised at once: finished units stay, and nothing of the others is left.
        """
        self.tally = Tally()
        self._stopped.clear()
        feed, bytes_before = self._feed(next_unit), 0
        damaged: list[_Damaged] = []
        with (
            ThreadPoolExecutor(1, "latentmill-read") as reader,
            Publisher(self.destinations, self.recipe.variants, self.tally, done) as publisher,
            Progress(max(1, self.total_bytes // 1_000_000), self.label, "MB", enabled=bool(self.label)) as progress,
        ):
            ready = collections.deque(reader.submit(next, feed, None) for _ in range(QUEUED))
            try:
                while True:
                    with self.tally.timed("wait"):
                        found = ready.popleft().result()
                    if found is None:
                        break
                    ready.append(reader.submit(next, feed, None))
                    position = bytes_before
                    if isinstance(found, Batch):
                        self._take_holes(found)
                        publisher.add(self._encode(found))
                        position += found.position
                    elif isinstance(found, _Damaged):
                        publisher.drop()
                        damaged.append(found)
                        self.tally.bytes += found.unit.bytes
                        log.warning(f"encode: {found.error}; going on with the others")
                    else:
                        publisher.end(found.facts)
                        self._count(found.facts)
                        self._refuse_early()
                    bytes_before = self.tally.bytes
                    progress.update(
                        max(position, bytes_before) // 1_000_000 - progress.done,
                        images_s=f"{self.tally.rate:.0f}",
                        rejects=self.tally.rejected.total(),
                    )
                publisher.finish()
            except BaseException:
                self.decoders.abort()
                raise
            finally:
                self._stopped.set()
                stop()
                reader.shutdown(cancel_futures=True)
                feed.close()
        if len(damaged) > 1:
            names = [one.unit.name for one in damaged]
            raise ShardCorrupt(
                f"{len(damaged)} input shards are damaged, the others are done. The first: {damaged[0].error}; "
                f"{option('leave_out', names)} leaves all of them out"
            )
        if damaged:
            raise damaged[0].error
        return self.tally.told(self.decoders.count)

    def _take_holes(self, batch: Batch) -> None:
        facts, items = self.recipe.conditions.mask, iter(batch.items)
        for part in batch.drawing:
            with self.tally.timed("wait"):
                drawn, seconds = part.result()
            self.tally.drawing += seconds
            for packed in drawn:
                assert facts is not None, "holes are drawn for caches with masks"
                next(items).take(packed, facts)

    def _encode(self, batch: Batch) -> Encoded:
        encoded = self.encoder.encode(batch)
        self.tally.seconds["autoencoder"] += encoded.seconds[0]
        self.tally.seconds["text"] += encoded.seconds[1]
        self.tally.images += len(batch.items)
        return encoded

    def _count(self, facts: UnitFacts) -> None:
        tally = self.tally
        tally.rejected.update(facts.rejected)
        self._defects[facts.unit.name] += sum(
            count for reason, count in facts.rejected.items() if not reason.startswith(FILTERED)
        )
        tally.read += facts.read
        tally.accepted += facts.accepted
        tally.bytes += facts.shard.bytes

    def _refuse_early(self) -> None:
        """Raises SourceError once there are more defects than the whole source is allowed to have."""
        tally = self.tally
        if tally.bytes >= self.total_bytes:
            return  # everything has been read: the check of finalize gives the exact numbers
        expected_samples = tally.read * max(1.0, self.total_bytes / max(tally.bytes, 1))  # samples, estimated
        if tally.defects > self.max_rejects * expected_samples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in tally.rejected.most_common())
            worst = [name for name, count in self._defects.most_common() if count]
            raise SourceError(
                f"{tally.defects} of the first {tally.read} samples were rejected ({reasons}): that is already more "
                f"than max_rejects={self.max_rejects:g} of the whole source. Run again with a higher max_rejects to "
                f"accept that; or mend the source, and run this once with {option('forget', worst)}, then again without"
            )

    # The reader thread -----------------------------------------------------------------------------------------------

    def _feed(self, next_unit: Callable[[], Unit | None]) -> Generator[Batch | _Finished | _Damaged]:
        """Yields batches of decoded samples, and _Finished or _Damaged at the end of each unit."""
        while (unit := next_unit()) is not None:
            try:
                yield from self._unit(unit)
            except ShardCorrupt as error:
                yield _Damaged(error, unit)

    def _unit(self, unit: Unit) -> Iterator[Batch | _Finished]:
        targets = range(len(self.recipe.targets))
        with unit.open(self.recipe.limits, self._stopped) as shard:
            rejects = Rejects(shard.where)
            facts = UnitFacts(
                unit,
                shard,
                rejected=rejects.counts,
                censuses=[Census() for _ in targets],
                thumbnails=[[] for _ in targets],
                buckets=[[] for _ in targets],
                looks=[[] for _ in targets],
                cut_boxes=[0 for _ in targets],
            )
            seen: set[bytes] = set()
            pending: dict[tuple[int, int], list[Item]] = {}
            for result in self._filtered(shard):
                facts.read += 1
                if isinstance(result, Prepared) and result.digest and result.digest in seen:
                    result = Rejected(bounded(result.key), f"{FILTERED}duplicate")
                if isinstance(result, Rejected):
                    rejects.add(result)
                    continue
                seen.add(result.digest)
                for record in self._accept(result, facts):
                    place = record.target, record.picture.bucket
                    batch = pending.setdefault(place, [])
                    batch.append(record)
                    if len(batch) == self.encoder.batch:
                        yield self._batch(unit, *place, batch, shard.position)
                        del pending[place]
            for place, batch in sorted(pending.items()):
                yield self._batch(unit, *place, batch, shard.position)
            facts.rejects = rejects.lines()
            self._hint(facts)
            yield _Finished(facts)

    def _batch(self, unit: Unit, target: int, bucket: int, items: list[Item], position: int) -> Batch:
        """The batch, whose holes decoding workers begin to draw."""
        batch = Batch(unit, target, bucket, items, position)
        if self.recipe.conditions.mask is not None:
            holes = [item.holes(unit.number) for item in items]
            parts = (holes[start : start + CHUNK] for start in range(0, len(holes), CHUNK))
            batch.drawing = [self.decoders.draw(part) for part in parts]
        return batch

    def _hint(self, facts: UnitFacts) -> None:
        """Says what may be wrong, once, with a shard of which no sample is usable."""
        if facts.accepted or self._hinted:
            return
        self._hinted = True
        log.warning(
            f"encode: {facts.shard.where}: none of {facts.read} samples is usable; "
            f"{hints(facts.rejected, facts.shard.first, self.recipe.caption_key)}"
        )

    def _accept(self, sample: Prepared, facts: UnitFacts) -> Iterator[Item]:
        """Counts an accepted sample and yields the items of its records."""
        first = facts.accepted * self.recipe.variants
        downsampling = self.encoder.first_stage.downsampling
        facts.accepted += 1
        facts.truncated += any(one.truncated for one in sample.captions)
        facts.cut_captions += sample.cut_captions
        facts.digests.append(sample.digest)
        if sample.profile:
            facts.profiles[sample.profile] += 1
        for target, picture in enumerate(sample.pictures):
            facts.censuses[target].add(sample, target)
            facts.buckets[target].append(picture.bucket)
            facts.looks[target].append(picture.looks)
            if facts.accepted <= THUMBNAILS:
                words = sample.caption or class_words(picture, self.recipe.conditions.classes)
                facts.thumbnails[target].append({"caption": words, "jpeg": thumbnail(sample, target)})
            facts.cut_boxes[target] += picture.cut_boxes
            for flipped in range(self.recipe.variants):
                row = first + flipped
                yield item(row, sample, target, self.recipe.conditions, downsampling, flipped=bool(flipped))

    def _filtered(self, shard: SourceUnit) -> Iterator[Prepared | Rejected]:
        """Yields what `_decoded` does, with rejections of samples whose captions do not fit."""
        decoded = self._decoded(shard)
        if self.similar is None:
            yield from decoded
            return
        while group := list(itertools.islice(decoded, self.similar.together)):
            with self.tally.timed("score"):
                judged = list(self.similar.judged(group))
            yield from judged

    def _decoded(self, shard: SourceUnit) -> Iterator[Prepared | Rejected]:
        """Yields, for each sample of the shard in order, the prepared sample or its rejection."""
        pending: collections.deque[Future[Prepares]] = collections.deque()
        samples = shard.samples()
        more = True
        while more or pending:
            if more and len(pending) < self.decoders.count + 1:
                with self.tally.timed("read"):
                    chunk = _take(samples)
                more = bool(chunk)
                if chunk:
                    pending.append(self.decoders.submit(chunk, shard.where))
                continue
            results, seconds = pending.popleft().result()
            self.tally.seconds["decode"] += seconds
            yield from results


def _take(samples: Iterator[Sample]) -> list[Sample]:
    """The next samples: CHUNK of them, or fewer once they have CHUNK_BYTES."""
    chunk: list[Sample] = []
    size = 0
    while len(chunk) < CHUNK and size < CHUNK_BYTES and (sample := next(samples, None)) is not None:
        chunk.append(sample)
        size += sum(map(len, sample.members.values()))
    return chunk
