"""The model card of a pushed export: README.md with the metadata that the hub reads, what the model is, its figures,
and how to load it.

Figures are those of the run's evaluation cards of the exported weights. Nothing in a card is a place, a host, a time or
a secret: data sets and encoders are named by their hashes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

import pipeline
from pipeline.config import ExportConfig, TrainConfig
from pipeline.config.tasks.figures import OF_FEATURES, RFID, Figure
from pipeline.config.tasks.found import BOUNDS, figures_of_run, present
from pipeline.inference.first_stage import TrainedAutoencoder
from pipeline.inference.trained import Trained
from pipeline.log import log
from pipeline.models.weights import weights_digest
from pipeline.parsing.text import one_line, safe
from pipeline.report.parsed import is_number, is_steered
from pipeline.report.run import Evaluation, load

PIPELINE_TAGS = {
    "text": "text-to-image",
    "unconditional": "unconditional-image-generation",
    "inpaint": "image-to-image",
    "superres": "image-to-image",
    "semantic": "image-to-image",
}
"""Task -> the hub's name for it; it has none for pictures of classes or of layouts."""
FEATURED = re.compile(r"(fid|rfid|fid_infinity|kid|cmmd|precision|recall|inception_score)(_[a-z0-9]\w*)?")
NO_FIGURE = re.compile(r"_floor|_(low|high|error|std)$")
"""Ends of names of numbers that belong to another."""
MOST = 12
"""Evaluations that a card shows: the first ones in order of their names."""
ERRORS = """± is a standard error, of figures over all pictures (FID and its like) a standard deviation over subsets;
[ ] is a 95% interval."""
UNMEASURED = """Nothing measured bias, safety, or how near the pictures come to single pictures that the model was
trained on."""
BEGINS = "`latentmill train init=FOLDER` begins a run with the weights of its UNet."
DOWNLOAD = """```python
from huggingface_hub import {function}

{line}
```

"""


def card(config: ExportConfig, trained: Trained | TrainedAutoencoder, loading: str) -> str:
    """The text of README.md. loading: how to load what was exported, of `folder` or `file`. Raises StorageError."""
    name = config.push.removeprefix("hub:").rpartition("/")[2]
    evaluations = evaluated(config.run, trained)
    shown, more = evaluations[:MOST], len(evaluations[MOST:])
    parts = [
        f"---\n{metadata(config, trained)}---\n\n# {name}\n",
        _what(trained),
        "## What it is\n\n" + _table(("", ""), _facts(trained)),
        "## Figures\n\n" + _figures(trained, shown, more),
        "## What was not measured\n\n" + _unmeasured(trained, shown),
    ]
    said = safe("\n".join(part.rstrip("\n") + "\n" for part in parts))
    return f"{said}\n## How to load it\n\n{_download(config)}{loading.strip()}\n"


def metadata(config: ExportConfig, trained: Trained | TrainedAutoencoder) -> str:
    """The YAML at the top: license, library_name, pipeline_tag, tags, datasets, those that there are."""
    task = trained.info.config.task.name if isinstance(trained, Trained) else "autoencoder"
    facts: dict[str, Any] = {
        "license": config.license,
        "library_name": "diffusers" if config.format == "diffusers" else "",
        "pipeline_tag": PIPELINE_TAGS.get(task, ""),
        "tags": ["latentmill", "latent-diffusion", task, config.format],
        "datasets": list(config.datasets),
    }
    if config.format == "diffusers":
        facts["tags"].remove("diffusers")  # library_name says so
    given = {key: value for key, value in facts.items() if value}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=10_000)


def evaluated(run: str, trained: Trained | TrainedAutoencoder) -> list[Evaluation]:
    """The run's evaluations of the exported weights whose images were given nothing besides their conditioning. A card
    that has the hash of the weights is of others where it differs: a run may have been made anew."""
    stored = load(run)
    for note in stored.notes:
        log.warning(f"export: the model card is without what is damaged in {run}: {note}")
    found = [
        one
        for one in stored.evaluations
        if one.n == trained.n
        and one.card.get("weights") == trained.weights
        and not is_steered(one.card.get("steering"))
    ]
    if isinstance(trained, TrainedAutoencoder) or not any(one.card.get("weights_sha256") for one in found):
        return found
    digest = weights_digest(trained.state)
    return [one for one in found if one.card.get("weights_sha256", "") in ("", digest)]


def _what(trained: Trained | TrainedAutoencoder) -> str:
    kind = "A latent diffusion model" if isinstance(trained, Trained) else "An autoencoder"
    if isinstance(trained, Trained) and trained.contract.stored == "pixels":
        kind = "A diffusion model"
    return f"{kind}, trained by latentmill: {_weights(trained)} at {trained.n:,} samples seen.\n"


def _weights(trained: Trained | TrainedAutoencoder) -> str:
    kind, _, which = trained.weights.partition("=")
    average = f"averaged weights ({kind}{f' {which}' if which else ''})"
    return "weights as trained" if kind == "raw" else average


def _facts(trained: Trained | TrainedAutoencoder) -> list[tuple[str, str]]:
    """What the model is and what it was trained on, by the run's configuration and run.json."""
    info, contract = trained.info, trained.contract
    rows: list[tuple[str, str]] = []
    if isinstance(trained, Trained):
        config = trained.info.config
        assert isinstance(config, TrainConfig)
        rows += [
            ("task", config.task.name),
            ("prediction", config.diffusion.prediction),
            ("parameters trained", f"{sum(tensor.numel() for tensor in trained.state.values()):,}"),
        ]
        if contract.stored != "pixels":
            rows += [
                ("latents", " × ".join(map(str, contract.latent_shape))),
                ("latent scale, shift", f"{contract.scale:g}, {contract.shift:g}"),
                ("autoencoder, SHA-256 of its weights", contract.vae_sha256 or "not known"),
            ]
        if contract.text is not None and config.task.takes_text:
            rows.append(("text tower, SHA-256 of its weights", contract.text_sha256 or "not known"))
    else:
        first = trained.config
        rows += [
            ("kind", f"{first.regularizer}, f = {first.downsampling}, {first.latent_channels} channels"),
            ("parameters", f"{sum(tensor.numel() for tensor in trained.model.parameters()):,}"),
        ]
    sizes = sorted({f"{width} × {height}" for width, height in contract.buckets})
    rows += [
        ("pictures", f"{sizes[0]} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes, {contract.resolution}² pixels"),
        ("samples seen", f"{trained.n:,}"),
        ("batch", f"{info.config.optim.batch:,}"),
        ("seed", str(info.config.seed)),
    ]
    roles = {role: digest for role, digest in info.manifests.items() if role != "val"}
    rows += [(f"data set ({role}), digest of its manifest", digest) for role, digest in roles.items()]
    records = info.facts.get("dataset_samples")
    if is_number(records):
        rows.append(("records", f"{records:,}"))
    made = {"latentmill (export)": pipeline.__version__, **_texts(info.facts.get("versions"))}
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in made.items())))
    return rows


def _texts(versions: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in versions.items()} if isinstance(versions, Mapping) else {}


def _figures(trained: Trained | TrainedAutoencoder, evaluations: Sequence[Evaluation], more: int) -> str:
    """A table for each evaluation, and how it was made. more: how many there are besides."""
    if not evaluations:
        return f"No evaluation of these weights ({_weights(trained)} at {trained.n:,} samples) is in the run.\n"
    texts = []
    for one in evaluations:
        rows = [_row(one.metrics, name, figure) for name, figure in _measured(one.metrics)]
        where = f"`latentmill eval`, {_code(one.name)}" if one.name else "The evaluation inside training"
        line = f"\n{_code(one.card['line'])}\n" if one.card.get("line") else ""
        records = one.card.get("captions") or one.card.get("pictures") or {}
        digest = f" Records: {_code(str(records['dataset']))}." if records.get("dataset") else ""
        table = _table(("figure", "value", "error", "beside it", "in"), rows)
        texts.append(f"{where}, {one.metrics.get('images', '?')} pictures.{digest}\n\n{table}{line}")
    besides = f"\n{more:,} more of these weights are in the run and not shown here.\n" if more else ""
    return "\n".join(texts) + f"\n{ERRORS}\n{besides}"


def _measured(metrics: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """The figures that metrics hold, those of features first."""
    named: list[tuple[str, Figure]] = []
    titles = {figure.name: figure for figure in (*OF_FEATURES, RFID)}
    for name, value in metrics.items():
        found = FEATURED.fullmatch(name)
        if found and is_number(value) and not NO_FIGURE.search(name):
            kind = next((k for k in sorted(titles, key=len, reverse=True) if name == k or name.startswith(f"{k}_")), "")
            plain = Figure(found[1], name, "", "lower", "pooled", digits=4)
            figure = titles[kind] if kind and "infinity" not in name else plain
            named.append((name, figure))
    return named + [(name, figure) for name, figure in present(metrics) if is_number(metrics[name])]


def _row(metrics: Mapping[str, Any], name: str, figure: Figure) -> tuple[str, ...]:
    digits = figure.digits
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    error = metrics.get(f"{name}_error", metrics.get(f"{name}_std"))
    bar = f"± {error:.2g}" if is_number(error) else "none"
    if is_number(low) and is_number(high):
        bar = f"[{low:.{digits}f}, {high:.{digits}f}]"
    beside = [f"{end} {metrics[key]:.{digits}f}" for end in BOUNDS if is_number(metrics.get(key := f"{name}_{end}"))]
    floors = {"real": f"{name}_floor_real", "reconstruction": f"{name}_floor_reconstruction"}
    beside += [f"{word} {metrics[key]:.{digits}f}" for word, key in floors.items() if is_number(metrics.get(key))]
    title = figure.title if name in figure.names else name
    return title, f"{metrics[name]:.{digits}f}", bar, ", ".join(beside), figure.unit


def _unmeasured(trained: Trained | TrainedAutoencoder, evaluations: Sequence[Evaluation]) -> str:
    """Figures that latentmill has for such a model and that no evaluation shown holds, and what it has none for."""
    held = {name for one in evaluations for name, value in one.metrics.items() if is_number(value)}
    missing = [
        figure.title
        for figure in figures_of_run(trained.info.config)
        if not any(
            name == n or (figure in (*OF_FEATURES, RFID) and n.startswith(f"{name}_"))
            for name in figure.names
            for n in held
        )
    ]
    listed = f"Of these weights: {', '.join(missing)}. " if missing else ""
    return f"{listed}{UNMEASURED}\n"


def _download(config: ExportConfig) -> str:
    """The lines that bring the files here."""
    repo = config.push.removeprefix("hub:")
    revision = f', revision="{config.revision}"' if config.revision != "main" else ""
    if config.format == "diffusers":
        return DOWNLOAD.format(function="snapshot_download", line=f'folder = snapshot_download("{repo}"{revision})')
    file = config.dest.rpartition("/")[2]
    return DOWNLOAD.format(function="hf_hub_download", line=f'file = hf_hub_download("{repo}", "{file}"{revision})')


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: str) -> str:
    """Text of others in a table of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", one_line(value))


def _code(value: str) -> str:
    return f"`{one_line(value).replace('`', '')}`"
