"""The unit of training: one prompt with its two or three responses, as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """One prompt and its responses; equal responses are equal lists and cost nothing extra.

    prompt, chosen, rejected, explored: lists of token ids; `explored` is None where the group has no explored response.
    row_id: the dataset row (counted from 0), for messages; None where there is none.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    explored: list[int] | None = None
    row_id: int | None = None

    def responses(self) -> list[list[int]]:
        """The distinct responses, in the order chosen, rejected, explored."""
        distinct: list[list[int]] = []
        for response in (self.chosen, self.rejected, self.explored):
            if response is not None and response not in distinct:
                distinct.append(response)
        return distinct

    def num_tokens(self) -> int:
        """Rows of the packed batch that this group takes: the prompt once, no response's last token."""
        return len(self.prompt) - 1 + sum(len(response) for response in self.responses())
