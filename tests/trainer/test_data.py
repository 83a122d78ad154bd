import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from trainer_node.data import HeldOutText, ImageBatches, TextBatches, epoch_offset

CPU = torch.device("cpu")
GOLDEN_TEXT = [430, 440, 470, 700, 380, 150, 70, 850, 830]
GOLDEN_IMAGES = [43, 44, 47, 70, 38, 15, 7]


def text(count=1000, *, sequences=3, context=10, seed=0, guard=2):
    """Token number i is i, so a window says where it came from."""
    return TextBatches(
        np.arange(count, dtype=np.uint16),
        sequences=sequences,
        context_tokens=context,
        seed=seed,
        guard_batches=guard,
        device=CPU,
    )


def images(count=100, *, sequences=7, seed=0, guard=1):
    numbers = np.arange(count)
    pictures = np.broadcast_to(numbers[:, None, None, None], (count, 1, 8, 8)).astype(np.float32)
    return ImageBatches(
        pictures, numbers.astype(np.int64), sequences=sequences, seed=seed, guard_batches=guard, device=CPU
    )


def starts(batches, positions):
    return [int(start) for i in positions for start in batches.batch(i).inputs[:, 0]]


@st.composite
def text_shapes(draw):
    sequences, context = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    guard = draw(st.integers(1, 3))
    windows = draw(st.integers(sequences, 40))
    spare = draw(st.integers(0, context - 1))
    count = guard * sequences * context + 1 + context * (windows + 1) + spare
    shape = {"count": count, "sequences": sequences, "context": context, "guard": guard}
    return shape, windows


@given(text_shapes(), st.integers(0, 3), st.integers(0, 2))
def test_every_window_is_used_exactly_once_per_epoch(shape_and_windows, seed, epoch):
    shape, windows = shape_and_windows
    batches = text(**shape, seed=seed)
    sequences, context = shape["sequences"], shape["context"]
    first, last = epoch * windows // sequences, -(-(epoch + 1) * windows // sequences)
    skipped = epoch * windows - first * sequences
    used = starts(batches, range(first, last))[skipped : skipped + windows]
    offset = epoch_offset(seed, epoch, context)
    assert sorted(used) == [offset + i * context for i in range(windows)]


@given(text_shapes(), st.integers(0, 3))
def test_guard_windows_are_never_trained_on_not_even_as_a_target(shape_and_windows, seed):
    shape, windows = shape_and_windows
    batches = text(**shape, seed=seed)
    guard_inputs = np.concatenate([batches.guard(i).inputs.numpy().ravel() for i in range(shape["guard"])])
    assert len(set(guard_inputs)) == len(guard_inputs)
    positions = range(2 * windows // shape["sequences"] + 1)
    trained = max(int(batches.batch(i).targets.max()) for i in positions)
    assert trained < guard_inputs.min()


def test_targets_are_the_inputs_one_token_later():
    for batch in (text().batch(5), text().guard(1)):
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape == (3, 10)


@pytest.mark.parametrize("make", [text, images])
def test_a_batch_depends_on_its_position_alone(make):
    walked, jumped = make(), make()
    in_order = [walked.batch(i) for i in range(80)]
    for i in (79, 0, 40, 41, 3):
        assert torch.equal(jumped.batch(i).inputs, in_order[i].inputs)
        assert torch.equal(jumped.batch(i).targets, in_order[i].targets)


def test_seed_and_epoch_change_the_order_of_images():
    def order(seed, first):
        batches = images(105, sequences=7, seed=seed)  # 98 trained, 14 batches an epoch
        return [batches.batch(i).targets.tolist() for i in range(first, first + 14)]

    assert order(0, 0) != order(1, 0)
    assert order(3, 0) != order(3, 14)


def test_seed_and_epoch_change_the_order_of_windows():
    def order(seed, epoch):
        batches = text(971, seed=seed)  # 90 windows, 30 batches an epoch
        offset = epoch_offset(seed, epoch, 10)
        return [start - offset for start in starts(batches, range(30 * epoch, 30 * epoch + 30))]

    assert order(0, 0) != order(1, 0)
    assert order(3, 0) != order(3, 1)
    assert sorted(order(3, 1)) == [10 * i for i in range(90)]


def test_window_grid_starts_elsewhere_in_other_epochs():
    assert len({epoch_offset(0, epoch, 128) for epoch in range(20)}) > 10


def test_order_of_epochs_is_the_same_on_every_machine():
    # Golden: a change here silently breaks the resumption of every run on disk.
    assert starts(text(), range(3)) == GOLDEN_TEXT
    assert images().batch(0).targets.tolist() == GOLDEN_IMAGES


def test_guard_beyond_the_last_is_refused():
    for batches in (text(guard=2), images(guard=2)):
        with pytest.raises(IndexError, match="guard batch 2 of 2"):
            batches.guard(2)


def test_epoch_counts_items_and_not_batches():
    batches = images(100, sequences=7, guard=1)
    assert batches.epoch(0) == 0.0
    assert batches.epoch(93) == pytest.approx(7.0)


@pytest.mark.parametrize("sequences", [3, 8])
def test_smallest_text_that_works_is_the_one_the_error_names(sequences):
    with pytest.raises(DataError, match=r"has 5 tokens.*need (\d+); give more text, or lower") as error:
        text(5, sequences=sequences)
    needed = int(str(error.value).split("need ")[1].split(";")[0])
    text(needed, sequences=sequences).batch(0)
    with pytest.raises(DataError):
        text(needed - 1, sequences=sequences)


def test_too_few_images_are_an_error_with_numbers():
    with pytest.raises(DataError, match="there are 13 training images, one batch and the guard need 14"):
        images(13)
    images(14).batch(0)


@given(st.integers(11, 500), st.integers(1, 6), st.integers(1, 9))
def test_held_out_windows_are_disjoint_equal_and_spread_evenly(count, sequences, batches):
    held = HeldOutText(
        np.arange(count, dtype=np.uint16), sequences=sequences, context_tokens=10, batches=batches, device=CPU
    )
    found = list(held)
    assert 1 <= len(found) == len(held) <= batches
    assert len({batch.inputs.shape for batch in found}) == 1
    begins = np.concatenate([batch.inputs[:, 0].numpy() for batch in found])
    gaps = np.diff(begins)
    assert (gaps >= 10).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 10
    assert int(found[-1].targets.max()) < count
    # The windows reach the last part of the text, as far as their number allows.
    assert count - begins[-1] <= 2 * 10 + (count // len(begins))


def test_held_out_text_below_one_window_is_an_error_with_the_cure():
    with pytest.raises(DataError, match=r"has 10 tokens, one window needs 11; .*raise trainer\.data"):
        HeldOutText(np.arange(10), sequences=1, context_tokens=10, batches=1, device=CPU)


def test_images_of_an_epoch_are_all_but_the_guard_and_each_once():
    batches = images(100, sequences=31, guard=1)
    used = [int(n) for i in range(3) for n in batches.batch(i).targets][:69]
    assert sorted(used) == list(range(69))
    assert sorted(batches.guard(0).targets.tolist()) == list(range(69, 100))
    batch = batches.batch(0)
    assert torch.equal(batch.inputs[:, 0, 0, 0].long(), batch.targets)
    assert batch.inputs.shape == (31, 1, 8, 8)
    assert batch.inputs.dtype == torch.float32
