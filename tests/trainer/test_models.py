import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from common.config import load_settings
from common.settings import ModelSettings
from trainer_node.corpus import Document
from trainer_node.groups import parameter_groups
from trainer_node.model.cnn import DigitsCNN
from trainer_node.model.gpt import GPT, rotary_table, rotate
from trainer_node.sample import generate
from trainer_node.tokens import train_tokenizer

SMALL = {"layers": 3, "heads": 2, "width": 16, "context_tokens": 12, "vocabulary_size": 300}


def small_gpt(**changes) -> GPT:
    """With random output matrices, so that blocks act as in a trained model."""
    torch.manual_seed(0)
    model = GPT(ModelSettings(**{**SMALL, **changes}))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.normal_(std=0.02)
            block.mlp.down.weight.normal_(std=0.02)
    return model


def random_tokens(shape, vocabulary_size=300):
    return torch.randint(vocabulary_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("vocabulary_size", [300, 5000])
def test_first_loss_is_the_logarithm_of_the_vocabulary(vocabulary_size, tied_head):
    torch.manual_seed(0)
    model = GPT(ModelSettings(**{**SMALL, "vocabulary_size": vocabulary_size, "tied_head": tied_head}))
    tokens = random_tokens((8, 13), vocabulary_size)
    loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss == pytest.approx(math.log(vocabulary_size), rel=0.02)


def test_loss_is_the_mean_cross_entropy_of_the_logits():
    model, tokens = small_gpt(), random_tokens((2, 13))
    logits = model(tokens[:, :-1])
    assert logits.shape == (2, 12, 300)
    assert logits.dtype == torch.float32
    expected = F.cross_entropy(logits.reshape(-1, 300), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), expected)


def test_a_token_changes_no_logit_before_it_and_some_at_it():
    model, tokens = small_gpt(), random_tokens((1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 300
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_attention_knows_the_order_of_earlier_tokens():
    # One layer: without positions its last token would see a set of earlier tokens.
    model, tokens = small_gpt(layers=1), random_tokens((1, 12))
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1])


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance_only():
    rotary = rotary_table(32, 8)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    queries, keys = (rotate(vector.expand(1, 1, 32, 8), rotary)[0, 0] for vector in (query, key))
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(32))
    products = queries @ keys.T
    torch.testing.assert_close(products[5:, 5:], products[:-5, :-5])


def test_odd_head_width_runs():
    assert small_gpt(width=6, heads=2)(random_tokens((1, 4))).shape == (1, 4, 300)


def test_dropout_acts_in_training_only():
    model, tokens = small_gpt(dropout=0.5), random_tokens((1, 12))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_gpt_parameters_fall_into_the_named_groups():
    names = {group.name for group in parameter_groups(small_gpt())}
    thirds = ("early", "middle", "late")
    kinds = {f"{kind}.{third}" for kind in ("attention", "mlp", "norm") for third in thirds}
    assert names == kinds | {"embedding", "head", "norm"}


def test_every_parameter_gets_a_gradient_after_the_first_step():
    for model, inputs, targets in (
        (small_gpt(), random_tokens((4, 12)), random_tokens((4, 12))),
        (DigitsCNN(ModelSettings()), torch.rand(4, 1, 8, 8), torch.arange(4)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # the zero output matrices hide the others from the first
            optimizer.zero_grad()
            model(inputs, targets).backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gpt2_small_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(load_settings(preset="gpt2-small").trainer.model)
    count = sum(p.numel() for p in model.parameters())
    assert 123e6 < count < 125e6


def test_cnn_is_small_has_no_running_statistics_and_ten_classes():
    model = DigitsCNN(ModelSettings(channels=16))
    assert sum(p.numel() for p in model.parameters()) == 14_378
    assert not list(model.buffers())
    images = torch.rand(5, 1, 8, 8)
    assert model(images).shape == (5, 10)
    assert model(images, torch.zeros(5, dtype=torch.int64)).item() == pytest.approx(math.log(10), rel=0.1)


def tokenizer() -> Tokenizer:
    return train_tokenizer([Document(name="a", text=b"for x in range(10): print(x)\n" * 5)], 280)


def test_sampling_is_the_same_for_a_seed_and_differs_between_seeds():
    model = small_gpt()
    texts = [generate(model, tokenizer(), "for", max_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("for") for text in texts)


def test_sampling_goes_beyond_the_context_and_starts_from_nothing():
    assert len(generate(small_gpt(), tokenizer(), "", max_tokens=40, top_k=0, seed=1)) > 12


def test_temperature_zero_takes_the_likeliest_token_of_the_real_vocabulary():
    model, words = small_gpt(), tokenizer()
    with torch.no_grad():
        model.head.weight.zero_()
        model.final_norm.weight.fill_(1.0)
        # Whatever the sign of the stream, one row of each pair wins; 298 and 299 are no entries.
        for row, weight in (("y", 1.0), ("z", -1.0)):
            model.head.weight[words.token_to_id(row)] = weight
        model.head.weight[298], model.head.weight[299] = 100.0, -100.0
    assert words.get_vocab_size() < 298
    first = generate(model, words, "x", max_tokens=3, temperature=0.0, seed=1)
    assert first == generate(model, words, "x", max_tokens=3, temperature=0.0, seed=2)
    assert len(first) == 4
    assert set(first[1:]) <= {"y", "z"}


def test_sampling_leaves_the_model_in_its_mode():
    model = small_gpt().train()
    generate(model, tokenizer(), "x", max_tokens=1)
    assert model.training
