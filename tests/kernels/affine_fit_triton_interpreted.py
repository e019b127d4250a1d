"""The Triton kernel in Triton's interpreter; test_affine_fit_gpu.py runs this file in a process of its own."""

import pytest
import torch

from mkf import affine_fit
from mkf.kernels.affine_fit import triton as triton_backend
from tests.kernels.affine_fit_float64 import assert_agrees
from tests.kernels.pretender import enlist
from tests.kernels.test_affine_fit import (  # noqa: F401
    noise,
    test_a_common_offset_in_float64,
    test_constant_filters_are_dead,
    test_equal_keys_go_to_the_lowest_index,
    test_not_finite_filters_leave_their_neighbours_alone,
    test_tiny_and_huge_filters,
)


@pytest.fixture
def fit(monkeypatch):
    enlist(monkeypatch, "interpreted", triton_backend.launch)
    return lambda filters, keys, **options: affine_fit(filters, keys, backend="interpreted", **options)


@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("keys_count", [1, 8])
def test_any_size(fit, k, keys_count):
    filters, keys = noise(37, k, k), noise(keys_count, k, k, seed=1)
    assert_agrees(fit(filters, keys), filters, keys)


def test_the_most_keys(fit):
    filters, keys = noise(5, 7, 7), noise(256, 7, 7, seed=1)
    assert_agrees(fit(filters, keys), filters, keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(fit, dtype):
    filters, keys = noise(40, 7, 7).to(dtype), noise(8, 7, 7, seed=1)
    assert_agrees(fit(filters, keys), filters.double(), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1e4, 5e4])
def test_near_a_key_and_far_from_zero(fit, offset, dtype):
    keys = noise(8, 7, 7, seed=1)
    filters = (-3 * keys[torch.arange(40) % 8] + 0.3 * noise(40, 7, 7)).to(dtype) + offset
    assert_agrees(fit(filters, keys), filters, keys)


def test_nearly_tied_keys(fit):
    keys = noise(2, 7, 7).repeat(4, 1, 1) + 1e-6 * noise(8, 7, 7, seed=1)
    filters = keys[torch.arange(40) % 8] + 0.3 * noise(40, 7, 7, seed=2)
    assert_agrees(fit(filters, keys), filters, keys)


@pytest.mark.parametrize("sign", ["any", "positive"])
def test_the_best_m_keys(fit, sign):
    filters, keys = noise(40, 7, 7), noise(6, 7, 7, seed=1)
    best = fit(filters, keys, topk=6, sign=sign)
    assert (best.index.sort(1).values == torch.arange(6)).all()
    assert (best.residual.diff(dim=1) > -1e-6).all()
    assert (best.residual <= 1).all()
    expected = affine_fit(filters, keys, topk=6, sign=sign, backend="reference")
    torch.testing.assert_close(best.residual, expected.residual, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(best.scale, expected.scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "view", [lambda x: x.permute(0, 2, 1), lambda x: x[::2, 1:6, 2:7], lambda x: x.permute(2, 0, 1)[:, :7]]
)
def test_strided_filters(fit, view):
    filters = view(noise(33, 7, 7))
    keys = noise(8, *filters.shape[1:], seed=1)
    assert_agrees(fit(filters, keys), filters, keys)
