import sys

import pytest
import torch
from torch import nn

from common.errors import SettingsError
from common.settings import OptimizerSettings
from tests.trainer.small_optim import CPU, EVERY_OPTIMIZER, TINY, routed, tiny_gpt
from tests.trainer.tiny import tiny_settings
from trainer_node.assembly import prepare_task
from trainer_node.model.cnn import DigitsCNN
from trainer_node.optim import build
from trainer_node.optim.build import build_optimizers, set_rates


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
@pytest.mark.parametrize(
    "model", [tiny_gpt(), tiny_gpt(tied_head=True), DigitsCNN(TINY)], ids=["gpt", "tied", "cnn"]
)
def test_every_parameter_is_in_exactly_one_group(model, name):
    optimizers = build_optimizers(model, OptimizerSettings(name=name), CPU)
    placed = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(model.parameters())


def test_muon_takes_hidden_matrices_and_neither_embedding_nor_head_nor_norms():
    model = tiny_gpt()
    optimizers = build_optimizers(model, OptimizerSettings(name="muon"), CPU)
    assert routed(optimizers, torch.optim.Muon) == {
        p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2
    }


def test_convolutions_go_to_adamw():
    optimizers = build_optimizers(DigitsCNN(TINY), OptimizerSettings(name="muon"), CPU)
    assert [type(o) for o in optimizers] == [torch.optim.AdamW]


def test_frozen_parameters_belong_to_no_optimizer():
    model = tiny_gpt()
    model.embedding.weight.requires_grad_(False)
    optimizers = build_optimizers(model, OptimizerSettings(), CPU)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert all(p is not model.embedding.weight for group in groups for p in group["params"])


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_decay_acts_on_tensors_of_two_dimensions_and_more_only(name):
    optimizers = build_optimizers(tiny_gpt(), OptimizerSettings(name=name, weight_decay=0.3), CPU)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            wanted = {0.3 if p.ndim >= 2 else 0.0 for p in group["params"]}
            assert wanted == {group["weight_decay"]}


def test_set_rates_scales_the_peak_and_never_the_last_rate():
    optimizers = build_optimizers(tiny_gpt(), OptimizerSettings(rate=0.01, muon_rate=0.5), CPU)
    for factor in (0.5, 0.1):
        set_rates(optimizers, factor)
    rates = {type(o).__name__: {group["lr"] for group in o.param_groups} for o in optimizers}
    assert rates == {"Muon": {0.05}, "AdamW": {0.001}}


def test_a_rate_that_is_a_tensor_is_filled_and_not_replaced():
    """A compiled step, or one in a CUDA graph, goes on reading the tensor it was made with."""
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=rate)
    (group,) = optimizer.param_groups
    group["peak_rate"] = 0.5
    set_rates([optimizer], 0.5)
    assert group["lr"] is rate
    assert rate.item() == 0.25


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.0, False)])
def test_sgd_is_nesterovs_wherever_it_has_a_momentum(momentum, nesterov):
    (optimizer,) = build_optimizers(tiny_gpt(), OptimizerSettings(name="sgd", beta1=momentum), CPU)
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(momentum, nesterov)}


@pytest.mark.parametrize(("name", "library"), build.LIBRARIES.items())
def test_an_optimizer_without_its_library_is_a_mistake_in_the_settings_that_names_the_cure(
    name, library, monkeypatch
):
    words = rf"{name} needs the library {library}: pip install 'hybrid-predict-trainer\[optimizers\]'"
    monkeypatch.setattr(build, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=words):  # before a run folder is written
        prepare_task(tiny_settings(f"trainer.optimizer.name={name}").trainer)
    for module in (library, f"{library}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError, match=words):
        build_optimizers(tiny_gpt(), OptimizerSettings(name=name), CPU)
