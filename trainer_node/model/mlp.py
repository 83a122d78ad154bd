"""A multi-layer perceptron: the model of the regression task.

Input layer, then `layers` - 1 more hidden layers, all of `width` with GELU, a linear output; biases, no
normalisation. PyTorch's default init. Owns no data: synthetic.py has the teacher.

B examples, I inputs, D width, O outputs.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from common.settings import ModelSettings

INPUTS, OUTPUTS = 32, 8


class RegressionMLP(nn.Module):
    """Names follow the parameter groups: `embed_input`, `mlp.2`, `head`."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.embed_input = nn.Linear(INPUTS, width)
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(settings.layers - 1))
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(width, OUTPUTS)

    def forward(self, inputs_BI: Tensor, targets_BO: Tensor | None = None) -> Tensor:
        """Outputs (B, O) float32, or with targets their mean squared error ()."""
        hidden_BD = F.gelu(self.embed_input(inputs_BI))
        for layer in self.mlp:
            hidden_BD = F.gelu(layer(hidden_BD))
        outputs_BO = self.head(self.dropout(hidden_BD)).float()
        return outputs_BO if targets_BO is None else F.mse_loss(outputs_BO, targets_BO)
