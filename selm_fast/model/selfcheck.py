"""Before any work: does this model, packed, say what it says by itself?"""

from __future__ import annotations

import torch

from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import pack
from selm_fast.errors import Refused
from selm_fast.model.policy import Policy

# Largest difference of a token's log-prob (nats). A head scaled wrongly, a mask or a position that is off errs by more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@torch.no_grad()
def check_packed(policy: Policy, source: str, dtype: torch.dtype | None = None) -> None:
    """Compare log-probs through the packed path, the fused layers and the fused head with the model's own logits.

    dtype: that the model computes in (default: of its weights).
    Raises Refused where they differ, or where the packed path fails: the model has something (a scaled head, another
    mask, attention sinks) that is not served.
    """
    tolerance = TOLERANCE[dtype or policy.head.weight.dtype]
    kind, device = policy.model.config.model_type, policy.head.weight.device
    ids = torch.randint(policy.head.weight.shape[0], (17,), generator=torch.Generator().manual_seed(0)).tolist()
    group = TokenGroup(ids[:6], ids[6:11], ids[11:14], ids[14:])
    batch = pack([group])[0]
    try:
        packed = policy.token_logps(batch.to(device)).double()
    except (ValueError, TypeError) as cause:
        raise Refused(f"{source} ({kind}) cannot read packed batches: {cause}") from cause
    own = torch.cat([policy.own_logps(group.prompt, response) for response in group.responses()])
    error = (packed - own).abs().max().item()
    if not error <= tolerance:
        raise Refused(
            f"{source} ({kind}): log-probs through packed batches differ from the model's own by {error:.2g} nats "
            f"a token (at most {tolerance:g} expected); this model is not served"
        )
