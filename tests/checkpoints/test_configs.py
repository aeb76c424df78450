# SPDX-License-Identifier: Apache-2.0
import math
from types import SimpleNamespace

import pytest

from t2p_fast.checkpoints import check_numbers, shown


@pytest.mark.parametrize(
    ("value", "interval", "fits"),
    [
        (0, "[0, 1]", True),
        (1.0, "[0, 1]", True),
        (1, "[0, 1)", False),
        (0.0, "(0, inf)", False),
        (5e-324, "(0, inf)", True),
        (math.inf, "[0, inf)", False),
        (math.nan, "[0, inf)", False),
        (math.nan, "[-inf, inf]", False),
        (10**400, "[1, 1e9]", False),
        ((1, 2), "[1, 2]", True),
        ((1, 3), "[1, 2]", False),
        ((), "[1, 2]", True),
        (None, "[1, 2]", True),
    ],
)
def test_check_numbers(value: object, interval: str, fits: bool) -> None:
    config = SimpleNamespace(rate=value)
    if fits:
        check_numbers(config, "run.", rate=interval)
        return
    with pytest.raises(ValueError, match=r"^run\.rate is .*, expected within ") as caught:
        check_numbers(config, "run.", rate=interval)
    assert str(caught.value).endswith(interval)


def test_shown_is_short() -> None:
    assert shown("a red circle") == "'a red circle'"
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10_000, deep, list(range(10_000)), 10**4000):
        assert len(shown(value)) <= 100
