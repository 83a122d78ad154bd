"""Text -> tokens on disk: byte-level BPE, cached by content.

The vocabulary is learned from TRAINING documents only, from at most 8 MB of them (in hash order, so a
sample). Documents are joined by <end>; text that happens to spell <end> is ordinary text.
A cache folder is named by the SHA-256 of content and settings and holds `tokenizer.json`, `train.bin`,
`validation.bin` (little-endian uint16, or uint32 above 65536 entries) and the sidecar `tokens.json`,
written last. It is built in a private folder, synced and renamed, so a reader sees all or
nothing; sizes and hashes are checked before use and a folder that fails is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import DataError, EnvironmentFault
from trainer_node.corpus import Corpus, Document, split

FORMAT = 1
END = "<end>"
END_TOKEN = 0  # its number in every vocabulary that train_tokenizer makes
# Enough for a stable vocabulary: seconds instead of minutes on big corpora. Guess, untested.
VOCABULARY_BYTES = 8 << 20
# Per call of the encoder, whose tokens take about 100 bytes each until they are arrays. A longer document
# is cut there at a line, which costs at most one merge.
ENCODE_BYTES = 1 << 20
_DTYPE_BYTES = {"<u2": 2, "<u4": 4}
_FILES = ("tokenizer.json", "train.bin", "validation.bin")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One split in the sidecar."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """tokens.json; everything about the arrays that the arrays do not say."""

    format: int
    dtype: str
    vocabulary_size: int
    corpus_sha256: str
    files: dict[str, dict[str, Any]]  # name -> {"bytes": int, "sha256": str}
    train: Part
    validation: Part

    @property
    def vocabulary_sha256(self) -> str:
        return str(self.files["tokenizer.json"]["sha256"])


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """`train` and `validation` are read-only memmaps (N,) of token numbers."""

    train: np.ndarray
    validation: np.ndarray
    tokenizer_path: Path
    vocabulary_size: int  # entries the text really gave, at most the number asked for
    bytes_per_token: float  # on held-out text
    sidecar: Sidecar


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "hybrid-predict-trainer"


def prepare_tokens(
    corpus: Corpus, *, vocabulary_size: int, cache_dir: str | Path = "", validation_share: float
) -> TokenSet:
    """Tokens of the corpus, from the cache or built now.

    Raises DataError when the text is too short to be split, EnvironmentFault when the cache cannot be
    written.
    """
    try:
        root = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    except RuntimeError as error:
        raise EnvironmentFault(f"no home folder: {error}; set trainer.data.cache_dir") from None
    corpus_sha256 = corpus.sha256()
    key = [FORMAT, tokenizers.__version__, corpus_sha256, vocabulary_size, validation_share, VOCABULARY_BYTES]
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    try:
        # Once more if another process, mending the same damaged folder, has moved ours away.
        for _ in range(3):
            sidecar = read_sidecar(folder)
            if sidecar is not None:
                return _open(folder, sidecar)
            _build_folder(folder, corpus, corpus_sha256, vocabulary_size, validation_share)
        raise EnvironmentFault(f"{folder}: tokens just written read back damaged; check the disk")
    except OSError as error:
        raise EnvironmentFault(
            f"{root}: tokens cannot be stored: {error.strerror or error};"
            " set trainer.data.cache_dir to a writable folder with free space"
        ) from None


def read_sidecar(folder: Path) -> Sidecar | None:
    """The sidecar of a complete, undamaged cache folder, else None."""
    try:
        raw = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        sidecar = Sidecar(**{**raw, "train": Part(**raw["train"]), "validation": Part(**raw["validation"])})
        if sidecar.format != FORMAT or sorted(sidecar.files) != sorted(_FILES):
            return None
        if any(sidecar.files[name] != _file_facts(folder / name) for name in _FILES):
            return None
        width = _DTYPE_BYTES[sidecar.dtype]
        for name, part in (("train.bin", sidecar.train), ("validation.bin", sidecar.validation)):
            if sidecar.files[name]["bytes"] != part.tokens * width or part.tokens < 1:
                return None
    except FileNotFoundError:
        return None
    # not JSON, or JSON of another shape
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return sidecar


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises DataError if the file is not a tokenizer."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizer file: {error}") from None
    if tokenizer.token_to_id(END) is None:
        raise DataError(f"{path}: not a tokenizer of ours: it has no {END}")
    tokenizer.encode_special_tokens = True  # text that spells <end> is text
    return tokenizer


def train_tokenizer(documents: Sequence[Document], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE whose entry 0 is <end>; smaller than asked for where the text gives fewer merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_texts(documents), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _build_folder(
    folder: Path, corpus: Corpus, corpus_sha256: str, vocabulary_size: int, validation_share: float
) -> None:
    parts = split(corpus, validation_share)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = train_tokenizer(parts.train, vocabulary_size)
        dtype = "<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4"
        _write(building / "tokenizer.json", [tokenizer.to_str().encode()])
        counts = {}
        for name, documents in (("train", parts.train), ("validation", parts.validation)):
            written = _write(building / f"{name}.bin", _encoded(tokenizer, documents, dtype))
            counts[name] = Part(
                documents=len(documents),
                bytes=sum(len(document.text) for document in documents),
                tokens=written // _DTYPE_BYTES[dtype],
            )
        sidecar = Sidecar(
            format=FORMAT,
            dtype=dtype,
            vocabulary_size=tokenizer.get_vocab_size(),
            corpus_sha256=corpus_sha256,
            files={name: _file_facts(building / name) for name in _FILES},
            train=counts["train"],
            validation=counts["validation"],
        )
        _write(building / "tokens.json", [json.dumps(asdict(sidecar), indent=2).encode()])
        _move_into_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _move_into_place(building: Path, folder: Path) -> None:
    """Rename; a damaged folder is moved away first, a good one of another process is kept."""
    _sync_folder(building)
    if folder.exists() and read_sidecar(folder) is None:
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            os.rename(folder, aside / folder.name)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(building, folder)
    except OSError:
        if read_sidecar(folder) is None:
            raise
    _sync_folder(folder.parent)


def _open(folder: Path, sidecar: Sidecar) -> TokenSet:
    arrays = {
        name: np.memmap(folder / f"{name}.bin", dtype=sidecar.dtype, mode="r")
        for name in ("train", "validation")
    }
    return TokenSet(
        train=arrays["train"],
        validation=arrays["validation"],
        tokenizer_path=folder / "tokenizer.json",
        vocabulary_size=sidecar.vocabulary_size,
        bytes_per_token=sidecar.validation.bytes / sidecar.validation.tokens,
        sidecar=sidecar,
    )


def _encoded(tokenizer: Tokenizer, documents: Sequence[Document], dtype: str) -> Iterator[bytes]:
    """Token bytes of all documents, each followed by <end>."""
    end = tokenizer.token_to_id(END)
    for batch in _batches(documents):
        encodings = tokenizer.encode_batch_fast([text for text, _ in batch])
        for encoding, (_, is_last) in zip(encodings, batch, strict=True):
            yield np.array([*encoding.ids, end] if is_last else encoding.ids, dtype=dtype).tobytes()


def _batches(documents: Sequence[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of about ENCODE_BYTES in all; a piece knows whether it ends its document."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        start, length = 0, len(document.text)
        while start < length:
            end = _piece_end(document.text, start)
            batch.append((document.text[start:end].decode("utf-8"), end == length))
            start, size = end, size + end - start
            if size >= ENCODE_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _piece_end(text: bytes, start: int) -> int:
    """End of the piece from `start`: the last line end, else character, within ENCODE_BYTES."""
    limit = start + ENCODE_BYTES
    if len(text) <= limit:
        return len(text)
    line_end = text.rfind(b"\n", start, limit) + 1
    return line_end or start + len(text[start:limit].decode("utf-8", "ignore").encode())


def _sample_texts(documents: Sequence[Document]) -> Iterator[str]:
    room = VOCABULARY_BYTES
    for document in documents:
        if room <= 0:
            return
        yield document.text[:room].decode("utf-8", "ignore")
        room -= len(document.text)


def _write(path: Path, pieces: Iterator[bytes] | list[bytes]) -> int:
    """Bytes written, on the disk when this returns."""
    with path.open("xb") as stream:
        for piece in pieces:
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
