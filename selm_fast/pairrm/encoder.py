"""PairRM's network: DeBERTa over a row, and a head over the hidden states of the row's three prefixes.

    C(row) = f([h_source; h_left]) - f([h_source; h_right]),   f = Linear(2H, H), Tanh, Linear(H, 1)

> 0 where the left candidate is the better one (LLM-Blender, arXiv 2306.02561, section 3.2; llm-blender 0.0.2,
CrossCompareReranker).
"""

from __future__ import annotations

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model
from transformers.initialization import no_init_weights

from selm_fast.errors import Refused
from selm_fast.pairrm.checkpoint import ENCODER, Checkpoint
from selm_fast.pairrm.deberta import Positions, project_positions, states_at

SHOWN = 3


class PairEncoder(nn.Module):
    """The network, its parts named as in a checkpoint; dropout is off."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Identity(), nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Identity(), nn.Linear(hidden, 1)
        )
        self._positions: list[Positions] | None = None  # of the weights as they are when the first rows come
        self.eval()

    @torch.inference_mode()
    def forward(self, ids: Tensor, lengths: Tensor, prefixes: Tensor) -> Tensor:
        """Logits of rows: (N,), of the head's dtype.

        ids: (N, T) int64, padded on the right; lengths: (N,) int64, of the rows without padding.
        prefixes: (N, 3) int64, where the prefixes of prompt, left and right candidate stand.
        """
        if self._positions is None:
            self._positions = project_positions(self.pretrained_model)
        marks = states_at(self.pretrained_model, self._positions, ids, lengths, prefixes)
        source, left, right = marks.to(next(self.head_layer.parameters()).dtype).unbind(1)
        better: Tensor = self.head_layer(torch.cat([source, left], 1)) - self.head_layer(torch.cat([source, right], 1))
        return better.squeeze(1)


def load(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> PairEncoder:
    """The network with the weights of a checkpoint. dtype: of the encoder; the head is in fp32 where that is less.

    Raises Refused where tensors are missing, too many or of other shapes.
    """
    try:
        with no_init_weights():
            network = PairEncoder(DebertaV2Config.from_dict(checkpoint.encoder))
        tensors = safetensors.torch.load_file(checkpoint.weights)
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise Refused(f"{checkpoint.source} cannot be loaded: {error}") from error
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:SHOWN]) + f"; and {len(problems) - SHOWN} more" * (len(problems) > SHOWN)
        raise Refused(f"{checkpoint.weights} is not a PairRM's: {shown}")
    of_head = torch.promote_types(dtype, torch.float32)
    tensors = {name: tensor.to(dtype if name.startswith(ENCODER) else of_head) for name, tensor in tensors.items()}
    network.load_state_dict(tensors, assign=True)
    return network.to(device).requires_grad_(False)
