"""Graphs by name: Cora, papers that cite each other, with the split that most of the literature uses.

It is read from local tables only. The published Planetoid files are pickles, which we never read, since reading one
may run anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from compressible.data.manifest import DataError, fetch_all, load_manifest

CORA = ("cora/nodes.csv.gz", "cora/edges.csv.gz")
CORA_NODES, CORA_EDGES, CORA_WORDS = 2708, 5278, 1433
CORA_PARTS = {"train": 140, "validation": 500, "test": 1000}
CORA_CLASSES = 7


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph whose nodes have features and classes.

    Args:
        features: (N, n) float32.
        labels: (N,) int64, numbers of the classes.
        edges: (2, E) int64, each undirected edge once, with the smaller number first and no loops.
        train, validation, test: numbers of the nodes of the three parts, int64; not all nodes are in one.
        classes: number of classes.
        digests: sha256 by the name of the file that was read.
    """

    features: Tensor
    labels: Tensor
    edges: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    classes: int
    digests: dict[str, str] = field(repr=False)

    def adjacency(self) -> Tensor:
        """(N, N) sparse float32: D^-1/2 (A + I) D^-1/2, with D the row sums of A + I.

        Example:
            >>> nodes = torch.arange(3)
            >>> graph = Graph(torch.eye(3), nodes, torch.tensor([[0], [1]]), nodes, nodes, nodes, 3, {})
            >>> graph.adjacency().to_dense()[0].tolist()
            [0.5, 0.5, 0.0]

        Reference:
            T. N. Kipf and M. Welling, Semi-Supervised Classification with Graph Convolutional Networks, equation 2.
        """
        nodes = len(self.labels)
        loops = torch.arange(nodes, device=self.edges.device)
        rows = torch.cat([self.edges[0], self.edges[1], loops])
        columns = torch.cat([self.edges[1], self.edges[0], loops])
        scale = torch.bincount(rows, minlength=nodes).double().rsqrt()
        values = (scale[rows] * scale[columns]).float()
        sparse = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (nodes, nodes), check_invariants=True)
        return sparse.coalesce()


def load_cora(row_normalise: bool = True) -> Graph:
    """Cora: 2,708 papers in 7 classes, 1,433 words, 5,278 undirected citations, the published split 140 / 500 / 1,000.

    Args:
        row_normalise: divide the features of a paper, 1 for a word that occurs and 0 for others, by their sum.

    Returns:
        The `Graph`; nodes keep the published order.

    Raises:
        DataError: if the tables cannot be had, or are not what they should be.

    Example:
        >>> graph = load_cora()  # doctest: +SKIP
        >>> tuple(graph.features.shape), len(graph.train), graph.edges.shape[1]  # doctest: +SKIP
        ((2708, 1433), 140, 5278)

    Reference:
        Z. Yang, W. Cohen, R. Salakhutdinov, Revisiting Semi-Supervised Learning with Graph Embeddings (the split);
        T. N. Kipf and M. Welling (features divided by their sum).
    """
    nodes, links = (pd.read_csv(path, keep_default_na=False) for path in fetch_all(CORA))
    edges = links[["source", "target"]].to_numpy(np.int64).T
    _check_sizes(nodes, edges)
    features = torch.zeros(CORA_NODES, CORA_WORDS)
    for node, words in enumerate(nodes["words"].astype(str)):
        features[node, [int(word) for word in words.split()]] = 1.0
    if row_normalise:
        features /= features.sum(1, keepdim=True).clamp_min(1.0)  # a paper without words stays zero
    parts = {part: torch.from_numpy(np.flatnonzero((nodes["split"] == part).to_numpy())) for part in CORA_PARTS}
    labels = torch.tensor(nodes["label"].to_numpy(), dtype=torch.int64)
    known = load_manifest()
    digests = {name: known[name].sha256 for name in CORA}
    return Graph(features, labels, torch.from_numpy(edges.copy()), **parts, classes=CORA_CLASSES, digests=digests)


def _check_sizes(nodes: pd.DataFrame, edges: np.ndarray) -> None:
    """DataError with the value and what was expected unless the tables are Cora's."""
    sizes = {part: int((nodes["split"] == part).sum()) for part in CORA_PARTS}
    facts = [
        ("nodes", len(nodes), CORA_NODES),
        ("numbers of nodes in order", bool((nodes["node"] == np.arange(len(nodes))).all()), True),
        ("edges", edges.shape[1], CORA_EDGES),
        (
            "different edges with the smaller number first",
            len({(a, b) for a, b in edges.T.tolist() if a < b}),
            CORA_EDGES,
        ),
        ("numbers in edges", (int(edges.min()) >= 0, int(edges.max()) < CORA_NODES), (True, True)),
        ("classes", nodes["label"].nunique(), CORA_CLASSES),
        ("parts", sizes, CORA_PARTS),
    ]
    for what, found, expected in facts:
        if found != expected:
            raise DataError(f"{' and '.join(CORA)}: {what} {found}, expected {expected}")
