"""What a learner's process does, or that of one of its ranks, whoever asks: a channel or a Ray actor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcpo.config import Config
from vcpo.runtime.outbox import Outbox
from vcpo.runtime.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from vcpo.learner.ranks import Ranks


def configured(description: dict[str, Any]) -> Config:
    """The config of the run, as it was sent; limits this process's threads."""
    import torch

    config = Config.model_validate(description)
    torch.set_num_threads(config.runtime.threads)
    return config


def meet_ranks(place: dict[str, Any], config: Config) -> Ranks:
    """Join the other ranks of the learner: ``rank`` of ``size``, at ``meeting``; on ``device``, or on the one
    that the config gives this rank."""
    from vcpo.learner.ranks import device_of, join

    rank, timeout = place["rank"], config.runtime.timeout_seconds
    device = place["device"] or device_of(rank, config.model.device)
    return join(rank, place["size"], place["meeting"], device, timeout)


class LearnerWorker:
    """A learner service, and the way its weights leave. Arguments and answers are JSON, but for records."""

    def __init__(
        self, config: Config, run_folder: Path, outbox: Outbox, on_loss: Callable[[float], None]
    ) -> None:
        """``on_loss`` hears of every step of a warm start."""
        from vcpo.pipeline.services import LearnerService

        self._config, self._outbox, self._on_loss = config, outbox, on_loss
        self._service = LearnerService(config, run_folder)
        self._first = True
        """Whether this is the first rank, which speaks for all."""

    def prepare(self, resume: bool) -> Reply:
        self._service.prepare(resume=resume, listener=self._on_loss)
        return {}

    def begin(self, resume: bool, ranks: dict[str, Any] | None) -> Reply:
        together = {}
        if ranks is not None:
            self._first = ranks["rank"] == 0
            together = {"ranks": meet_ranks(ranks, self._config)}
        begun = self._service.begin(resume=resume, listener=self._on_loss, **together)
        return {"begun": vars(begun), "publication": self.publication(self._outbox)}

    def step(self, records: Sequence[bytes], skipped: Sequence[tuple[int, float]]) -> Reply:
        metrics = self._service.step(records, [(problem, reward) for problem, reward in skipped])
        return {"metrics": metrics, "publication": self.publication(self._outbox)}

    def choose(self, numbers: Sequence[int]) -> Reply:
        return {"problems": self._service.choose(numbers)}

    def checkpoint(self, position: dict[str, Any]) -> Reply:
        self._service.checkpoint(position)
        return {}

    def export(self, folder: str) -> Reply:
        self._service.export(Path(folder))
        return {}

    def meet(self, address: str, port: int, world_size: int) -> Reply:
        self._outbox.meet(address, port, world_size)
        return {}

    def broadcast(self) -> Reply:
        self._outbox.send(self._service.tensors())
        return {}

    def close(self) -> None:
        self._outbox.close()

    def publication(self, outbox: Outbox) -> Reply:
        """Put the current weights where the samplers can take them; the first of several ranks does so."""
        version, weights, checksum = self._service.weights()
        probe = self._service.probe()
        return {
            "version": version,
            "checksum": checksum,
            "source": outbox.put(version, weights) if self._first else None,
            "probe": None if probe is None else vars(probe),
        }
