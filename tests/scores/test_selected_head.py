"""Score norms and gradients where the head sees the sampled positions alone, whole or in pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from score_cases import (
    MODELS,
    RAGGED,
    VOCABULARY,
    Batch,
    batch_of,
    gpt2,
    gradient_oracle,
    gradients_of,
    llama,
    members_of,
    separate_gradients,
    trajectories_of,
)
from score_cases import Rows as CaseRows
from torch import Tensor, nn

from vcpo.errors import UnsupportedLayerError, VcpoError
from vcpo.policy.log_probs import TokenLogProbs, predicting, sampled_log_probs
from vcpo.policy.packing import PackedRows, pack
from vcpo.scores import Record, ScoreTape, squared_score_norms_oracle
from vcpo.scores.choice import Choice

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

COEFFICIENTS = torch.tensor([0.7, -1.3, 0.4, 0.0, -2.0, 1.1], dtype=torch.float64)
SOME = 3 * VOCABULARY
"""A budget of three tokens."""
WAYS = {"one token a piece": 1, "some": SOME, "whole": 10**9}
CHOICES = {
    "ghost": Choice(columns=0, formed_from=torch.inf),
    "formed": Choice(columns=0, formed_from=0.0),
}
SKETCH = Choice(columns=4, formed_from=torch.inf, sketched_below=torch.inf)


@pytest.fixture(autouse=True)
def no_warning(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever is no fallback is really in pieces."""
    yield
    if request.function is not test_a_head_of_another_kind_sees_the_selection:
        assert not [r for r in caplog.get_records("call") if r.levelno >= logging.WARNING]


def packed(batch: Batch, *, together: bool = True) -> PackedRows:
    return pack(trajectories_of(batch), packed=together)


def objective_of(log_probs: Tensor, batch: Batch, rows: PackedRows) -> Tensor:
    return (batch.normalisers.to(log_probs)[rows.action_owners] * log_probs).sum()


class Asked:
    """A model, its log-probs and its tape."""

    def __init__(
        self, model: Any, *, budget: int = 1, method: str | Choice = "exact", **options: Any
    ) -> None:
        self.model = model
        self.tape = ScoreTape(model, method=method, **options)
        self.log_probs = TokenLogProbs(model, logit_budget=budget)

    def recorded(self, batch: Batch, rows: PackedRows) -> Tensor:
        with self.tape:
            return objective_of(self.log_probs(rows), batch, rows)

    def measured(self, batch: Batch, rows: PackedRows) -> Record:
        return self.tape.measure(self.recorded(batch, rows), rows.segments, rows.count, predicting(rows))

    def matches_oracles(
        self, batch: Batch, rows: PackedRows, *, twin: Any = None, rtol: float = 1e-8, prefix: str = ""
    ) -> None:
        twin = self.model if twin is None else twin
        norms = squared_score_norms_oracle(twin, batch.sequences, batch.masks, batch.normalisers)
        expected = gradient_oracle(twin, batch, COEFFICIENTS)
        self.model.zero_grad()
        record = self.measured(batch, rows)
        torch.testing.assert_close(record.squared_norms, norms, rtol=rtol, atol=0.0)
        record.backward(COEFFICIENTS)
        assert_close_gradients(self.gradients(), expected, rtol)

    def gradients(self) -> dict[str, Tensor]:
        return {name.replace("_orig_mod.", ""): g for name, g in gradients_of(self.model).items()}


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * scale, msg=name)


def with_bias(model: Any) -> Any:
    """Phi's and GPT-J's heads have one."""
    head = nn.Linear(model.lm_head.in_features, VOCABULARY, dtype=torch.float64)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


HEADS: dict[str, Callable[[], Any]] = {
    **{name: MODELS[name] for name in ("llama", "llama-tied", "gemma3-tied", "gpt2-tied", "qwen3")},
    "bias": lambda: with_bias(llama()),
    "tied, bias": lambda: with_bias(llama(tie_word_embeddings=True)),
    "capped": lambda: capped(llama(tie_word_embeddings=True)),
}


def capped(model: Any) -> Any:
    """Gemma 2's last step, behind Llama's layers, which compute in float64."""
    model.config.final_logit_softcapping = 0.8
    forward = type(model).forward

    def bent(self: Any, **inputs: Any) -> Any:
        found = forward(self, **inputs)
        found.logits = 0.8 * torch.tanh(found.logits / 0.8)
        return found

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": bent})
    return model


# Against one backward pass a trajectory


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize(
    ("way", "choice"), [("one token a piece", "ghost"), ("some", "formed"), ("whole", "ghost")]
)
@pytest.mark.parametrize("head", HEADS)
def test_norms_and_gradients_of_every_head(head: str, way: str, choice: str) -> None:
    """Trajectories that share rows, one of them without sampled tokens, and padding."""
    asked = Asked(HEADS[head](), budget=WAYS[way], method=CHOICES[choice])
    for seed, together in enumerate((True, False)):  # two steps of one tape
        batch = batch_of(RAGGED, seed)
        asked.matches_oracles(batch, packed(batch, together=together))


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize("way", WAYS)
def test_norms_alone_and_norms_on_the_way_of_a_backward_pass(way: str) -> None:
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    rows, asked = packed(batch), Asked(model, budget=WAYS[way])
    norms = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    objective = asked.recorded(batch, rows)
    found = asked.tape.norms(objective, rows.segments, rows.count, predicting(rows))
    torch.testing.assert_close(found.squared_norms, norms, rtol=1e-8, atol=0.0)
    assert all(p.grad is None for p in model.parameters())
    objective = asked.recorded(batch, rows)
    found = asked.tape.backward(objective, rows.segments, rows.count, predicting(rows))
    torch.testing.assert_close(found.squared_norms, norms, rtol=1e-8, atol=0.0)
    assert_close_gradients(asked.gradients(), gradient_oracle(model, batch, torch.ones(len(RAGGED))), 1e-8)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [1, SOME])
def test_sketches_are_those_of_the_whole_logits(budget: int, tied: bool) -> None:
    """The same signs meet the same matrix, so the estimate, its stated error and the gradient are the same;
    test_sketch.py shows that they are unbiased."""
    model, batch = llama(tie_word_embeddings=tied), batch_of(RAGGED)
    rows, asked = packed(batch), Asked(model, budget=budget, method=SKETCH, seed=3)
    record = asked.measured(batch, rows)
    assert record.methods["lm_head.weight" if not tied else "model.embed_tokens.weight"] == "sketch"
    record.backward(COEFFICIENTS)
    found = asked.gradients()
    model.zero_grad()
    with asked.tape:
        objective = objective_of(sampled_log_probs(model, rows), batch, rows)
    expected = asked.tape.measure(objective, rows.segments, rows.count)
    torch.testing.assert_close(record.squared_norms, expected.squared_norms, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(record.relative_errors, expected.relative_errors, rtol=1e-7, atol=1e-12)
    expected.backward(COEFFICIENTS)
    assert_close_gradients(found, asked.gradients(), 1e-9)
    again = asked.measured(batch, rows)
    assert torch.equal(again.squared_norms, record.squared_norms)


@pytest.mark.usefixtures("norm_layers_in_float64")
def test_records_that_wait_for_each_other() -> None:
    """A group over two micro-batches, the second measured before the first gives its gradient."""
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    asked = Asked(model)
    parts = [[0, 1, 3], [2, 4, 5]]
    batches = [members_of(batch, part) for part in parts]
    records = [asked.measured(part, packed(part)) for part in batches]
    for part, record in zip(parts, records, strict=True):
        record.backward(COEFFICIENTS[part])
    assert_close_gradients(asked.gradients(), gradient_oracle(model, batch, COEFFICIENTS), 1e-8)


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize("build", [gpt2, llama])
def test_with_gradient_checkpointing(build: Callable[[], Any]) -> None:
    model, batch = build().train(), batch_of(RAGGED)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    Asked(model).matches_oracles(batch, packed(batch), twin=build())


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize("frozen", ["lm_head", "model.embed_tokens", "model.layers.0", "all but the head"])
def test_frozen_parts(frozen: str) -> None:
    model, batch = llama(), batch_of(RAGGED)
    for name, parameter in model.named_parameters():
        is_head = name.startswith("lm_head")
        parameter.requires_grad_(is_head if frozen == "all but the head" else not name.startswith(frozen))
    Asked(model).matches_oracles(batch, packed(batch))


@pytest.mark.usefixtures("norm_layers_in_float64")
def test_a_head_asked_twice_in_one_recording() -> None:
    """Two passes at two temperatures: their gradients add before they are squared."""
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    rows, asked = packed(batch), Asked(model)
    warm = TokenLogProbs(model, temperature=1.5, logit_budget=SOME)
    with asked.tape:
        objective = objective_of(asked.log_probs(rows), batch, rows)
        objective = objective + objective_of(warm(rows), batch, rows)
    record = asked.tape.measure(objective, rows.segments, rows.count, predicting(rows))

    case_rows = CaseRows(rows.input_ids, rows.position_ids, rows.segments)
    logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    both = [separate_gradients(model, logits / t, batch, case_rows) for t in (1.0, 1.5)]
    each = [{name: one[name] + other[name] for name in one} for one, other in zip(*both, strict=True)]
    norms = torch.stack([torch.stack([g.square().sum() for g in one.values()]).sum() for one in each])
    torch.testing.assert_close(record.squared_norms, norms, rtol=1e-8, atol=0.0)
    record.backward(COEFFICIENTS)
    expected = {n: torch.tensordot(COEFFICIENTS, torch.stack([o[n] for o in each]), 1) for n in each[0]}
    assert_close_gradients(asked.gradients(), expected, 1e-8)


# Adapters


def lora(targets: str | list[str], **options: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **options)
    model: Any = get_peft_model(llama(), config, autocast_adapter_dtype=False).double()  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) * parameter.requires_grad
    return model


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize("way", WAYS)
def test_adapters_before_a_frozen_head(way: str) -> None:
    model, batch = lora("all-linear"), batch_of(RAGGED)
    Asked(model, budget=WAYS[way]).matches_oracles(batch, packed(batch))
    assert model.get_output_embeddings().weight.grad is None


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize("whole", [False, True], ids=["adapter on the head", "head trained whole"])
def test_a_head_of_another_kind_sees_the_selection(whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    options = {"modules_to_save": ["lm_head"]} if whole else {}
    model, batch = lora(["q_proj"] if whole else ["q_proj", "lm_head"], **options), batch_of(RAGGED)
    asked = Asked(model)
    assert [r.message for r in caplog.records if "head" in r.message] == [
        f"PeftModelForCausalLM has a head that is no plain linear layer "
        f"({type(model.get_output_embeddings()).__name__}): memory for logits grows with tokens × vocabulary "
        "(learner.token_budget bounds it)"
    ]
    shapes: list[Any] = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, output: shapes.append(output.shape))
    rows = packed(batch)
    asked.matches_oracles(batch, rows)
    assert shapes[-1] == (len(rows.action_rows), VOCABULARY)


# Number types


@pytest.mark.parametrize("inside", [False, True], ids=["after autocast", "inside autocast"])
@pytest.mark.parametrize("name", ["llama-biases", "gemma3-tied", "gpt2-tied"])
def test_bfloat16_autocast(name: str, inside: bool) -> None:
    """One backward pass a trajectory under the same autocast rounds what reaches the hidden states twice,
    pieces three times (E before its factor, E W, and the factor times that): to bfloat16, by 2⁻⁹ each. The
    norms of 12-wide layers average that over few elements."""
    model, batch = nn.Module.to(MODELS[name](), torch.float32), batch_of(RAGGED)
    rows, asked = packed(batch), Asked(model, budget=SOME)
    case_rows = CaseRows(rows.input_ids, rows.position_ids, rows.segments)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
        each = separate_gradients(model, logits.float(), batch, case_rows)
        objective = asked.recorded(batch, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        record = asked.tape.measure(objective, rows.segments, rows.count, predicting(rows))
        record.backward(COEFFICIENTS)
    norms = torch.stack([squared(one) for one in each])
    torch.testing.assert_close(record.squared_norms.double(), norms, rtol=2e-2, atol=0.0)
    found = asked.gradients()
    expected = {
        n: torch.tensordot(COEFFICIENTS, torch.stack([o[n].double() for o in each]), 1) for n in found
    }
    assert squared({n: found[n] - expected[n] for n in found}) < 2**-13 * squared(expected)


def squared(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradients.values()]).sum()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_bfloat16_weights(name: str) -> None:
    """Against the same model's whole logits; norms are sums over all elements, whose roundings average."""
    model, batch = nn.Module.to(MODELS[name](), torch.bfloat16), batch_of(RAGGED)
    rows, asked = packed(batch), Asked(model, budget=SOME, method=CHOICES["ghost"])
    record = asked.measured(batch, rows)
    record.backward(COEFFICIENTS)
    found = asked.gradients()
    model.zero_grad()
    with asked.tape:
        objective = objective_of(sampled_log_probs(model, rows), batch, rows)
    expected = asked.tape.measure(objective, rows.segments, rows.count)
    expected.backward(COEFFICIENTS)
    assert record.squared_norms.dtype == torch.float32
    torch.testing.assert_close(record.squared_norms, expected.squared_norms, rtol=2e-2, atol=0.0)
    wanted = asked.gradients()
    assert squared({n: found[n].float() - wanted[n].float() for n in found}) < 2**-12 * squared(wanted)


# Compiled


@pytest.mark.usefixtures("fresh_compiler", "norm_layers_in_float64")
@pytest.mark.parametrize("way", ["torch.compile", "its layers"])
def test_compiled_model(way: str) -> None:
    """The tape first, as it must be there before the compiled model's first call."""
    model: Any = llama(num_hidden_layers=1, tie_word_embeddings=True)
    if way == "torch.compile":
        model = torch.compile(model, backend="aot_eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    asked = Asked(model)
    for seed in (0, 1):
        batch = batch_of(RAGGED, seed)
        twin = llama(num_hidden_layers=1, tie_word_embeddings=True)
        asked.matches_oracles(batch, packed(batch), twin=twin)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


# Refusals


def test_an_optimizer_step_between_measuring_and_the_gradient_is_refused() -> None:
    model, batch = llama(), batch_of(RAGGED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    asked = Asked(model)
    rows = packed(batch)
    record, other = asked.measured(batch, rows), asked.measured(batch, rows)
    other.backward(COEFFICIENTS)
    optimizer.step()
    with pytest.raises(VcpoError, match="the head's weights have changed since the forward pass"):
        record.backward(COEFFICIENTS)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_optimizer_step_between_the_forward_pass_and_measuring_is_refused(autocast: bool) -> None:
    """By autograd itself; under autocast it keeps a bfloat16 copy of the weight and would not notice."""
    model, batch = nn.Module.to(llama(), torch.float32), batch_of(RAGGED)
    asked, rows = Asked(model), packed(batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        objective = asked.recorded(batch, rows)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.1)
    with pytest.raises(
        (VcpoError, RuntimeError), match=r"weights have changed since|by an inplace operation"
    ):
        asked.tape.measure(objective, rows.segments, rows.count, predicting(rows))


BAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "numbers that are not whole": (lambda s: s.double(), "selected must be whole numbers of shape"),
    "a mask": (lambda s: torch.ones_like(s).bool(), "selected must be whole numbers of shape"),
    "two dimensions": (lambda s: s[None], r"selected must be whole numbers of shape \[N\]"),
    "a place that is not there": (lambda s: s + 1000, "selected names position .* numbered row by row"),
    "a place before the first": (lambda s: s - 1000, "selected names position -"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_selection_that_is_none(bad: str) -> None:
    change, message = BAD[bad]
    model, batch = llama(), batch_of(RAGGED)
    asked, rows = Asked(model), packed(batch)
    objective = asked.recorded(batch, rows)
    with pytest.raises(VcpoError, match=message):
        asked.tape.measure(objective, rows.segments, rows.count, change(predicting(rows)))


@pytest.mark.parametrize("budget", [1, 10**9])
def test_a_selection_of_another_length_or_none_names_the_head(budget: int) -> None:
    model, batch = llama(), batch_of(RAGGED)
    asked, rows = Asked(model, budget=budget), packed(batch)
    for selected in (predicting(rows)[1:], None):
        objective = asked.recorded(batch, rows)
        with pytest.raises(UnsupportedLayerError, match=r"lm_head \(LogProbHead\) saw .*selected"):
            asked.tape.measure(objective, rows.segments, rows.count, selected)


def test_a_selection_of_padding_is_refused() -> None:
    model, batch = llama(), batch_of(RAGGED)
    asked, rows = Asked(model), packed(batch)
    objective = asked.recorded(batch, rows)
    nowhere = torch.full_like(predicting(rows), int((rows.segments.flatten() < 0).nonzero()[0]))
    with pytest.raises(VcpoError, match="positions that the segments call padding"):
        asked.tape.measure(objective, rows.segments, rows.count, nowhere)


def test_a_weight_that_is_used_beside_its_head_is_named() -> None:
    model, batch = llama(), batch_of(RAGGED)
    asked, rows = Asked(model), packed(batch)
    with asked.tape:
        objective = objective_of(asked.log_probs(rows), batch, rows)
        objective = objective + model.get_parameter("lm_head.weight").square().sum()
    with pytest.raises(UnsupportedLayerError, match=r"lm_head.weight is also used outside"):
        asked.tape.measure(objective, rows.segments, rows.count, predicting(rows))


def test_a_trajectory_with_impossible_tokens_is_named() -> None:
    model, batch = llama(), batch_of(RAGGED)
    asked = Asked(model)
    rows = packed(batch, together=False)
    with asked.tape:
        log_probs = asked.log_probs(rows)
    factors = torch.where(rows.action_owners == 3, torch.inf, 1.0)
    with pytest.raises(VcpoError, match="non-finite squared score norm at trajectory index 3"):
        asked.tape.measure((factors * log_probs).sum(), rows.segments, rows.count, predicting(rows))


def test_hooks_do_nothing_outside_and_go_with_their_owner() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows = packed(batch)
    expected = model(input_ids=rows.input_ids, position_ids=rows.position_ids).logits
    log_probs = TokenLogProbs(model, logit_budget=1)
    found = log_probs(rows)
    again = model(input_ids=rows.input_ids, position_ids=rows.position_ids).logits
    assert torch.equal(expected, again)
    torch.testing.assert_close(found, sampled_log_probs(model, rows), rtol=1e-10, atol=1e-12)
    head: Any = model.get_submodule("lm_head")
    assert head._forward_pre_hooks and head._forward_hooks
    del log_probs
    assert not head._forward_pre_hooks and not head._forward_hooks
