from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from student_trainer.losses import matmul
from student_trainer.losses.head import Head, Lora
from tests.student_trainer.losses.worlds import world

W = world()


def test_logits_follow_the_formula() -> None:
    g = torch.Generator().manual_seed(1)
    bias, a, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((23,), (2, 6), (23, 2)))
    head = Head(W.weight_VD, bias, logit_scale=0.5, final_softcap=3.0, lora=Lora(a, b, 2.0))
    raw = W.hidden_ND @ (W.weight_VD + 2.0 * b @ a).T + bias
    torch.testing.assert_close(head.logits(W.hidden_ND), 3.0 * torch.tanh(0.5 * raw / 3.0))
    torch.testing.assert_close(head.slice(7).logits(W.hidden_ND), head.logits(W.hidden_ND)[:, :7])
    assert head.slice(23) is head
    assert head.slice(7).weight_VD.data_ptr() == W.weight_VD.data_ptr()


@pytest.mark.parametrize("rows", [0, 24])
def test_slice_names_the_limit(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.23.*not {rows}"):
        Head(W.weight_VD).slice(rows)


@pytest.mark.parametrize("padded", [(), ("cpu",)], ids=["side by side", "aligned"])
@pytest.mark.parametrize("tile_bytes", [1, 64 << 20])
def test_half_weights_give_float32_results(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int, padded: tuple[str, ...]
) -> None:
    monkeypatch.setattr(matmul, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(matmul, "PADDED", padded)
    large = world(vocab=151)  # two tiles of 64 rows, and a smaller one
    h, w = large.hidden_ND.bfloat16(), large.weight_VD.bfloat16()
    z = matmul.project(h, w)
    assert z.dtype == torch.float32
    assert z.stride() == ((192, 1) if padded else (151, 1))
    torch.testing.assert_close(z, h.float() @ w.float().T)
    g = torch.randn(40, 151, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(matmul.project_back(g, w), g @ w.float())
    total = torch.ones(151, 6)
    matmul.add_outer(total, g, h)
    torch.testing.assert_close(total, 1 + g.T @ h.float())


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 151])
@pytest.mark.parametrize("tile_bytes", [1, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_by_tensor_cores_are_whole(
    monkeypatch: pytest.MonkeyPatch, vocab: int, tile_bytes: int, dtype: torch.dtype
) -> None:
    """The way of a GPU, whose product of half-precision operands with a float32 result is made by others here."""
    real = torch.mm

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        wanted = out_dtype or a.dtype
        made = real(a.to(wanted), b.to(wanted))
        return made if out is None else out.copy_(made)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(matmul, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(matmul, "PADDED", ("cpu",))
    monkeypatch.setattr(matmul, "TILE_BYTES", tile_bytes)
    w = world(vocab=vocab)
    h_CD, weight_VD = w.hidden_ND.bfloat16(), w.weight_VD.bfloat16()
    torch.testing.assert_close(matmul.project(h_CD, weight_VD), h_CD.float() @ weight_VD.float().T)
    g_CV = torch.randn(40, vocab, generator=torch.Generator().manual_seed(2)).to(dtype)
    rounded_CV = g_CV.bfloat16().float()
    torch.testing.assert_close(matmul.project_back(g_CV, weight_VD), rounded_CV @ weight_VD.float())
    total_VD = torch.ones(vocab, 6)
    matmul.add_outer(total_VD, g_CV, h_CD)
    torch.testing.assert_close(total_VD, 1 + rounded_CV.T @ h_CD.float())


def test_tiles_begin_at_aligned_rows() -> None:
    """A tile of 10,922 rows would begin between the addresses that tensor cores read fast."""
    tiles = list(matmul._tiles(torch.empty(151_665, 1536, device="meta")))
    assert tiles[0].start == 0 and tiles[-1].stop == 151_665
    assert all(one.stop == other.start and one.stop % matmul.ALIGNED == 0 for one, other in pairwise(tiles))
    assert all(4 * 1536 * (tile.stop - tile.start) <= matmul.TILE_BYTES for tile in tiles)


def test_autocast_does_not_round_logits() -> None:
    h, w = W.hidden_ND.float(), W.weight_VD.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert (h @ w.T).dtype == torch.bfloat16
        assert torch.equal(Head(w).logits(h), h.mm(w.T).float()) is False
        z = Head(w).logits(h)
    assert torch.equal(z, h @ w.T)
