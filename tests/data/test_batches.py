import dataclasses
import hashlib
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.config import DataConfig
from deltaw.data import Example, Order, batches, collate, encode, plan, read
from deltaw.errors import DataError

lengths = st.lists(st.integers(1, 500), max_size=300)


def test_a_seeds_batches_stay_the_same_from_version_to_version():
    """So that a run of old can be had again."""
    assert plan([7, 9, 30, 8, 17, 64, 1, 24, 25, 16, 40, 33], 3, 0, 0) == [[6, 5, 3], [11, 2, 9], [4, 8, 0], [10, 7, 1]]
    for count, batch, tokens, known in (
        (400, 4, None, "963b86698780"),
        (1275, 1, None, "4fc482291cd4"),
        (300, 8, 3000, "fadcd36efa9e"),
    ):
        chance = random.Random(count)
        planned = plan([chance.randint(1, 500) for _ in range(count)], batch, 1, 2, tokens)
        assert hashlib.sha256(json.dumps(planned).encode()).hexdigest()[:12] == known


@given(st.integers(1, 3000), st.integers(1, 9), st.integers(1, 60))
def test_windows_have_nearly_the_same_number_of_batches(count, rows, width):
    windows = batches._windows(count, rows, width)
    assert windows[0][0] == 0 and windows[-1][1] == count
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(windows))
    full = [(end - start) // rows for start, end in windows]
    assert max(full) <= width and max(full) - min(full) <= 1
    assert all((end - start) % rows == 0 for start, end in windows[:-1])
    assert len(windows) == max(1, -(-(count // rows) // width))


@pytest.mark.parametrize(("count", "is_sorted"), [(80, False), (87, False), (88, True), (240, True)])
def test_with_records_for_ten_batches_or_fewer_nothing_is_sorted(count, is_sorted):
    """A tenth of eleven batches is more than one of them."""
    sizes = [8 * i for i in range(count)]
    random.Random(3).shuffle(sizes)
    rows = [[sizes[i] for i in b] for b in plan(sizes, 8, 0, 0)]
    assert all(row in (sorted(row), sorted(row, reverse=True)) for row in rows) == is_sorted


@pytest.mark.parametrize("tokens", [None, 64])
def test_no_records_are_no_batches(tokens):
    assert plan([], 4, 0, 0, tokens) == []


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_each_index_once_and_the_same_again(lengths, batch, seed, epoch):
    planned = plan(lengths, batch, seed, epoch)
    assert sorted(i for b in planned for i in b) == list(range(len(lengths)))
    assert len(planned) == -(-len(lengths) // batch) and all(len(b) <= batch for b in planned)
    assert planned == plan(lengths, batch, seed, epoch)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 2000), st.integers(0, 5))
def test_a_token_budget_counts_padding_and_splits_no_record(lengths, tokens, epoch):
    planned = plan(lengths, 8, 0, epoch, tokens)
    assert sorted(i for b in planned for i in b) == list(range(len(lengths)))
    for indices in planned:
        padded = -(-max(lengths[i] for i in indices) // 8) * 8
        assert len(indices) * padded <= tokens or len(indices) == 1


def test_a_token_budget_counts_the_longest_record_wherever_it_is():
    """Few records are not sorted: the longest one of a batch may be in its middle."""
    lengths = [8, 8, 64] * 10
    for seed in range(20):
        assert all(
            64 not in b or len(b) <= 2 for b in ([lengths[i] for i in p] for p in plan(lengths, 8, seed, 0, 128))
        )


def test_a_token_budget_is_used():
    chance = random.Random(0)
    lengths = [chance.randint(10, 500) for _ in range(4000)]
    planned = plan(lengths, 8, 0, 0, 4096)
    assert 0.9 * 4096 < sum(lengths) / len(planned) < 4096


@pytest.mark.parametrize("tokens", [None, 300])
def test_no_record_is_likelier_early_or_late_whatever_its_length(tokens):
    """Over many seeds, the mean place of the longest records' steps and of the shortest's is the middle of the epoch."""
    lengths = [10] * 60 + [50] * 60 + [90] * 60
    places = {10: [], 90: []}
    for seed in range(400):
        planned = plan(lengths, 4, seed, 0, tokens)
        for step, indices in enumerate(planned):
            for i in indices:
                if lengths[i] in places:
                    places[lengths[i]].append(step / (len(planned) - 1))
    for found in places.values():
        assert abs(sum(found) / len(found) - 0.5) < 0.02


@given(lengths.filter(bool), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 2000)), st.data())
def test_the_records_of_a_step_follow_from_its_number(lengths, batch, tokens, data):
    order = Order(lengths, batch=batch, seed=3, tokens=tokens)
    epochs = [plan(lengths, batch, 3, epoch, tokens) for epoch in range(3)]
    everything = [b for planned in epochs for b in planned]
    assert order.steps(3) == len(everything) and order.steps(1) == len(epochs[0])
    assert order.steps(1.5) == len(epochs[0]) + -(-len(epochs[1]) // 2)
    assert order.steps(1e-9) == 1
    for step in data.draw(st.lists(st.integers(0, len(everything) - 1), max_size=8)):
        assert order.at(step) == everything[step]


@pytest.mark.parametrize(
    ("epochs", "batches", "steps"),
    [
        (1.1, 10, 11),
        (2.2, 10, 22),
        (1.05, 10, 11),
        (0.1 + 0.2, 10, 3),
        (1 / 3, 9, 3),
        (2 / 3, 9, 6),
        (0.35, 10, 4),
        (3, 7, 21),
    ],
)
def test_a_part_of_an_epoch_is_as_many_steps_as_it_says(epochs, batches, steps):
    assert Order([9] * (4 * batches - 1), batch=4, seed=0).steps(epochs) == steps


@pytest.mark.parametrize("tokens", [None, 300])
def test_steps_of_very_many_epochs_are_told_at_once(tokens):
    lengths = [10, 20, 30, 40] * 30
    order = Order(lengths, batch=8, seed=0, tokens=tokens)
    assert order.steps(50) == sum(len(plan(lengths, 8, 0, epoch, tokens)) for epoch in range(50))
    assert order.steps(100_000) == pytest.approx(1000 * order.steps(100), rel=1e-9)
    assert order.steps(1e6 + 0.5) == order.steps(1e6) + -(-len(plan(lengths, 8, 0, 10**6, tokens)) // 2)


def _pairs(planned):
    return {pair for batch in planned for pair in itertools.combinations(sorted(batch), 2)}


def _meet_again(lengths, batch=8, tokens=None, epochs=12):
    """Share of the pairs of an epoch that share a batch in the next one too, and that share by chance; share of batches."""
    planned = [plan(lengths, batch, 0, epoch, tokens) for epoch in range(epochs)]
    pairs = [_pairs(each) for each in planned]
    batches = [{tuple(sorted(b)) for b in each} for each in planned]
    again = sum(len(a & b) for a, b in itertools.pairwise(pairs)) / sum(map(len, pairs[:-1]))
    same = sum(len(a & b) for a, b in itertools.pairwise(batches)) / sum(map(len, batches[:-1]))
    return again, len(pairs[0]) * 2 / (len(lengths) * (len(lengths) - 1)), same


def _spread(count):
    chance = random.Random(5)
    return [chance.randint(10, 500) for _ in range(count)]


@pytest.mark.parametrize("tokens", [None, 2000])
@pytest.mark.parametrize("count", [20, 60, 100, 300])
def test_few_records_meet_others_in_each_epoch(count, tokens):
    """Sorted all together, 20 to 300 records came in the same batches in every epoch."""
    again, by_chance, same = _meet_again(_spread(count), tokens=tokens)
    assert again < (1.2 * by_chance + 0.02 if count <= 60 else 3 * by_chance + 0.04)
    assert same < 0.02


def test_records_of_one_length_meet_by_chance():
    again, by_chance, _ = _meet_again([30] * 400)
    assert again < 1.3 * by_chance


@pytest.mark.slow
def test_real_records_meet_others_in_each_epoch(smollm2, shared_data):
    """The first 300 of E2E: 58% of the pairs met again, 2.3% would by chance."""
    records = read(shared_data / "e2e" / "train.jsonl", DataConfig())
    first = type(records)(records.items[:300], records.form, records.source)
    lengths = encode(first, smollm2, DataConfig(separator="\n")).lengths
    again, by_chance, same = _meet_again(lengths)
    assert again < 3 * by_chance and same == 0
    assert _computed(plan(lengths, 8, 0, 0), lengths) < 1.2 * sum(lengths)


@pytest.mark.parametrize("tokens", [None, 1200])
def test_a_batch_that_is_not_full_has_any_length_and_any_place(tokens):
    """It was always of the longest records."""
    lengths = list(range(10, 310))
    random.Random(2).shuffle(lengths)
    ranks, places = [], []
    for epoch in range(200):
        planned = plan(lengths, 7, 0, epoch, tokens)
        short = min(planned, key=lambda b: len(b) if tokens is None else sum(lengths[i] for i in b))
        ranks.append(sum(lengths[i] for i in short) / len(short))
        places.append(planned.index(short) / (len(planned) - 1))
    assert min(ranks) < 80 and max(ranks) > 240
    assert 0.4 < sum(places) / len(places) < 0.6 and len(set(places)) > 20


def _computed(planned, lengths):
    return sum(len(b) * -(-max(lengths[i] for i in b) // 8) * 8 for b in planned)


def test_many_records_are_padded_hardly_more_than_sorted_altogether():
    lengths = _spread(8000)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = _computed([order[i : i + 8] for i in range(0, len(order), 8)], lengths)
    assert _computed(plan(lengths, 8, 0, 0), lengths) < 1.02 * best


def test_little_padding_and_other_orders():
    chance = random.Random(0)
    lengths = [chance.randint(10, 500) for _ in range(4000)]
    planned = plan(lengths, 8, 0, 0)
    computed = sum(len(b) * max(lengths[i] for i in b) for b in planned)
    assert computed < 1.05 * sum(lengths)
    assert planned != plan(lengths, 8, 0, 1) != plan(lengths, 8, 1, 0)
    longest = [max(lengths[i] for i in b) for b in planned[:50]]
    assert longest != sorted(longest)


def test_a_batch_is_padded_on_the_right_and_masked():
    batch = collate([Example([5, 6, 7], [False, True, True], "a"), Example([8, 9], [False, True], "b")], pad_id=0)
    fill, off = [0] * 5, [False] * 5
    assert batch.input_ids.tolist() == [[5, 6, 7, *fill], [8, 9, 0, *fill]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, *fill], [1, 1, 0, *fill]]
    assert batch.supervised.tolist() == [[False, True, True, *off], [False, True, False, *off]]
    assert str(batch.supervised.dtype) == "torch.bool" and str(batch.input_ids.dtype) == "torch.int64"
    assert batch.targets == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.input_ids = batch.attention_mask


def test_sizes_below_one_and_empty_batches_are_refused():
    with pytest.raises(DataError, match="at least 1"):
        plan([1], 0, 0, 0)
    with pytest.raises(DataError, match="batch_tokens is 0"):
        plan([1], 1, 0, 0, 0)
    with pytest.raises(DataError, match="at least one example"):
        collate([], 0)


@pytest.mark.parametrize(("length", "most", "width"), [(8, None, 8), (9, None, 16), (9, 12, 12), (9, 9, 9), (9, 4, 9)])
def test_rows_are_padded_to_a_multiple_of_8_that_the_model_has_positions_for(length, most, width):
    batch = collate([Example([3] * length, [True] * length, "a")], 0, most)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.supervised.shape == (1, width)
    assert int(batch.attention_mask.sum()) == int(batch.supervised.sum()) == length
