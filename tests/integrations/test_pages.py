"""Every example of the pages is run, with a predictor in this process; and frameworks are never needed."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import trainer_node.hybrid
from common.errors import UserError
from tests.integrations import tiny_models as tiny

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"transformers", "accelerate", "lightning", "peft"}


def blocks_of(page: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S | re.M
    )


SETUP, *EXAMPLES = blocks_of("library.md")
LOSS_OF = EXAMPLES[1].split("\n\n")[0]  # a later example uses the function of this one


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Examples name no server: they get a predictor in this process, and a folder to write in."""
    make = trainer_node.hybrid.Hybrid.__init__

    def quick(hybrid: Any, model: nn.Module, optimizer: Any, **options: Any) -> None:
        make(hybrid, model, optimizer, **{**options, "redis": "memory://", "settings": tiny.QUICK})

    monkeypatch.setattr(trainer_node.hybrid.Hybrid, "__init__", quick)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*sources: str, **names: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    for source in sources:
        exec(compile(source, "example", "exec"), names)
    return names


def ended_steps(folder: Path) -> list[int]:
    return [line["step"] for line in tiny.said(folder, "RunEnded")]


@pytest.mark.parametrize(
    ("number", "steps"),
    [(0, [40]), (1, [40]), (2, [40]), (3, [20]), (4, [40]), (5, [36]), (6, [20, 40])],
    ids=["three lines", "batch", "backward", "accumulation", "optimizers", "guard", "resume"],
)
def test_the_examples_of_the_library_run(in_process: Path, number: int, steps: list[int]) -> None:
    run(SETUP, LOSS_OF, EXAMPLES[number])
    assert ended_steps(in_process) == steps
    assert len(EXAMPLES) == 7


def test_the_example_of_accelerate_runs(in_process: Path) -> None:
    pytest.importorskip("accelerate", reason="pip install 'hybrid-predict-trainer[accelerate]'")
    names = run(SETUP)
    run(*blocks_of("accelerate.md"), **{**names, "loader": DataLoader(names["loader"], batch_size=None)})
    assert ended_steps(in_process) == [20]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_the_examples_of_hugging_face_run(in_process: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'hybrid-predict-trainer[transformers]'")
    pytest.importorskip("peft", reason="pip install 'hybrid-predict-trainer[transformers]'")
    run(*blocks_of("huggingface.md"), model=tiny.llama(), dataset=tiny.Counting())
    assert ended_steps(in_process) == [40, 40]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")
def test_the_example_of_lightning_runs(in_process: Path) -> None:
    pytest.importorskip("lightning", reason="pip install 'hybrid-predict-trainer[lightning]'")
    from tests.integrations.test_lightning_callback import Regression

    loader = DataLoader(run(SETUP)["loader"], batch_size=None)
    run(*blocks_of("lightning.md"), module=Regression(), loader=loader)
    assert ended_steps(in_process) == [80]


@pytest.mark.parametrize(
    ("module", "package"), [("hf_trainer", "transformers"), ("lightning_callback", "lightning")]
)
def test_without_the_framework_one_line_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    name = f"trainer_node.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for loaded in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'hybrid-predict-trainer\[{package}\]'") as caught:
        importlib.import_module(name)
    assert "\n" not in str(caught.value)


def test_only_the_integrations_import_a_framework() -> None:
    places = set()
    for package in ("common", "trainer_node", "predictor_node", "monitor_node"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                if FRAMEWORKS & {name.split(".")[0] for name in names}:
                    places.add(str(path.relative_to(ROOT)))
    folder = "trainer_node/integrations"
    assert places == {f"{folder}/hf_trainer.py", f"{folder}/lightning_callback.py"}
