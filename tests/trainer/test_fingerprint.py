import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.references import fingerprint_of
from trainer_node import fingerprint as module
from trainer_node.fingerprint import fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def random_bits(shape, dtype, *, seed=0):
    """Any bit pattern, NaN and infinity included."""
    width = torch.empty(0, dtype=dtype).element_size()
    random = torch.Generator().manual_seed(seed)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(high, (*shape, width), dtype=torch.uint8, generator=random)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fingerprint_equals_the_slow_twin(dtype):
    tensors = [random_bits((3, 5), dtype), random_bits((), dtype, seed=1), torch.zeros(0, dtype=dtype)]
    arrays = [t.view(torch.int16).numpy() if dtype is torch.bfloat16 else t.numpy() for t in tensors]
    assert fingerprint(tensors) == fingerprint_of(arrays)


def test_fingerprint_equals_the_slow_twin_across_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_WORDS", 7)
    tensor = random_bits((50,), torch.float64)
    assert fingerprint([tensor]) == fingerprint_of([tensor.numpy()])


CHUNK = module._CHUNK_BLOCKS * module._BLOCK_WORDS


@pytest.mark.parametrize("size", [0, 1, module._BLOCK_WORDS, CHUNK - 1, CHUNK, 2 * CHUNK + 1025])
@pytest.mark.parametrize("word", [None, -(1 << 31), (1 << 31) - 1], ids=["any", "lowest", "highest"])
def test_the_sums_on_the_host_are_those_of_a_gpu_also_at_the_ends_of_the_range(size, word):
    """In float64 a sum is exact below 2^53 only: the largest words must not reach that."""
    words = random_bits((size,), torch.float32, seed=size).view(torch.int32)
    if word is not None:
        words.fill_(word)
    assert torch.equal(torch.from_numpy(module._host_sums(words.numpy())), module._word_sums(words))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_flipped_bit_anywhere_changes_the_fingerprint(data):
    dtype = data.draw(st.sampled_from(DTYPES[:-1]))
    tensors = [random_bits((n,), dtype, seed=n) for n in data.draw(st.lists(st.integers(1, 40), min_size=1))]
    before = fingerprint(tensors)
    victim = data.draw(st.sampled_from(tensors)).view(torch.uint8)
    place = data.draw(st.integers(0, victim.numel() - 1))
    victim[place] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint(tensors) != before


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(DTYPES))
def test_equal_bits_give_equal_text_on_non_contiguous_views(rows, columns, dtype):
    square = random_bits((2 * rows, 3 * columns), dtype)
    for view in (square.t(), square[::2, ::3], square[:, 1:], square.t()[1:]):
        assert fingerprint([view]) == fingerprint([view.clone(memory_format=torch.contiguous_format)])


def test_swapped_weights_and_swapped_tensors_change_the_fingerprint():
    one, two = torch.arange(6.0), torch.arange(6.0).flip(0)
    assert len({fingerprint([one, two]), fingerprint([two, one]), fingerprint([one, one])}) == 3


def test_zero_and_minus_zero_differ():
    assert fingerprint([torch.zeros(3)]) != fingerprint([-torch.zeros(3)])


def test_sums_beyond_64_bits_wrap_as_the_law_says():
    huge = torch.full((9,), -(1 << 63), dtype=torch.int64)
    assert fingerprint([huge]) == fingerprint_of([huge.numpy()])


def test_the_text_is_16_hex_digits_also_for_no_tensor():
    for tensors in ([], [torch.zeros(3)]):
        text = fingerprint(iter(tensors))
        assert len(text) == 16
        assert set(text) <= set("0123456789abcdef")


def test_reading_leaves_the_tensor_and_its_gradient_alone():
    weight = torch.nn.Parameter(torch.from_numpy(np.arange(4.0)))
    before = weight.detach().clone()
    fingerprint([weight])
    assert torch.equal(weight, before)
    assert weight.grad is None
