"""A small decoder: the model of the language task.

Pre-norm blocks with RMSNorm, rotary positions (Su et al. 2021, halves form), causal
`scaled_dot_product_attention` on normalised queries and keys (Henry et al. 2020; 400 steps of `nano`:
2.836 against 2.881 without), MLP with ReLU^2 (So et al. 2021, Primer; 2.881, GELU 2.946), no biases.
Names follow the parameter groups: `embedding`, `blocks.3.attention.query`, `blocks.3.mlp.up`, `head`.
Initial weights are normal with std 0.02 (GPT-2), and zero where a block writes into the residual
stream (modded-nanogpt; 400 steps of `nano`: 2.916 against 2.954 with GPT-2's 0.02 / sqrt(2 layers)),
so a fresh model is embedding and head only and its first loss is ln(vocabulary) within 2 %.
With a `document_token`, attention stays within a document: intra-document causal masking (Zhao et al. 2024,
arXiv 2402.13991). The token opens the document behind it, as it does in sampling, so no target is predicted
from another document. Positions go on over the boundary: rotary ones count as distances alone.
Owns no data, no optimizer and no device.

B sequences, T tokens, D width, H heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.settings import ModelSettings

INIT_STD = 0.02
ROTARY_BASE = 10_000.0


class GPT(nn.Module):
    cosine_TR: Tensor
    sine_TR: Tensor

    def __init__(self, settings: ModelSettings, document_token: int | None = None) -> None:
        """`document_token` begins a document; None = every token sees all tokens before it."""
        super().__init__()
        width, vocabulary_size = settings.width, settings.vocabulary_size
        self.settings, self.document_token = settings, document_token
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.final_norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        cosine_TR, sine_TR = rotary_table(settings.context_tokens, width // settings.heads)
        self.register_buffer("cosine_TR", cosine_TR, persistent=False)
        self.register_buffer("sine_TR", sine_TR, persistent=False)
        self._initialize()
        if settings.tied_head:
            self.head.weight = self.embedding.weight

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) float32, or with targets the mean loss () in nats per token.

        Inputs and targets are int64 in [0, V); T is at most the context.
        """
        length = inputs_BT.shape[1]
        assert length <= self.settings.context_tokens, f"{length} tokens do not fit into the context"
        rotary = self.cosine_TR[:length], self.sine_TR[:length]
        is_seen_B1TT = self._mask(inputs_BT)
        stream_BTD = self.dropout(self.embedding(inputs_BT))
        for block in self.blocks:
            stream_BTD = block(stream_BTD, rotary, is_seen_B1TT)
        logits_BTV = self.head(self.final_norm(stream_BTD)).float()
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def _mask(self, inputs_BT: Tensor) -> Tensor | None:
        """None = plain causal attention, whose kernels need no mask."""
        return None if self.document_token is None else within_document(inputs_BT, self.document_token)

    @torch.no_grad()
    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.zero_()
            elif parameter.ndim == 2:
                parameter.normal_(std=INIT_STD)


class Block(nn.Module):
    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.width)
        self.attention = Attention(settings)
        self.mlp_norm = nn.RMSNorm(settings.width)
        self.mlp = MLP(settings)

    def forward(
        self, stream_BTD: Tensor, rotary: tuple[Tensor, Tensor], is_seen_B1TT: Tensor | None = None
    ) -> Tensor:
        stream_BTD = stream_BTD + self.attention(self.attention_norm(stream_BTD), rotary, is_seen_B1TT)
        return stream_BTD + self.mlp(self.mlp_norm(stream_BTD))


class Attention(nn.Module):
    """Query, key and value are three matrices, because Muon orthogonalises each by itself."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.dropout = settings.heads, settings.dropout
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(
        self, normed_BTD: Tensor, rotary: tuple[Tensor, Tensor], is_seen_B1TT: Tensor | None
    ) -> Tensor:
        batch, length, width = normed_BTD.shape
        shape = (batch, length, self.heads, width // self.heads)
        query_BHTR = self.query(normed_BTD).view(shape).transpose(1, 2)
        key_BHTR = self.key(normed_BTD).view(shape).transpose(1, 2)
        value_BHTR = self.value(normed_BTD).view(shape).transpose(1, 2)
        mixed_BHTR = F.scaled_dot_product_attention(
            rotate(unit_rms(query_BHTR), rotary),
            rotate(unit_rms(key_BHTR), rotary),
            value_BHTR,
            attn_mask=is_seen_B1TT,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_seen_B1TT is None,
        )
        return self.output(mixed_BHTR.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.up = nn.Linear(settings.width, 4 * settings.width, bias=False)
        self.down = nn.Linear(4 * settings.width, settings.width, bias=False)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, normed_BTD: Tensor) -> Tensor:
        return self.dropout(self.down(F.relu(self.up(normed_BTD)).square()))


def within_document(inputs_BT: Tensor, document_token: int) -> Tensor:
    """Whether a token (second to last axis) sees another (last axis): (B, 1, T, T) bool.

    It sees itself and what is before it in its own document. A row's first document may have no token that
    begins it. Heads and blocks share the mask.
    """
    document_BT = (inputs_BT == document_token).cumsum(-1)
    is_same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return is_same_BTT.tril()[:, None]


def unit_rms(heads_BHTR: Tensor) -> Tensor:
    return F.rms_norm(heads_BHTR, heads_BHTR.shape[-1:])


def rotary_table(context_tokens: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (T, head_width // 2) float32."""
    half = head_width // 2
    speed_R = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / max(1, half))
    angle_TR = torch.arange(context_tokens, dtype=torch.float32)[:, None] * speed_R
    return angle_TR.cos(), angle_TR.sin()


def rotate(heads_BHTR: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + half) by their position's angle; an odd last channel stays."""
    cosine_TR, sine_TR = (table.to(heads_BHTR.dtype) for table in rotary)
    half = cosine_TR.shape[-1]
    first, second, rest = heads_BHTR.split((half, half, heads_BHTR.shape[-1] - 2 * half), dim=-1)
    return torch.cat(
        (first * cosine_TR - second * sine_TR, second * cosine_TR + first * sine_TR, rest), dim=-1
    )
