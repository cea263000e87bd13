"""``import vcpo`` is light, and everything it promises is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vcpo
import vcpo.estimators


def test_import_loads_no_torch_until_an_estimator_is_used() -> None:
    program = (
        "import sys, vcpo\n"
        "assert 'torch' not in sys.modules and 'ess_ratio' in dir(vcpo)\n"
        "vcpo.ess_ratio\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_export_is_the_estimator() -> None:
    names = [name for name in vcpo.__all__ if name != "__version__"]
    assert sorted(names) == sorted(vcpo.estimators.__all__)
    assert all(getattr(vcpo, name) is getattr(vcpo.estimators, name) for name in names)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vcpo.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
