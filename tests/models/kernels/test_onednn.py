"""oneDNN's product equals the matrix product; a build of PyTorch without oneDNN uses PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.kernels.onednn import available, product


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (64, 33)])
@pytest.mark.parametrize("oneDNN", [False, True])
def test_a_product_is_the_product(
    rows: int, columns: int, bias: bool, oneDNN: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: oneDNN)
    assert available() is oneDNN
    g = torch.Generator().manual_seed(rows)
    a, b = torch.randn(rows, 19, generator=g), torch.randn(columns, 19, generator=g)
    added = torch.randn(columns, generator=g) if bias else None
    expected = a.double() @ b.double().t() + (0 if added is None else added.double())
    for strided in (b, b.t().contiguous().t()):  # patches of images come column by column
        torch.testing.assert_close(product(a, strided, added).double(), expected, rtol=1e-5, atol=1e-5)


def test_float64_stays_so() -> None:
    a = torch.full((1, 1), 1 / 3, dtype=torch.float64)
    assert product(a, a).item() == (1 / 3) ** 2
