"""Products with a constant matrix are the same by every library."""

import pytest
import torch

from fxshap.ops import matrices
from fxshap.ops.matrices import is_amd, multiply_rows, runs_by_onednn

ROWS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
MATRIX = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def onednn(monkeypatch):
    """Choose oneDNN for small products too, on any processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matrices, "MIN_MULTIPLICATIONS", 0)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS[0],
        ROWS[0, 0],
        ROWS[:0],
        ROWS.transpose(0, 1),
        ROWS[:, :1].expand(3, 4, 8),
        ROWS[:1, :1, :1].expand(3, 4, 8),
        ROWS[:, ::2],
        torch.cat([ROWS, ROWS], -1)[..., 8:],
    ],
    ids=lambda rows: f"{tuple(rows.shape)} {rows.stride()}",
)
@pytest.mark.parametrize("matrix", [MATRIX, MATRIX.t().contiguous().t()], ids=["rows", "columns"])
def test_the_product_is_that_of_torch(onednn, rows, matrix):
    product = multiply_rows(rows, matrix)
    assert product.shape == (*rows.shape[:-1], 6)
    torch.testing.assert_close(product, rows @ matrix)


def test_a_product_that_is_differentiated_again_is_that_of_torch(onednn):
    assert runs_by_onednn(ROWS, MATRIX)
    assert not runs_by_onednn(ROWS.clone().requires_grad_(), MATRIX)
    assert not runs_by_onednn(ROWS.double(), MATRIX.double())


def test_the_vendor_is_read_from_the_system(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("vendor_id\t: AuthenticAMD\n")
    assert is_amd(cpuinfo)
    cpuinfo.write_text("vendor_id\t: GenuineIntel\n")
    assert not is_amd(cpuinfo)
