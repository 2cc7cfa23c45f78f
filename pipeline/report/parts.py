"""Charts of what an autoencoder's training logs beside its loss: the loss's parts, its codes, its discriminator."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.charts import Series, line_chart
from pipeline.report.run import Run

PARTS = (
    ("rec", "Reconstruction error", "log scale", True),
    ("perceptual", "Perceptual distance of the loss", "", False),
    ("kl", "KL", "nats for each pixel value; it rises where its weight is small", False),
    ("quantisation", "Distance of latents to their codes", "mean square, log scale", True),
    ("codes_used", "Codes used in training", "share of the codebook", False),
    ("perplexity", "Perplexity in training", "codes, were they used evenly", False),
    ("lambda", "Weight of the discriminator", "the ratio of gradients, log scale", True),
    ("gan", "Generator's loss", "minus the logit of reconstructions", False),
    ("discriminator", "Discriminator's loss", "hinge: 2 where it sees no difference", False),
    ("grad_norm_discriminator", "Gradient norm of the discriminator", "before clipping, log scale", True),
)
"""Name in metrics.jsonl, title, unit, and whether the axis is logarithmic."""
LOGITS = (("logits_real", "pictures"), ("logits_fake", "reconstructions"))


def loss_parts(runs: Sequence[Run]) -> list[str]:
    """The charts of the parts that any of the runs logs; [] for runs of diffusion models."""
    charts = []
    for name, title, unit, log_y in PARTS:
        series = [Series(run.name, run.curve(name), colour=i, smooth=True) for i, run in enumerate(runs)]
        charts.append(line_chart(series, title=title, y_label=unit, log_y=log_y))
    if len(runs) == 1:
        logits = [Series(label, runs[0].curve(name), colour=i, smooth=True) for i, (name, label) in enumerate(LOGITS)]
        charts.append(line_chart(logits, title="Logits of the discriminator"))
    return [chart for chart in charts if chart]
