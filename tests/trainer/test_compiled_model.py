"""The GPT compiles as one graph, with the names and the loss it had: what `trainer.compile` relies on.

Captured with a backend that runs the graph as it is; the kernels themselves need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common.settings import ModelSettings
from tests.trainer.tiny import tiny_settings
from trainer_node import tasks
from trainer_node.model.gpt import GPT


def small_gpt(document_token: int | None = None, **options: object) -> GPT:
    torch.manual_seed(0)
    shape = {"layers": 2, "heads": 2, "width": 16, "context_tokens": 8, "vocabulary_size": 257}
    return GPT(ModelSettings(**{**shape, **options}), document_token)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tied_head", "document_token"), [(False, None), (True, None), (False, 0)])
def test_the_model_is_one_graph_with_the_same_names_loss_and_gradients(
    tied_head: bool, document_token: int | None
) -> None:
    plain, compiled = (small_gpt(document_token, tied_head=tied_head) for _ in range(2))
    names = [name for name, _ in compiled.named_parameters()]
    compiled.compile(backend="eager", fullgraph=True)  # raises at a break
    tokens = torch.randint(0, 257, (3, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for model in (plain, compiled):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.detach())
    assert [name for name, _ in compiled.named_parameters()] == names
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert torch.equal(*losses)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("switch", [(), ("trainer.controls.context=true",)])
def test_a_shape_that_controls_bring_leaves_the_kernels_of_the_first_shape(switch, monkeypatch) -> None:
    """Or a trial that was set back would leave other digits. Without controls torch decides, as it did."""
    calls: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        number = len(calls)
        calls.append(0)

        def called(*arguments: object) -> object:
            calls[number] += 1
            return graph.forward(*arguments)

        return called

    torch._dynamo.reset()
    model = small_gpt()
    with_kernels = model.compile
    monkeypatch.setattr(model, "compile", lambda **options: with_kernels(backend=count, **options))
    settings = tiny_settings("trainer.compile=true", *switch).trainer
    tasks._compiled(model, settings, torch.device("cuda"))
    for shape in ((3, 8), (3, 8), (6, 4), (3, 8), (12, 2), (3, 8)):
        model(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64))
    assert calls[0] == (4 if switch else 2)
    assert sum(calls) == 6
