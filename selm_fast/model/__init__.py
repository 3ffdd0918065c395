"""The policy: an unmodified transformers model that reads packed, shared-prefix batches."""

from selm_fast.model.policy import Policy

__all__ = ["Policy"]
