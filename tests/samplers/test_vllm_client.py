"""The vLLM engine's side of HTTP: what each bad answer becomes. Real servers are in ``engine_tests``."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from vllm_stub import BREAK, FACTS, SHAPE, Stub, completion, never

from vcpo.config import Config, LoraConfig
from vcpo.errors import ConfigError, VcpoError, WorkerError
from vcpo.samplers.protocol import Completion
from vcpo.samplers.vllm.handshake import Expected
from vcpo.samplers.vllm.process import free_port
from vcpo.samplers.vllm.sampler import VllmSampler
from vcpo.samplers.vllm.server import Server, ServerLost

EXPECTED = Expected("my-model", SHAPE, lambda text: [ord(c) for c in text], 128, 64)
NEVER = frozenset[int]()


def config_of(*urls: str, timeout: float = 60.0, **sampler: Any) -> Config:
    return Config.model_validate(
        {
            "sampler": {"kind": "vllm", "urls": list(urls), **sampler},
            "runtime": {"timeout_seconds": timeout},
        }
    )


async def ask(sampler: VllmSampler, max_tokens: int = 2, session: int | None = None) -> Completion:
    return await sampler.generate([1, 2], max_tokens=max_tokens, stop=NEVER, seed=0, session=session)


def refusal(
    change: Callable[[Stub], object], expected: Expected = EXPECTED, lora_rank: int = 0, **sampler: Any
) -> str:
    """The error of a server that is changed so, and names it."""

    async def run() -> str:
        async with Stub().running() as stub:
            change(stub)
            lora = LoraConfig(rank=lora_rank)
            config = config_of(stub.url, **sampler).model_copy(update={"lora": lora})
            engine = VllmSampler(config, expected)
            try:
                with pytest.raises(ConfigError) as refused:
                    await engine.ready()
            finally:
                await engine.close()
            message = str(refused.value)
            assert message.startswith(f"vLLM server 0 at {stub.url} ")
            return message.removeprefix(f"vLLM server 0 at {stub.url} ")

    return asyncio.run(run())


def facts(**changes: object) -> Callable[[Stub], None]:
    return lambda stub: stub.answers.update({"/collective_rpc": lambda body: {"results": [FACTS | changes]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (facts(architecture=SHAPE | {"hidden_size": 128}), "its hidden_size is 128, that of my-model is 64"),
        (
            facts(max_model_len=63),
            "holds 63 tokens and model.context_length is 64: lower it, or give `vcpo serve` the",
        ),
        (facts(weight_transfer=""), "takes no weights from vcpo; start it with `vcpo serve`"),
        (lambda stub: stub.answers.pop("/collective_rpc"), "404: Not Found: it lacks what updates weights"),
        (
            lambda stub: stub.answers.update({"/tokenize": lambda body: {"tokens": [5, 6]}}),
            'has another tokenizer than my-model: it reads "What is 12 + 30? Let\'s see: x = 42." as [5, 6]…',
        ),
        (lambda stub: setattr(stub, "healthy", False), "does not answer: is it running"),
    ],
)
def test_a_server_that_is_not_the_one_meant(change: Callable[[Stub], object], message: str) -> None:
    assert message in refusal(change)


def test_shaped_sampling_needs_processed_log_probs() -> None:
    raw = facts(logprobs_mode="raw_logprobs")
    for shape in ({"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 3}):
        assert "start it with --logprobs-mode processed_logprobs" in refusal(raw, EXPECTED, 0, **shape)


def test_adapters_need_a_server_that_takes_them() -> None:
    assert "serves adapters up to rank 0 and lora.rank is 4: give `vcpo serve` the" in refusal(
        facts(), lora_rank=4
    )
    assert "serves adapters up to rank 8 and lora.rank is 16" in refusal(facts(max_lora_rank=8), lora_rank=16)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://127.0.0.1:99999", "nonsense"]
)
def test_a_wrong_url(url: str) -> None:
    async def run() -> None:
        engine = VllmSampler(config_of(url.format(port=free_port())), EXPECTED)
        try:
            with pytest.raises(ConfigError, match="does not answer: is it running, and is"):
                await engine.ready()
        finally:
            await engine.close()

    asyncio.run(run())


def playing(work: Callable[[VllmSampler, list[Stub]], Any], count: int = 1, **settings: Any) -> Any:
    """``work`` with a sampler over stubs, ready."""

    async def run() -> Any:
        async with Stub().running() as one, Stub().running() as two:
            stubs = [one, two][:count]
            engine = VllmSampler(config_of(*(stub.url for stub in stubs), **settings), EXPECTED)
            try:
                await engine.ready()
                return await work(engine, stubs)
            finally:
                await engine.close()

    return asyncio.run(run())


def test_a_completion_is_what_the_server_said() -> None:
    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        asked: list[Any] = []

        def hear(body: Any) -> Any:
            asked.append(body)
            answer = completion(body)
            answer["choices"][0] |= {
                "finish_reason": "stop",
                "token_ids": [9, 8, 1],
                "weight_versions": [
                    {"version": "default", "start": 0, "end": 1},
                    {"version": "4", "start": 1, "end": 3},
                ],
                "logprobs": {"content": [{"logprob": x} for x in (-1.0, -2.0, -3.0)]},
            }
            return answer

        stubs[0].answers["/inference/v1/generate"] = hear
        done = await engine.generate(
            [5, 6], max_tokens=7, stop=frozenset({4, 1}), seed=2**63 + 9, greedy=True
        )
        assert done == Completion([9, 8, 1], [-1.0, -2.0, -3.0], [0, 4, 4], "stop")
        assert (asked[0]["token_ids"], asked[0]["model"]) == ([5, 6], "served-model")
        sampling = asked[0]["sampling_params"]
        wanted = {
            "max_tokens": 7,
            "stop_token_ids": [1, 4],
            "seed": 9,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        assert {key: sampling[key] for key in wanted} == wanted
        assert (engine.sampled_tokens, engine.servers[0].outstanding) == (3, 0)

    playing(work)


def test_a_broken_connection_is_tried_again_and_then_told() -> None:
    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        answers = iter([BREAK, BREAK])
        stubs[0].answers["/inference/v1/generate"] = lambda body: next(answers, completion(body))
        assert (await ask(engine)).tokens == [7, 7]
        stubs[0].answers["/inference/v1/generate"] = lambda body: BREAK
        with pytest.raises(WorkerError, match="broke the connection of /inference/v1/generate"):
            await ask(engine)
        assert engine.servers[0].outstanding == 0

    playing(work)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda body: web.json_response({"error": {"message": "bad\n seed"}}, status=400),
            "with 400: bad\n seed",
        ),
        (
            lambda body: web.Response(status=500, text="Internal  Server\nError"),
            "with 500: Internal Server Error",
        ),
        (lambda body: web.Response(status=500), "with 500: no reason given"),
        (
            lambda body: {"choices": [completion(body)["choices"][0] | {"finish_reason": "abort"}]},
            "ended a completion by 'abort'",
        ),
    ],
)
def test_a_refusal_names_the_server_and_its_reason(answer: Callable[[Any], Any], message: str) -> None:
    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        stubs[0].answers["/inference/v1/generate"] = answer
        with pytest.raises(WorkerError) as refused:
            await ask(engine)
        assert str(refused.value).startswith(f"vLLM server 0 at {stubs[0].url} ")
        assert message in str(refused.value)
        assert len(engine.servers) == 1

    playing(work)


def test_a_server_that_hangs_is_told_after_the_timeout() -> None:
    async def run() -> None:
        async with Stub().running() as stub:
            stub.answers["/inference/v1/generate"] = never
            server = Server("vLLM server 0", stub.url, 0.05)
            try:
                with pytest.raises(
                    WorkerError, match=r"did not answer /inf.* within 0.05 s \(of runtime.timeout_sec"
                ):
                    await server.generate([1], {"max_tokens": 1})
            finally:
                await server.close()

    asyncio.run(run())


def test_a_new_conversation_goes_where_the_fewest_tokens_are_outstanding() -> None:
    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        opened = asyncio.Event()
        homes: dict[int, int] = {}

        def slow(place: int) -> Callable[[Any], Any]:
            async def answer(body: Any) -> Any:
                homes[body["sampling_params"]["max_tokens"]] = place
                await opened.wait()
                return completion(body)

            return answer

        for place, stub in enumerate(stubs):
            stub.answers["/inference/v1/generate"] = slow(place)
        calls = [asyncio.ensure_future(ask(engine, size, session=size)) for size in (40, 10, 11, 12, 13)]
        while len(homes) < 5:
            await asyncio.sleep(0)
        assert homes == {40: 0, 10: 1, 11: 1, 12: 1, 13: 1}  # 40 against 10, 21, 33
        opened.set()
        await asyncio.gather(*calls)
        heard = len(stubs[0].heard)
        await ask(engine, 3, session=40)  # nothing is outstanding anywhere: it stays at home
        await ask(engine, 3, session=13)
        assert (homes[3], len(stubs[0].heard)) == (1, heard + 1)

    playing(work, 2)


def test_the_requests_of_a_lost_server_go_to_the_other_and_the_last_one_is_told() -> None:
    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        def die(stub: Stub) -> Callable[[Any], Any]:
            def answer(body: Any) -> Any:
                stub.healthy = False
                return BREAK

            return answer

        stubs[0].answers["/inference/v1/generate"] = die(stubs[0])
        done = await asyncio.gather(*(ask(engine, 5, session=i) for i in range(4)))
        assert [c.tokens for c in done] == [[7] * 5] * 4
        assert [server.url for server in engine.servers] == [stubs[1].url]
        stubs[1].answers["/inference/v1/generate"] = die(stubs[1])
        with pytest.raises(
            WorkerError, match=rf"vLLM server 1 at {stubs[1].url} .*; no other vLLM server is left"
        ):
            await ask(engine, 5, session=0)
        with pytest.raises(WorkerError, match="no vLLM server is left"):
            await ask(engine, 5)

    playing(work, 2)


def test_an_engine_that_is_dead_behind_its_api_is_lost() -> None:
    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        def dead(body: Any) -> web.Response:
            stubs[0].healthy = False
            return web.json_response({"error": {"message": "EngineCore died"}}, status=500)

        stubs[0].answers["/inference/v1/generate"] = dead
        with pytest.raises(VcpoError, match="EngineCore died; no other vLLM server is left") as lost:
            await ask(engine)
        assert isinstance(lost.value.__cause__, ServerLost)

    playing(work)


def test_an_update_that_fails_on_one_server_leaves_none_paused() -> None:
    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        paused = asyncio.Event()

        async def hang(body: Any) -> None:
            paused.set()
            await never(body)

        async def refuse(body: Any) -> web.Response:
            await paused.wait()
            return web.Response(status=400, text="no room")

        stubs[0].answers |= {"/pause": refuse, "/resume": lambda body: {}}
        stubs[1].answers |= {"/pause": hang, "/resume": lambda body: {}}
        with pytest.raises(WorkerError, match="no room"):
            await engine.update(1, {})
        assert [stub.heard[-2:] for stub in stubs] == [["/pause", "/resume"]] * 2

    playing(work, count=2)


@pytest.mark.parametrize("breaks_off", [True, False], ids=["its own update broke off", "its update is done"])
def test_a_server_that_is_being_resumed_when_another_fails_is_resumed(breaks_off: bool) -> None:
    """As a real one does, the stub drops what it was doing when its client is gone."""

    async def work(engine: VllmSampler, stubs: list[Stub]) -> None:
        asked, resumed = asyncio.Event(), []

        async def resume(body: Any) -> dict[str, Any]:
            asked.set()
            await asyncio.sleep(0.3)
            resumed.append(True)
            return {}

        async def refuse(body: Any) -> web.Response:
            await asked.wait()
            return web.Response(status=400, text="no room")

        own = web.Response(status=400, text="not here either")
        fine = {route: lambda body: {} for route in ("/pause", "/start_weight_update", "/update_weights")}
        fine |= {"/finish_weight_update": lambda body: {}, "/collective_rpc": lambda body: {"results": ["d"]}}
        stubs[0].answers |= fine | {"/resume": resume} | ({"/pause": lambda body: own} if breaks_off else {})
        stubs[1].answers |= {"/pause": refuse, "/resume": lambda body: {}}
        with pytest.raises(WorkerError, match="no room"):
            await engine.update(1, {})
        assert resumed == [True]

    playing(work, count=2)


def test_a_share_of_the_servers() -> None:
    async def run() -> None:
        async with Stub().running() as one, Stub().running() as two:
            config = config_of(one.url, two.url)
            for index, stub in enumerate((one, two)):
                engine = VllmSampler(config, dataclasses.replace(EXPECTED), share=(index, 2))
                await engine.ready()
                assert [str(s) for s in engine.servers] == [f"vLLM server {index} at {stub.url}"]
                await engine.close()

    asyncio.run(run())


def test_without_the_extra_the_error_names_it() -> None:
    program = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from vcpo.config import load_config\n"
        "from vcpo.pipeline.engines import check_engine\n"
        "check_engine(load_config(None, ['--sampler.kind=vllm']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ConfigError" in done.stderr
    assert "pip install 'vcpo[vllm]'" in done.stderr
