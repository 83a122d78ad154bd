import json
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError, EnvironmentFault
from trainer_node import tokens as tokens_module
from trainer_node.corpus import Corpus, Document, split
from trainer_node.tokens import END, END_TOKEN, load_tokenizer, prepare_tokens, read_sidecar, train_tokenizer

WORDS = ["def", "return", "value", "token", "weight", "step", "été", "名前", "<end>", "\t", "\n", "()", "0.5"]


def make_corpus(count=20, seed=0):
    choose = random.Random(seed)
    return Corpus(
        source="test",
        documents=tuple(
            Document(name=f"{i:02d}.py", text=" ".join(choose.choices(WORDS, k=200)).encode())
            for i in range(count)
        ),
        skipped={},
    )


CORPUS = make_corpus()


def prepare(folder, corpus=CORPUS, vocabulary_size=300, validation_share=0.2):
    return prepare_tokens(
        corpus, vocabulary_size=vocabulary_size, cache_dir=folder, validation_share=validation_share
    )


def decoded(token_set, part):
    """The documents of a part, read back from its tokens."""
    tokenizer = load_tokenizer(token_set.tokenizer_path)
    found, current = [], []
    for token in getattr(token_set, part).tolist():
        if token == tokenizer.token_to_id(END):
            found.append(tokenizer.decode(current).encode())
            current = []
        else:
            current.append(token)
    assert not current
    return found


@pytest.mark.parametrize("part", ["train", "validation"])
def test_tokens_decode_to_the_very_bytes_of_the_documents(tmp_path, part):
    # The corpus spells <end> too: that must not read as a border.
    wanted = [document.text for document in getattr(split(CORPUS, 0.2), part)]
    assert decoded(prepare(tmp_path), part) == wanted


@pytest.mark.parametrize("part", ["train", "validation"])
def test_the_end_token_stands_behind_every_document_and_nowhere_else(tmp_path, part):
    token_set = prepare(tmp_path)
    assert load_tokenizer(token_set.tokenizer_path).token_to_id(END) == END_TOKEN
    tokens = getattr(token_set, part)
    assert tokens[-1] == END_TOKEN
    assert np.count_nonzero(tokens == END_TOKEN) == getattr(token_set.sidecar, part).documents


@pytest.mark.parametrize("text", ["ü line\n" * 700, "ü" * 3000, "\n\n  x" * 900])
def test_documents_longer_than_a_piece_keep_every_byte(tmp_path, monkeypatch, text):
    monkeypatch.setattr(tokens_module, "ENCODE_BYTES", 1001)
    texts = (text, "short", text + "end")
    corpus = Corpus(
        source="",
        documents=tuple(Document(name=str(i), text=t.encode()) for i, t in enumerate(texts)),
        skipped={},
    )
    token_set = prepare(tmp_path, corpus)
    found = decoded(token_set, "train") + decoded(token_set, "validation")
    assert sorted(found) == sorted(document.text for document in corpus.documents)


def test_vocabulary_is_learned_from_training_documents_only(tmp_path):
    parts = split(CORPUS, 0.2)
    held = parts.validation[0]
    changed = tuple(
        Document(name=d.name, text=b"zq" * (len(d.text) // 2)) if d.name == held.name else d
        for d in CORPUS.documents
    )
    first = prepare(tmp_path)
    second = prepare(tmp_path, Corpus(source="", documents=changed, skipped={}))
    assert first.tokenizer_path != second.tokenizer_path
    assert first.sidecar.vocabulary_sha256 == second.sidecar.vocabulary_sha256


def test_vocabulary_is_the_same_when_learned_twice():
    texts = [train_tokenizer(CORPUS.documents, 300).to_str() for _ in range(2)]
    assert texts[0] == texts[1]


def test_sidecar_counts_what_the_arrays_hold(tmp_path):
    token_set = prepare(tmp_path)
    sidecar, parts = token_set.sidecar, split(CORPUS, 0.2)
    for name in ("train", "validation"):
        facts, array, wanted = getattr(sidecar, name), getattr(token_set, name), getattr(parts, name)
        assert facts.tokens == len(array)
        assert facts.documents == len(wanted)
        assert facts.bytes == sum(len(d.text) for d in wanted)
    assert token_set.bytes_per_token == sidecar.validation.bytes / len(token_set.validation)
    assert sidecar.corpus_sha256 == CORPUS.sha256()
    assert token_set.train.dtype == np.uint16
    assert token_set.vocabulary_size == sidecar.vocabulary_size <= 300
    assert token_set.train.max() < token_set.vocabulary_size


def test_second_preparation_reads_the_cache(tmp_path, monkeypatch):
    first = prepare(tmp_path)
    monkeypatch.setattr(tokens_module, "train_tokenizer", None)
    second = prepare(tmp_path)
    assert second.sidecar == first.sidecar
    assert np.array_equal(second.train, first.train)


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": make_corpus(seed=1)},
        {"vocabulary_size": 290},
        {"validation_share": 0.3},
    ],
)
def test_another_text_or_setting_has_another_cache_folder(tmp_path, change):
    assert prepare(tmp_path).tokenizer_path != prepare(tmp_path, **change).tokenizer_path


def cut_file(folder):
    data = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(data[:-2])


def flip_bit(folder):
    data = bytearray((folder / "validation.bin").read_bytes())
    data[7] ^= 1
    (folder / "validation.bin").write_bytes(data)


def change_count(folder):
    sidecar = json.loads((folder / "tokens.json").read_text())
    sidecar["train"]["tokens"] += 1
    (folder / "tokens.json").write_text(json.dumps(sidecar))


DAMAGES = {
    "file cut short": cut_file,
    "bit flipped": flip_bit,
    "wrong count": change_count,
    "no sidecar": lambda folder: (folder / "tokens.json").unlink(),
    "no tokens": lambda folder: (folder / "train.bin").unlink(),
    "sidecar is not JSON": lambda folder: (folder / "tokens.json").write_text("{"),
    "sidecar of another shape": lambda folder: (folder / "tokens.json").write_text('["x"]'),
    "sidecar is binary": lambda folder: (folder / "tokens.json").write_bytes(b"\xff\0"),
    "tokenizer changed": lambda folder: (folder / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_cache_is_built_again_and_never_trusted(tmp_path, damage):
    first = prepare(tmp_path)
    folder = first.tokenizer_path.parent
    expected = first.train.tolist()
    damage(folder)
    assert read_sidecar(folder) is None
    again = prepare(tmp_path)
    assert again.sidecar == first.sidecar
    assert again.train.tolist() == expected
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_concurrent_preparers_get_equal_tokens_and_leave_one_folder(tmp_path):
    results, start = [], threading.Barrier(4)

    def worker():
        start.wait()
        results.append(prepare(tmp_path))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(r.sidecar == results[0].sidecar for r in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(path, pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens_module, "_write", full_disk)
    with pytest.raises(EnvironmentFault, match=r"No space left on device; set trainer\.data\.cache_dir"):
        prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_that_cannot_exist_is_the_environments_fault(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="tokens cannot be stored") as error:
        prepare(tmp_path / "file" / "cache")
    assert "\n" not in str(error.value)


def test_default_cache_is_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert prepare("").tokenizer_path.is_relative_to(tmp_path / ".cache" / "hybrid-predict-trainer")


def test_maps_stay_readable_when_the_cache_is_deleted(tmp_path):
    token_set = prepare(tmp_path)
    expected = token_set.train.tolist()
    shutil.rmtree(tmp_path)
    assert token_set.train.tolist() == expected


def test_a_file_that_is_no_tokenizer_is_a_data_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.json")
