"""latentmill verify: proves that a cache is right, or says what is wrong with it.

Every byte is hashed and every record read. Hashes and counts are compared with the manifest; shapes, types and
finiteness with the contract; the statistics are computed again. Then a few records are compared with their source: the
captions must be those of the source, the contract's encoders must reproduce text states and moments, and the decoded
latents must look like the images. Of columns (of=CACHE) the keys must be the cache's, and the values their source's.
"""

from __future__ import annotations

import sys

from pipeline import cli
from pipeline.config import VerifyConfig
from pipeline.data.format.manifest import MANIFEST, Manifest, load_manifest
from pipeline.data.format.present import require_shards
from pipeline.data.joined.binding import bind
from pipeline.data.joined.columns import is_columns, load_columns
from pipeline.errors import ConfigError, DataError
from pipeline.log import log, show
from pipeline.report.publish import require_page
from pipeline.storage.urls import open_storage
from preprocess.adopting.reproved import check_conversion
from preprocess.proving.against_source import check_sources
from preprocess.proving.columns import REMEDY, check_columns, check_values_of_source
from preprocess.proving.filters import check_near_duplicates
from preprocess.proving.findings import Findings
from preprocess.proving.page import MARK, Pair, write_page
from preprocess.proving.shards import check_excluded, check_shards, check_uncond


def main(config: VerifyConfig) -> int:
    """Runs the verb. Raises DataError when anything is wrong."""
    if config.report:
        require_page(config.report, MARK)
    storage = open_storage(config.dataset)
    if config.of or (is_columns(storage) and not storage.exists(MANIFEST)):
        return verify_columns(config)
    manifest = load_manifest(storage)
    require_shards(storage, manifest)
    findings = Findings()
    check_shards(storage, manifest, findings)
    check_uncond(storage, manifest, findings)
    check_excluded(storage, manifest, findings)
    check_near_duplicates(storage, manifest, findings)
    pairs = list[Pair]()
    if findings.problems:
        findings.add("source", "not compared: the cache itself is damaged")
    elif manifest.adopted and not config.source:
        findings.add("source", "not compared: it was indexed from latents whose images are not known")
    elif manifest.contract.converted and not config.source:
        findings.add("source", "not compared: give source=, which it was converted from")
    elif manifest.contract.converted and config.samples:
        check_conversion(manifest, config, findings)
    elif config.samples:
        pairs = check_sources(storage, manifest, config, findings)
    tell(findings, f"dataset {config.dataset}, digest {manifest.digest}")
    if config.report:
        write_page(config.report, config.dataset, manifest, findings.checks, pairs)
    refuse_wrong(config.dataset, findings, otherwise(manifest))
    if findings.poor:
        raise DataError(
            f"{config.dataset} is what its manifest promises, but its encoders do not reconstruct these images: "
            f"{findings.poor}. Look at the pairs (report=page.html); encode with others, or accept it with min_psnr="
        )
    return 0


def verify_columns(config: VerifyConfig) -> int:
    """Proves columns: that they are what columns.json says, belong to the cache `of` record by record, and hold what
    their source gives. Raises ConfigError, ContractMismatch, DataError."""
    if not config.of:
        raise ConfigError(f"{config.dataset} holds columns: name the cache that they belong to, of=CACHE")
    if config.report:
        raise ConfigError("report= shows pictures, and columns have none: leave it out")
    storage, cache = open_storage(config.dataset), open_storage(config.of)
    manifest = load_manifest(cache)
    bound = bind(storage, load_columns(storage, manifest.digest), cache, manifest)
    findings = Findings()
    check_columns(cache, manifest, bound, findings)
    if findings.problems:
        findings.add("source", "not compared: the columns themselves are damaged")
    elif config.samples:
        check_values_of_source(bound, manifest, config, findings)
    tell(findings, f"columns {config.dataset}, digest {bound.columns.digest}, of {config.of}")
    refuse_wrong(config.dataset, findings, REMEDY)
    return 0


def tell(findings: Findings, head: str) -> None:
    """Prints what was found."""
    width = max(len(name) for name, _ in findings.checks)
    show(head)
    for name, result in findings.checks:
        show(f"  {name:<{width}}  {result}")


def refuse_wrong(dataset: str, findings: Findings, otherwise: str) -> None:
    """Raises DataError when there are problems. otherwise: what to do about them where no check knows."""
    if not findings.problems:
        return
    for problem in findings.problems[:20]:
        log.error(f"verify: {problem}")
    raise DataError(
        f"{dataset} is not what its manifest promises: {len(findings.problems)} problems, the first: "
        f"{findings.problems[0]}. {'; '.join(findings.remedies) or otherwise}"
    )


def otherwise(manifest: Manifest) -> str:
    """What to do about problems that no check knows a remedy for."""
    if manifest.adopted:
        return "Index it anew"
    if manifest.contract.converted:
        return "Convert it anew, into another dest"
    return (
        f"If the manifest was changed, delete {MANIFEST} and {manifest.name} and run the same `latentmill encode` "
        "again, which writes them anew; else encode it again, into another dest"
    )


if __name__ == "__main__":
    raise SystemExit(cli.main(["verify", *sys.argv[1:]]))
