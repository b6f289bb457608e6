"""What a judge may spend, and what it has spent."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sauce_hooks.errors import JudgeBudgetError


@dataclass(frozen=True)
class Budget:
    """The most that an endpoint judge may spend in its life; None is no limit. What is in the cache costs nothing.

    Tokens and cost are known when an answer is there, so those under way at that moment (as many as there are workers) may
    go beyond a limit.

    Raises:
        ValueError: a negative limit or price, or a limit of cost without prices.
    """

    max_requests: int | None = None
    """Requests sent, each retry counted."""
    max_tokens: int | None = None
    """Tokens sent and received."""
    max_cost: float | None = None
    """In the currency of the prices."""
    price_in: float | None = None
    """Of a million tokens sent."""
    price_out: float | None = None
    """Of a million tokens received."""

    def __post_init__(self) -> None:
        limits = (self.max_requests, self.max_tokens, self.max_cost, self.price_in, self.price_out)
        if any(limit is not None and not limit >= 0 for limit in limits):
            raise ValueError(f"limits and prices can't be negative: {self}")
        if self.max_cost is not None and None in (self.price_in, self.price_out):
            raise ValueError("max_cost needs price_in and price_out, of a million tokens each")


class Account:
    """What has been spent of a budget; several threads spend from it."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.requests = 0
        self.tokens_in = 0
        self.tokens_out = 0
        self._lock = threading.Lock()

    @property
    def cost(self) -> float:
        """In the currency of the prices."""
        prices = self.budget.price_in or 0.0, self.budget.price_out or 0.0
        return (self.tokens_in * prices[0] + self.tokens_out * prices[1]) / 1e6

    def request(self) -> None:
        """Count a request that is about to be sent.

        Raises:
            JudgeBudgetError: it may not be.
        """
        with self._lock:
            limits = {
                "requests": (self.requests, self.budget.max_requests),
                "tokens": (self.tokens_in + self.tokens_out, self.budget.max_tokens),
                "cost": (self.cost, self.budget.max_cost),
            }
            for what, (spent, limit) in limits.items():
                if limit is not None and spent >= limit:
                    raise JudgeBudgetError(f"the judge may spend no more: {what} {spent:,} of {limit:,} ({self})")
            self.requests += 1

    def answered(self, tokens_in: int, tokens_out: int) -> None:
        """Count what an answer took."""
        with self._lock:
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out

    def __str__(self) -> str:
        tokens = f"{self.requests:,} requests, {self.tokens_in:,} tokens sent, {self.tokens_out:,} received"
        return tokens if self.budget.price_in is None else f"{tokens}, cost {self.cost:.4f}"
