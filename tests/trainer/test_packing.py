"""Packing by document: a packed row is its documents, each alone; without it, nothing has changed.

The slow twin runs every document by itself, from position 0, through a model without the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import load_settings
from common.errors import CheckpointError, DataError, SettingsError
from common.settings import ModelSettings, RunSettings
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node import checkpoint, recompute
from trainer_node.checkpoint import Checkpoints
from trainer_node.controls import cut_context
from trainer_node.corpus import Document
from trainer_node.data import Batch
from trainer_node.housekeeping import Housekeeping
from trainer_node.model.gpt import GPT
from trainer_node.sample import generate
from trainer_node.step import mean_loss
from trainer_node.tasks import Task, build_model, build_task
from trainer_node.tokens import END_TOKEN, train_tokenizer

CPU = torch.device("cpu")
CONTEXT = 24


def gpts(**changes: object) -> tuple[GPT, GPT]:
    """Packed and plain, of the same weights; large ones, so that every token seen moves the logits."""
    shape = {"layers": 3, "heads": 2, "width": 16, "context_tokens": CONTEXT, "vocabulary_size": 300}
    options = ModelSettings(**{**shape, **changes})  # type: ignore[arg-type]
    packed, plain = GPT(options, END_TOKEN), GPT(options)
    random = torch.Generator().manual_seed(0)
    for one, other in zip(packed.parameters(), plain.parameters(), strict=True):
        one.data = torch.randn(one.shape, generator=random) / 4
        other.data = one.data.clone()
    return packed.eval(), plain.eval()


PACKED, PLAIN = gpts()


def rows(count: int = 2, *, marks: tuple[int, ...], seed: int = 0) -> Tensor:
    """(B, T) tokens whose documents begin at `marks`."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 300, (count, CONTEXT), generator=random)
    tokens[:, list(marks)] = END_TOKEN
    return tokens


def spans_of(row: Tensor) -> Iterator[slice]:
    """Where each document of a row (T,) lies, by hand."""
    starts = sorted({0, *(i for i, token in enumerate(row.tolist()) if token == END_TOKEN)})
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        yield slice(start, stop)


@torch.no_grad()
def alone(model: GPT, inputs: Tensor) -> Tensor:
    """Logits (B, T, V) of each document by itself, from position 0."""
    return torch.stack([torch.cat([model(row[span][None])[0] for span in spans_of(row)]) for row in inputs])


@given(
    st.lists(st.lists(st.integers(0, CONTEXT - 1), max_size=6), min_size=1, max_size=3), st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_the_logits_of_a_packed_row_are_those_of_each_document_alone(
    marks: list[list[int]], seed: int
) -> None:
    tokens = torch.cat([rows(1, marks=tuple(row), seed=seed) for row in marks])
    with torch.no_grad():
        torch.testing.assert_close(PACKED(tokens), alone(PLAIN, tokens), rtol=1e-4, atol=1e-4)


def test_a_token_changes_logits_of_its_own_document_only() -> None:
    tokens = rows(marks=(6, 15))
    with torch.no_grad():
        for place, first, stop in ((3, 0, 6), (6 + 2, 6, 15), (23, 15, 24)):
            changed = tokens.clone()
            changed[:, place] = tokens[:, place] % 299 + 1
            is_moved = (PACKED(changed) != PACKED(tokens)).any(-1)
            assert is_moved[:, place:stop].all()
            assert not is_moved[:, :first].any()
            assert not is_moved[:, stop:].any()
            assert (PLAIN(changed) != PLAIN(tokens)).any(-1)[:, place:].all()  # what packing takes away


@pytest.mark.parametrize("context", [12, 8, 3])
def test_a_shorter_context_is_the_packing_of_the_cut_rows(context: int) -> None:
    tokens = rows(marks=(5, 12, 17))
    cut = cut_context(Batch(tokens, tokens), context).inputs
    assert torch.equal(cut.flatten(), tokens.flatten())
    with torch.no_grad():
        torch.testing.assert_close(PACKED(cut), alone(PLAIN, cut), rtol=1e-4, atol=1e-4)


def test_computing_a_block_again_keeps_the_mask() -> None:
    (packed, _), tokens = gpts(), rows(marks=(6, 15))
    gradients = []
    for again in (False, True):
        recompute.set_recompute(packed, again)
        packed.zero_grad()
        packed(tokens, tokens.roll(-1, 1)).backward()
        gradients.append([p.grad.clone() for p in packed.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_stream_is_plain_causal_attention_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    attention = F.scaled_dot_product_attention

    def noted(*heads: Tensor, **options: object) -> Tensor:
        asked.append(options)
        return attention(*heads, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    model = build_model(load_settings(preset="nano").trainer, CPU)
    model(rows(marks=(3,)))
    assert len(asked) == 4
    assert all(options["attn_mask"] is None and options["is_causal"] is True for options in asked)


# ---- the task ------------------------------------------------------------------------------------


def text_settings(tmp_path: Path, *overrides: str, documents: int = 120) -> RunSettings:
    """A tiny GPT on many short files, so that nearly every window has a border."""
    folder = tmp_path / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"{i}.txt").write_text(f"{i} is the number of this file\n" * (1 + i % 4))
    text = (
        "trainer.task=language",
        f"trainer.data.path='{folder}'",
        f"trainer.data.cache_dir='{tmp_path / 'cache'}'",
        "trainer.data.validation_share=0.2",
        "trainer.model.layers=2",
        "trainer.model.heads=2",
        "trainer.model.width=16",
        f"trainer.model.context_tokens={CONTEXT}",
        "trainer.model.vocabulary_size=300",
        "trainer.batch.sequences=4",
        "trainer.evaluate_every_steps=100",
        "predictor.enabled=false",
    )
    return tiny_settings(*text, *overrides)


def task_of(tmp_path: Path, packing: str, **changes: int) -> Task:
    return build_task(text_settings(tmp_path, f"trainer.data.packing={packing}", **changes).trainer, CPU)


def batches_of(task: Task) -> list[Batch]:
    """Of training, guard and held-out text."""
    return [*(task.train.batch(i) for i in range(4)), task.train.guard(0), *task.validation]


def test_packing_leaves_every_batch_as_it_is(tmp_path: Path) -> None:
    stream, packed = (task_of(tmp_path, packing) for packing in ("stream", "document"))
    for one, other in zip(batches_of(stream), batches_of(packed), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
    assert packed.units_per_step == stream.units_per_step
    assert "each file sees itself alone" in packed.description
    assert "sees" not in stream.description


def test_every_loss_of_the_task_is_the_mean_over_all_targets_each_from_its_own_document(
    tmp_path: Path,
) -> None:
    """Of training, guard, held-out and cut batches alike."""
    task = task_of(tmp_path, "document")
    plain = GPT(task.model.settings)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(0)
    for one, other in zip(task.model.parameters(), plain.parameters(), strict=True):
        one.data = torch.randn(one.shape, generator=random) / 4
        other.data = one.data
    found = batches_of(task)
    assert sum(int((batch.inputs[:, 1:] == END_TOKEN).sum()) for batch in found) > len(found)
    for batch in [*found, *(cut_context(batch, CONTEXT // 4) for batch in found)]:
        wanted = F.cross_entropy(alone(plain, batch.inputs).flatten(0, 1), batch.targets.flatten())
        assert task.loss(batch).item() == pytest.approx(wanted.item(), rel=1e-4)
        assert task.logits is not None
        torch.testing.assert_close(
            task.logits(batch.inputs), alone(plain, batch.inputs), rtol=1e-3, atol=1e-3
        )
    assert mean_loss(task.model, task.loss, task.validation) > 0.0


def test_a_run_packed_by_document_learns_and_its_checkpoint_is_of_that_packing(tmp_path: Path) -> None:
    packed = text_settings(tmp_path, "trainer.data.packing=document", "trainer.steps=20")
    checkpoints = Checkpoints(tmp_path / "kept", keep=1, on_failure=pytest.fail)
    housekeeping = Housekeeping(lambda _: None, checkpoints)
    loop = tiny_loop(ScriptedLinks(), packed, housekeeping=housekeeping)
    first = mean_loss(loop.task.model, loop.task.loss, loop.task.validation)
    housekeeping.begin(loop)
    loop.run()
    checkpoints.close()
    assert mean_loss(loop.task.model, loop.task.loss, loop.task.validation) < 0.9 * first
    folder = next((tmp_path / "kept").iterdir())
    checkpoint.load(folder, tiny_loop(ScriptedLinks(), packed))
    stream = tiny_loop(ScriptedLinks(), text_settings(tmp_path, "trainer.steps=20"))
    with pytest.raises(CheckpointError, match=r"another trainer\.data\.packing; resume with its config.toml"):
        checkpoint.load(folder, stream)


def test_a_sample_is_one_document_so_packing_changes_none() -> None:
    words = train_tokenizer([Document(name="a", text=b"for x in range(10): print(x)\n" * 5)], 280)
    texts = [
        generate(model, words, "for x", max_tokens=40, temperature=0.0)  # beyond the context
        for model in (PACKED, PLAIN)
    ]
    assert texts[0] == texts[1] != "for x"


def test_what_cannot_be_packed_is_refused_in_one_line_that_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must be one of stream, document") as other:
        text_settings(tmp_path, "trainer.data.packing=pages")
    with pytest.raises(SettingsError, match="task digits has no documents; leave it at stream") as no_text:
        build_task(tiny_settings("trainer.data.packing=document").trainer, CPU)
    with pytest.raises(DataError, match=r"is one document, .* give --data a folder") as single:
        task_of(tmp_path / "single", "document", documents=1)
    assert all("\n" not in str(error.value) for error in (other, no_text, single))
    assert not (tmp_path / "single" / "cache").exists()
