"""The nearest vectors: exactly, by bits, and from files of FAISS."""

import faiss
import numpy as np
import pytest

from tspo_trl.retrieval.dense import vectors as module
from tspo_trl.retrieval.dense.faiss_files import FaissVectors, is_flat, open_flat
from tspo_trl.retrieval.dense.vectors import ExactVectors, SmallVectors


def make(rows, dimensions=24, *, seed=0, dtype=np.float32):
    """Vectors with a common mean, as embeddings have."""
    values = np.random.default_rng(seed).standard_normal((rows, dimensions)) + 1
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(dtype)


def brute_force(matrix, queries, k):
    scores = queries @ matrix.astype(np.float32).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 7, 100, 500])
def test_exact_search_equals_brute_force(dtype, k, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    matrix, queries = make(300, dtype=dtype), make(5, seed=1)
    scores, indices = ExactVectors(matrix).search(queries, k)
    expected_scores, expected = brute_force(matrix, queries, k)
    assert indices.shape == (5, min(k, 300))
    assert (indices == expected).all()
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_equal_scores_are_in_the_order_of_the_corpus(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    matrix = np.repeat(np.eye(4, dtype=np.float32), 20, axis=0)
    _, indices = ExactVectors(matrix).search(np.eye(4, dtype=np.float32)[[2]], 7)
    assert indices.tolist() == [[40, 41, 42, 43, 44, 45, 46]]


@pytest.mark.parametrize("dimensions", [24, 30])
def test_small_vectors_with_all_candidates_differ_by_rounding_only(tmp_path, dimensions, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    matrix, queries = make(300, dimensions), make(20, dimensions, seed=1)
    SmallVectors.write(tmp_path, matrix)
    small = SmallVectors(tmp_path, candidates=300)
    assert small.bits.shape == (300, (dimensions + 7) // 8)
    scores, indices = small.search(queries, 10)
    exact, _ = brute_force(matrix, queries, 10)
    np.testing.assert_allclose(scores, exact, atol=0.02)
    np.testing.assert_allclose(scores, (queries[:, None] * matrix[indices]).sum(-1), atol=0.02)
    np.testing.assert_allclose(small.first(3), matrix[:3], atol=0.02)


def test_more_candidates_find_more_of_the_nearest(tmp_path):
    matrix, queries = make(5000, 64), make(50, 64, seed=1)
    SmallVectors.write(tmp_path, matrix)
    _, nearest = brute_force(matrix, queries, 10)

    def recall(candidates):
        _, found = SmallVectors(tmp_path, candidates).search(queries, 10)
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, nearest, strict=True)])

    few, many, everything = recall(20), recall(500), recall(5000)
    assert few < many <= everything
    assert everything > 0.95


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_cores_that_share_the_vectors_find_the_same_candidates(tmp_path, monkeypatch, queries):
    matrix, wanted = make(1000, 64), make(queries, 64, seed=1)
    SmallVectors.write(tmp_path, matrix)
    small = SmallVectors(tmp_path, candidates=50)
    together = small.search(wanted, 10)
    searched = []
    count = small._faiss.knn_hamming
    monkeypatch.setattr(module, "PART", 100)
    monkeypatch.setattr(small._faiss, "omp_get_max_threads", lambda: 7)
    monkeypatch.setattr(small._faiss, "knn_hamming", lambda q, b, k: searched.append(len(b)) or count(q, b, k))
    shared = small.search(wanted, 10)
    assert sum(searched) == 1000
    assert len(searched) == 7 // queries
    for one, other in zip(shared, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_mean_is_subtracted_before_the_bits(tmp_path):
    """Without it, all bits of vectors with a large mean are equal."""
    matrix = make(200, 32) + 5
    SmallVectors.write(tmp_path, matrix)
    assert 0.3 < np.unpackbits(SmallVectors(tmp_path).bits, axis=1).mean() < 0.7


def write_faiss(path, matrix, index=None):
    index = faiss.IndexFlatIP(matrix.shape[1]) if index is None else index
    index.add(matrix)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize("split", [None, 1, 20, 45, 53, 60, 5000])
def test_a_flat_file_of_faiss_is_read_in_parts(tmp_path, split):
    matrix = make(100)
    whole = write_faiss(tmp_path / "flat.index", matrix)
    parts = [whole]
    if split is not None:
        content = whole.read_bytes()
        parts = [tmp_path / "part_aa", tmp_path / "part_ab"]
        for part, half in zip(parts, (content[:split], content[split:]), strict=True):
            part.write_bytes(half)
    flat = open_flat(parts)
    assert (flat.rows, flat.dimensions) == matrix.shape
    assert is_flat(parts)
    assert [len(block) for block in flat.blocks(30)] == [30, 30, 30, 10]
    assert (np.concatenate(list(flat.blocks(30))) == matrix).all()
    assert (np.concatenate(list(flat.blocks(30, first=77))) == matrix[77:]).all()


def test_damaged_files_of_faiss_are_refused(tmp_path):
    matrix = make(10)
    content = write_faiss(tmp_path / "flat.index", matrix).read_bytes()
    (tmp_path / "short").write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"short has 1001 bytes, expected 1005 .* a part is missing"):
        open_flat([tmp_path / "short"])
    with pytest.raises(ValueError, match=r"a part is given twice"):
        open_flat([tmp_path / "flat.index", tmp_path / "flat.index"])
    with pytest.raises(FileNotFoundError, match=r"part_ab"):
        open_flat([tmp_path / "flat.index", tmp_path / "part_ab"])
    (tmp_path / "text").write_text("no index, but a text that is long enough to have a header of its own")
    with pytest.raises(ValueError, match=r"begins with b'no i', expected b'IxFI'"):
        open_flat([tmp_path / "text"])
    write_faiss(tmp_path / "l2.index", matrix, faiss.IndexFlatL2(24))
    with pytest.raises(ValueError, match=r"squared distance. Only inner products are supported"):
        open_flat([tmp_path / "l2.index"])


def test_other_indexes_of_faiss_are_searched_by_it(tmp_path):
    matrix, queries = make(300), make(20, seed=1)
    path = write_faiss(tmp_path / "hnsw", matrix, faiss.IndexHNSWFlat(24, 16, faiss.METRIC_INNER_PRODUCT))
    vectors = FaissVectors(path)
    assert not is_flat([path])
    assert vectors.shape == (300, 24)
    scores, indices = vectors.search(queries, 5)
    exact, nearest = brute_force(matrix, queries, 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(indices, nearest, strict=True)]) > 0.8
    assert (scores[:, 0] <= exact[:, 0] + 1e-6).all()
    np.testing.assert_allclose(vectors.first(2), matrix[:2])
