"""Owners against their definition, element by element."""

import itertools
import math

import numpy as np
from properties import given, settings, st

from dropinf.capturing.owners import (
    NONE,
    broadcast,
    collapsed,
    compressed,
    merged,
    mixed,
    parts,
    read,
    reshaped,
)

few = settings(max_examples=200, derandomize=True, deadline=None)
shapes = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4).map(tuple)


def owners_of(shape, least=NONE, most=2):
    """Owners of a tensor of `shape`: dimensions of size 1 or full, often the same along some."""

    def make(sizes, values, along):
        own = tuple(n if full else 1 for n, full in zip(shape, sizes, strict=True))
        found = np.array(values[: math.prod(own)]).reshape(own)
        if along is not None and own[along % len(own)] > 1:  # the same along all others
            d = along % len(own)
            at = tuple(slice(None) if k == d else slice(1) for k in range(len(own)))
            found = np.broadcast_to(found[at], own).copy()
        return found

    count = math.prod(shape)
    return st.builds(
        make,
        st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)),
        st.lists(st.integers(least, most), min_size=count, max_size=count),
        st.none() | st.integers(0, 3),
    )


with_owners = shapes.flatmap(lambda shape: st.tuples(st.just(shape), owners_of(shape)))


def only(values):
    """The one owner of some elements, NONE if nobody's, None if they differ."""
    values = set(values) - {NONE}
    return NONE if not values else values.pop() if len(values) == 1 else None


@few
@given(case=with_owners, choice=st.sets(st.integers(0, 3)))
def test_collapsed(case, choice):
    shape, owners = case
    dims = sorted(d for d in choice if d < len(shape))
    full = np.broadcast_to(owners, shape)
    slim = tuple(1 if d in dims else n for d, n in enumerate(shape))
    truth = {
        at: only(full[tuple(slice(None) if d in dims else i for d, i in enumerate(at))].reshape(-1))
        for at in itertools.product(*map(range, slim))
    }
    found = collapsed(owners, dims)
    if found is None:
        assert None in truth.values()
        assert isinstance(mixed(owners, dims, None, "f"), str)
        return
    assert all(found.shape[d] == 1 for d in dims)
    found = np.broadcast_to(found, slim)
    assert {at: found[at] for at in truth} == truth


def test_collapsed_of_nothing():
    assert collapsed(np.zeros((0, 3), int), (0,)).tolist() == [[NONE] * 3]


@few
@given(case=with_owners)
def test_compressed(case):
    shape, owners = case
    found = compressed(owners)
    assert np.array_equal(np.broadcast_to(found, shape), np.broadcast_to(owners, shape))
    for d in range(found.ndim):
        assert found.shape[d] == 1 or (found != found.take([0], d)).any()


@few
@given(case=with_owners, choice=st.sets(st.integers(0, 3)), lead=st.integers(0, 2))
def test_broadcast(case, choice, lead):
    """Of an operand with ones where the result has more, and without its first dimensions."""
    shape, owners = case
    lead = min(lead, len(shape))
    operand = tuple(1 if d in choice else n for d, n in enumerate(shape))[lead:]
    full = np.broadcast_to(owners, shape)
    seen = {}
    for at in itertools.product(*map(range, shape)):
        here = tuple(i % n for i, n in zip(at[lead:], operand, strict=True))
        seen.setdefault(here, []).append(full[at])
    truth = {at: only(values) for at, values in seen.items()}
    found = broadcast(owners, operand, "f")
    if isinstance(found, str):
        assert None in truth.values()
        return
    found = np.broadcast_to(found, operand)
    assert {at: found[at] for at in truth} == truth


def factored(n):
    """Shapes of n elements."""
    if n == 1:
        return st.lists(st.just(1), max_size=2)
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0]).flatmap(
        lambda d: factored(n // d).map(lambda rest: [d, *rest]) if d > 1 else factored_more(n)
    )


def factored_more(n):
    return st.sampled_from([d for d in range(2, n + 1) if n % d == 0]).flatmap(
        lambda d: factored(n // d).map(lambda rest: [1, d, *rest])
    )


@few
@given(
    case=with_owners.flatmap(
        lambda case: st.tuples(st.just(case), factored(math.prod(case[0])).map(tuple))
    )
)
def test_reshaped(case):
    (old, owners), new = case
    found = reshaped(owners, old, new, None)
    assert found.ndim == len(new)
    truth = np.broadcast_to(owners, old).reshape(new)
    assert np.array_equal(np.broadcast_to(found, new), truth)
    # With rows per token, examples [B, 1] that are merged with T positions become tokens.
    T = new[1] if len(new) > 1 else 1
    for_tokens = reshaped(-2 - np.abs(owners), old, new, T)
    example = np.where(for_tokens >= 0, -2 - for_tokens // max(1, T), for_tokens)
    assert np.array_equal(np.broadcast_to(example, new), -2 - np.abs(truth))


def test_positions_that_are_merged_are_tokens():
    owners = np.array([[-2], [-3]])
    assert reshaped(owners, (2, 3), (6,), 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert reshaped(owners, (2, 4), (8,), 3).tolist() == [-2] * 4 + [-3] * 4
    some = np.array([[-2], [NONE]])
    assert reshaped(some, (2, 3), (6,), 3).tolist() == [-2] * 3 + [NONE] * 3


def test_reshapes_of_nothing():
    assert reshaped(np.array([[0], [1]]), (2, 0), (0,), None) == "a reshape"


def pair_of(shape, **bounds):
    return st.tuples(st.just(shape), owners_of(shape, **bounds), owners_of(shape, **bounds))


@few
@given(case=shapes.flatmap(pair_of))
def test_merged(case):
    shape, one, other = case
    a, b = (np.broadcast_to(o, shape) for o in (one, other))
    pairs = zip(a.reshape(-1), b.reshape(-1), strict=True)
    truth = [only(pair) for pair in pairs]
    found = merged(one, other, None)
    if isinstance(found, str):
        assert None in truth
    else:
        assert np.broadcast_to(found, shape).reshape(-1).tolist() == truth
    assert merged("lost", one, None) == merged(one, "lost", None) == "lost"


@few
@given(case=shapes.flatmap(lambda shape: pair_of(shape, least=-4, most=5)))
def test_merged_with_rows_per_token(case):
    """A token, and the example it is of, are the token; two of different examples are lost."""
    T = 3
    shape, one, other = case

    def both(a, b):
        if NONE in (a, b):
            return max(a, b) if a < NONE and b < NONE else a if b == NONE else b
        if a == b:
            return a
        example = [-2 - o // T if o >= 0 else o for o in (a, b)]
        return max(a, b) if example[0] == example[1] and min(a, b) < NONE else None

    a, b = (np.broadcast_to(o, shape).reshape(-1).tolist() for o in (one, other))
    truth = [both(*pair) for pair in zip(a, b, strict=True)]
    found = merged(one, other, T)
    if isinstance(found, str):
        assert None in truth
    else:
        assert np.broadcast_to(found, shape).reshape(-1).tolist() == truth


@few
@given(
    shape=shapes,
    d=st.integers(0, 3),
    index=st.lists(st.integers(-1, 3), min_size=1, max_size=4),
    data=st.data(),
)
def test_read(shape, d, index, data):
    """Of a tensor of which positions were taken, in any order, also twice, also from the end."""
    d %= len(shape)
    index = np.array([i % shape[d] for i in index])
    taken = (*shape[:d], len(index), *shape[d + 1 :])
    owners = data.draw(owners_of(taken))
    full = np.broadcast_to(owners, taken)
    seen = {}
    for at in itertools.product(*map(range, taken)):
        seen.setdefault((*at[:d], int(index[at[d]]), *at[d + 1 :]), []).append(full[at])
    truth = {at: only(seen.get(at, [])) for at in itertools.product(*map(range, shape))}
    found = read(lambda x: x.take(index, d), owners, shape, (d,), "f")
    if isinstance(found, str):
        # Owners along a dimension that the positions do not show may be lost as well.
        assert None in truth.values() or found == "f"
        return
    found = np.broadcast_to(found, shape)
    assert {at: found[at] for at in truth} == truth


def test_parts():
    assert parts([2, 0, 3]) == [slice(0, 2), slice(2, 2), slice(2, 5)]
