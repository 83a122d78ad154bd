import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from trainer_node import corpus as corpus_module
from trainer_node.corpus import Corpus, Document, collect, split


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents]


def documents(sizes):
    return tuple(Document(name=f"file-{i}", text=b"x" * size) for i, size in enumerate(sizes))


def test_folder_is_read_recursively_in_the_order_of_names(tmp_path):
    write(tmp_path, {"b.txt": "two", "a/z.py": "one", "a/deep/er.md": "three\r\n"})
    corpus = collect(str(tmp_path))
    assert [(d.name, d.text) for d in corpus.documents] == [
        ("a/deep/er.md", b"three\r\n"),
        ("a/z.py", b"one"),
        ("b.txt", b"two"),
    ]


def test_unfit_files_are_left_out_and_counted_by_reason(tmp_path):
    write(
        tmp_path,
        {
            "good.txt": "text",
            "empty.txt": "",
            "null.bin": b"ab\0cd",
            "latin.txt": "caf\xe9".encode("latin-1"),
            ".secret": "hidden",
            ".git/config": "hidden",
            "node_modules/x.js": "installed",
            "__pycache__/x.py": "cache",
        },
    )
    corpus = collect(str(tmp_path))
    assert names(corpus) == ["good.txt"]
    assert corpus.skipped == {"empty": 1, "binary": 1, "binary or not UTF-8": 1, "hidden or installed": 1}


def test_links_out_of_the_folder_are_left_out_and_links_inside_are_read(tmp_path):
    outside = write(tmp_path / "outside", {"secret.txt": "secret"})
    inside = write(tmp_path / "inside", {"a.txt": "text"})
    (inside / "out.txt").symlink_to(outside / "secret.txt")
    (inside / "in.txt").symlink_to(inside / "a.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "loop.txt").symlink_to(inside / "loop.txt")
    corpus = collect(str(inside))
    assert names(corpus) == ["a.txt", "in.txt"]
    assert corpus.skipped["link out of the folder"] == 2
    assert sum(corpus.skipped.values()) == 3


@pytest.mark.parametrize("suffix", ["py", ".py"])
def test_suffixes_filter_a_folder_with_and_without_the_dot(tmp_path, suffix):
    write(tmp_path, {"a.py": "1", "b.txt": "2", "copy": "3"})
    corpus = collect(str(tmp_path), (suffix,))
    assert names(corpus) == ["a.py"]
    assert corpus.skipped == {"other suffix": 2}


def test_suffixes_do_not_filter_a_file_given_by_itself(tmp_path):
    write(tmp_path, {"b.txt": "one\ntwo\n"})
    assert names(collect(str(tmp_path / "b.txt"), (".py",))) == ["b.txt"]


def test_a_git_repository_gives_its_tracked_files_only(tmp_path):
    write(tmp_path, {"a.py": "tracked", "b.py": "untracked", "ü.py": "tracked too"})
    for arguments in (["init", "-q"], ["add", "a.py", "ü.py"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    assert names(collect(str(tmp_path))) == ["a.py", "ü.py"]


def test_reading_a_repository_runs_no_program_that_it_names(tmp_path):
    write(tmp_path, {"a.py": "tracked", "hook": f"#!/bin/sh\ntouch {tmp_path}/ran\n"})
    (tmp_path / "hook").chmod(0o755)
    for arguments in (["init", "-q"], ["add", "a.py"], ["config", "core.fsmonitor", str(tmp_path / "hook")]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    (tmp_path / "ran").unlink(missing_ok=True)
    collect(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_without_git_a_repository_is_walked_like_a_folder(tmp_path, monkeypatch):
    write(tmp_path, {"a.py": "1", "b.py": "2", ".git/HEAD": "ref"})
    monkeypatch.setenv("PATH", "")
    assert names(collect(str(tmp_path))) == ["a.py", "b.py"]


def test_too_much_text_gives_a_sample_that_fits_and_is_the_same_every_time(tmp_path):
    write(tmp_path, {f"{i:03d}.txt": "x" * 100 for i in range(100)})
    sample = names(collect(str(tmp_path), max_bytes=5000))
    assert 47 <= len(sample) <= 50
    assert sample == names(collect(str(tmp_path), max_bytes=5000))
    assert sample[0] < "030.txt"
    assert sample[-1] > "070.txt"  # spread over the names, not the first of them


def test_too_long_single_file_is_cut_at_a_line(tmp_path):
    write(tmp_path, {"a.txt": "line\n" * 1000})
    assert collect(str(tmp_path / "a.txt"), max_bytes=1024).documents[0].text == b"line\n" * 204


def test_too_long_single_line_is_cut_between_characters(tmp_path):
    write(tmp_path, {"a.txt": "ü" * 1000})
    assert collect(str(tmp_path / "a.txt"), max_bytes=1025).documents[0].text == "ü".encode() * 512


def test_default_is_the_standard_library_without_tests_and_installed_packages(monkeypatch, tmp_path):
    write(
        tmp_path,
        {
            "os.py": "1",
            "json/decoder.py": "2",
            "test/test_os.py": "3",
            "site-packages/numpy/core.py": "4",
            "idlelib/idle_test/test_a.py": "5",
            "lib2to3/tests/data/x.py": "6",
            "lib.so": b"\0",
        },
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert names(collect("", suffixes=(".md",))) == ["json/decoder.py", "os.py"]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "missing", "no such file or folder; check --data"),
        ({}, ".", r"no text to learn from \(no files\)"),
        ({"a.bin": b"\0", "b.bin": b"\xff"}, ".", r"\(1 binary, 1 binary or not UTF-8\); give --data"),
        ({"a.bin": b"\0"}, "a.bin", "binary; give --data a UTF-8 text file"),
        ({"a.txt": ""}, "a.txt", "empty; give --data"),
        ({"a.txt": "x"}, "a.txt/b", "cannot be read: Not a directory"),
        ({}, "a\0b", "cannot be read"),
    ],
)
def test_bad_data_is_one_line_that_names_the_cure(tmp_path, files, path, message):
    write(tmp_path, files)
    with pytest.raises(DataError, match=message) as error:
        collect(f"{tmp_path}/{path}" if path != "." else str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_pipe_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        collect(str(tmp_path / "pipe"))
    write(tmp_path, {"a.txt": "text"})
    assert collect(str(tmp_path)).skipped == {"not a regular file": 1}


def deny(monkeypatch, *denied):
    """Unreadable also for root, who runs the tests in a container."""
    opened = Path.open

    def open_or_refuse(self, *arguments, **options):
        if self.name in denied:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_or_refuse)


def test_one_unreadable_file_among_many_is_left_out_and_counted(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "1", "b.txt": "2"})
    deny(monkeypatch, "a.txt")
    corpus = collect(str(tmp_path))
    assert names(corpus) == ["b.txt"]
    assert corpus.skipped == {"unreadable (Permission denied)": 1}


def test_a_single_unreadable_file_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "1"})
    deny(monkeypatch, "a.txt")
    with pytest.raises(DataError, match=r"unreadable \(Permission denied\)"):
        collect(str(tmp_path / "a.txt"))


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus_module.os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied; check the folder's rights"):
        collect(str(tmp_path))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=60), st.floats(0.001, 0.5))
def test_split_is_by_document_and_neither_side_is_empty(sizes, share):
    corpus = Corpus(source="", documents=documents(sizes), skipped={})
    parts = split(corpus, share)
    assert parts.train
    assert parts.validation
    assert sorted(d.name for d in parts.train + parts.validation) == sorted(names(corpus))
    held_bytes = sum(len(d.text) for d in parts.validation)
    assert held_bytes <= share * sum(sizes) or len(parts.validation) == 1


@given(st.randoms())
def test_split_depends_on_names_and_not_on_the_order_of_documents(random):
    shuffled = list(documents([10] * 40))
    expected = split(Corpus(source="", documents=tuple(shuffled), skipped={}), 0.25)
    random.shuffle(shuffled)
    assert split(Corpus(source="", documents=tuple(shuffled), skipped={}), 0.25) == expected


def test_split_holds_out_about_the_stated_share():
    parts = split(Corpus(source="", documents=documents([100 + i for i in range(400)]), skipped={}), 0.05)
    held, kept = (sum(len(d.text) for d in part) for part in (parts.validation, parts.train))
    assert 0.045 <= held / (held + kept) <= 0.05


def test_single_file_is_cut_at_a_line_and_nothing_is_lost():
    text = b"".join(b"line %d\n" % i for i in range(100))
    parts = split(Corpus(source="", documents=(Document(name="a", text=text),), skipped={}), 0.1)
    (train,), (held_out,) = parts.train, parts.validation
    assert train.text + held_out.text == text
    assert train.text.endswith(b"\n")
    assert 0.08 * len(text) <= len(held_out.text) <= 0.12 * len(text)


def test_single_line_cannot_be_split_and_the_error_says_so():
    with pytest.raises(DataError, match="at least two lines"):
        split(Corpus(source="", documents=(Document(name="a", text=b"x" * 99),), skipped={}), 0.1)


def test_digest_changes_with_a_name_a_byte_and_a_border():
    def digest(*pairs):
        return Corpus(
            source="", documents=tuple(Document(name=n, text=t) for n, t in pairs), skipped={}
        ).sha256()

    digests = {
        digest(("a", b"bc")),
        digest(("b", b"bc")),
        digest(("a", b"bd")),
        digest(("ab", b"c")),
        digest(("a", b"b"), ("c", b"")),
    }
    assert len(digests) == 5
