"""The trainer's account of its memory: what it says, when, and what it costs."""

from __future__ import annotations

from functools import partial

import psutil
import pytest
import torch

from common.codec import encode
from common.messages import Holder, MemoryAction, MemoryReport, Observation, Outcome
from tests.trainer.memory_scene import Scene, gpt_settings, ordered
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks
from trainer_node import memory_report
from trainer_node.memory_report import REPORT_SECONDS, REPORT_STEPS, MemoryReports, holders
from trainer_node.snapshot import optimizer_tensors

PLAIN = "predictor.enabled=false"
Uncounted = partial(Scene, is_counted=False)


def reports(scene: Scene) -> list[MemoryReport]:
    return scene.links.of(MemoryReport)


def by_name(found: tuple[Holder, ...]) -> dict[str, int]:
    return {holder.name: holder.num_bytes for holder in found}


def test_steps_alone_are_reported_every_so_many_and_never_one_by_one() -> None:
    scene = Uncounted(gpt_settings(PLAIN, "trainer.steps=200", "trainer.statistics_steps=300")).run()
    assert [r.step for r in reports(scene)] == list(range(1, 200, REPORT_STEPS))
    assert {r.occasion for r in reports(scene)} == {"interval"}


def test_slow_steps_are_reported_every_few_seconds() -> None:
    now = [0.0]
    said: list[object] = []
    told = MemoryReports(said.append, now_seconds=lambda: now[0])
    scene = Uncounted(gpt_settings(PLAIN, "trainer.statistics_steps=300"))

    def step(loop: object, occasion: str) -> None:
        now[0] += REPORT_SECONDS / 4
        told(loop, occasion)  # type: ignore[arg-type]

    scene.loop.report = step
    scene.run()
    assert [r.step for r in said] == list(range(1, 41, 4))  # type: ignore[attr-defined]


def test_phases_are_reported_with_the_copies_of_the_model_that_they_take() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1))
    settings = gpt_settings("trainer.verify.tolerance=100.0", "trainer.steps=60")
    scene = Uncounted(settings, links=links).run()
    predicted = [r for r in reports(scene) if r.occasion == "predict"]
    jumps = [o for o in links.of(Outcome) if o.probation_steps]
    assert [r.step for r in predicted] == [o.base_step for o in jumps]
    assert len([r for r in reports(scene) if r.occasion == "full"]) == 1 + len(jumps)
    weights_bytes = sum(p.numel() * 4 for p in scene.task.model.parameters())
    held = by_name(predicted[0].holders)
    assert held["weights"] >= weights_bytes
    assert held["averages"] == 3 * weights_bytes
    # Weights, averages and both moments of AdamW or the one of Muon: a snapshot holds them all.
    assert held["snapshot"] >= 3 * weights_bytes


def test_holders_hold_the_tensors_that_are_there() -> None:
    scene = Uncounted(gpt_settings("trainer.steps=10")).run()
    held = by_name(tuple(holders(scene.loop)))
    parameters = list(scene.task.model.parameters())
    nbytes = lambda tensors: sum(t.nbytes for t in tensors)  # noqa: E731
    assert held["gradients"] == nbytes(p.grad for p in parameters)
    assert held["weights"] == nbytes([*parameters, *scene.task.model.buffers()])
    moments = [t for t in optimizer_tensors(scene.loop.optimizers) if t.dim()]
    assert held["optimizer"] == nbytes(moments)
    assert {h.place for h in holders(scene.loop)} == {"device"}


def test_what_is_parked_on_disk_is_said_to_be_there(tmp_path) -> None:
    settings = gpt_settings("trainer.steps=10", "trainer.basis.history_snapshots=3")
    scene = Uncounted(settings, folder=tmp_path).run()
    places = {(h.name, h.place): h.num_bytes for h in holders(scene.loop)}
    weights_bytes = sum(p.numel() * 4 for p in scene.task.model.parameters())
    assert places["averages", "device"] == 2 * weights_bytes
    assert places["averages", "disk"] == weights_bytes
    assert places["history", "disk"] == 2 * weights_bytes


def test_on_a_cpu_the_process_stands_for_the_allocator_and_the_rest_is_unknown_not_zero() -> None:
    scene = Uncounted(gpt_settings(PLAIN, "trainer.steps=6")).run()
    report = memory_report.memory_report(scene.loop, "interval")
    assert (report.allocated_bytes, report.inactive_split_bytes, report.peak_bytes) == (None, None, None)
    rss_bytes = psutil.Process().memory_info().rss
    assert report.reserved_bytes == pytest.approx(rss_bytes, rel=0.1)
    on_device = sum(h.num_bytes for h in report.holders if h.place == "device")
    assert on_device == report.reserved_bytes
    assert len(encode(report)) < 1000


STATS = {
    "allocated_bytes.all.current": 10**7,
    "allocated_bytes.all.peak": 3 * 10**7,
    "reserved_bytes.all.current": 4 * 10**7,
    "inactive_split_bytes.all.current": 12345,
    "num_alloc_retries": 7,
}


def test_on_a_gpu_the_numbers_are_the_allocators_and_a_new_peak_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Uncounted(gpt_settings(PLAIN, "trainer.steps=6")).run()
    resets: list[object] = []
    object.__setattr__(scene.task, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: STATS)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    report = memory_report.memory_report(scene.loop, "interval")
    assert report.allocated_bytes == 10**7
    assert report.peak_bytes == 3 * 10**7
    assert report.reserved_bytes == 4 * 10**7
    assert report.inactive_split_bytes == 12345
    assert report.alloc_retries == 7
    assert resets == [torch.device("cuda", 0)]
    assert sum(h.num_bytes for h in report.holders) == 10**7


def test_a_report_says_how_the_batch_is_cut() -> None:
    scene = Uncounted(gpt_settings(PLAIN, "trainer.batch.accumulation=3"))
    scene.at[4] = ordered(MemoryAction.HALVE_MICRO_BATCH)
    scene.run()
    sizes = [(r.micro_batch, r.accumulation) for r in reports(scene) if r.occasion in ("interval", "order")]
    assert sizes[:2] == [(8, 3), (4, 6)]


def test_reports_do_not_change_what_is_observed() -> None:
    said = []
    for is_reported in (True, False):
        scene = Uncounted(gpt_settings("trainer.steps=30"))
        if not is_reported:
            scene.loop.report = memory_report.no_report
        scene.run()
        said.append([repr(o) for o in scene.links.of(Observation)])
    assert said[0] == said[1]
