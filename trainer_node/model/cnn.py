"""A small CNN for 8 x 8 grey images: the model of the digits task.

Three 3 x 3 convolutions (C, 2C stride 2, 2C) with ReLU, mean over places, a linear head; biases, no
normalisation, so that a weight delta moves nothing but weights (BatchNorm statistics would be
stale after a jump). PyTorch's default init (Kaiming uniform, a = sqrt 5).

B images, C channels, N classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from common.settings import ModelSettings

CLASSES = 10


class DigitsCNN(nn.Module):
    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        channels = settings.channels
        self.conv_first = nn.Conv2d(1, channels, 3, padding=1)
        self.conv_second = nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2)
        self.conv_third = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(2 * channels, CLASSES)

    def forward(self, images_B1HW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Logits (B, N) float32, or with labels the mean loss () in nats per image.

        Images are float32 in [0, 1], labels int64 in [0, N).
        """
        maps = F.relu(self.conv_first(images_B1HW))
        maps = F.relu(self.conv_second(maps))
        maps = F.relu(self.conv_third(maps))
        logits_BN = self.head(self.dropout(maps.mean(dim=(2, 3)))).float()
        return logits_BN if labels_B is None else F.cross_entropy(logits_BN, labels_B)
