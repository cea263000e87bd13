"""From ``sampler.kind`` to an engine, and to what the environment needs to talk to it.

The controller checks settings here too, so torch and transformers are imported by the engines alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from vcpo.config import Config
from vcpo.environments.protocol import Codec
from vcpo.errors import ConfigError
from vcpo.samplers.protocol import Sampler

if TYPE_CHECKING:
    from vcpo.policy.loading import Policy


LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine, where a broadcast meets."""


@dataclass(frozen=True)
class Share:
    """Which of several sampler processes this is: the ``index``-th of ``count``."""

    index: int = 0
    count: int = 1
    logs: Path | None = None
    """Where processes that it starts write their logs; None: a temporary folder."""


class Speaker(Protocol):
    """What the environment and the rollout loop need to know of a policy."""

    @property
    def codec(self) -> Codec: ...

    @property
    def stop(self) -> frozenset[int]: ...

    @property
    def context_length(self) -> int: ...


Engine = Callable[[Config, "str | Policy", Share], tuple[Speaker, Sampler]]


def local_engine(config: Config, policy: str | Policy, share: Share) -> tuple[Speaker, Sampler]:
    """transformers in this process, with a replica of the policy."""
    from vcpo.policy.loading import Policy, for_sampling, load_policy
    from vcpo.policy.lora import with_adapters
    from vcpo.samplers.local import LocalSampler

    if isinstance(policy, Policy):
        replica = Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.context_length, policy.name)
    else:
        replica = load_policy(policy, for_sampling(config.model))
        replica = with_adapters(replica, config.lora, config.run.seed)
    timeout = config.runtime.timeout_seconds
    return replica, LocalSampler(replica.model, replica.context_length, config.sampler, timeout)


def vllm_engine(config: Config, policy: str | Policy, share: Share) -> tuple[Speaker, Sampler]:
    """vLLM servers, which load the policy themselves; here is only its text."""
    from vcpo.policy.text import load_text
    from vcpo.samplers.vllm.handshake import Expected
    from vcpo.samplers.vllm.sampler import VllmSampler

    text = load_text(policy if isinstance(policy, str) else policy.name, config.model)
    expected = Expected(
        model=text.name,
        architecture=text.architecture,
        tokenize=text.codec.encode,
        vocabulary=text.architecture["vocab_size"],
        context_length=text.context_length,
    )
    sampler = VllmSampler(config, expected, share=(share.index, share.count), logs=share.logs)
    return text, sampler


def check_engine(config: Config) -> None:
    """Raise ConfigError for settings of a run that do not go together, before anything is loaded."""
    sampler, samplers = config.sampler, config.runtime.samplers
    if sampler.transfer == "collective" and config.pipeline.mode == "exact":
        raise ConfigError(
            "sampler.transfer = 'collective' needs pipeline.mode = 'async': the exact mode has one process"
        )
    if sampler.kind != "vllm":
        return
    import vcpo.samplers.vllm.server  # noqa: F401  raises if the extra is not installed
    from vcpo.samplers.vllm.process import check_quantization

    check_quantization(sampler.quantization)
    for url in sampler.urls:
        _check_url(url, of_this_machine=sampler.transfer == "collective" and config.runtime.kind == "local")
    own_servers = samplers if config.runtime.kind == "ray" else sampler.servers
    servers = len(sampler.urls) or own_servers
    if config.pipeline.mode == "async" and samplers > servers:
        source = "sampler.urls names" if sampler.urls else "sampler.servers is"
        raise ConfigError(
            f"runtime.samplers = {samplers} share out vLLM servers, and {source} {servers}: lower the first"
        )
    if sampler.transfer == "collective" and config.lora.rank:
        raise ConfigError(
            "sampler.transfer = 'collective' needs lora.rank = 0 with vLLM, which reads adapters from files"
        )


def _check_url(url: str, *, of_this_machine: bool) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.scheme in ("http", "https") and parts.port != 0 else None
    except ValueError:  # a port or an IPv6 address that is none
        host = None
    if not host:
        raise ConfigError(f"sampler.urls has {url!r}, which is no address: write http://HOST:PORT")
    if of_this_machine and host not in LOOPBACK:
        raise ConfigError(
            f"sampler.transfer = 'collective' reaches servers of this machine, and sampler.urls has {url!r}: "
            "write http://127.0.0.1:PORT, or let files carry the weights (runtime.weights_folder)"
        )


ENGINES: dict[str, Engine] = {"local": local_engine, "vllm": vllm_engine}
