"""The sums that prove a restore: equal to plain integers, taken while copying or not, blind to nothing."""

import hashlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import EnvironmentFault
from tests.trainer.test_fingerprint import random_bits
from trainer_node import proof as module
from trainer_node.proof import ROW_BYTES, ROW_WORDS, Proof, bytes_of
from trainer_node.snapshot import DiskStore, MemoryStore, Snapshot

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
# In bytes: none, below, at and behind a row, and behind the first chunk.
SIZES = (
    0,
    8,
    ROW_BYTES - 8,
    ROW_BYTES,
    3 * ROW_BYTES + 24,
    2 * ROW_BYTES * module.CHUNK_ROWS + ROW_BYTES + 8,
)


def digest_of(tensors):
    """The law by Python integers."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        raw = bytes_of(tensor.contiguous()).numpy().tobytes()
        rest = len(raw) // ROW_BYTES * ROW_BYTES
        words = [int.from_bytes(raw[place : place + 8], "little") for place in range(0, rest, 8)]
        rows = [sum(words[place : place + ROW_WORDS]) for place in range(0, len(words), ROW_WORDS)]
        columns = [sum(words[column::ROW_WORDS]) for column in range(ROW_WORDS if words else 0)]
        for total in (*rows, *columns):
            digest.update((total % (1 << 64)).to_bytes(8, "little"))
        digest.update(raw[rest:])
    return digest.hexdigest()


def copy_part(to, of, start, end):
    to[start:end].copy_(of[start:end])


def drawn_tensors(data):
    """Of all types; some are transposed, some begin between two words of their storage."""
    tensors = []
    for size in data.draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)):
        dtype, form = (
            data.draw(st.sampled_from(DTYPES)),
            data.draw(st.sampled_from(["flat", "turned", "late"])),
        )
        flat = random_bits((size // torch.empty(0, dtype=dtype).element_size() + 3,), dtype, seed=size)
        turned = flat[: len(flat) // 2 * 2].view(2, -1).t()
        tensors.append({"flat": flat, "turned": turned, "late": flat[1:]}[form])
    return tensors


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_digest_is_that_of_plain_integers_taken_alone_or_while_copying(data):
    tensors = drawn_tensors(data)
    alone, copying, into = Proof(), Proof(), []
    for tensor in tensors:
        alone.add(tensor)
        source = bytes_of(tensor.contiguous())
        into.append(target := torch.zeros_like(source).view(tensor.dtype))
        copying.add_while(partial(copy_part, bytes_of(target), source), target)
    assert alone.digest() == copying.digest() == digest_of(tensors)
    for target, tensor in zip(into, tensors, strict=True):
        assert torch.equal(bytes_of(target), bytes_of(tensor.contiguous()))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_flipped_bit_in_the_store_is_told_at_the_restore(data):
    tensors = [t for t in drawn_tensors(data) if t.dtype is not torch.bool] or [torch.ones(5)]
    parameters, store = [torch.nn.Parameter(torch.ones(2))], MemoryStore()
    snapshot = Snapshot(store, parameters, [], tensors, with_random=False)
    before = [bytes_of(t.contiguous()).clone() for t in tensors]
    for tensor in tensors:
        bytes_of(tensor.contiguous()).zero_()
    snapshot.restore()
    assert all(torch.equal(bytes_of(t.contiguous()), b) for t, b in zip(tensors, before, strict=True))
    copy = data.draw(st.sampled_from(store._copies))
    victim = copy.untyped_storage()  # of the copy alone
    place = data.draw(st.integers(0, copy.numel() * copy.element_size() - 1))
    victim[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(EnvironmentFault, match="differs"):
        snapshot.restore()


@pytest.mark.parametrize(
    "distance", [1, ROW_WORDS, ROW_WORDS * module.CHUNK_ROWS], ids=["row", "column", "chunk"]
)
def test_two_changes_that_cancel_in_a_sum_are_seen(distance):
    words = random_bits((2 * ROW_WORDS * module.CHUNK_ROWS + 5,), torch.int64)
    before, after = Proof(), Proof()
    before.add(words)
    words[7] += 1
    words[7 + distance] -= 1
    after.add(words)
    assert before.digest() != after.digest()


def test_both_stores_prove_the_same(tmp_path):
    tensors = [random_bits((300, 70), torch.float32).t(), random_bits((9_001,), torch.bfloat16, seed=1)]
    expected, found = digest_of(tensors), []
    for store in (MemoryStore(), DiskStore(tmp_path)):
        for work in (store.save, store.load_into):
            work(tensors, proof := Proof())
            found.append(proof.digest())
        store.close()
    assert found == [expected] * 4
