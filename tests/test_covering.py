"""The generator of covering arrays: every feasible pair occurs, no excluded one does, and the rows are the same every time."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.covering import covering_array, missing_pairs

pytestmark = pytest.mark.cpu


def pairs_of(row):
    return set(itertools.combinations(row.items(), 2))


def brute_force(factors, allowed):
    """All pairs that occur in any allowed row, by listing every row."""
    found = set()
    for values in itertools.product(*factors.values()):
        pairs = pairs_of(dict(zip(factors, values, strict=True)))
        if all(allowed(*a, *b) for a, b in pairs):
            found |= pairs
    return found


@pytest.mark.parametrize("sizes", [(2, 2), (3, 4, 5), (2,) * 12, (7, 1, 3, 2, 2), (5, 5, 5, 5, 5)], ids=str)
def test_every_pair_without_constraints(sizes):
    factors = {f"f{i}": tuple(range(n)) for i, n in enumerate(sizes)}
    rows = covering_array(factors)
    wanted = {
        ((f, x), (g, y)) for f, g in itertools.combinations(factors, 2) for x, y in itertools.product(factors[f], factors[g])
    }  # fmt: skip
    assert set().union(*map(pairs_of, rows)) == wanted
    least = sorted(sizes)[-1] * sorted(sizes)[-2]
    assert least <= len(rows) <= 2 * least + 4
    assert missing_pairs(rows, factors) == []


@pytest.mark.parametrize("seed", range(8))
def test_constraints(seed):
    """Random exclusions: exactly the pairs that some allowed row holds are covered."""
    rng = random.Random(seed)
    factors = {f"f{i}": tuple(range(rng.randint(1, 4))) for i in range(6)}
    excluded = {
        ((f, x), (g, y))
        for f, g in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[f], factors[g])
        if rng.random() < 0.25
    }

    def allowed(f, x, g, y):
        return ((f, x), (g, y)) not in excluded

    rows = covering_array(factors, allowed, seed=seed)
    assert set().union(set(), *map(pairs_of, rows)) == brute_force(factors, allowed)
    assert missing_pairs(rows, factors, allowed) == []


def test_the_same_rows_every_time():
    factors = {f"f{i}": tuple("abcd") for i in range(8)}
    assert covering_array(factors, seed=3) == covering_array(factors, seed=3)


def test_a_missing_pair_is_found():
    factors = {"a": (1, 2), "b": (1, 2), "c": (1, 2)}
    rows = [dict(a=1, b=1, c=1), dict(a=2, b=2, c=2), dict(a=1, b=2, c=1)]
    missing = {(("a", 1), ("c", 2)), (("a", 2), ("b", 1)), (("a", 2), ("c", 1)), (("b", 1), ("c", 2))}
    assert set(missing_pairs(rows, factors)) == missing


def test_a_value_listed_twice_is_refused():
    with pytest.raises(AssertionError, match="a value is listed twice"):
        covering_array({"a": (1, 1), "b": (2,)})
