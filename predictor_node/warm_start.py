"""What earlier runs have taught, as one file for `predictor.state`: written by `predictor-node fit`.

    8 bytes magic, 32 bytes SHA-256 of the rest, 8 bytes length of the JSON, JSON, safetensors

Nothing in it runs: JSON and safetensors, read only after the digest and the schema agree.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from common.errors import CheckpointError, EnvironmentFault
from predictor_node.policy import PolicyState

MAGIC = b"HPTSTATE"
SCHEMA = 2  # 2: networks over the features of version 2
MAX_BYTES = 1 << 30
FIT_AGAIN = "fit it again from recordings of this version (predictor-node fit)"
_DIGEST_BYTES, _LENGTH_BYTES = 32, 8


def write_warm_start(path: Path, state: PolicyState) -> None:
    """Whole or not at all. Raises EnvironmentFault."""
    text = json.dumps({"schema": SCHEMA, "values": dict(state.values)}, sort_keys=True).encode()
    body = len(text).to_bytes(_LENGTH_BYTES, "little") + text + state.tensors
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
        temporary.replace(path)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}") from None


def read_warm_start(path: str | Path) -> PolicyState:
    """Raises CheckpointError in one line for a file that is not one, damaged, or of another schema."""
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: larger than any predictor state")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; make one with predictor-node fit"
        ) from None
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path}: not a predictor state; make one with predictor-node fit")
    digest, body = content[len(MAGIC) :][:_DIGEST_BYTES], content[len(MAGIC) + _DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(f"{path}: damaged (its digest does not match); {FIT_AGAIN}")
    length = int.from_bytes(body[:_LENGTH_BYTES], "little")
    text, tensors = body[_LENGTH_BYTES : _LENGTH_BYTES + length], body[_LENGTH_BYTES + length :]
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path}: schema {document['schema']!r:.40}, this version reads {SCHEMA}; {FIT_AGAIN}"
            )
        return PolicyState(values=dict(document["values"]), tensors=tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r:.80}); {FIT_AGAIN}") from None
