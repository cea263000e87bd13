"""New weights for a running vLLM server: the version of each token, both ways of travel, the probe."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
from playing import NEVER, assert_stamped_right, config_of, probe_of, sampling, tokens_given, until
from torch import Tensor

from vcpo.errors import PublicationError, WorkerError
from vcpo.samplers.protocol import Completion
from vcpo.samplers.vllm.inside.vcpo_rendezvous import WeightGroup
from vcpo.samplers.vllm.process import free_port
from vcpo.samplers.vllm.sampler import VllmSampler
from vcpo.weights import WeightFile, announced_weights, checksum, weight_tensors, write_weights

pytestmark = pytest.mark.xdist_group("served")

PROMPTS = [tiny.random_tokens(length, length) for length in (3, 8, 31)]


def weights_of(version: int) -> dict[str, Tensor]:
    return weight_tensors(tiny.llama(version))


async def serve(sampler: VllmSampler, version: int) -> None:
    model = tiny.llama(version)
    answer = await sampler.update(version, weight_tensors(model), probe_of(model))
    assert answer == checksum(weight_tensors(model))
    assert sampler.version == version


def begin(sampler: VllmSampler, max_tokens: int) -> list[asyncio.Task[Completion]]:
    return [
        asyncio.ensure_future(sampler.generate(p, max_tokens=max_tokens, stop=NEVER, seed=i, session=i))
        for i, p in enumerate(PROMPTS)
    ]


async def under_way(url: str, tokens: int) -> None:
    """Return when that many more tokens have been sampled."""
    before = tokens_given(url)
    await until(lambda: tokens_given(url) >= before + tokens)


def test_keep_swaps_between_two_tokens_and_leaves_no_stale_keys(served: str, model: Path) -> None:
    async def run() -> list[Completion]:
        async with sampling(config_of(model, urls=[served])) as sampler:
            await serve(sampler, 1)
            calls = begin(sampler, 1600)
            for version in (2, 3):
                await under_way(served, 20)
                await serve(sampler, version)
            return await asyncio.gather(*calls)

    models = {v: tiny.llama(v) for v in (1, 2, 3)}
    for prompt, done in zip(PROMPTS, asyncio.run(run()), strict=True):
        assert len(done.tokens) == 1600
        assert done.versions == sorted(done.versions)
        assert set(done.versions) == {1, 2, 3}
        assert_stamped_right(models, prompt, done, tolerance=3e-5)


def test_drain_lets_conversations_end_before_it_updates(served: str, model: Path) -> None:
    async def run() -> tuple[list[Completion], list[Completion], Completion]:
        async with sampling(config_of(model, urls=[served], update="drain")) as sampler:
            await serve(sampler, 1)
            calls = begin(sampler, 100)
            await under_way(served, 10)
            update = asyncio.ensure_future(serve(sampler, 2))
            await asyncio.sleep(0)
            late = asyncio.ensure_future(
                sampler.generate(PROMPTS[0], max_tokens=20, stop=NEVER, seed=9, session=9)
            )
            first = await asyncio.gather(*calls)
            second = await asyncio.gather(  # the next turn of a conversation under way
                *(
                    sampler.generate([*p, *c.tokens, 5], max_tokens=20, stop=NEVER, seed=i, session=i)
                    for i, (p, c) in enumerate(zip(PROMPTS, first, strict=True))
                )
            )
            assert not update.done() and not late.done()
            for session in range(len(PROMPTS)):
                sampler.release(session)
            await update
            return first, second, await late

    first, second, late = asyncio.run(run())
    assert {v for c in (*first, *second) for v in c.versions} == {1}
    assert set(late.versions) == {2}
    models = {1: tiny.llama(1), 2: tiny.llama(2)}
    assert_stamped_right(models, PROMPTS[0], late)
    for prompt, one, two in zip(PROMPTS, first, second, strict=True):
        assert_stamped_right(models, [*prompt, *one.tokens, 5], two)


def test_a_file_that_is_there_is_read_where_it_is(served: str, model: Path, tmp_path: Path) -> None:
    """As runs do it: the learner writes, samplers hand on the path."""

    async def run() -> str:
        write_weights(path := tmp_path / "version-4.safetensors", weights_of(4))
        async with sampling(config_of(model, urls=[served])) as sampler:
            return await sampler.update(4, WeightFile(path), probe_of(tiny.llama(4)))

    assert asyncio.run(run()) == checksum(weights_of(4))
    assert (tmp_path / "version-4.safetensors").exists()


def test_a_broadcast_brings_the_same_bytes(served: str, model: Path) -> None:
    def send(group: WeightGroup, weights: Mapping[str, Tensor]) -> None:
        for _, tensor in sorted(weights.items()):
            group.broadcast(tensor.contiguous())

    async def run() -> Completion:
        async with sampling(config_of(model, urls=[served], transfer="collective")) as sampler:
            port, size = free_port(), 1 + sum(await sampler.ranks())
            group, _ = await asyncio.gather(
                asyncio.to_thread(WeightGroup, "127.0.0.1", port, 0, size, "cpu", 300.0),
                sampler.meet("127.0.0.1", port, 1, size),
            )
            for version in (5, 6):
                weights = weights_of(version)
                announced = announced_weights(
                    [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in weights.items()]
                )
                answer, _ = await asyncio.gather(
                    sampler.update(version, announced, probe_of(tiny.llama(version))),
                    asyncio.to_thread(send, group, weights),
                )
                assert answer == checksum(weights)
            return await sampler.generate(PROMPTS[1], max_tokens=20, stop=NEVER, seed=0)

    done = asyncio.run(run())
    assert set(done.versions) == {6}
    assert_stamped_right({6: tiny.llama(6), 5: tiny.llama(5)}, PROMPTS[1], done)


def test_the_probe_finds_a_head_that_did_not_arrive(served: str, model: Path) -> None:
    """vLLM takes half a model without a word, and keeps the old tensors for the rest."""

    async def run() -> None:
        async with sampling(config_of(model, urls=[served])) as sampler:
            await serve(sampler, 1)
            headless = {name: t for name, t in weights_of(2).items() if name != "lm_head.weight"}
            await sampler.update(2, headless, probe_of(tiny.llama(2)))

    with pytest.raises(PublicationError, match=r"vLLM server 0 at http.* does not serve version 2: .* nats"):
        asyncio.run(run())


def test_the_probe_finds_an_update_that_did_nothing(served: str, model: Path) -> None:
    """Also between two versions that differ by less than the tolerance."""

    async def run() -> None:
        async with sampling(config_of(model, urls=[served])) as sampler:
            await serve(sampler, 1)
            near = tiny.llama(1)
            for tensor in weight_tensors(near).values():
                tensor *= 1.001
            await sampler.update(2, weights_of(1), probe_of(near))

    with pytest.raises(PublicationError, match=r"vLLM server 0 .* still serves the version before 2"):
        asyncio.run(run())


def test_weights_of_another_shape_are_refused_and_the_server_goes_on(served: str, model: Path) -> None:
    async def run() -> None:
        async with sampling(config_of(model, urls=[served])) as sampler:
            wrong = weight_tensors(tiny.llama(2, num_hidden_layers=3))
            with pytest.raises(WorkerError, match=r"vLLM server 0 .* answered /update_weights with 500"):
                await sampler.update(2, wrong, probe_of(tiny.llama(2)))
            await serve(sampler, 3)

    asyncio.run(run())


def test_after_an_update_that_breaks_off_anywhere_the_server_goes_on_and_takes_the_next(
    served: str, model: Path
) -> None:
    """As a broadcast does when another server is lost: some layers are whole by then, one has half of its
    tensors."""

    async def run() -> None:
        async with sampling(config_of(model, urls=[served])) as sampler:
            for version, name in enumerate(sorted(weights_of(0)), start=1):
                wrong = weights_of(version)
                wrong[name] = wrong[name].new_zeros(3, *wrong[name].shape)
                with pytest.raises(WorkerError, match="answered /update_weights with 500"):
                    await sampler.update(100 + version, wrong)
                await sampler.generate(PROMPTS[0], max_tokens=2, stop=NEVER, seed=0)
                await serve(sampler, version)

    asyncio.run(run())
