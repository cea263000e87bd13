"""What several tests of score norms need around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def norm_layers_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm layers compute in float32 whatever the model's type: let them stay in float64."""
    rounded = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else rounded(x))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
