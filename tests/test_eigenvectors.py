"""The leading eigenvectors against the full decomposition, and the cases that only it can answer."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest

from edge_tokcomp.methods import eigenvectors, get_method
from edge_tokcomp.methods.eigenvectors import leading_eigenvectors
from edge_tokcomp.methods.prunesid import projections
from edge_tokcomp.tokens import Layout, VisionTokens
from made_up_images import same_plan

SIZE = 320
GRID = 2.0**-36


def with_spectrum(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    directions = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    matrix = (directions * values) @ directions.T
    return (matrix + matrix.T) / 2


def falling(seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Eigenvalues that fall the way those of image features do."""
    jitter = np.exp(0.1 * np.random.default_rng(seed).standard_normal(size))
    return np.sort(jitter / (1 + np.arange(size)) ** 1.5)[::-1].copy()


def smooth_features(seed: int, side: int = 18, width: int = 400) -> np.ndarray:
    """Fields over a grid, finer and weaker one after another, a row all tokens share, and noise."""
    rng = np.random.default_rng(seed)
    place = np.stack(np.divmod(np.arange(side**2), side)) / side
    cycles, phase = rng.random((2, 80)) * (0.5 + np.arange(80) / 15), rng.random((2, 80))
    field = np.cos(2 * np.pi * (place[:, :, None] * cycles[:, None] + phase[:, None])).prod(axis=0)
    scene = (field / (1 + np.arange(80)) ** 0.6) @ rng.standard_normal((80, width))
    shared = rng.standard_normal(width)
    return (scene / scene.std() + shared + 0.2 * rng.standard_normal(scene.shape)).astype(np.float32)


@pytest.fixture
def no_full_decomposition(monkeypatch):
    """Makes the full decomposition of anything but the small matrices inside the method fail."""
    eigh = np.linalg.eigh

    def small_only(matrix, *args, **options):
        assert len(matrix) < SIZE // 2 + 1, "the full decomposition was taken"
        return eigh(matrix, *args, **options)

    monkeypatch.setattr(np.linalg, "eigh", small_only)


@pytest.mark.parametrize("count", [1, 7, 16, 24])
@pytest.mark.parametrize("seed", range(3))
def test_leading_vectors_equal_those_of_the_full_decomposition(count, seed, no_full_decomposition):
    matrix = with_spectrum(falling(seed), seed)
    values, vectors = leading_eigenvectors(matrix, count)
    assert values.shape == (count,)
    assert vectors.shape == (SIZE, count)
    expected, directions = np.linalg.svd(matrix, hermitian=False)[1:]
    np.testing.assert_allclose(values, expected[:count], rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.abs(vectors), np.abs(directions[:count].T), rtol=0, atol=GRID / 20)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-13)
    assert np.max(np.linalg.norm(matrix @ vectors - vectors * values, axis=0)) < 1e-14


@pytest.mark.parametrize("seed", range(8))
def test_every_copy_of_a_repeated_eigenvalue_is_found(seed):
    rng = np.random.default_rng(seed)
    spectrum = falling(seed)
    first, copies = int(rng.integers(0, 10)), int(rng.integers(3, 14))
    spectrum[first : first + copies] = spectrum[first]
    values, vectors = leading_eigenvectors(with_spectrum(spectrum, seed), 16)
    np.testing.assert_allclose(values, spectrum[:16], atol=1e-13)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(16), atol=1e-12)


@pytest.mark.parametrize(
    ("power", "first", "copies"), [(2.17, 7, 15), (2.4, 8, 15), (2.0, 5, 13), (2.3, 8, 17), (2.6, 11, 19)]
)
def test_copies_orthogonal_to_every_vector_found_are_noticed(power, first, copies):
    spectrum = falling() ** (power / 1.5)
    spectrum[first : first + copies] = spectrum[first]
    values, _ = leading_eigenvectors(with_spectrum(spectrum), 24)
    np.testing.assert_allclose(values, spectrum[:24], atol=1e-13)


def test_what_stands_out_beside_a_basis_is_measured():
    spectrum = falling()
    spectrum[:12] = 1
    matrix = with_spectrum(spectrum)
    leading = np.linalg.eigh(matrix)[1][:, -60:]
    assert 0.5 * spectrum[60] < eigenvectors._largest_beside(leading, matrix) <= spectrum[60] * (1 + 1e-9)
    assert eigenvectors._largest_beside(leading[:, :-3], matrix) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "spectrum",
    [
        np.zeros(SIZE),
        np.ones(SIZE),
        np.repeat([3.0, 0.0], [1, SIZE - 1]),
        np.repeat([5.0, 3.0, 1.0], [1, 12, SIZE - 13]),
        np.concatenate([falling(0, 9), np.zeros(SIZE - 9)]),
        np.linspace(1.0, 0.9, SIZE),
    ],
    ids=["zero", "identity", "one component", "three values", "nine components", "hardly falling"],
)
def test_matrices_lanczos_cannot_answer_get_the_full_decomposition(spectrum):
    matrix = with_spectrum(spectrum)
    assert eigenvectors._lanczos(matrix, 16) is None
    values, vectors = leading_eigenvectors(matrix, 16)
    np.testing.assert_allclose(values, spectrum[:16], atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(16), atol=1e-12)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 4), (5, 9), (30, 3), (200, 150)])
def test_small_matrices_and_large_shares_give_what_there_is(size, count):
    spectrum = falling(size, size)
    values, vectors = leading_eigenvectors(with_spectrum(spectrum), count)
    np.testing.assert_allclose(values, spectrum[:count], atol=1e-14)
    assert vectors.shape == (size, min(size, count))


def test_numpy_torch_and_the_strict_array_api_agree_far_below_the_grid(no_full_decomposition):
    torch = pytest.importorskip("torch")
    matrix = with_spectrum(falling())
    values, vectors = leading_eigenvectors(matrix, 16)
    for convert in (torch.from_numpy, array_api_strict.asarray):
        others, directions = leading_eigenvectors(convert(matrix), 16)
        assert type(others) is type(directions) is type(convert(matrix))
        np.testing.assert_allclose(np.asarray(others), values, rtol=0, atol=1e-14)
        np.testing.assert_allclose(np.abs(np.asarray(directions)), np.abs(vectors), rtol=0, atol=GRID / 20)


@pytest.mark.parametrize("centre", ["feature", "token"])
def test_projections_of_an_image_take_the_short_way_and_are_its_singular_vectors(centre, no_full_decomposition):
    features = smooth_features(0)
    squashed = 1 / (1 + np.exp(-features.astype(np.float64)))
    squashed -= squashed.mean(axis=1 if centre == "feature" else 0, keepdims=True)
    expected = np.abs(np.linalg.svd(squashed, full_matrices=False)[0][:, :16])
    np.testing.assert_allclose(projections(features, 16, centre), expected, rtol=0, atol=GRID)


@pytest.mark.parametrize("name", ["prunesid", "prunesid-paper", "prunesid-qwen"])
def test_plans_of_large_images_are_the_same_on_torch(name):
    torch = pytest.importorskip("torch")
    for seed in range(3):
        attention = np.random.default_rng(seed).dirichlet(np.full(324, 0.3), 4).astype(np.float32)
        features, layout = smooth_features(seed), Layout.of_grids((18, 18))
        plan = get_method(name).compress(VisionTokens(features, layout, cls_attention=attention), 64)
        on_torch = VisionTokens(torch.from_numpy(features), layout, cls_attention=torch.from_numpy(attention))
        assert same_plan(plan, get_method(name).compress(on_torch, 64))
        assert plan.stats["groups"] == 16
