"""Score norms and gradients with what people do to models: adapters, autocast, compilation, odd calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from score_cases import (
    MODELS,
    RAGGED,
    VOCABULARY,
    Batch,
    Rows,
    batch_of,
    disturbed,
    forward,
    gpt2,
    gradient_oracle,
    gradients_of,
    llama,
    members_of,
    objective_of,
    packed,
    padded,
    separate_gradients,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from vcpo.errors import UnsupportedLayerError, VcpoError
from vcpo.scores import Record, ScoreTape, squared_score_norms_oracle
from vcpo.scores.choice import Choice

torch.set_num_threads(1)

# PEFT's and transformers' remarks about each other and about small models.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

COEFFICIENTS = torch.tensor([0.7, -1.3, 0.4, 0.0, -2.0, 1.1], dtype=torch.float64)

EXACT = {
    "formed": Choice(columns=0, formed_from=0.0),
    "ghost": Choice(columns=0, formed_from=torch.inf),
}
SKETCH = Choice(columns=4, formed_from=torch.inf, sketched_below=torch.inf)


def recorded(model: nn.Module, tape: ScoreTape, batch: Batch, rows: Rows) -> Tensor:
    with tape:
        return objective_of(forward(model, rows), batch, rows)


def measured(model: nn.Module, tape: ScoreTape, batch: Batch, rows: Rows) -> Record:
    objective = recorded(model, tape, batch, rows)
    return tape.measure(objective, rows.segments, len(batch.sequences))


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * scale, msg=name)


def assert_matches_oracles(
    model: nn.Module,
    tape: ScoreTape,
    batch: Batch,
    rows: Rows,
    *,
    twin: nn.Module | None = None,
    rtol: float = 1e-8,
) -> None:
    """One measured step against one backward pass a trajectory, of the model or an equal one."""
    twin = model if twin is None else twin
    norms = squared_score_norms_oracle(twin, batch.sequences, batch.masks, batch.normalisers)
    expected = gradient_oracle(twin, batch, COEFFICIENTS)
    model.zero_grad()
    record = measured(model, tape, batch, rows)
    torch.testing.assert_close(record.squared_norms, norms, rtol=rtol, atol=0.0)
    record.backward(COEFFICIENTS)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients_of(model).items()}
    assert_close_gradients(found, expected, rtol)


# Adapters


def adapted(model: Any, config: PeftConfig) -> Any:
    """With adapters that are not zero, as those that PEFT makes are."""
    torch.manual_seed(1)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) * parameter.requires_grad
    return model


def lora(model: Any, targets: str | list[str], **options: Any) -> Any:
    return adapted(
        model, LoraConfig(r=2, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **options)
    )


ALL, ATTENTION = "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]

LORAS: dict[str, Callable[[], Any]] = {
    "attention": lambda: lora(llama(), ATTENTION),
    "all linear layers": lambda: lora(llama(), ALL),
    "head trained whole": lambda: lora(llama(), ALL, modules_to_save=["lm_head"]),
    "table and norms trained whole": lambda: lora(
        llama(), ["q_proj"], modules_to_save=["embed_tokens", "input_layernorm"]
    ),
    "biases": lambda: lora(llama(attention_bias=True), ALL, bias="all", lora_bias=True),
    "tied head": lambda: lora(llama(tie_word_embeddings=True), [*ATTENTION, "lm_head"]),
    "rank-stabilised": lambda: lora(MODELS["qwen3"](), ALL, use_rslora=True),
    "Conv1D": lambda: lora(gpt2(), ["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
}


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize("choice", EXACT)
@pytest.mark.parametrize("name", LORAS)
def test_lora(name: str, choice: str) -> None:
    model, batch = LORAS[name](), batch_of(RAGGED)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert_matches_oracles(model, ScoreTape(model, method=EXACT[choice]), batch, packed(batch))
    assert frozen and all(p.grad is None for p in frozen)


WITHOUT_RULE: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: lora(llama(), ["q_proj"], use_dora=True), r"q_proj\.lora_magnitude_vector\.default"),
    "LoRA of a table": (lambda: lora(llama(), ["embed_tokens"]), r"embed_tokens\.lora_embedding_A"),
    "single tokens": (
        lambda: lora(llama(), ["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}),
        r"embed_tokens\.token_adapter\.trainable_tokens_delta",
    ),
    "IA3": (
        lambda: adapted(llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
        r"k_proj\.ia3_l",
    ),
    "VeRA": (
        lambda: adapted(llama(), peft.VeraConfig(target_modules=["q_proj"], r=2)),
        r"q_proj\.vera_lambda_",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_adapters_without_a_rule_are_named(name: str) -> None:
    build, module = WITHOUT_RULE[name]
    with pytest.raises(UnsupportedLayerError, match=f"no score-norm rule for .*{module}"):
        ScoreTape(build())


def test_adapters_of_bare_parameters_are_named() -> None:
    """LoRA through ``target_parameters`` multiplies the adapters' weights without calling them."""
    model, batch = lora(llama(), [], target_parameters=["q_proj.weight"]), batch_of(RAGGED)
    tape = ScoreTape(model)
    objective = recorded(model, tape, batch, packed(batch))
    with pytest.raises(UnsupportedLayerError, match=r"q_proj\.lora_A\.default \(Linear\) was not called"):
        tape.measure(objective, packed(batch).segments, len(RAGGED))


# Precision


@pytest.mark.parametrize("inside", [False, True], ids=["after autocast", "inside autocast"])
@pytest.mark.parametrize("choice", EXACT)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gemma3-tied", "gpt2-tied", "lora"])
def test_bf16_autocast(name: str, choice: str, inside: bool) -> None:
    """Norms to 1e-3, the gradient to 2⁻⁸: autograd rounds every weight gradient to bfloat16, and so is the
    product of a coefficient and a factor. Rounding is random: a norm averages it over all elements."""
    model = nn.Module.to(lora(llama(), ALL) if name == "lora" else MODELS[name](), torch.float32)
    batch = batch_of(RAGGED)
    rows, tape = packed(batch), ScoreTape(model, method=EXACT[choice])
    with torch.autocast("cpu", torch.bfloat16):
        each = separate_gradients(model, forward(model, rows), batch, rows)
        objective = recorded(model, tape, batch, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        record = tape.measure(objective, rows.segments, len(RAGGED))
        record.backward(COEFFICIENTS)
    norms = torch.stack([squared_norm(one.values()) for one in each])
    assert record.squared_norms.dtype == torch.float32
    torch.testing.assert_close(record.squared_norms.double(), norms, rtol=1e-3, atol=0.0)
    found = gradients_of(model)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    expected = {n: torch.tensordot(COEFFICIENTS, stacked(each, n), 1) for n in found}
    errors = [found[n].double() - expected[n] for n in found]
    assert squared_norm(errors) < 2**-16 * squared_norm(expected.values())


def stacked(each: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([one[name].double() for one in each])


def squared_norm(gradients: Any) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradients]).sum()


class _WideLinear(torch.autograd.Function):
    """x Wᵀ in bfloat16, with the gradient of W summed in float32, for another leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, wide: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return e @ weight, None, e.flatten(0, 1).float().mT @ x.flatten(0, 1).float()


class _WideLookup(torch.autograd.Function):
    """Rows of a bfloat16 table, with its gradient summed in float32, for another leaf."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int, wide: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.padding = padding
        return weight[tokens]

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[None, None, None, Tensor]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        sums = torch.zeros(VOCABULARY, e.shape[-1])
        sums.index_add_(0, tokens.flatten(), e.flatten(0, 1).float())
        return None, None, None, sums.index_fill_(0, torch.tensor([ctx.padding]), 0)


class WideWeightGradients(TorchFunctionMode):
    """Linear layers and tables give the gradients of their weights in float32, to leaves of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[Tensor, Tensor] = {}

    def _leaf(self, weight: Tensor) -> Tensor:
        return self.leaves.setdefault(weight, torch.zeros(weight.shape, requires_grad=True))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            return _WideLinear.apply(args[0], args[1], self._leaf(args[1]))
        if func is functional.embedding:
            return _WideLookup.apply(*args, kwargs["padding_idx"], self._leaf(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_pure_bf16_norms_against_sums_in_float32(name: str) -> None:
    """What bfloat16 activations and gradients say, summed with all digits, to 1e-4: the form that keeps
    factors loses nothing. Norm layers are frozen: nothing sums their gradients but autograd, in bfloat16."""
    model, batch = nn.Module.to(MODELS[name](), torch.bfloat16), batch_of(RAGGED)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    rows = packed(batch)
    with WideWeightGradients() as wide:
        logits = forward(model, rows)
    norms = []
    for i in range(len(RAGGED)):
        alone = replace(batch, normalisers=batch.normalisers * (torch.arange(len(RAGGED)) == i))
        objective = objective_of(logits, alone, rows)
        norms.append(
            squared_norm(torch.autograd.grad(objective, list(wide.leaves.values()), retain_graph=True))
        )
    found = measured(model, ScoreTape(model, method=EXACT["ghost"]), batch, rows).squared_norms
    assert len(wide.leaves) == sum(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(found.double(), torch.stack(norms), rtol=1e-4, atol=0.0)


# Compilation: the backend traces and cuts as any, and leaves out the slow part, making code.


def compiled(model: Any, way: str) -> Any:
    if way == "torch.compile":
        return torch.compile(model, backend="aot_eager")
    parts = model.model.layers if way == "its layers" else [model]
    for part in parts:
        part.compile(backend="aot_eager")
    return model


def shallow() -> Any:
    return llama(num_hidden_layers=1, tie_word_embeddings=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", ["torch.compile", "Module.compile", "its layers"])
def test_compiled_model(way: str) -> None:
    """The tape is made of the compiled model, before its first call; several steps are taken."""
    model = compiled(shallow(), way)
    tape = ScoreTape(model, method="exact")
    for seed in (0, 1):
        batch = batch_of(RAGGED, seed)
        assert_matches_oracles(model, tape, batch, packed(batch), twin=shallow())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_checkpointed_model_with_norm_and_biases() -> None:
    model, batch = gpt2().train(), batch_of(RAGGED)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = compiled(model, "torch.compile")
    assert_matches_oracles(model, ScoreTape(model, method="exact"), batch, packed(batch), twin=gpt2())


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_model_is_sketched_alike() -> None:
    batch = batch_of(RAGGED)
    plain = shallow()
    expected = measured(plain, ScoreTape(plain, method=SKETCH), batch, packed(batch))
    called = compiled(shallow(), "torch.compile")
    found = measured(called, ScoreTape(called, method=SKETCH), batch, packed(batch))
    assert found.methods == expected.methods and "sketch" in found.methods.values()
    torch.testing.assert_close(found.squared_norms, expected.squared_norms, rtol=1e-8, atol=0.0)


@pytest.mark.usefixtures("fresh_compiler")
def test_tape_after_the_first_compiled_call_is_refused() -> None:
    """Compiled code does not run hooks that came later; what it leaves out is named."""
    model, batch = shallow(), batch_of(RAGGED)
    called, rows = compiled(model, "torch.compile"), packed(batch)
    forward(called, rows)
    tape = ScoreTape(called)
    objective = recorded(called, tape, batch, rows)
    with pytest.raises(UnsupportedLayerError, match=r"embed_tokens .*needs the tape before its first call"):
        tape.measure(objective, rows.segments, len(RAGGED))


@pytest.mark.usefixtures("fresh_compiler")
def test_fullgraph_is_refused() -> None:
    model, batch = shallow(), batch_of(RAGGED)
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="a ScoreTape watches it: leave out fullgraph=True"):
        recorded(called, ScoreTape(called), batch, packed(batch))  # type: ignore[arg-type]


class Bypass(nn.Module):
    """The head's weight is used beside the head, in what may become one compiled piece."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return functional.linear(x.sin(), self.head.weight) + self.head(x)


@pytest.mark.usefixtures("fresh_compiler")
def test_parameter_used_beside_its_compiled_module_is_named() -> None:
    model, batch = Bypass().double(), batch_of(RAGGED)
    rows, called = packed(batch), compiled(model, "torch.compile")
    tape = ScoreTape(called)
    with tape:
        objective = objective_of(called(rows.ids), batch, rows)
    with pytest.raises(UnsupportedLayerError, match=r"head\.weight is also used outside"):
        tape.measure(objective, rows.segments, len(RAGGED))


@pytest.mark.parametrize("autocast", [False, True])
def test_parameter_used_beside_its_module_is_named_under_autocast_too(autocast: bool) -> None:
    """Autocast casts the weight once for both uses, so that the graph has one edge to it."""
    model, batch = Bypass(), batch_of(RAGGED)
    rows, tape = packed(batch), ScoreTape(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), tape:
        objective = objective_of(model(rows.ids).float(), batch, rows)
    with pytest.raises(UnsupportedLayerError, match=r"head\.weight is also used outside"):
        tape.measure(objective, rows.segments, len(RAGGED))


def test_replicas_that_would_drift_apart_are_refused() -> None:
    wrapped = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedLayerError, match=r"module 0 \(DataParallel\) averages the gradients"):
        ScoreTape(wrapped)


# Sketches


def test_sketch_does_not_depend_on_the_layout_of_a_batch() -> None:
    """Packed, padded, or in two micro-batches: one seed gives one estimate."""
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    tape = ScoreTape(model, method=SKETCH, seed=7)
    expected = measured(model, tape, batch, packed(batch)).squared_norms
    rows_alone = measured(model, tape, batch, padded(batch)).squared_norms
    torch.testing.assert_close(rows_alone, expected, rtol=1e-8, atol=0.0)
    parts = [members_of(batch, [0, 1, 2]), members_of(batch, [3, 4, 5])]
    found = [measured(model, tape, part, packed(part)).squared_norms for part in parts]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-8, atol=0.0)


# Odd calls


@pytest.mark.parametrize("choice", EXACT)
def test_dropout_in_train_mode(choice: str) -> None:
    """Score norms are of the model that ran, dropped units and all."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=12, n_layer=2, n_head=2, n_positions=64)
    model, batch = disturbed(GPT2LMHeadModel(config)).train(), batch_of(RAGGED)
    rows, tape = packed(batch), ScoreTape(model, method=EXACT[choice])
    torch.manual_seed(5)
    each = separate_gradients(model, forward(model, rows), batch, rows)
    torch.manual_seed(5)
    record = measured(model, tape, batch, rows)
    norms = torch.stack([squared_norm(one.values()) for one in each])
    torch.testing.assert_close(record.squared_norms, norms, rtol=1e-8, atol=0.0)
    record.backward(COEFFICIENTS)
    expected = {name: torch.tensordot(COEFFICIENTS, stacked(each, name), 1) for name in each[0]}
    assert_close_gradients(gradients_of(model), expected, 1e-8)
    torch.manual_seed(6)
    assert not torch.allclose(measured(model, tape, batch, rows).squared_norms, norms, rtol=1e-3)


@pytest.mark.usefixtures("norm_layers_in_float64")
def test_eval_and_train_mode_of_one_tape() -> None:
    model, batch = llama(), batch_of(RAGGED)
    tape = ScoreTape(model, method="exact")
    for mode in (model.eval, model.train):
        mode()
        assert_matches_oracles(model, tape, batch, packed(batch))


def test_head_called_on_a_slice_is_named() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows, tape = padded(batch), ScoreTape(model)
    with tape:
        logits = model(input_ids=rows.ids, position_ids=rows.positions, logits_to_keep=3).logits
    with pytest.raises(UnsupportedLayerError, match=r"lm_head \(Linear\) saw \(6, 3\) positions"):
        tape.measure(logits.sum(), rows.segments, len(RAGGED))


@pytest.mark.usefixtures("norm_layers_in_float64")
def test_two_forward_passes_of_the_same_rows_in_one_recording() -> None:
    """Objectives of two passes, as with an added term: gradients add before they are squared."""
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    rows = packed(batch)
    tape = ScoreTape(model, method="exact")
    shifted = replace(rows, positions=2 * rows.positions)  # another function of the same parameters
    with tape:
        objective = objective_of(forward(model, rows), batch, rows)
        objective = objective + objective_of(forward(model, shifted), batch, rows)
    record = tape.measure(objective, rows.segments, len(RAGGED))
    both = [separate_gradients(model, forward(model, r), batch, rows) for r in (rows, shifted)]
    each = [{name: one[name] + other[name] for name in one} for one, other in zip(*both, strict=True)]
    norms = torch.stack([squared_norm(one.values()) for one in each])
    torch.testing.assert_close(record.squared_norms, norms, rtol=1e-8, atol=0.0)
    record.backward(COEFFICIENTS)
    expected = {name: torch.tensordot(COEFFICIENTS, stacked(each, name), 1) for name in each[0]}
    assert_close_gradients(gradients_of(model), expected, 1e-8)


@pytest.mark.usefixtures("norm_layers_in_float64")
def test_forward_pass_that_the_objective_leaves_out() -> None:
    model, batch = llama(tie_word_embeddings=True), batch_of(RAGGED)
    rows, tape = packed(batch), ScoreTape(model, method="exact")
    with tape:
        forward(model, rows)
        objective = objective_of(forward(model, rows), batch, rows)
    norms = tape.measure(objective, rows.segments, len(RAGGED)).squared_norms
    expected = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0.0)


def test_forward_pass_without_gradient_in_a_recording_is_named() -> None:
    model, batch = llama(), batch_of(RAGGED)
    rows, tape = packed(batch), ScoreTape(model)
    with tape:
        with torch.no_grad():
            forward(model, rows)
        objective = objective_of(forward(model, rows), batch, rows)
    with pytest.raises(UnsupportedLayerError, match=r"embed_tokens \(Embedding\) ran without gradient"):
        tape.measure(objective, rows.segments, len(RAGGED))


@pytest.mark.usefixtures("norm_layers_in_float64")
@pytest.mark.parametrize("assign", [False, True])
def test_loading_weights_between_steps(assign: bool) -> None:
    model, batch = llama(), batch_of(RAGGED)
    tape = ScoreTape(model, method="exact")
    measured(model, tape, batch, packed(batch)).backward(COEFFICIENTS)
    other = {name: 1.1 * value for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=assign)
    assert_matches_oracles(model, tape, batch, packed(batch))


@pytest.mark.usefixtures("norm_layers_in_float64")
def test_generation_between_steps() -> None:
    """Hooks stay in place and do nothing, even between a recording and its measurement."""
    model: Any = llama(tie_word_embeddings=True)
    batch = batch_of(RAGGED)
    rows, tape = packed(batch), ScoreTape(model, method="exact")
    prompts, options = torch.randint(3, VOCABULARY, (3, 4)), {"do_sample": False, "max_new_tokens": 6}
    expected = model.generate(prompts, **options)
    assert_matches_oracles(model, tape, batch, rows)
    assert torch.equal(model.generate(prompts, **options), expected)
    objective = recorded(model, tape, batch, rows)
    assert torch.equal(model.generate(prompts, **options), expected)
    norms = squared_score_norms_oracle(model, batch.sequences, batch.masks, batch.normalisers)
    record = tape.measure(objective, rows.segments, len(RAGGED))
    torch.testing.assert_close(record.squared_norms, norms, rtol=1e-8, atol=0.0)
    assert_matches_oracles(model, tape, batch, rows)


@pytest.mark.usefixtures("norm_layers_in_float64")
def test_parameters_frozen_and_thawed_between_steps() -> None:
    model, batch = llama(tie_word_embeddings=True, attention_bias=True), batch_of(RAGGED)
    tape = ScoreTape(model, method="exact")
    for trained in ("", "bias", "layers.1", "embed_tokens", ""):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
            parameter.grad = None
        assert_matches_oracles(model, tape, batch, packed(batch))


class Keywords(nn.Module):
    """Calls its modules with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, *, input_ids: Tensor, **others: object) -> Any:
        mixed = self.embed(input=input_ids).cumsum(1)
        return SimpleNamespace(logits=self.head(input=self.norm(input=mixed)))


def test_modules_called_with_keyword_arguments() -> None:
    model, batch = Keywords().double(), batch_of(RAGGED)
    assert_matches_oracles(model, ScoreTape(model, method="exact"), batch, padded(batch))


def test_optimizer_steps_with_a_record_and_with_a_loss_agree() -> None:
    """Three AdamW steps from records, of two micro-batches each, and three from ordinary losses."""
    batch = batch_of(RAGGED)
    taped, plain = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (taped, plain)]
    tape = ScoreTape(taped)
    for _ in range(3):
        for members in ([0, 1, 2, 3], [4, 5]):
            part, coefficients = members_of(batch, members), COEFFICIENTS[members]
            measured(taped, tape, part, packed(part) if len(members) > 2 else padded(part)).backward(
                coefficients
            )
            weighted = replace(part, normalisers=part.normalisers * coefficients)
            objective_of(forward(plain, padded(part)), weighted, padded(part)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(taped.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)


def test_module_whose_own_forward_was_replaced_is_named() -> None:
    """A linear layer by its class alone: an instance's forward, as some kernels put there, is unknown."""
    model = llama()
    head = model.get_submodule("lm_head")
    head.forward = MethodType(lambda self, x: 2 * functional.linear(x, self.weight), head)
    with pytest.raises(UnsupportedLayerError, match=r"no score-norm rule for lm_head \(Linear\)"):
        ScoreTape(model)


def test_module_added_after_the_tape_is_named() -> None:
    """Such as a head of another size, or adapters."""
    model, batch = llama(), batch_of(RAGGED)
    tape = ScoreTape(model)
    model.resize_token_embeddings(VOCABULARY + 3)
    rows = packed(batch)
    objective = recorded(model, tape, batch, rows)
    with pytest.raises(VcpoError, match=r"(embed_tokens|lm_head) .*was not called"):
        tape.measure(objective, rows.segments, len(RAGGED))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_of_torch_in_bf16_against_sums_in_float64(kind: str, autocast: bool) -> None:
    """A normalised input that is rounded to bf16 puts a norm off by more than 1e-4."""
    torch.manual_seed(0)
    width, seen = 64, {}
    norm: Any = nn.LayerNorm(width) if kind == "LayerNorm" else nn.RMSNorm(width, eps=1e-6)
    model = nn.Sequential(nn.Linear(width, width), norm, nn.Tanh(), nn.Linear(width, 5))
    model.requires_grad_(False)
    norm.weight.requires_grad_(True)
    if not autocast:
        model.bfloat16()

    def look(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen["a"] = args[0].detach().double()
        output.register_hook(lambda e: seen.update(e=e.double()))

    norm.register_forward_hook(look)
    segments = torch.arange(4).repeat_interleave(35).view(2, 70)
    tape = ScoreTape(model, method="exact")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), tape:
        output = model(torch.randn(2, 70, width).to(next(model.parameters()).dtype))
    found = tape.squared_norms(output.float().log_softmax(-1)[..., 0].sum(), segments, 4)
    a = seen["a"]
    if kind == "LayerNorm":
        a = a - a.mean(-1, keepdim=True)
    x = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + norm.eps)
    expected = [(seen["e"] * x)[segments == i].sum(0).square().sum() for i in range(4)]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=0.0)
