"""What a task learns beside the UNet costs: embeddings and transformers over a few tokens, by arithmetic.

Parts have the names of modules of models/tasks/, after "task.". Their layers run before the UNet's, and the gradient
passes through the context to them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import ClassTask, LayoutTask, ModelConfig, SemanticTask, SuperresTask, TaskConfig, TextTask
from pipeline.config.tasks.base import Cache
from pipeline.planning.parts import Layer, Part, Piece, linear_layer

BANDS = 4
"""Octaves of the sinusoids of a box's edge (models/tasks/layout.py)."""


def learned_parts(task: TaskConfig, model: ModelConfig, cache: Cache, batch: int) -> tuple[Part, ...]:
    """The parts of a task's own network for `batch` samples of a cache, in the order in which they run; () where it
    learns nothing. Facts that the cache lacks count as none: training refuses such a cache itself."""
    return tuple(_parts(task, model, cache, batch))


def _parts(task: TaskConfig, model: ModelConfig, cache: Cache, batch: int) -> Iterator[Part]:
    conditions, width = cache.conditions, model.context_width
    if isinstance(task, TextTask) and task.encoder == "transformer" and cache.text is not None:
        tokens = cache.text.length
        yield _table("tokens.embed", cache.text.vocabulary * width)
        yield _table("tokens.place", tokens * width)
        yield from _encoder("tokens.transformer", width, task, batch, tokens)
    elif isinstance(task, ClassTask) and conditions.classes is not None:
        made = width if task.makes_context else model.vector_width
        yield _table("embed", (conditions.classes.count + 1) * made)
    elif isinstance(task, LayoutTask) and conditions.boxes is not None:
        yield from _layout(task, width, conditions.boxes.count, batch, conditions.boxes.most)
    elif isinstance(task, SemanticTask) and conditions.labels is not None:
        yield _table("embed", (conditions.labels.count + 1) * task.width)
    elif isinstance(task, SuperresTask) and task.noise:
        yield _table("embed_level", (task.noise + 1) * model.vector_width)


def _layout(task: LayoutTask, width: int, classes: int, batch: int, most: int) -> Iterator[Part]:
    """A token of each of `most` boxes, and one that is always there."""
    rows = batch * most
    yield _table("embed", (classes + 1) * width)
    first = linear_layer("first", rows, 4 + 8 * BANDS, width, input_gradient=False)
    hidden, last = (linear_layer(name, rows, width, width) for name in ("hidden", "last"))
    yield Part("task.perceptron", (Piece(row="perceptron", layers=(first, hidden, last), x=rows * width),))
    if task.encoder == "transformer":
        yield from _encoder("transformer", width, task, batch, 1 + most)
    if task.paint:
        yield _table("paint", classes * task.paint)


def _encoder(name: str, width: int, task: TextTask | LayoutTask, batch: int, tokens: int) -> Iterator[Part]:
    sizes = {"depth": task.depth, "heads": task.heads, "head_width": task.head_width}
    return transformer_parts(f"task.{name}", width, **sizes, batch=batch, tokens=tokens)


def transformer_parts(
    name: str, width: int, *, depth: int, heads: int, head_width: int, batch: int, tokens: int
) -> Iterator[Part]:
    """Blocks over (batch, tokens, width), and a last norm (models/tasks/transformer.py)."""
    rows, inner = batch * tokens, heads * head_width
    for i in range(depth):
        attention = (
            linear_layer("qkv", rows, width, 3 * inner, bias=False),
            Layer(
                name="attend",
                kind="attention",
                flops=4 * batch * tokens * tokens * inner,
                inputs=tokens,
                outputs=inner,
            ),
            linear_layer("out", rows, inner, width),
        )
        feed = (linear_layer("up", rows, width, 4 * width), linear_layer("down", rows, 4 * width, width))
        size = rows * width
        pieces = (
            Piece(
                row="encode_self",
                layers=attention,
                norms=2 * width,
                x=size,
                h=rows * inner,
                rows=rows,
                heads=rows * heads,
            ),
            Piece(row="encode_feed", layers=feed, norms=2 * width, x=size, h=4 * size, rows=rows),
        )
        yield Part(f"{name}.blocks.{i}", pieces)
    yield Part(f"{name}.norm", (Piece(row="mean", layers=(), norms=2 * width, x=rows * width),))


def _table(name: str, parameters: int) -> Part:
    """An embedding, which keeps indices alone."""
    layer = Layer(name=name, kind="linear", flops=0, parameters=parameters)
    return Part(f"task.{name}", (Piece(row="none", layers=(layer,)),))
