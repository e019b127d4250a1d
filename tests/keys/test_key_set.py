"""What a KeySet keeps, scales and refuses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mkf import keys as key_room
from mkf.keys import KeySet

SOBEL = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean((1, 2), keepdims=True)


@given(
    st.integers(1, 5),
    st.sampled_from([3, 5, 7, 9, 11]),
    st.floats(-50, 50),
    st.sampled_from([1e-20, 1e-3, 1.0, 7.0, 1e20]),
    st.integers(0, 2**32 - 1),
)
def test_keys_are_divided_by_the_norm_of_their_centred_version(
    count: int, k: int, offset: float, size: float, seed: int
) -> None:
    given_keys = (noise(count, k, k, seed=seed) + offset) * size
    keys = KeySet(given_keys)
    expected = given_keys / np.linalg.norm(centred(given_keys), axis=(1, 2), keepdims=True)
    assert keys.filters.dtype == torch.float32
    rounding = 1e-7 * np.abs(expected).max()
    np.testing.assert_allclose(keys.filters.double(), expected, rtol=0, atol=rounding)
    assert keys.filters.shape == (count, k, k)
    assert (len(keys), keys.kernel_size) == (count, k)
    assert torch.equal(KeySet(keys.filters).filters, keys.filters)

    unit = keys.centred().double()
    assert unit.mean((1, 2)).abs().max() < 1e-7
    assert (torch.linalg.vector_norm(unit, dim=(1, 2)) - 1).abs().max() < 3e-7
    np.testing.assert_allclose(unit, centred(expected), rtol=0, atol=1e-7 + 10 * rounding)


@pytest.mark.parametrize(
    "given_keys",
    [
        SOBEL,
        np.array(SOBEL, dtype=np.int8),
        np.array(SOBEL)[::-1, ::-1].copy()[::-1, ::-1],
        torch.tensor(SOBEL),
        torch.tensor(SOBEL, dtype=torch.bfloat16),
        torch.tensor(SOBEL, dtype=torch.float64, requires_grad=True),
        torch.tensor(SOBEL, dtype=torch.float16).T.contiguous().T,
    ],
)
def test_any_real_array_will_do(given_keys: object) -> None:
    single = given_keys[None] if isinstance(given_keys, np.ndarray | torch.Tensor) else [given_keys]
    filters = KeySet(single).filters
    assert filters.is_contiguous()
    assert not filters.requires_grad
    np.testing.assert_allclose(filters, np.array([SOBEL]) / np.sqrt(12), rtol=1e-7)


def test_the_set_cannot_be_changed() -> None:
    source = torch.from_numpy(noise(2, 7, 7)).float()
    keys = KeySet(source)
    before = keys.filters.clone()
    source.zero_()
    keys.filters.zero_()
    keys.centred().zero_()
    assert torch.equal(keys.filters, before)
    with pytest.raises(AttributeError):
        keys.filters = before  # type: ignore[misc]
    with pytest.raises(AttributeError):
        keys.names = ("a", "b")  # type: ignore[misc]


def test_labels() -> None:
    plain = KeySet(noise(2, 3, 3))
    assert (plain.names, plain.kinds, plain.provenance, plain.licence) == (("1", "2"), ("", ""), "", "")
    keys = KeySet(noise(2, 3, 3), ["a", "b"], ["edge", "spot"], "here", "CC0-1.0")
    assert (keys.names, keys.kinds, keys.provenance, keys.licence) == (("a", "b"), ("edge", "spot"), "here", "CC0-1.0")


@pytest.mark.parametrize(
    ("which", "rows"),
    [
        (6, [6]),
        (-1, [7]),
        (slice(4), [0, 1, 2, 3]),
        ([0, 6], [0, 6]),
        ([6, 0], [6, 0]),
        (torch.tensor([3, -1]), [3, 7]),
        (np.arange(8) % 4 == 1, [1, 5]),
    ],
)
def test_some_of_the_keys(which: object, rows: list[int]) -> None:
    keys = key_room.paper8()
    some = keys[which]  # type: ignore[index]
    assert torch.equal(some.filters, keys.filters[rows])
    assert some.names == tuple(keys.names[i] for i in rows)
    assert some.kinds == tuple(keys.kinds[i] for i in rows)
    assert some.provenance == keys.provenance


def test_no_such_key() -> None:
    keys = key_room.paper8()
    with pytest.raises(IndexError, match="8"):
        keys[8]
    with pytest.raises(IndexError):
        keys[[0, 9]]
    with pytest.raises(ValueError, match="1 to 256 keys, got 0"):
        keys[8:]


def test_iteration_gives_sets_of_one_key() -> None:
    keys = key_room.paper8()
    singles = list(keys)
    assert [key.names[0] for key in singles] == list(keys.names)
    assert torch.equal(torch.cat([key.filters for key in singles]), keys.filters)


def test_equality_is_of_values_and_labels() -> None:
    keys = KeySet(noise(2, 3, 3), licence="MIT")
    assert keys == KeySet(noise(2, 3, 3), licence="MIT")
    assert keys != KeySet(noise(2, 3, 3))
    assert keys != KeySet(noise(2, 3, 3, seed=1), licence="MIT")
    assert keys != "keys"
    assert len({keys, KeySet(noise(2, 3, 3), licence="MIT"), keys[0], keys[1]}) == 3
    assert pickle.loads(pickle.dumps(keys)) == copy.deepcopy(keys) == keys


def test_repr_says_what_there_is() -> None:
    assert repr(KeySet(noise(2, 3, 3), ["a", "b"])) == "<KeySet of 2 3x3 keys (a, b)>"
    assert repr(KeySet(noise(1, 5, 5), provenance="a file")) == "<KeySet of 1 5x5 key (1) from a file>"
    assert repr(KeySet(noise(40, 5, 5))) == "<KeySet of 40 5x5 keys (1, 2, 3, 4, 5, 6, 7, 8, ..., 40)>"


def test_the_default_device_does_not_matter() -> None:
    expected = [make().filters for make in (key_room.paper8, lambda: key_room.analytic("B"), key_room.random)]
    with torch.device("meta"):
        found = [key_room.paper8(), key_room.analytic("B"), key_room.random()]
        assert [key.rank for key in found[1].structure] == [1, 1, 1, 1, 1, 1, 2, 1]
        assert all(keys.centred().device.type == keys.filters.device.type == "cpu" for keys in found)
    assert all(torch.equal(keys.filters, filters) for keys, filters in zip(found, expected, strict=True))


def with_value(value: float) -> np.ndarray:
    keys = noise(3, 5, 5)
    keys[1, 2, 2] = value
    return keys


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (noise(7, 7), r"\(K, k, k\), got \(7, 7\): give a single key as filters\[None\]"),
        (noise(8, 49), r"got \(8, 49\): reshape flat keys with filters.reshape\(-1, 7, 7\)"),
        (noise(8, 48), r"\(K, k, k\), got \(8, 48\)"),
        (noise(8, 1, 7, 7), r"got \(8, 1, 7, 7\): take the filters of a depthwise weight with weight\[:, 0\]"),
        (noise(8, 5, 7), r"\(K, k, k\), got \(8, 5, 7\)"),
        (noise(8, 4, 4), "4x4: the kernel size must be 3, 5, 7, 9 or 11"),
        (noise(8, 1, 1), "1x1: the kernel size must be"),
        (noise(2, 13, 13), "13x13: the kernel size must be"),
        (noise(0, 7, 7), "1 to 256 keys, got 0"),
        (noise(257, 3, 3), "1 to 256 keys, got 257"),
        (with_value(np.nan), "key 2 has values that are not finite"),
        (with_value(-np.inf), "key 2 has values that are not finite"),
        (with_value(1e39), "key 2 has values that are not finite in float32"),
        (noise(2, 3, 3) * [[[1]], [[0]]], "key 2 is constant: leave it out"),
        (noise(2, 3, 3) * [[[1]], [[0]]] + 0.1, "key 2 is constant: leave it out"),
        (noise(2, 3, 3) * 1e-6 + 1, "key 1 is constant to within .* subtract the mean first"),
        (noise(2, 3, 3) + 1j, "keys must be real numbers"),
        (torch.zeros(2, 3, 3, dtype=torch.complex64), "keys must be real numbers"),
        ([[[1, 2], [3]]], "keys must be real numbers"),
        ("paper8", "keys must be real numbers"),
    ],
)
def test_bad_filters(filters: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeySet(filters)  # type: ignore[arg-type]


def test_a_large_offset_is_fine_while_float32_holds_what_varies() -> None:
    keys = noise(1, 7, 7) + 1000
    np.testing.assert_allclose(KeySet(keys).centred(), centred(keys) / np.linalg.norm(centred(keys)), atol=2e-4)
    small = noise(2, 3, 3) * 1e-6 + 1
    KeySet(small - small.mean((1, 2), keepdims=True))  # as the message advises


@pytest.mark.parametrize("offset", [0, 100, 9000])
@pytest.mark.parametrize("factor", [0.998, 1.0001, 1.004])
def test_no_offset_hides_that_a_key_is_not_scaled(offset: float, factor: float) -> None:
    key = centred(noise(1, 7, 7))
    key /= np.linalg.norm(key)
    keys = KeySet(factor * key + offset)
    stored = keys.filters.double().numpy()
    rounding = np.linalg.norm(np.spacing(keys.filters.numpy())) / 2
    expected = key + offset / factor
    assert np.linalg.norm(stored - expected) <= rounding * (1 + 1e-6)
    assert torch.equal(KeySet(keys.filters).filters, keys.filters)
    assert torch.equal(KeySet(stored).filters, keys.filters)


@pytest.mark.parametrize("what", ["names", "kinds"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [("ab", "must be a list of strings"), ([1, 2], "must be a list of strings"), (["a"], "each of the 2 keys, got 1")],
)
def test_bad_labels(what: str, labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"{what} .*{message}"):
        KeySet(noise(2, 3, 3), **{what: labels})  # type: ignore[arg-type]


def test_names_differ() -> None:
    with pytest.raises(ValueError, match="names must differ from each other, got a, a"):
        KeySet(noise(2, 3, 3), ["a", "a"])
    KeySet(noise(2, 3, 3), kinds=["edge", "edge"])


def test_words_and_none_are_told_how_to_become_keys() -> None:
    with pytest.raises(ValueError, match=r"this is a word; mkf\.keys\.parse"):
        KeySet("paper8")
    with pytest.raises(ValueError, match=r"this is None; mkf\.keys\.paper8"):
        KeySet(None)
