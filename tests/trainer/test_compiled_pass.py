"""The compiled pass: one graph for any length, as near to the reference as it says, never compiled late."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from tests.trainer.test_delta import ready_job
from tests.trainer.test_fused_apply import COEFFICIENTS, scene
from trainer_node import compiled_pass, fused_apply
from trainer_node import delta as delta_module
from trainer_node.delta import apply_delta, compile_pass, linear_deltas, move
from trainer_node.fused_apply import Difference, Sample

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1.0 / 128}


@pytest.fixture
def captured(monkeypatch):
    """Counts compilings with a backend that compiles nothing; tests/bench and tests/gpu have the kernel.

    A pass that was not prepared for is an error here; in a run it is slow.
    """
    torch.compiler.reset()
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    kernel = torch.compile(compiled_pass._expression, backend=backend, dynamic=True, fullgraph=True)
    monkeypatch.setattr(compiled_pass, "_compiled", lambda _: kernel)
    monkeypatch.setattr(compiled_pass, "WHERE_NOT_PREPARED", "fail_on_recompile")
    yield found
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_prepared_pass_moves_as_the_reference_and_is_compiled_once_for_any_length(captured, dtype) -> None:
    compiled_pass.prepare((made := scene((3,), dtype)).weights, made.directions, along=[made.average])
    for length in (5_000, 9_001):
        ours, wide = scene((length,), dtype), scene((length,), dtype)
        exact = scene((length,), dtype)
        for name in ("weights", "average"):
            setattr(exact, name, getattr(wide, name).double())
        momentum, drift, slow, _ = wide.directions
        assert isinstance(drift, Difference)
        assert isinstance(momentum, Tensor)
        assert isinstance(slow, Tensor)
        exact.directions = [
            momentum.double(),
            Difference(exact.average, drift.subtrahend.double()),
            slow.double(),
            Difference(exact.average, exact.weights),
        ]
        sample = Sample(torch.arange(0, length, 7), torch.zeros(math.ceil(length / 7), dtype=dtype))
        before = ours.weights.clone()
        square = compiled_pass.move_along(
            ours.weights, ours.directions, COEFFICIENTS, along=[ours.average], sample=sample
        )
        expected = fused_apply.reference(exact.weights, exact.directions, COEFFICIENTS, along=[exact.average])
        near = TOLERANCE[dtype]
        for mine, theirs in ((ours.weights, exact.weights), (ours.average, exact.average)):
            torch.testing.assert_close(mine.double(), theirs, rtol=near, atol=8 * near)
        torch.testing.assert_close(
            (before[::7] + sample.values).double(), ours.weights[::7].double(), rtol=2 * near, atol=8 * near
        )
        torch.testing.assert_close(square.double(), expected.double(), rtol=max(near, 1e-5), atol=0.0)
    assert len(captured) == 1


def test_preparing_touches_no_tensor(captured) -> None:
    made = scene((5_000,))
    before = made.weights.clone(), made.average.clone()
    compiled_pass.prepare(made.weights, made.directions, along=[made.average])
    assert torch.equal(made.weights, before[0])
    assert torch.equal(made.average, before[1])


@pytest.mark.parametrize(
    ("weights", "dtype", "momentum"),
    [
        (torch.float32, "fp32", 0.25),
        (torch.float32, "fp32", 0.0),
        (torch.float64, "fp32", 0.25),
        (torch.bfloat16, "bf16", 0.25),
    ],
)
def test_a_jump_after_compile_pass_compiles_nothing_and_is_near_that_of_whole_deltas(
    captured, monkeypatch, weights, dtype, momentum
) -> None:
    monkeypatch.setattr(delta_module, "SMALLEST_ONE_PASS", 5)
    jobs = [ready_job(weights=weights, dtype=dtype) for _ in range(2)]
    compile_pass(jobs[0].basis)
    assert jobs[0].basis.has_compiled_pass
    count = len(captured)
    assert count > 0
    coefficients = torch.tensor([[momentum, 0.5, 0.0, -0.3]] * len(jobs[0].groups))
    coefficients[1] = 0.0
    still = [p.detach().clone() for p in jobs[0].groups[1].parameters]
    applied = apply_delta(jobs[0].basis, coefficients)
    expected = move(jobs[1].basis, linear_deltas(jobs[1].basis, coefficients))
    assert len(captured) == count
    near = max(TOLERANCE[weights], TOLERANCE[torch.bfloat16] if dtype == "bf16" else 0.0)
    for mine, theirs in zip(jobs[0].basis.parameters, jobs[1].basis.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2 * near, atol=2 * near)
    torch.testing.assert_close(applied.sample_Gm, expected.sample_Gm, rtol=2 * near, atol=2 * near)
    assert applied.norm == pytest.approx(expected.norm, rel=max(1e-5, 2 * near))
    assert applied.norm > 0.0
    assert all(torch.equal(p, s) for p, s in zip(jobs[0].groups[1].parameters, still, strict=True))


def test_without_a_compiler_one_line_is_logged_and_every_bit_is_as_without_compiling(
    monkeypatch, caplog
) -> None:
    def nothing(*_, **__):
        raise RuntimeError("no working C++ compiler found\nand more")

    monkeypatch.setattr(compiled_pass, "_compiled", lambda _: nothing)
    monkeypatch.setattr(delta_module, "SMALLEST_ONE_PASS", 5)
    jobs = [ready_job() for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        compile_pass(jobs[0].basis)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["jumps are not compiled: no working C++ compiler found"]
    for job in jobs:
        apply_delta(job.basis, torch.full((len(job.groups), 4), 0.3))
    assert jobs[0].state() == jobs[1].state()
