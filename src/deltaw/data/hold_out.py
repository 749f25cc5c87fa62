"""Records set aside by whole items, so that no prompt is on both sides. Knows records; nothing of what a set is for.

Every set that is cut from another is cut here.
"""

from __future__ import annotations

from collections.abc import Sequence

from deltaw.data.forms import Record
from deltaw.data.prompts import in_words, items_in
from deltaw.errors import DataError

# Sums of sizes are searched exactly up to so many records, among so many items
_EXACT_RECORDS, _EXACT_ITEMS = 1000, 20_000


def hold_out(records: Sequence[Record], count: int, *, most: int, seed: int, source: str, instead: str) -> list[int]:
    """Return the numbers of about `count` records to hold out, at most `most`, in whole items, and never all.

    The sum is the nearest to `count` that whole items allow. If even the smallest item has more than `most`, that item is held
    out. The same seed gives the same records.

    Raises DataError for records of a single item; `instead` says what to do.
    """
    members = list(items_in(records).values())
    if len(members) < 2:
        raise DataError(
            f"{source}: its {len(records):,} records are of {in_words(len(members), records[0].form)}, so none can be held "
            f"out that is not trained on too. {instead}"
        )
    return _drawn(members, count, most, seed, len(records) - 1)


def sample(records: Sequence[Record], most: int, *, seed: int) -> list[int]:
    """Return the numbers of at most `most` records in whole items: all in their order where they are few, else drawn by `seed`.

    If even the smallest item has more than `most`, it is that one.
    """
    if len(records) <= most:
        return list(range(len(records)))
    return _drawn(list(items_in(records).values()), most, most, seed, len(records))


def first(records: Sequence[Record], most: int) -> list[int]:
    """Return the numbers of the first items' records, in their order.

    They are as many whole items as have at most `most` records together, and one at least.
    """
    picked: list[int] = []
    for item in items_in(records).values():
        if picked and len(picked) + len(item) > most:
            break
        picked += item
    return sorted(picked)


def _drawn(members: list[list[int]], count: int, most: int, seed: int, limit: int) -> list[int]:
    """Return records of items in random order, their number in 1 … min(most, limit) and the nearest to `count`."""
    import torch

    places = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    order = [members[place] for place in places]
    picked: list[list[int]] = []
    first = 0
    while first < len(order) and count > _EXACT_RECORDS:
        item, first = order[first], first + 1
        if len(item) <= count:
            picked.append(item)
            count, most, limit = count - len(item), most - len(item), limit - len(item)
    order = order[first : first + _EXACT_ITEMS]
    taken = _nearest([len(item) for item in order], count, min(most, limit), empty=bool(picked))
    picked += [order[i] for i in taken]
    if not picked:
        picked = [min(members, key=len)]
    return [i for item in picked for i in item]


def _nearest(sizes: Sequence[int], count: int, most: int, *, empty: bool) -> list[int]:
    """Return the indices of sizes whose sum is the nearest to `count`, the smaller of two.

    The sum is at most `most`, and 0 only if `empty`. Without such a sum the result is empty.
    """
    most = min(most, count + max(sizes, default=0))
    mask = (1 << (most + 1)) - 1
    reach = [1]  # bit s: some of the sizes from here to the end sum to s
    for size in reversed(sizes):
        reach.append((reach[-1] | reach[-1] << size) & mask)
    reach.reverse()
    sums = [s for s in range(0 if empty else 1, most + 1) if reach[0] >> s & 1]
    left = min(sums, key=lambda s: (abs(s - count), s), default=0)
    taken = []
    for i, size in enumerate(sizes):
        if size <= left and reach[i + 1] >> (left - size) & 1:
            taken.append(i)
            left -= size
    return taken
