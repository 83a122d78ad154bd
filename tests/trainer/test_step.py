import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.small_job import bits, small_job
from trainer_node.groups import parameter_groups
from trainer_node.step import autocast, gradient_norms, mean_loss, train_step


class Linear(nn.Module):
    """Without dropout, so that gradients can be compared."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, batch):
        inputs, targets = batch
        return nn.functional.cross_entropy(self.head(inputs), targets)


def linear(seed=0):
    torch.manual_seed(seed)
    return Linear()


def batches_of(count, size=8):
    random = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 6, generator=random) * 3, torch.randint(3, (size,), generator=random))
        for _ in range(count)
    ]


def one_step(model, batches, *, clip_norm=0.0, rate=0.1, **options):
    groups = parameter_groups(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return train_step(model, model, batches, [optimizer], groups, clip_norm=clip_norm, **options)


def test_micro_batches_are_one_big_batch():
    split, whole = linear(), linear()
    batches = batches_of(4)
    merged = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    left, right = one_step(split, batches), one_step(whole, [merged])
    torch.testing.assert_close(left.loss, right.loss)
    torch.testing.assert_close(left.gradient_norms_G, right.gradient_norms_G)
    torch.testing.assert_close(split.head.weight, whole.head.weight)


def test_clipping_equals_torchs_own():
    mine, torchs = linear(), linear()
    batch = batches_of(1)
    norms = one_step(mine, batch, clip_norm=0.3)
    torchs(batch[0]).backward()
    total = nn.utils.clip_grad_norm_(torchs.parameters(), 0.3)
    torch.optim.SGD(torchs.parameters(), lr=0.1).step()
    assert total > 0.3
    assert bits(mine.head.weight) == bits(torchs.head.weight)
    torch.testing.assert_close(norms.gradient_norms_G.norm(), total)
    torch.testing.assert_close(norms.clip_scale, 0.3 / (total + 1e-6))


@pytest.mark.parametrize("clip_norm", [0.0, 1e6])
def test_a_gradient_that_need_not_be_clipped_is_not_touched(clip_norm):
    clipped, plain = linear(), linear()
    tensors = one_step(clipped, batches_of(1), clip_norm=clip_norm)
    plain(batches_of(1)[0]).backward()
    assert tensors.clip_scale.item() == 1.0
    assert bits(clipped.head.weight.grad) == bits(plain.head.weight.grad)


def test_norms_are_of_the_gradient_before_clipping_and_zero_for_a_group_without_one():
    model = linear()
    groups = parameter_groups(model)
    tensors = one_step(model, batches_of(1), clip_norm=1e-3)
    reference = linear()
    reference(batches_of(1)[0]).backward()
    wanted = torch.cat([p.grad.reshape(-1) for p in reference.head.parameters()]).double().norm()
    found = dict(zip([g.name for g in groups], tensors.gradient_norms_G.tolist(), strict=True))
    assert found["head"] == pytest.approx(wanted.item(), rel=1e-6)
    assert found["other"] == 0.0
    assert gradient_norms(groups).max() < 2e-3  # after clipping


def test_gradients_of_the_former_step_are_forgotten():
    twice, once = linear(), linear()
    one_step(twice, batches_of(1), rate=0.0)
    one_step(twice, batches_of(1), rate=0.0)
    one_step(once, batches_of(1), rate=0.0)
    assert bits(twice.head.weight.grad) == bits(once.head.weight.grad)


def test_the_loss_is_the_mean_over_micro_batches():
    model, batches = linear(), batches_of(3)
    wanted = sum(model(batch).item() for batch in batches) / 3
    assert one_step(model, batches).loss.item() == pytest.approx(wanted, rel=1e-6)


def test_forward_runs_in_the_context_and_backward_outside_of_it():
    inside, seen = [False], []

    @contextmanager
    def context():
        inside[0] = True
        yield
        inside[0] = False

    model = linear()
    model.head.weight.register_hook(lambda _: seen.append(("backward", inside[0])))
    model.head.register_forward_hook(lambda *_: seen.append(("forward", inside[0])))
    one_step(model, batches_of(2), context=context)
    assert seen == [("forward", True), ("backward", False)] * 2


def test_bf16_autocast_computes_in_bfloat16_and_returns_a_float32_loss():
    model, dtypes = linear(), []
    model.head.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    cpu = torch.device("cpu")
    loss = one_step(model, batches_of(1), context=lambda: autocast(cpu, "bf16")).loss
    one_step(model, batches_of(1), context=lambda: autocast(cpu, "fp32"))
    assert dtypes == [torch.bfloat16, torch.float32]
    assert loss.dtype == model.head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("was_training", [True, False])
def test_measuring_a_loss_changes_no_bit_of_training(was_training):
    job = small_job()
    job.step()
    job.model.train(was_training)
    gradients = [bits(p.grad) for p in job.basis.parameters]
    before = job.state()
    loss = mean_loss(job.model, job.loss_of, [job.batch(1), job.batch(2)])
    assert job.state() == before
    assert [bits(p.grad) for p in job.basis.parameters] == gradients
    assert job.model.training is was_training
    job.model.eval()
    wanted = [job.loss_of(job.batch(i)).item() for i in (1, 2)]
    assert loss == pytest.approx(sum(wanted) / 2, rel=1e-6)


def test_a_step_is_taken_in_training_mode_also_after_an_evaluation():
    job, twin = small_job(), small_job()
    torch.manual_seed(1)
    job.model.eval()
    job.step()
    torch.manual_seed(1)
    twin.step()
    assert job.state() == twin.state()


def test_equal_seeds_give_equal_bits():
    states = []
    for _ in range(2):
        job = small_job(optimizer="muon")
        for _ in range(3):
            job.step()
        states.append(copy.deepcopy(job.state()))
    assert states[0] == states[1]


class Watch(TorchDispatchMode):
    """Notes every operation by which the host asks a tensor for its value."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.asked.append(function)
        return function(*arguments, **(named or {}))


def test_an_ordinary_step_asks_no_tensor_for_its_value():
    """On a GPU each such question would stop the device; the optimizer is fused there as here."""
    job = small_job()
    job.step()
    with Watch() as watch:
        job.step()
        job.basis.averages.begin_window()
    assert watch.asked == []
    with Watch() as watch:
        job.guard_loss()
    assert watch.asked
