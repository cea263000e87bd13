"""Mathematics with known answers (GSM8K, MATH), one turn, checked by math-verify.

Departure from the official code of VCPO (arXiv 2602.17616), which builds on the rewards of verl: here one
rule is for all, :meth:`vcpo.environments.checking.AnswerChecker.is_right`.
"""

from __future__ import annotations

from typing import ClassVar

from vcpo.config import EnvironmentConfig
from vcpo.environments.checking import AnswerChecker
from vcpo.environments.protocol import Codec
from vcpo.environments.single_turn import SingleTurn

REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."


class Mathematics(SingleTurn):
    """Problems whose answers are numbers, expressions, intervals, sets, matrices; reward 1 for an equal
    one."""

    default_template: ClassVar[str] = "{prompt}\n" + REQUEST

    def __init__(self, codec: Codec, config: EnvironmentConfig) -> None:
        super().__init__(codec, config)
        self._checker = AnswerChecker()

    async def is_right(self, response: str, answer: str) -> bool:
        """Whether the response's answer equals ``answer``."""
        return await self._checker.is_right(response, answer)
