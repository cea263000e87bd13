"""LoRA: adapters published to a vLLM server whose model stays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path

import playing
import pytest
import tiny
import torch
from playing import NEVER, config_of, probe_of, sampling, tokens_given, until
from torch import Tensor

from vcpo.config import Config
from vcpo.errors import PublicationError
from vcpo.policy.loading import Policy, load_policy
from vcpo.policy.lora import merged, with_adapters
from vcpo.samplers.protocol import Completion
from vcpo.samplers.vllm.server import Server
from vcpo.samplers.vllm.transfer import AdapterTransfer
from vcpo.weights import checksum, weight_tensors

pytestmark = pytest.mark.xdist_group("adapters")

LORA = {"rank": 6, "alpha": 12.0}
PROMPT = tiny.random_tokens(7, 0)


@pytest.fixture(scope="module")
def url(engine_python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("lora") / "log"
    with playing.vcpo_serve(engine_python, model, log, "--lora.rank", "6") as served:
        yield served


def adapted(config: Config, version: int) -> Policy:
    """The learner's policy as after ``version`` steps; after none the adapters change nothing."""
    policy = with_adapters(load_policy(config.model.name, config.model), config.lora, 0)
    torch.manual_seed(version)
    if version:
        for tensor in weight_tensors(policy.model).values():
            tensor += 0.3 * torch.randn_like(tensor)
    return policy


def test_adapters_are_served_version_by_version(url: str, model: Path) -> None:
    config = config_of(model, LORA, urls=[url])
    policies = {version: adapted(config, version) for version in (0, 1, 2)}

    async def run() -> list[Completion]:
        done = []
        async with sampling(config) as sampler:
            for version, policy in policies.items():
                weights = weight_tensors(policy.model)
                assert all("lora_" in name for name in weights)
                assert await sampler.update(version, weights, probe_of(policy.model)) == checksum(weights)
                done.append(await sampler.generate(PROMPT, max_tokens=30, stop=NEVER, seed=0))
        return done

    for version, done in enumerate(asyncio.run(run())):
        assert set(done.versions) == {version}
        models = {version: policies[version].model, 9: merged(policies[2 if version == 1 else 1]).model}
        playing.assert_stamped_right(models, PROMPT, done)


def test_a_completion_across_an_update(url: str, model: Path) -> None:
    config = config_of(model, LORA, urls=[url])
    policies = {version: adapted(config, version) for version in (1, 2)}

    async def run() -> Completion:
        async with sampling(config) as sampler:
            await sampler.update(1, weight_tensors(policies[1].model))
            before = tokens_given(url)
            call = asyncio.ensure_future(sampler.generate(PROMPT, max_tokens=400, stop=NEVER, seed=0))
            await until(lambda: tokens_given(url) > before + 10)
            await sampler.update(2, weight_tensors(policies[2].model), probe_of(policies[2].model))
            return await call

    done = asyncio.run(run())
    assert set(done.versions) == {1, 2}
    playing.assert_stamped_right({v: p.model for v, p in policies.items()}, PROMPT, done, tolerance=1e-4)


class Forgetful(AdapterTransfer):
    """Labels the version, and sends no adapter."""

    async def send(self, server: Server, version: int, weights: Mapping[str, Tensor]) -> str:
        await server.post("/update_weight_version", {"new_version": str(version)})
        return checksum(weights)


def test_the_probe_finds_an_adapter_that_never_arrives(
    url: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vcpo.samplers.vllm.sampler.transfer_for", Forgetful)
    config = config_of(model, LORA, urls=[url])
    policy = adapted(config, 1)

    async def run() -> None:
        async with sampling(config) as sampler:
            await sampler.update(1, weight_tensors(policy.model), probe_of(policy.model))

    with pytest.raises(PublicationError, match=r"vLLM server 0 .* does not serve version 1: .* nats"):
        asyncio.run(run())
