"""The low-level operations: tensors in, tensors out. Needs torch and nothing else of this package."""

from selm_fast.ops.attention import shared_prefix_attention
from selm_fast.ops.linear_logprob import linear_logprob
from selm_fast.ops.preference_loss import Pairs, preference_loss
from selm_fast.ops.sequence_sum import sequence_sum

__all__ = ["Pairs", "backends", "linear_logprob", "preference_loss", "sequence_sum", "shared_prefix_attention"]


def backends(device: str = "cpu") -> dict[str, str]:
    """Which back end serves each op on a device ("cpu" or "cuda")."""
    attention = "torch flash attention by branch" if device == "cpu" else "torch by branch"
    return dict.fromkeys(("linear_logprob", "sequence_sum", "preference_loss"), "torch") | {
        "shared_prefix_attention": attention
    }
