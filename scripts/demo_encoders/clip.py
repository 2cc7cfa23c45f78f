"""The demo CLIP: open_clip's architecture, trained contrastively on captioned shapes (Radford et al. 2021).

Besides the contrastive loss there are several aids. False captions, made from true ones by a change of one colour,
shape, size, side or relation, are negatives in each batch, so that binding and place matter; captions that happen to be
true of another picture are no negatives. A linear probe on the embedding of the picture predicts the triples that it
shows. Linear probes on the text states predict, at the word of each shape, the attributes of that object, so that the
per-token states that condition the UNet are as useful as the pooled one. Linear probes on the states of the end token
predict the content of the whole caption and a thumbnail of the picture, since a small denoiser learns more easily from
states that make the places of objects plain. The probes are discarded after training.

Captions are padded with the end token, like those of Stable Diffusion 1, and the probes read every one of these tokens.
So the context of a UNet holds the whole caption many times, and no untrained states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from demo_encoders import tokenizer as vocabulary
from demo_encoders.data import (
    EVAL_SEED,
    IMAGES,
    TRAIN_SEED,
    Average,
    as_input,
    optimise,
    pictures,
    save_half,
    save_json,
)
from preprocess.shapes.captions import (
    COLOURS,
    PLACE_WORDS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SHAPES,
    SIZES,
    Facts,
    describe,
    holds,
    wording,
)
from preprocess.shapes.drawing import Scene

EMBED = 64
TEXT_WIDTH = 128
STEPS = 1600
BATCH = 128
LR = 1e-3
LENGTH = 24  # tokens used in training: no caption of captioned shapes is longer
SMALLEST_TEMPERATURE = 0.01
AID_WEIGHT = 0.5
THUMBNAIL = 8  # pixels per side
THUMBNAIL_WEIGHT = 4.0

PAIRS = len(SHAPES) * len(COLOURS)
SIZE_NAMES = (None, *SIZES)
RELATIONS = (None, *RELATION_WORDS)
PLACES = (None, *PLACE_WORDS)
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def architecture(vocab_size: int) -> dict:
    """open_clip's model_cfg."""
    return {
        "embed_dim": EMBED,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": vocabulary.CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": TEXT_WIDTH,
            "heads": 4,
            "layers": 3,
        },
    }


def build(vocab_size: int) -> open_clip.CLIP:
    """Builds the model with random weights."""
    config = architecture(vocab_size)
    return open_clip.CLIP(
        config["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**config["text_cfg"]),
    )


def spoil(facts: Facts, truth: Scene, rng: np.random.Generator) -> Facts:
    """Changes one thing in `facts`, so that they are no longer true of `truth`."""
    while True:
        objects = list(facts.objects)
        i = int(rng.integers(len(objects)))
        kind = ("colour", "shape", "size", "where", "swap")[int(rng.integers(5))]
        spoiled = facts
        if kind == "colour":
            objects[i] = replace(objects[i], colour=COLOURS[int(rng.integers(len(COLOURS)))])
        elif kind == "shape":
            objects[i] = replace(objects[i], shape=SHAPES[int(rng.integers(len(SHAPES)))])
        elif kind == "size" and objects[i].size:
            objects[i] = replace(objects[i], size="small" if objects[i].size == "large" else "large")
        elif kind == "where" and facts.relation:
            spoiled = replace(facts, relation=INVERSE[facts.relation])
        elif kind == "where" and facts.place:
            spoiled = replace(facts, place=tuple(PLACE_WORDS)[int(rng.integers(len(PLACE_WORDS)))])
        elif kind == "swap" and len(objects) > 1:
            j = (i + 1) % len(objects)
            a, b = objects[i], objects[j]
            objects[i], objects[j] = replace(a, colour=b.colour), replace(b, colour=a.colour)
        spoiled = replace(spoiled, objects=tuple(objects))
        if not holds(spoiled, truth.objects):
            return spoiled


def truths(stated: Sequence[Facts], scenes: Sequence[Scene]) -> torch.Tensor:
    """(len(scenes), len(stated)) bool: whether a caption is true of a scene."""

    def pairs(things: Sequence) -> int:
        return sum(1 << (SHAPES.index(t.shape) * len(COLOURS) + COLOURS.index(t.colour)) for t in things)

    shown = np.array([pairs(truth.objects) for truth in scenes])
    said = np.array([pairs(facts.objects) for facts in stated])
    result = shown[:, None] == said[None, :]  # equal colours and shapes: candidates for the exact check
    for i, j in zip(*np.nonzero(result), strict=True):
        result[i, j] = holds(stated[j], scenes[i].objects)
    return torch.from_numpy(result)


def text_states(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """States after the final norm (B, L, TEXT_WIDTH) of tokens (B, L). L is at most the context length."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    return model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))


class Aids(nn.Module):
    """Linear probes that are trained with the model and discarded after training."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Linear(EMBED, PAIRS * len(SIZES))  # the triples that are shown
        self.word = nn.Linear(TEXT_WIDTH, len(SIZE_NAMES) + len(COLOURS) + len(SHAPES) + len(RELATIONS))
        self.end = nn.Linear(TEXT_WIDTH, PAIRS + len(RELATIONS) + len(PLACES))
        self.thumbnail = nn.Linear(TEXT_WIDTH, 3 * THUMBNAIL * THUMBNAIL)  # the picture, as far as it is described

    def forward(
        self,
        pixels: torch.Tensor,
        embedding: torch.Tensor,
        scenes: Sequence[Scene],
        states: torch.Tensor,
        tokens: torch.Tensor,
        stated: Sequence[Facts],
        shape_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The sum of the probes' losses.

        pixels (B, 3, 64, 64) and embedding (B, EMBED) of the pictures `scenes`; states (B, L, TEXT_WIDTH) of their
        captions `stated`.
        """
        shown = torch.zeros(len(scenes), PAIRS * len(SIZES))
        for i, truth in enumerate(scenes):
            for thing in truth.objects:
                shown[i, (thing.label - 1) * len(SIZES) + SIZES.index(thing.size)] = 1
        loss = F.binary_cross_entropy_with_logits(self.picture(embedding.float()), shown) * 10

        at_shapes = torch.isin(tokens, shape_ids)
        rows = [
            (SIZE_NAMES.index(o.size), COLOURS.index(o.colour), SHAPES.index(o.shape), RELATIONS.index(role))
            for facts in stated
            for o, role in zip(facts.objects, (None, facts.relation, None), strict=False)
        ]
        targets = torch.tensor(rows)
        widths = [len(SIZE_NAMES), len(COLOURS), len(SHAPES), len(RELATIONS)]
        for facet, logits in enumerate(self.word(states[at_shapes].float()).split(widths, dim=1)):
            loss = loss + F.cross_entropy(logits, targets[:, facet]) / 4

        row, column = torch.nonzero(tokens == tokens.max(), as_tuple=True)  # the end token and its copies after it
        ends = states[row, column].float()
        pairs, relation, place = self.end(ends).split([PAIRS, len(RELATIONS), len(PLACES)], dim=1)
        said = torch.zeros(len(stated), PAIRS)
        for i, facts in enumerate(stated):
            for o in facts.objects:
                said[i, SHAPES.index(o.shape) * len(COLOURS) + COLOURS.index(o.colour)] = 1
        loss = loss + F.binary_cross_entropy_with_logits(pairs, said[row]) * 5
        loss = loss + F.cross_entropy(relation, torch.tensor([RELATIONS.index(f.relation) for f in stated])[row]) / 2
        loss = loss + F.cross_entropy(place, torch.tensor([PLACES.index(f.place) for f in stated])[row]) / 2
        small = F.adaptive_avg_pool2d(pixels, THUMBNAIL).flatten(1)
        return loss + F.mse_loss(self.thumbnail(ends), small[row]) / small.var() * THUMBNAIL_WEIGHT


def contrast(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, also_true: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the symmetric contrastive loss, and the share of pictures whose own caption scores highest.

    image: (B, D). text: (M, D) with M >= B; text i < B is the caption of picture i, the others are false ones.
    also_true: (B, M), captions that are true of a picture; except for its own they are left out of the comparison.
    """
    count = len(image)
    logits = scale * F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T
    own_caption = torch.arange(count)
    ignored = also_true.clone()
    ignored[own_caption, own_caption] = False
    logits = logits.masked_fill(ignored, float("-inf"))
    loss = (F.cross_entropy(logits, own_caption) + F.cross_entropy(logits[:, :count].T, own_caption)) / 2
    return loss, (logits.argmax(dim=1) == own_caption).float().mean()


def train(folder: Path, seed: int, steps: int, every_minutes: float) -> dict[str, float]:
    """Trains CLIP, saves it to `folder`, which holds the tokenizer already, and returns its figures on unseen
    pictures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, scenes = pictures(TRAIN_SEED, IMAGES)
    tokenizer = vocabulary.load(folder)
    shape_ids = torch.tensor([tokenizer.encode(word)[0] for words in SHAPE_WORDS.values() for word in words])
    model = build(tokenizer.vocab_size)
    aids = Aids()
    print(f"clip: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    average = Average(model, decay=0.995)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = rng.integers(len(images), size=BATCH)
        shown = [scenes[i] for i in chosen]
        captions, stated = map(list, zip(*(describe(truth.objects, rng) for truth in shown), strict=True))
        spoiled = [spoil(facts, truth, rng) for facts, truth in zip(stated, shown, strict=True)]
        captions += [wording(facts, rng) for facts in spoiled]
        tokens = tokenizer(captions)[:, :LENGTH]
        tokens = torch.where(torch.arange(LENGTH) > tokens.argmax(dim=1, keepdim=True), tokens.max(), tokens)
        pixels = as_input(images[chosen])
        # In bf16 on a CPU the backward pass of fused attention takes half of a step, that of plain attention an eighth
        # of that.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image = model.encode_image(pixels)
            states = text_states(model, tokens)
            end = states[torch.arange(len(tokens)), tokens.argmax(dim=1)]
            text = end @ model.text_projection
        scale = model.logit_scale.exp().clamp(max=1 / SMALLEST_TEMPERATURE)
        loss, accuracy = contrast(image, text, scale, truths(stated + spoiled, shown))
        aid = aids(pixels, image, shown, states[:BATCH], tokens[:BATCH], stated, shape_ids)
        figures = {"accuracy": accuracy.item(), "contrast": loss.item(), "aid": aid.item(), "scale": scale.item()}
        return loss + AID_WEIGHT * aid, figures

    def keep(step: int) -> None:
        save(model, folder)
        print(f"provisional at step {step}: {measure(folder)}", flush=True)

    optimise(
        model,
        [*model.parameters(), *aids.parameters()],
        loss_of_step,
        steps=steps,
        lr=LR,
        average=average,
        every_minutes=every_minutes,
        provisional=keep,
    )
    save(model, folder)
    return measure(folder)


def save(model: open_clip.CLIP, folder: Path) -> None:
    """Writes weights and open_clip_config.json."""
    half = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    save_json({"model_cfg": architecture(model.vocab_size), "preprocess_cfg": half}, folder / "open_clip_config.json")
    save_half(model, folder / "open_clip_model.safetensors")


@torch.no_grad()
def measure(folder: Path, count: int = 1024) -> dict[str, float]:
    """Computes figures of the saved CLIP on `count` unseen pictures.

    picks_16: how often the true caption scores highest among 16, where the others belong to other pictures and are
    false of this one. picks_16_plain: the same with captions of any other pictures, including true ones. picks_spoiled:
    how often the true caption scores higher than a copy with one thing changed.
    """
    tokenizer = vocabulary.load(folder)
    model = build(tokenizer.vocab_size).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "open_clip_model.safetensors").items()})
    images, scenes = pictures(EVAL_SEED, count)
    rng = np.random.default_rng(EVAL_SEED)
    stated = [truth.facts for truth in scenes]
    spoiled = [spoil(truth.facts, truth, rng) for truth in scenes]
    captions = [truth.caption for truth in scenes] + [wording(facts, rng) for facts in spoiled]
    batches = [slice(i, i + 128) for i in range(0, 2 * count, 128)]
    image_embeddings = torch.cat(
        [model.encode_image(as_input(images[b]), normalize=True) for b in batches if b.start < count]
    )
    text_embeddings = torch.cat([model.encode_text(tokenizer(captions[b]), normalize=True) for b in batches])
    scores = (image_embeddings @ text_embeddings[:count].T).numpy()
    true = truths(stated, scenes).numpy()
    picks = {"picks_16": 0, "picks_16_plain": 0}
    for i in range(count):
        order = rng.permutation(count)
        false_ones = order[~true[i, order]][:15]
        others = order[order != i][:15]
        picks["picks_16"] += int(scores[i, i] > scores[i, false_ones].max())
        picks["picks_16_plain"] += int(scores[i, i] > scores[i, others].max())
    figures = {name: round(wins / count, 4) for name, wins in picks.items()}
    wins_over_spoiled = (image_embeddings * text_embeddings[:count]).sum(1) > (
        image_embeddings * text_embeddings[count:]
    ).sum(1)
    return {**figures, "picks_spoiled": round(float(wins_over_spoiled.float().mean()), 4)}
