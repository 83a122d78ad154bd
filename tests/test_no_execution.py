"""What comes from a stranger executes nothing: not a checkpoint, not a tokenizer, not a repository of text.

tests/test_architecture.py looks for pickle and its kind, eval, exec and torch.load; here is also the rest
that turns data into code or into much more data, and strangers' folders that try.
"""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import sealed_folder
from common.config import load_settings
from common.errors import CheckpointError, DataError, UserError
from tests.test_architecture import PACKAGES, ROOT, imported_modules, within
from trainer_node import run_folder, sample_run
from trainer_node.checkpoint import load_weights
from trainer_node.corpus import Document, collect
from trainer_node.tokens import load_tokenizer, train_tokenizer

CODE_OR_BOMBS = frozenset({
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy", "code",
    "codeop", "imp", "xmlrpc", "xml", "zipfile", "tarfile", "lzma", "bz2", "zipimport", "jsonpickle",
    "numpy.lib.format",
})  # fmt: skip
CALLS = frozenset({
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv",
    "torch.load", "torch.hub.load", "torch.jit.load", "np.load", "numpy.load", "joblib.load",
    "zlib.decompress", "zlib.decompressobj", "gzip.decompress", "gzip.open", "gzip.GzipFile",
    "shutil.unpack_archive", "urllib.request.urlretrieve", "pandas.read_pickle",
})  # fmt: skip
# Modules that are loaded by a name: all from lists in the source, or of installed packages.
LOADS_BY_NAME = frozenset({"trainer_node.race.optimizers", "monitor_node.device_choice"})


def modules() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text(encoding="utf-8")


def breaches(module: str, source: str) -> list[str]:
    found = [
        f"{module} imports {name}" for name in imported_modules(source, module) if within(name, CODE_OR_BOMBS)
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS:
            found.append(f"{module}:{node.lineno} calls {called}")
        if called.endswith("import_module") and module not in LOADS_BY_NAME:
            found.append(f"{module}:{node.lineno} imports by name")
        if any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords):
            found.append(f"{module}:{node.lineno} runs a shell")
    return found


def test_nothing_of_ours_turns_data_into_code_or_unpacks_an_archive() -> None:
    found = [breach for module, source in modules() for breach in breaches(module, source)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from numpy.lib import format", "import torch\ntorch.load(p)", "import zipfile",
        "import gzip\ngzip.decompress(b)", "eval(x)", "subprocess.run(x, shell=True)",
        "import yaml.constructor", "import importlib\nimportlib.import_module(x)", "np.load(p)",
        "def f():\n    from joblib import load",
    ],
)  # fmt: skip
def test_the_law_finds_what_it_forbids(source: str) -> None:
    assert breaches("common.example", source)


class Boom:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["pickle", "torch", "link"])
def test_a_pickle_under_the_name_of_a_tensor_file_is_refused_in_one_line_and_not_run(
    tmp_path: Path, how: str
) -> None:
    """A stranger can write any manifest: everything in the folder verifies."""
    import torch

    mark = tmp_path / "executed"
    building = sealed_folder.begin(tmp_path / "run", sealed_folder.folder_name(1, 1))
    file = building / "model.safetensors"
    if how == "torch":
        torch.save({"weight": Boom(mark)}, file)
    elif how == "pickle":
        file.write_bytes(pickle.dumps(Boom(mark)))
    else:
        file.symlink_to("/etc/passwd")
    folder = sealed_folder.seal(building, {"step": 1})
    with pytest.raises(CheckpointError) as error:
        load_weights(folder, torch.nn.Linear(2, 2))
    assert str(error.value).isprintable()
    assert not mark.exists()


def run_git(folder: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_text_in_a_strangers_repository_is_read_without_running_its_programs(tmp_path: Path) -> None:
    """A partial clone names the program that fetches its missing folder when the files are listed."""
    mark, program, source = tmp_path / "executed", tmp_path / "program", tmp_path / "source"
    program.write_text(f"#!/bin/sh\nmkdir {mark}\n")
    program.chmod(0o755)
    for name in ("in/a.txt", "out/b.txt"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("text\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "text"]):
        run_git(source, *arguments)
    run_git(tmp_path, "clone", "-q", "--no-local", str(source), "clone")
    clone = tmp_path / "clone"
    run_git(clone, "sparse-checkout", "set", "--cone", "--sparse-index", "in")
    assert "out/" in run_git(clone, "ls-files", "--sparse").split()
    missing = run_git(clone, "rev-parse", "HEAD:out").strip()
    (packs := clone / ".git/objects/pack").rename(tmp_path / "packs")
    packs.mkdir()
    for pack in (tmp_path / "packs").glob("*.pack"):
        with pack.open("rb") as file:
            subprocess.run(["git", "-C", str(clone), "unpack-objects", "-q"], stdin=file, check=True)
    (clone / ".git/objects" / missing[:2] / missing[2:]).unlink()
    for key, value in {
        "core.repositoryFormatVersion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.promisor": "true",
        "remote.origin.uploadpack": str(program),
    }.items():
        run_git(clone, "config", key, value)
    assert [document.name for document in collect(str(clone)).documents] == ["in/a.txt"]
    assert not mark.exists()
    assert (
        subprocess.run(["git", "-C", str(clone), "ls-files"], capture_output=True, check=False).returncode
        != 7
    )
    assert mark.exists(), "git alone would have run it: else this test proves nothing"


def test_a_tokenizer_of_a_stranger_is_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    no_end = b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]}}'
    for content in (
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        pickle.dumps(Boom(tmp_path / "executed")),
        no_end,
    ):
        file.write_bytes(content)
        with pytest.raises(DataError) as error:
            load_tokenizer(file)
        assert str(error.value).isprintable()
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens would be looked up beyond the end of the embedding."""
    sizes = ["trainer.model.vocabulary_size=260", "trainer.model.layers=1", "trainer.model.width=16"]
    settings = load_settings(preset="nano", overrides=[*sizes, "trainer.model.heads=1"])
    run = run_folder.create(tmp_path, "run", settings)
    text = Document(name="a", text=b"the cat sat on the mat and the cat sat again\n" * 50)
    tokenizer = train_tokenizer([text], 270)
    assert tokenizer.get_vocab_size() == 270
    tokenizer.save(str(run.tokenizer))
    monkeypatch.setattr(sample_run, "newest_checkpoint", lambda *_, **__: (tmp_path, []))
    monkeypatch.setattr(sample_run, "load_weights", lambda *_: 1)
    with pytest.raises(UserError, match=r"more tokens than the model \(260\); use the run's own"):
        sample_run.sample_run(run.path, prompt="the cat", max_tokens=1, temperature=0.0, top_k=0, seed=0)
