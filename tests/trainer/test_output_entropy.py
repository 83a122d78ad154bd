"""The entropy of the output against its cross entropy: equal to a slow twin, and what each sign means."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Evaluation, HealthSample
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node.checkpoint import Checkpoints
from trainer_node.data import Batch
from trainer_node.housekeeping import Housekeeping
from trainer_node.output_entropy import CHUNK_PLACES, MAX_PLACES, measure_output, output_entropy


def logits_of(seed: int, places: int, classes: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(places, classes, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 7, CHUNK_PLACES, CHUNK_PLACES + 1, 700]), st.integers(2, 40)
)
def test_it_equals_the_slow_twin(seed: int, places: int, classes: int) -> None:
    logits = logits_of(seed, places, classes)
    targets = torch.randint(classes, (places,), generator=torch.Generator().manual_seed(seed))
    found = output_entropy(logits, targets)
    shares = logits.double().softmax(-1)
    each = torch.distributions.Categorical(probs=shares).entropy().mean().item()
    of_mean = torch.distributions.Categorical(probs=shares.mean(0)).entropy().item()
    assert found.entropy == pytest.approx(each, abs=1e-4)
    assert found.cross_entropy == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-4)
    assert found.information == pytest.approx(of_mean - each, abs=1e-4)


def test_of_a_model_that_is_as_sure_as_it_may_be_both_are_equal() -> None:
    logits = logits_of(0, 20_000, 12)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    found = output_entropy(logits, targets)
    assert found.entropy == pytest.approx(found.cross_entropy, rel=0.03)
    overconfident = output_entropy(4 * logits, targets)
    assert overconfident.entropy < 0.5 * overconfident.cross_entropy


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300))
def test_an_output_that_is_always_the_same_tells_nothing(seed: int, places: int) -> None:
    logits = logits_of(seed, 1, 9).expand(places, 9)
    found = output_entropy(logits, torch.zeros(places, dtype=torch.int64))
    assert found.information == pytest.approx(0.0, abs=1e-5)


def test_impossible_classes_and_places_without_a_target_are_no_trouble() -> None:
    logits = torch.tensor([[0.0, -math.inf], [0.0, 0.0], [5.0, 1.0]])
    found = output_entropy(logits, torch.tensor([0, 1, -100]))
    assert found.entropy == pytest.approx(math.log(2) / 2)
    assert found.cross_entropy == pytest.approx(math.log(2) / 2)


def metrics_of(preset_task: str, tmp_path) -> tuple[dict[str, float | None], float]:
    links = ScriptedLinks()
    checkpoints = Checkpoints(tmp_path, keep=1, on_failure=pytest.fail)
    loop = tiny_loop(links, tiny_settings(f"trainer.task={preset_task}", "predictor.enabled=false"))
    before, random_before = weights_of(loop), torch.get_rng_state()
    loop.task.model.train()
    Housekeeping(links.emit, checkpoints).evaluate(loop)
    checkpoints.close()
    assert loop.task.model.training
    assert same_bits(before, weights_of(loop))
    assert torch.equal(random_before, torch.get_rng_state())
    (sample,), (evaluation,) = links.of(HealthSample), links.of(Evaluation)
    return {metric.name: metric.value for metric in sample.metrics}, evaluation.loss


def test_an_evaluation_tells_of_the_output_and_of_the_disk(tmp_path) -> None:
    metrics, loss = metrics_of("digits", tmp_path)
    assert metrics["output_cross_entropy"] == pytest.approx(loss, rel=1e-5)  # the one batch there is
    assert 0 < metrics["output_entropy"] <= math.log(10) + 1e-6
    assert metrics["disk_free_bytes"] is None  # unknown before a checkpoint, and said so
    assert metrics["skipped_steps"] == 0


def test_a_task_without_classes_has_no_entropy(tmp_path) -> None:
    metrics, _ = metrics_of("regression", tmp_path)
    assert not [name for name in metrics if name.startswith("output")]


def test_where_memory_runs_out_there_is_no_figure_and_training_goes_on() -> None:
    loop = tiny_loop(ScriptedLinks(), tiny_settings("predictor.enabled=false"))

    def too_much(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    loop.task.model.train()
    options = {"max_items": None, "is_compiled": False}
    batch = loop.task.validation[0]
    assert measure_output(replace(loop.task, logits=too_much), batch, nullcontext, **options) is None
    assert loop.task.model.training


def test_no_more_places_are_formed_than_promised() -> None:
    loop = tiny_loop(ScriptedLinks(), tiny_settings("predictor.enabled=false"))
    sizes: list[int] = []

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs))
        return torch.zeros(len(inputs), 3, 5)

    batch = Batch(torch.zeros(900, 3), torch.zeros(900, 3, dtype=torch.int64))
    for max_items in (None, 7):
        task = replace(loop.task, logits=logits)
        measure_output(task, batch, nullcontext, max_items=max_items, is_compiled=False)
    assert sizes == [MAX_PLACES // 3, 7]
