"""Our least squares and biased factorisation beside LensKit and Surprise, on one fold of MovieLens 100K.

    python -m pip install lenskit scikit-surprise
    OMP_NUM_THREADS=1 python benchmarks/peers_of_completion.py       # a minute on one core

Each pair minimises the same objective with the same hyper-parameters, from starts of its own: biases with damping;
alternating least squares on what these leave (LensKit's BiasedMFScorer); and biases and factors together, where
Surprise's SVD goes by single ratings and ours by sweeps. Both libraries weigh a ridge by the ratings of its row, which
`alternate` does with weighted=True. What is not installed is said and left out.

Root mean squares on fold u1 at rank 10 and ridge 0.1, mean [least, largest] of five starts, LensKit 2025.8.1 and
Surprise 1.1.5:

    biases                          ours .9621                      LensKit .9621
    least squares on the rest       ours .9439 [.9410, .9454]       LensKit .9441 [.9429, .9456]
    biases and factors together     ours .9351 [.9341, .9355]       Surprise .9346 [.9334, .9364]

So they agree within the spread of starts. Surprise needs some 600 passes for that: after 150 it has .930, as gradient
steps that stop early regularise, too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from compressible.data import ratings as data
from compressible.recovery.als import alternate
from compressible.recovery.sparse import SparseCompletion

RANK, RIDGE, DAMPING = 10, 0.1, (15.0, 10.0)  # DAMPING: of users and items, as our centring has it
EPOCHS = 20  # of least squares on the rest, ours and LensKit's
SWEEPS, PASSES, RATE = 200, 600, 0.005  # of ours, and of Surprise's gradient steps: both have settled by then
PEERS = {"lenskit": "lenskit", "scikit-surprise": "surprise"}  # distributions and their modules
Fold = tuple[data.Ratings, data.Split]


def own(fold: Fold, biases: bool, seed: int, sweeps: int) -> float:
    """The test error of our least squares after biases ("user_item", one sweep), or with biases of its own."""
    table, parts = fold
    offsets = data.center(table, parts.train, "global" if biases else "user_item", DAMPING, 1)
    values = table.ratings - offsets.at(table.users, table.items)
    places = table.users[parts.train], table.items[parts.train]
    seen = SparseCompletion(scipy.sparse.coo_array((values[parts.train], places), shape=table.shape))
    options = {"biases": biases, "bias_ridge": RIDGE, "start": "random", "weighted": True}
    right, left = alternate(seen, RANK, RIDGE, sweeps, torch.Generator().manual_seed(seed), **options).factors
    found = (left @ right).numpy()[table.users[parts.test], table.items[parts.test]]
    return float(np.sqrt(np.mean((found - values[parts.test]) ** 2)))


def own_biases(fold: Fold) -> float:
    """The test error of the mean and our biases alone."""
    table, parts = fold
    offsets = data.center(table, parts.train, "user_item", DAMPING, 1)
    return data.rmse(offsets.at(table.users, table.items)[parts.test], table.ratings[parts.test])["rmse"]


def lenskit_errors(fold: Fold, seed: int) -> dict[str, float]:
    """The test errors of LensKit's biases alone and of its least squares on what they leave."""
    from lenskit.als import BiasedMFScorer
    from lenskit.data import from_interactions_df
    from lenskit.training import TrainingOptions

    table, parts = fold
    names = {"user_id": table.users, "item_id": table.items, "rating": table.ratings}
    rows = pd.DataFrame(names)
    damping = dict(zip(("user", "item"), DAMPING, strict=True))
    scorer = BiasedMFScorer(features=RANK, epochs=EPOCHS, regularization=RIDGE, damping=damping)
    scorer.train(from_interactions_df(rows.iloc[parts.train]), TrainingOptions(rng=seed))
    test = rows.iloc[parts.test]
    users, items = scorer.users.numbers(test.user_id), scorer.items.numbers(test.item_id, missing="negative")
    known, bias = items >= 0, scorer.bias
    biases = bias.global_bias + bias.user_biases[users] + np.where(known, bias.item_biases[items], 0.0)
    factors = (scorer.user_embeddings[users] * scorer.item_embeddings[items]).sum(1)
    return {
        "biases": data.rmse(biases, test.rating.to_numpy())["rmse"],
        "least squares": data.rmse(biases + np.where(known, factors, 0.0), test.rating.to_numpy())["rmse"],
    }


def surprise_error(fold: Fold, seed: int) -> float:
    """The test error of Surprise's biases and factors together, by gradient steps on single ratings."""
    from surprise import SVD, Dataset, Reader

    table, parts = fold
    rows = pd.DataFrame({"user": table.users, "item": table.items, "rating": table.ratings})
    train = Dataset.load_from_df(rows.iloc[parts.train], Reader(rating_scale=(-100, 100))).build_full_trainset()
    model = SVD(n_factors=RANK, n_epochs=PASSES, lr_all=RATE, reg_all=RIDGE, random_state=seed).fit(train)
    test = rows.iloc[parts.test]
    found = [model.predict(*pair).est for pair in zip(test.user, test.item, strict=True)]
    return data.rmse(np.array(found), test.rating.to_numpy())["rmse"]


def installed(package: str, module: str) -> str:
    """The version of a package, "" where it is missing."""
    return importlib.metadata.version(package) if importlib.util.find_spec(module) else ""


def over_starts(error_of: Callable[[int], float], starts: int) -> list[float]:
    """Mean, least and largest of the errors over starts, to four digits."""
    errors = [error_of(seed) for seed in range(starts)]
    return [round(float(value), 4) for value in (np.mean(errors), np.min(errors), np.max(errors))]


def compare(fold: Fold, starts: int) -> dict[str, object]:
    """Root mean squares of all pairs that can be run: [mean, least, largest] over starts."""
    out: dict[str, object] = {}
    if version := installed("lenskit", "lenskit"):
        peer = [lenskit_errors(fold, seed) for seed in range(starts)]
        out["biases"] = {"ours": round(own_biases(fold), 4), f"LensKit {version}": round(peer[0]["biases"], 4)}
        out["least squares on the rest"] = {
            "ours": over_starts(lambda seed: own(fold, False, seed, EPOCHS), starts),
            f"LensKit {version}": over_starts(lambda seed: peer[seed]["least squares"], starts),
        }
    if version := installed("scikit-surprise", "surprise"):
        out["biases and factors together"] = {
            "ours": over_starts(lambda seed: own(fold, True, seed, SWEEPS), starts),
            f"Surprise {version}": over_starts(lambda seed: surprise_error(fold, seed), starts),
        }
    missing = [name for name, module in PEERS.items() if not installed(name, module)]
    return out | ({"not installed": missing} if missing else {})


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", default="u1", help="u1 to u5, or seed0, seed1, ...")
    parser.add_argument("--starts", type=int, default=5, help="random starts of each, usually 3 to 10")
    given = parser.parse_args()
    table = data.load("movielens-100k")
    found = compare((table, data.split(table, given.fold)), given.starts)
    print(json.dumps({"fold": given.fold, "rank": RANK, "ridge": RIDGE} | found, indent=1))


if __name__ == "__main__":
    main()
