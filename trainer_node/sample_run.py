"""Text from the newest checkpoint of a run folder."""

from __future__ import annotations

from pathlib import Path

import torch

from common.errors import UserError
from trainer_node.checkpoint import load_weights
from trainer_node.run_folder import newest_checkpoint, open_existing
from trainer_node.sample import generate
from trainer_node.tasks import build_model
from trainer_node.tokens import load_tokenizer


def sample_run(
    run_dir: Path, *, prompt: str, max_tokens: int, temperature: float, top_k: int, seed: int
) -> str:
    """Raises UserError when the run is no language model, CheckpointError without a whole checkpoint."""
    run, settings = open_existing(run_dir)
    tokenizer_file = run.tokenizer
    if settings.trainer.task != "language" or not tokenizer_file.is_file():
        raise UserError(
            f"{run.path}: is not a language model; train one with `trainer-node up --preset nano`"
        )
    folder, _ = newest_checkpoint(run, with_predictor=False)
    model = build_model(settings.trainer, torch.device("cpu"))
    load_weights(folder, model)
    tokenizer = load_tokenizer(tokenizer_file)
    known_tokens = model.settings.vocabulary_size
    if tokenizer.get_vocab_size() > known_tokens:
        raise UserError(
            f"{tokenizer_file}: has more tokens than the model ({known_tokens}); use the run's own"
        )
    return generate(
        model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
