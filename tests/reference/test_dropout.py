"""The dropout bits: Philox's published answers, the layout of halves, statistics."""

from __future__ import annotations

import pytest
import torch

from peftfast.reference.dropout import (
    dropout,
    keep_mask,
    keep_scale,
    key_schedule,
    philox,
    threshold,
)


def _words(seed: int, counter: int) -> list[int]:
    pairs = philox(key_schedule(torch.tensor(seed)), torch.tensor([counter]))
    return [int(pair) >> shift & 0xFFFFFFFF for pair in pairs for shift in (0, 32)]


def test_philox_gives_the_published_answer_for_zeros() -> None:
    # Random123's known-answer file: philox4x32, 7 rounds, counter and key all zero.
    assert _words(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def _philox_by_hand(seed: int, counter: int) -> list[int]:
    """Philox4x32-7 in Python integers, after the paper's figure 2."""
    mask = 0xFFFFFFFF
    c = [counter & mask, counter >> 32 & mask, 0, 0]
    k = [seed & mask, seed >> 32 & mask]
    for _ in range(7):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & mask, p0 >> 32 ^ c[3] ^ k[1], p0 & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return c


@pytest.mark.parametrize("seed", [1, 0x123456789ABCDEF0, (1 << 63) - 1])
@pytest.mark.parametrize("counter", [0, 5, (1 << 32) - 1, 1 << 32, (1 << 40) + 7])
def test_philox_equals_python_integers(seed: int, counter: int) -> None:
    assert _words(seed, counter) == _philox_by_hand(seed, counter)


def test_mask_reads_halves_in_order_and_pads_rows_to_eight() -> None:
    seed, rows, cols, p = 99, 3, 13, 0.3
    mask = keep_mask(torch.tensor(seed), rows, cols, p)
    for row in range(rows):
        for col in range(cols):
            words = _philox_by_hand(seed, row * 2 + col // 8)
            half = words[col % 8 // 2] >> 16 * (col % 2) & 0xFFFF
            signed = half - 0x10000 if half >= 0x8000 else half
            assert mask[row, col].item() == (signed >= threshold(p) - 0x8000)


def test_mask_over_several_chunks_is_one_mask() -> None:
    seed = torch.tensor(7)
    whole = keep_mask(seed, 40_000, 8, 0.5)
    assert torch.equal(whole[:100], keep_mask(seed, 100, 8, 0.5))
    assert 0.49 < whole[-5_000:].float().mean() < 0.51


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_share_kept(p: float) -> None:
    mask = keep_mask(torch.tensor(3), 1000, 1000, p)
    deviation = abs(mask.double().mean().item() - (1 - p))
    assert deviation <= 4 * (p * (1 - p) / 1e6) ** 0.5 + 2**-17


def test_masks_of_different_seeds_are_independent() -> None:
    a, b = (keep_mask(torch.tensor(s), 1000, 1000, 0.5).double() for s in (1, 2))
    assert abs((a * b).mean().item() - 0.25) < 0.003


def test_scale_keeps_the_mean_exactly() -> None:
    for p in (0.05, 0.1, 1 / 3):
        assert keep_scale(p) * (1 - threshold(p) / 65536) == pytest.approx(1.0, abs=1e-15)
    assert keep_scale(1.0) == 0.0


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 9), (0, 4), (4, 0)])
def test_dropout_of_any_rank(shape: tuple[int, ...]) -> None:
    x, seed, p = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.tensor(4), 0.25
    y = dropout(x, seed, p)
    assert y.shape == x.shape
    columns = x.shape[-1] if x.ndim else 1
    rows = x.numel() // columns if columns else 4
    mask = keep_mask(seed, rows, columns, p).view(shape)
    assert torch.equal(y, torch.where(mask, x * keep_scale(p), 0))
    if x.numel():
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, mask.double() * keep_scale(p))


def test_dropout_of_a_transposed_tensor_follows_its_indices() -> None:
    x = torch.randn(6, 10)
    assert torch.equal(
        dropout(x.t(), torch.tensor(4), 0.5), dropout(x.t().clone(), torch.tensor(4), 0.5)
    )
