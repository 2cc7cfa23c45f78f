"""The figures that judge tasks, without what computes them (evaluation/tasks/): names, directions and titles.

Configuration checks, the choice of the best checkpoint and reports read them where there is no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

TO_RECONSTRUCTION = "_to_reconstruction"
"""End of a figure's name where pictures were compared with the autoencoder's reconstruction, since the cache does not
hold the records' own pictures (encode conditions=[...,pixels])."""
SHORTCUT = "task"
"""Stands for the figure that a task means by "best"."""


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation, a number under this name in metrics.json."""

    name: str
    title: str
    """What it is, for a heading."""
    unit: str
    """What it is counted in, for an axis."""
    better: Literal["higher", "lower"]
    kind: Literal["share", "mean", "pooled", "cost"]
    """share: of cases that are right; NAME_low and NAME_high are its 95% interval (Wilson). mean: over pictures;
    NAME_error is its standard error. pooled: one figure of sums over all pictures; NAME_error is its standard
    deviation over halves of them. cost: follows from the architecture, or is a speed of this machine; it has no error
    bar, and training does not change it."""
    compares: bool = False
    """Whether it compares with the record's own picture; without that its name ends in _to_reconstruction."""
    digits: int = 3
    """Decimals that a table shows."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which metrics.json may hold it."""
        return (self.name, self.name + TO_RECONSTRUCTION) if self.compares else (self.name,)


OF_FEATURES = (
    Figure("fid", "FID", "lower is better", "lower", "pooled", digits=2),
    Figure("kid", "KID", "lower is better", "lower", "pooled", digits=5),
    Figure("cmmd", "CMMD", "lower is better", "lower", "pooled", digits=3),
)
"""Figures of any task against statistics of real images; their names in metrics.json end in the features' name."""
CLIP_SCORE = Figure("clip_score", "CLIP score", "100 × cosine", "higher", "mean", digits=2)
"""Of tasks that read captions."""
ST_LPIPS = Figure("st_lpips", "st-LPIPS", "distance, lower is better", "lower", "mean", compares=True, digits=4)
LPIPS = Figure("lpips", "LPIPS", "distance, lower is better", "lower", "mean", compares=True, digits=4)
PERCEIVED = (ST_LPIPS, LPIPS)
"""Of tasks that compare pictures, where eval.perceptual gives weights: the one of whose distance these are."""

TEXT = (Figure("attribute_accuracy", "Attribute accuracy", "share of captions shown right", "higher", "share"),)
UNCONDITIONAL = (
    Figure("whole_shapes", "Whole shapes", "share of pictures of one to three known shapes", "higher", "share"),
)
CLASSES = (Figure("class_accuracy", "Class accuracy", "share of pictures of their class", "higher", "share"),)
LAYOUT = (
    Figure("layout_iou", "Layout IoU", "mean over boxes", "higher", "mean"),
    Figure("layout_right", "Layouts right", "share of pictures with all boxes right, and no others", "higher", "share"),
    Figure("layout_recall", "Layout recall", "share of boxes that are shown", "higher", "share"),
    Figure("layout_precision", "Layout precision", "share of objects that were asked for", "higher", "share"),
)
SEMANTIC = (
    Figure("label_iou", "Mean IoU of labels", "pooled over pictures", "higher", "pooled"),
    Figure("label_iou_foreground", "Mean IoU of labels but the first", "pooled over pictures", "higher", "pooled"),
    Figure("label_accuracy", "Label accuracy", "share of cells", "higher", "mean"),
)
SUPERRES = (
    Figure("psnr", "PSNR", "dB, mean over pictures", "higher", "mean", compares=True, digits=2),
    Figure("ssim", "SSIM", "mean over pictures", "higher", "mean", compares=True),
    Figure("consistency", "Consistency", "dB, against the small image", "higher", "mean", digits=2),
    *PERCEIVED,
)
INPAINT = (
    Figure("completed", "Objects completed", "share of partly hidden objects", "higher", "share", compares=True),
    Figure("psnr_inside", "PSNR inside", "dB, pooled over hidden pixels", "higher", "pooled", compares=True, digits=2),
    Figure("psnr_outside", "PSNR outside", "dB, before pasting, pooled", "higher", "pooled", compares=True, digits=2),
    *PERCEIVED,
)
START = (
    Figure("class_kept", "Class kept", "share of pictures of their start's class", "higher", "share"),
    Figure("psnr_start", "PSNR to the start", "dB, pooled", "higher", "pooled", compares=True, digits=2),
)
"""Of images that begin from the records' own (eval strength=)."""
KEPT = (
    Figure(
        "psnr_kept", "PSNR of what is kept", "dB, before pasting, pooled", "higher", "pooled", compares=True, digits=2
    ),
)
"""Of images that keep a region of the records' own (eval keep=true)."""
GUIDED = (
    Figure(
        "guide_consistency", "Consistency with the target", "dB, mean over pictures", "higher", "mean", True, digits=2
    ),
)
"""Of any task, where a guide leads to pictures; captions and classes have the figures of their tasks."""
STEERED = (*START, *KEPT, *GUIDED)
"""Of what images are given besides their conditioning."""
QUARTERS = 4
"""Parts of the noise levels by which a classifier is measured, as often drawn in training as one another."""
CLASSIFIER = (
    Figure("accuracy", "Accuracy", "mean over records and noise levels", "higher", "mean"),
    Figure("cross_entropy", "Cross-entropy", "nats, mean over records and noise levels", "lower", "mean"),
    *(
        Figure(f"accuracy_q{i}", f"Accuracy, quarter {i} of the noise", "share of records", "higher", "share")
        for i in range(1, QUARTERS + 1)
    ),
    *(
        Figure(f"cross_entropy_q{i}", f"Cross-entropy, quarter {i} of the noise", "nats", "lower", "mean")
        for i in range(1, QUARTERS + 1)
    ),
)
"""Of classifiers of noisy latents. Quarter 1 has the least noise."""
OF_CODES = (
    Figure("codes_used", "Codes used", "share of the codebook", "higher", "pooled"),
    Figure("perplexity", "Perplexity of codes", "codes, were they used evenly", "higher", "pooled", digits=1),
)
"""Of autoencoders with a codebook."""
FIRST_STAGE = (
    Figure("psnr", "PSNR", "dB, mean over pictures", "higher", "mean", digits=2),
    Figure("ssim", "SSIM", "mean over pictures", "higher", "mean"),
    *(replace(figure, compares=False) for figure in PERCEIVED),
    *OF_CODES,
)
"""Of autoencoders, beside rFID."""
RFID = Figure("rfid", "rFID", "lower is better", "lower", "pooled", digits=2)
"""Of autoencoders: FID of reconstructions against statistics of real images; its name in metrics.json ends in the
features' name."""
FIRST_STAGE_COSTS = (
    Figure("bits_per_pixel", "Bits a pixel", "of the codes", "lower", "cost", digits=4),
    Figure("kl_bits_per_pixel", "KL, bits a pixel", "of the posterior to the prior", "lower", "mean", digits=4),
    Figure("stored_bits_per_pixel", "Stored bits a pixel", "of float16 in a cache", "lower", "cost", digits=3),
    Figure("encode_images_per_s", "Images/s encoded", "of one device", "higher", "cost", digits=1),
    Figure("decode_images_per_s", "Images/s decoded", "of one device", "higher", "cost", digits=1),
)
"""What an autoencoder's latents and its two halves cost. The first is of those with a codebook, the second of those
with a posterior."""


def perceived(perceptual: str) -> Figure:
    """The figure of the distance whose weights eval.perceptual gives, or that a card names."""
    return LPIPS if perceptual.startswith("lpips-vgg") else ST_LPIPS
