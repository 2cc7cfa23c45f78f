"""What a training loop of one's own imports (docs/how_to/use_your_own_loop.md). Everything else is the command line's.

    from latentmill import open_dataset

Names are imported when they are asked for, so that `import latentmill` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.errors import LatentmillError as LatentmillError
    from pipeline.loops.dataset import CacheDataset as CacheDataset
    from pipeline.loops.dataset import open_dataset as open_dataset
    from pipeline.loops.tars import as_webdataset as as_webdataset

_PLACES = {
    "CacheDataset": "pipeline.loops.dataset",
    "LatentmillError": "pipeline.errors",
    "as_webdataset": "pipeline.loops.tars",
    "open_dataset": "pipeline.loops.dataset",
}
__all__ = ["CacheDataset", "LatentmillError", "as_webdataset", "open_dataset"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'latentmill' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
