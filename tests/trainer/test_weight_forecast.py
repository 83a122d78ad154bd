import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.trainer.small_job import small_job
from trainer_node import weight_forecast
from trainer_node.weight_forecast import forecaster_shapes, read_forecaster

G, J, H = 3, 4, 8


def tensors(*, seed=0, groups=G, **changed):
    random = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(s, generator=random) for n, s in forecaster_shapes(groups, J, H).items()}
    for name in ("spacing", "group_scale", "group_size", "gain", "limit"):
        found[name] = found[name].abs() + 0.1
    return {**found, **changed}


def reader(table, groups=G):
    return read_forecaster(save(table), num_groups=groups, num_differences=J)


def twin_of_one_weight(table, group, weight, differences):
    """The formula of the module's docstring, one weight at a time, in float64."""
    t = {name: value.double().numpy() for name, value in table.items()}
    v = t["spacing"] * np.array(differences)
    floor = t["group_scale"][group]
    s = np.sqrt((v**2).mean() + (0.1 * floor) ** 2)
    x = np.append(v / s, np.arcsinh(weight / t["group_size"][group]))
    sign = -1.0 if v[0] < 0 else 1.0
    u = np.append(sign * x, np.clip(np.log(s / floor), -6, 6))
    u = np.maximum(t["bias"][group] + t["inner"] @ u, 0)
    u = np.maximum(t["hidden_bias"] + t["hidden"] @ u, 0)
    y = t["skip"][group] @ x + sign * (t["head"] @ u)
    return t["gain"] * s * t["limit"] * np.tanh(y / t["limit"])


def past_of(shape, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random), [torch.randn(shape, generator=random) for _ in range(J)]


@pytest.mark.parametrize("group", range(G))
def test_every_weight_gets_what_the_formula_says(group):
    table = tensors()
    weights, differences = past_of((5, 4))
    found = reader(table).displacement(group, weights, differences)
    assert found.shape == weights.shape
    for place in np.ndindex(5, 4):
        past = [float(d[place]) for d in differences]
        wanted = twin_of_one_weight(table, group, float(weights[place]), past)
        assert float(found[place]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_linear_coefficients_per_group_are_the_special_case_of_a_linear_phi():
    coefficients_GJ = torch.randn(G, J, generator=torch.Generator().manual_seed(5))
    skip_GI = torch.cat([coefficients_GJ, torch.zeros(G, 1)], dim=1)
    table = tensors(
        skip=skip_GI, head=torch.zeros(H), spacing=torch.ones(J), gain=torch.tensor(1.0),
        limit=torch.tensor(1e4),
    )  # fmt: skip
    weights, differences = past_of((30,))
    for group in range(G):
        wanted = sum(c * d for c, d in zip(coefficients_GJ[group], differences, strict=True))
        torch.testing.assert_close(reader(table).displacement(group, weights, differences), wanted)


def test_no_weight_moves_further_than_the_soft_limit():
    table = tensors(skip=torch.full((G, J + 1), 1e6))
    weights, differences = past_of((200,))
    found = reader(table).displacement(0, weights, differences)
    velocity = torch.stack(differences) * table["spacing"][:, None]
    scale = (velocity.square().mean(0) + (0.1 * table["group_scale"][0]) ** 2).sqrt()
    bound = table["gain"] * table["limit"] * scale
    assert (found.abs() <= bound * (1 + 1e-5)).all()
    assert (found.abs() >= 0.99 * bound).float().mean() > 0.9


def test_a_mirror_image_has_the_mirrored_fate():
    weights, differences = past_of((50,))
    forecaster = reader(tensors())
    mirrored = forecaster.displacement(1, -weights, [-d for d in differences])
    torch.testing.assert_close(mirrored, -forecaster.displacement(1, weights, differences))


def test_the_size_of_the_chunks_does_not_matter(monkeypatch):
    weights, differences = past_of((10, 10))
    whole = reader(tensors()).displacement(0, weights, differences)
    monkeypatch.setattr(weight_forecast, "CHUNK_WEIGHTS", 7)
    torch.testing.assert_close(reader(tensors()).displacement(0, weights, differences), whole)


BAD = {
    "empty": b"",
    "no safetensors": b"x" * 100,
    "too big": save({n: torch.ones(s) for n, s in forecaster_shapes(G, J, 190).items()}),
    "nothing in it": save({}),
    "no hidden units": save({n: torch.ones(s) for n, s in forecaster_shapes(G, J, 0).items()}),
    "another number of groups": save(tensors(groups=G + 1)),
    "a name too many": save(tensors(extra=torch.zeros(1))),
    "a shape": save(tensors(hidden=torch.zeros(H, H + 1))),
    "a dtype": save(tensors(head=torch.zeros(H, dtype=torch.float64))),
    "not finite": save(tensors(bias=torch.full((G, H), float("nan")))),
    "infinite": save(tensors(gain=torch.tensor(float("inf")))),
    "zero scale": save(tensors(group_scale=torch.zeros(G))),
    "zero limit": save(tensors(limit=torch.tensor(0.0))),
    "negative size": save(tensors(group_size=torch.full((G,), -1.0))),
    "negative spacing": save(tensors(spacing=torch.full((J,), -1.0))),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_applied_is_refused_when_it_is_read(case):
    with pytest.raises(ValueError):
        read_forecaster(BAD[case], num_groups=G, num_differences=J)


def ready_job(windows, **basis):
    job = small_job(history_snapshots=J + 1, history_sample=16, **basis)
    for _ in range(windows):
        job.window()
    groups = len(job.groups)
    return job, reader(tensors(groups=groups), groups)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_basis_forecasts_every_parameter_once_and_moves_nothing(dtype):
    job, forecaster = ready_job(J, dtype=dtype)
    before = job.state()
    found = dict(job.basis.forecast_displacements(forecaster))
    assert job.state() == before
    assert sorted(found) == list(range(len(job.basis.parameters)))
    for index, delta in found.items():
        group, average = job.basis.group_of[index], job.basis.average(index)
        wanted = forecaster.displacement(group, average, job.basis.history.differences(index))
        pull_back = float(forecaster.pull_back_G[group])
        wanted += pull_back * job.basis.averages.pull_back(index)
        torch.testing.assert_close(delta, wanted)
        assert delta.shape == job.basis.parameters[index].shape
        assert bool(delta.any())


@pytest.mark.parametrize("windows", [0, J - 1])
def test_a_basis_with_too_short_a_past_forecasts_nothing(windows):
    job, forecaster = ready_job(windows)
    with pytest.raises(ValueError, match="snapshots"):
        next(job.basis.forecast_displacements(forecaster))


def test_a_basis_that_holds_no_past_forecasts_nothing():
    with pytest.raises(ValueError, match="snapshots"):
        next(small_job().basis.forecast_displacements(reader(tensors())))
