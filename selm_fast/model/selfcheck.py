"""Before any work: does this model, packed, say what it says by itself?"""

from __future__ import annotations

import torch

from selm_fast.data.groups import TokenGroup
from selm_fast.data.packing import pack
from selm_fast.errors import Refused
from selm_fast.model.attention import NAME
from selm_fast.model.fused_layers import unfused
from selm_fast.model.policy import Policy

# Largest difference of a token's log-prob (nats). A head scaled wrongly, a mask or a position that is off errs by more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@torch.no_grad()
def check_packed(policy: Policy, source: str) -> None:
    """Compare log-probs through the packed path and fused layers with the model's own logits, a sequence at a time.

    Raises Refused where they differ, or where the packed path fails: the model has something (a scaled head, another
    mask, attention sinks) that is not served.
    """
    model = policy.model
    device, dtype = policy.head.weight.device, policy.head.weight.dtype
    ids = torch.randint(policy.head.weight.shape[0], (17,), generator=torch.Generator().manual_seed(0)).tolist()
    group = TokenGroup(ids[:6], ids[6:11], ids[11:14], ids[14:])
    batch = pack([group])[0]
    try:
        packed = policy.token_logps(batch.to(device)).double().cpu()
    except (ValueError, TypeError) as cause:
        raise Refused(f"{source} ({model.config.model_type}) cannot read packed batches: {cause}") from cause

    model.set_attn_implementation("eager")
    own = []
    for response in group.responses():
        inputs = torch.tensor([group.prompt + response], device=device)
        with unfused(model):
            logits = model(input_ids=inputs, use_cache=False).logits[0, len(group.prompt) - 1 : -1].double()
        own.append(
            logits.log_softmax(-1).gather(1, torch.tensor(response, device=device).unsqueeze(1)).squeeze(1).cpu()
        )
    model.set_attn_implementation(NAME)
    error = (packed - torch.cat(own)).abs().max().item()
    if not error <= TOLERANCE[dtype]:
        raise Refused(
            f"{source} ({model.config.model_type}): log-probs through packed batches differ from the model's own by "
            f"{error:.2g} nats "
            f"a token (at most {TOLERANCE[dtype]:g} expected); this model is not served"
        )
