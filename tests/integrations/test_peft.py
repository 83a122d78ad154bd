"""Laws of LoRA through PEFT: what is frozen has no direction and is never moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'hybrid-predict-trainer[transformers]'")
pytest.importorskip("peft", reason="pip install 'hybrid-predict-trainer[transformers]'")

from peft import LoraConfig, get_peft_model

from tests.integrations import tiny_models as tiny
from trainer_node.hybrid import Hybrid


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 asks transformers
def test_jumps_move_the_adapters_alone_and_the_base_stays_bit_identical(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), lora)
    before = tiny.weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)  # the frozen ones too, as people do
    data = tiny.Counting()
    with Hybrid(model, optimizer, steps=400, **tiny.options(tmp_path, tiny.FIXED)) as hybrid:
        assert hybrid.loop is not None
        names = [name for group in hybrid.loop.groups for name in group.parameter_names]
        basis = hybrid.loop.basis
        assert basis is not None
        moved = sum(parameter.numel() for parameter in basis.parameters)
        for step in range(60):
            items = [data[step * 4 + item] for item in range(4)]
            batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
            hybrid.step(lambda batch: model(**batch).loss, batch)
    assert "accepted" in tiny.verdicts(tmp_path)
    assert names
    assert all("lora_" in name for name in names)
    assert moved == model.num_parameters(only_trainable=True)
    after = tiny.weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
