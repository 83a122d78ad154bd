"""Text from a trained model, token by token.

Same seed, same text on the same machine. Owns no files: the caller loads model and tokenizer.

T tokens, V vocabulary.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trainer_node.model.gpt import GPT
from trainer_node.tokens import END


@torch.no_grad()
def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The prompt and up to `max_tokens` more tokens; ends early at the end of a document.

    Temperature 0 takes the likeliest token; top_k 0 chooses among all. A prompt longer than the
    context is remembered only by its end. The model is left in the mode it was found in.
    """
    end = tokenizer.token_to_id(END)
    assert end is not None, f"the tokenizer has no {END}"
    device = next(model.parameters()).device
    # Draws are made on the CPU, so the seed means the same on every device.
    random = torch.Generator().manual_seed(seed)
    # A document begins after the end of another, which is how an empty prompt begins.
    chosen = [end, *tokenizer.encode(prompt).ids]
    was_training = model.training
    model.eval()
    for _ in range(max_tokens):
        window_1T = torch.tensor([chosen[-model.settings.context_tokens :]], device=device)
        logits_V = model(window_1T)[0, -1, : tokenizer.get_vocab_size()].cpu()
        token = _draw(logits_V, temperature=temperature, top_k=top_k, random=random)
        if token == end:
            break
        chosen.append(token)
    model.train(was_training)
    return tokenizer.decode(chosen[1:])


def _draw(logits_V: Tensor, *, temperature: float, top_k: int, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if 0 < top_k < len(logits_V):
        threshold = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=random))
