"""Graphs: Cora's tables as published, damaged ones refused, and the normalised adjacency matrix."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pytest
import torch
from data_helpers import write_manifest

from compressible import data
from compressible.data import graphs

needs_cora = pytest.mark.skipif(
    not all(data.find(file) for file in graphs.CORA), reason="needs cora in COMPRESSIBLE_DATA"
)


def tables(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables with Cora's sizes and random content."""
    rng = np.random.default_rng(seed)
    sizes = graphs.CORA_PARTS
    split = [part for part, size in sizes.items() for _ in range(size)]
    split += [""] * (graphs.CORA_NODES - len(split))
    words = [" ".join(map(str, sorted(rng.choice(1433, 3, replace=False)))) for _ in range(graphs.CORA_NODES)]
    words[5] = ""
    label = np.arange(graphs.CORA_NODES) % 7
    nodes = pd.DataFrame({"node": np.arange(graphs.CORA_NODES), "label": label, "split": split, "words": words})
    pairs = np.unique(np.sort(rng.integers(0, graphs.CORA_NODES, (12_000, 2)), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    pairs = pairs[rng.permutation(len(pairs))[: graphs.CORA_EDGES]]
    return nodes, pd.DataFrame(pairs, columns=["source", "target"])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Function (nodes, edges) that puts tables in the place of Cora's."""

    def put(*frames: pd.DataFrame) -> None:
        contents = [gzip.compress(frame.to_csv(index=False).encode()) for frame in frames]
        files = dict(zip(graphs.CORA, contents, strict=True))
        write_manifest(tmp_path / "m.toml", {name: (content, []) for name, content in files.items()})
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        monkeypatch.setenv("COMPRESSIBLE_DATA", str(tmp_path))

    return put


def test_tables_become_a_graph(place):
    nodes, edges = tables()
    place(nodes, edges)
    plain, graph = graphs.load_cora(row_normalise=False), graphs.load_cora()
    assert plain.features.sum() == 3 * (graphs.CORA_NODES - 1) and not plain.features[5].any()
    assert plain.features[7].nonzero().flatten().tolist() == [int(word) for word in nodes["words"][7].split()]
    assert torch.allclose(graph.features.sum(1), torch.ones(2708).index_fill(0, torch.tensor([5]), 0.0))
    assert torch.equal(graph.edges, torch.tensor(edges.to_numpy().T)) and graph.labels[:9].tolist() == [
        *range(7),
        0,
        1,
    ]
    assert (graph.train[0], graph.validation[0], graph.test[-1]) == (0, 140, 1639)
    assert graph.digests.keys() == set(graphs.CORA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nodes, edges: (nodes[:-1], edges), "nodes 2707, expected 2708"),
        (lambda nodes, edges: (nodes[::-1], edges), "numbers of nodes in order False, expected True"),
        (lambda nodes, edges: (nodes, edges[1:]), "edges 5277, expected 5278"),
        (lambda nodes, edges: (nodes, edges.assign(source=edges["target"])), "smaller number first 0, expected 5278"),
        (lambda nodes, edges: (nodes, pd.concat([edges[:-1], edges[:1]])), "smaller number first 5277, expected 5278"),
        (lambda nodes, edges: (nodes, edges.assign(target=edges["target"] + 1_000)), r"\(True, False\), expected"),
        (lambda nodes, edges: (nodes.assign(label=nodes["label"] % 6), edges), "classes 6, expected 7"),
        (
            lambda nodes, edges: (nodes.assign(split=nodes["split"].replace("test", "")), edges),
            r"'test': 0\}, expected",
        ),
    ],
)
def test_tables_of_other_sizes_are_refused(place, change, message):
    place(*change(*tables()))
    with pytest.raises(data.DataError, match=message):
        graphs.load_cora()


def test_without_local_tables_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESSIBLE_DATA", raising=False)
    monkeypatch.setenv("COMPRESSIBLE_CACHE", str(tmp_path))
    with pytest.raises(data.DataError, match="only read from a local folder"):
        graphs.load_cora()


def test_the_adjacency_is_kipfs(place):
    place(*tables())
    graph = graphs.load_cora()
    dense = torch.eye(2708, dtype=torch.float64)
    dense[graph.edges[0], graph.edges[1]] = dense[graph.edges[1], graph.edges[0]] = 1.0
    degree = dense.sum(1)
    expected = dense / (degree[:, None] * degree[None]).sqrt()
    assert torch.allclose(graph.adjacency().to_dense().double(), expected, atol=1e-6)
    vector = degree.sqrt()  # the eigenvector of eigenvalue 1
    assert torch.allclose(graph.adjacency().double() @ vector, vector, atol=1e-5)


@needs_cora
def test_cora_is_the_published_one():
    graph = graphs.load_cora()
    assert tuple(graph.features.shape) == (2708, 1433) and graph.edges.shape == (2, 5278)
    assert torch.bincount(graph.labels).tolist() == [351, 217, 418, 818, 426, 298, 180]
    assert torch.bincount(graph.labels[graph.train]).tolist() == [20] * 7
    assert not set(graph.train.tolist()) & set(graph.test.tolist())
    assert torch.allclose(graph.features.sum(1), torch.ones(2708))
