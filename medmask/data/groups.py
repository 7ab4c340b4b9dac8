"""Groups of images that must stay together, and how whole groups are shared out to sides."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def find_groups(manifest: pd.DataFrame) -> list[str]:
    """Name of each image's group: images of one patient or lesion, and images with the same pixels, belong together.

    The name is the first of the source's names in the group, or `image:` and its first image where the source has none.
    """
    n = len(manifest)
    pixels = manifest["sha256"].factorize()[0] + n
    named = np.flatnonzero(manifest["group"] != "")
    groups = manifest["group"].iloc[named].factorize()[0] + 2 * n
    # images are the nodes 0..n-1, their pixels n..2n-1, the source's groups 2n..3n-1; an edge says "belongs to"
    start, end = np.concatenate([np.arange(n), named]), np.concatenate([pixels, groups])
    graph = coo_array((np.ones(len(start), dtype=np.int8), (start, end)), shape=(3 * n, 3 * n))
    component = connected_components(graph, directed=False)[1][:n]
    first: dict[int, str] = {}
    for number, group in sorted(zip(component[named], manifest["group"].iloc[named], strict=True)):
        first.setdefault(number, group)
    for number, image in zip(component, manifest["image_id"], strict=True):
        first.setdefault(number, f"image:{image}")
    return [first[number] for number in component]


def assign_groups(counts: np.ndarray, goals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share whole groups out to sides so that each side comes near its size and near its share of each class.

    Largest group first; each goes to the side whose squared relative distance from its shares shrinks most (or grows
    least). Before that, a class with a group for every side gets one on every side, the rarest class first, which a
    fold-wise search such as scikit-learn's StratifiedGroupKFold does not promise.

    Parameters
    ----------
    counts : ndarray, (G, K), int. Images of each class in each group.
    goals : ndarray, (S,), int. Images wanted on each side, in sum at most all of them.
    rng : orders groups of one size.

    Returns
    -------
    ndarray, (G,), int. Side of each group, S for the groups left over. A side is above its goal by less than the
    largest group, and not at all when all groups are single images.
    """
    goals = np.append(goals, counts.sum() - goals.sum())
    weights = np.column_stack([counts, counts.sum(axis=1)])  # (G, K + 1): the last column keeps the totals near
    shares = np.maximum(np.outer(goals / max(1, counts.sum()), weights.sum(axis=0)), 1e-9)  # (S + 1, K + 1)
    placed = np.zeros(shares.shape)
    side = np.full(len(counts), -1)
    shuffled = rng.permutation(len(counts))
    order = shuffled[np.argsort(-weights[shuffled, -1], kind="stable")]

    def put(group: int, target: int) -> None:
        side[group] = target
        placed[target] += weights[group]

    for label in np.argsort((counts > 0).sum(axis=0), kind="stable"):
        free = order[(counts[order, label] > 0) & (side[order] < 0)].tolist()
        if (counts[:, label] > 0).sum() < len(goals) - 1:
            continue
        for target in range(len(goals) - 1):
            if free and placed[target, label] == 0 and placed[target, -1] < goals[target]:
                put(free.pop(), target)  # the smallest
    for group in order[side[order] < 0]:
        room = goals - placed[:, -1]
        fits = room >= weights[group, -1]
        cost = (weights[group] * (2 * (placed - shares) + weights[group]) / shares).sum(axis=1)
        put(group, int(np.where(fits if fits.any() else room > 0, cost, np.inf).argmin()))
    return side
