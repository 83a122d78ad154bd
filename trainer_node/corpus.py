"""The user's text: which files are taken, and which of them are held out.

A path is a file, a folder (recursive), a git repository (tracked files; a plain walk without git), or
"" for the Python standard library's own source. Hidden entries, `node_modules` and the like, links
that leave the folder, empty files and files that are not UTF-8 text are left out and counted by reason.
The split is by document, never by window: documents are ordered by the SHA-256 of their name, and
the first ones that fit into the held-out share are held out. A single file is the one
exception: it is cut at a line into a leading training part and a trailing held-out part.
Everything is deterministic: same files, same corpus, on every machine. Reads files, writes none.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import DataError

SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
STDLIB_SKIPPED_FOLDERS = SKIPPED_FOLDERS | {"test", "tests", "idle_test"}
# Files are taken whole: stop looking for one that still fits once this share of the room is used.
FILLED_SHARE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    name: str  # relative to the corpus, "/" between folders
    text: bytes = field(repr=False)  # UTF-8, as in the file


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in the order of their names; `skipped` counts files left out, by reason."""

    source: str  # for people
    documents: tuple[Document, ...]
    skipped: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(len(document.text) for document in self.documents)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            name = document.name.encode("utf-8", "surrogateescape")
            for part in (name, document.text):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Split:
    train: tuple[Document, ...]
    validation: tuple[Document, ...]


class _Skip(Exception):
    """A file that is left out; the text is the reason."""


def collect(path: str, suffixes: Sequence[str] = (), max_bytes: int = 64 << 20) -> Corpus:
    """Read the corpus; at most `max_bytes` of it, then a fair sample of whole files.

    `suffixes` filter a folder's files ("py" and ".py" are the same); a file given by itself is
    always taken. Raises DataError with the cure.
    """
    if not path:
        root, source = Path(sysconfig.get_path("stdlib")), "the Python standard library's own source"
        if not root.is_dir():
            raise DataError(f"{root}: no standard library source here; give your own text with --data PATH")
        return _collect_folder(root, source, (".py",), max_bytes, STDLIB_SKIPPED_FOLDERS)
    try:
        root = Path(path).expanduser()
        mode = root.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder; check --data (trainer.data.path)") from None
    except (OSError, ValueError, RuntimeError) as error:  # NUL in the name; ~ of nobody
        raise DataError(f"{path!r}: cannot be read: {_reason(error)}; check --data and its rights") from None
    if stat.S_ISREG(mode):
        return _collect_file(root, path, max_bytes)
    if stat.S_ISDIR(mode):
        dotted = tuple(s if s.startswith(".") else f".{s}" for s in suffixes)
        return _collect_folder(root, path, dotted, max_bytes, SKIPPED_FOLDERS)
    raise DataError(f"{path}: neither a file nor a folder; give --data a text file, a folder or a repository")


def split(corpus: Corpus, validation_share: float) -> Split:
    """About `validation_share` of the bytes is held out, at least one document and never all."""
    if len(corpus.documents) == 1:
        return _split_single(corpus.documents[0], validation_share)
    ordered = sorted(corpus.documents, key=_hash_order)
    sizes = [len(document.text) for document in ordered]
    held = _fill(sizes, int(validation_share * sum(sizes)))
    if not held:
        held = {min(range(len(sizes)), key=lambda index: (sizes[index], index))}
    # A file's neighbours are its siblings by name, so the order by hash is kept: the end of the
    # training tokens, where the guard batches live, is then a sample of the whole corpus.
    return Split(
        train=tuple(d for index, d in enumerate(ordered) if index not in held),
        validation=tuple(d for index, d in enumerate(ordered) if index in held),
    )


def _collect_file(file: Path, source: str, max_bytes: int) -> Corpus:
    try:
        text = _read_text(file, max_bytes, inside=None)
    except _Skip as skip:
        raise DataError(f"{source}: {skip}; give --data a UTF-8 text file or a folder of them") from None
    return Corpus(source=source, documents=(Document(name=file.name, text=text),), skipped={})


def _collect_folder(
    root: Path, source: str, suffixes: tuple[str, ...], max_bytes: int, skipped_folders: frozenset[str]
) -> Corpus:
    skipped: Counter[str] = Counter()
    try:
        os.scandir(root).close()
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {_reason(error)}; check the folder's rights") from None
    tracked = _tracked_names(root) if (root / ".git").exists() else None
    names = _walked_names(root, skipped_folders, skipped.update) if tracked is None else tracked
    chosen = []
    for name in sorted(set(names)):
        parts = name.split("/")
        if any(part.startswith(".") or part in skipped_folders for part in parts):
            skipped["hidden or installed"] += 1
        elif suffixes and not name.endswith(suffixes):
            skipped["other suffix"] += 1
        else:
            chosen.append(name)
    documents = _read_documents(root, chosen, max_bytes, skipped)
    if not documents:
        found = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "no files"
        raise DataError(
            f"{source}: no text to learn from ({found}); give --data a folder with UTF-8 text files"
            + (" or change trainer.data.suffixes" if suffixes else "")
        )
    return Corpus(source=source, documents=tuple(documents), skipped=dict(skipped))


def _read_documents(root: Path, names: list[str], max_bytes: int, skipped: Counter[str]) -> list[Document]:
    """All text files, or, if they are too many, those that fit in the order of their names' hashes."""
    documents: list[Document] = []
    taken_bytes, inside = 0, root.resolve()
    for name in sorted(names, key=_name_hash):
        if taken_bytes >= FILLED_SHARE * max_bytes:
            skipped["beyond max_bytes"] += 1
            continue
        try:
            text = _read_text(root / name, max_bytes - taken_bytes, inside=inside)
        except _Skip as skip:
            skipped[str(skip)] += 1
            continue
        documents.append(Document(name=name, text=text))
        taken_bytes += len(text)
    return sorted(documents, key=lambda document: document.name)


def _read_text(file: Path, max_bytes: int, *, inside: Path | None) -> bytes:
    """The file's bytes, which are UTF-8 text; raises _Skip with the reason.

    Of a longer file no more than `max_bytes` is read: one of a folder is left out, one that was given by
    itself is cut at the last line end (or else character) that fits.
    """
    try:
        # Not only the file may be a link: an index of a stranger may name one behind a linked folder.
        if inside is not None and not file.resolve().is_relative_to(inside):
            raise _Skip("link out of the folder")
        if not stat.S_ISREG(file.stat().st_mode):
            raise _Skip("not a regular file")
        with file.open("rb") as stream:
            text = stream.read(max_bytes + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _Skip(f"unreadable ({_reason(error)})") from None
    if b"\0" in text:
        raise _Skip("binary")
    if len(text) > max_bytes and inside is not None:
        raise _Skip("beyond max_bytes")
    if len(text) > max_bytes:
        text = text[:max_bytes]
        text = text[: text.rfind(b"\n") + 1] or text.decode("utf-8", "ignore").encode()
    if not text:
        raise _Skip("empty")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise _Skip("binary or not UTF-8") from None
    return text


def _walked_names(
    root: Path, skipped_folders: frozenset[str], count: Callable[[Iterable[str]], None]
) -> Iterator[str]:
    """Relative names of all files and of links to folders, which are not entered."""
    for folder, folders, files in os.walk(root, onerror=lambda error: count(["unreadable folder"])):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped_folders]
        below = Path(folder).relative_to(root)
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from ((below / name).as_posix() for name in files + links)


def _tracked_names(root: Path) -> list[str] | None:
    """Tracked files, or None where git is absent or refuses the repository."""
    # A repository may name programs: as its fsmonitor, or as the other end of a partial clone whose missing
    # objects are fetched on sight. Reading one must not run anything of it, nor use the network.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(root), "ls-files", "-z", "--cached"]
    environment = {**os.environ, "GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1"}
    try:
        found = subprocess.run(command, capture_output=True, check=True, timeout=60, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return [os.fsdecode(name) for name in found.stdout.split(b"\0") if name]


def _split_single(document: Document, validation_share: float) -> Split:
    text = document.text
    wanted = int(len(text) * (1.0 - validation_share))
    cut = text.rfind(b"\n", 0, max(1, wanted)) + 1 or text.find(b"\n") + 1
    if not 0 < cut < len(text):
        raise DataError(
            f"{document.name}: a single file needs at least two lines, one to hold out; give more text"
        )
    return Split(
        train=(Document(name=f"{document.name} (leading part)", text=text[:cut]),),
        validation=(Document(name=f"{document.name} (trailing part)", text=text[cut:]),),
    )


def _fill(sizes: Sequence[int], room: int) -> set[int]:
    """Indices, first come first served, of sizes that fit into the room together."""
    taken: set[int] = set()
    used = 0
    for index, size in enumerate(sizes):
        if used >= FILLED_SHARE * room:
            break
        if used + size <= room:
            taken.add(index)
            used += size
    return taken


def _hash_order(document: Document) -> bytes:
    return _name_hash(document.name)


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
