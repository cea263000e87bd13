"""The small model, its tokenizer, and models loaded from a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from vcpo.config import ModelConfig
from vcpo.errors import ModelError
from vcpo.policy import loading
from vcpo.policy.loading import load_policy, small_policy
from vcpo.policy.tokens import PAD, TokenizerCodec, character_tokenizer
from vcpo.weights import checksum, weight_tensors

torch.set_num_threads(1)

ALPHABET = "abcz0189 +-*/()=:>\n\tß→𝒱"
SMALL = ModelConfig(hidden_size=16, layers=1, heads=2, intermediate_size=24, context_length=32)
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


# Tokens


@given(st.text(st.sampled_from(ALPHABET)))
def test_one_token_a_character_there_and_back(text: str) -> None:
    codec = TokenizerCodec(character_tokenizer(ALPHABET))
    ids = codec.encode(text)
    assert len(ids) == len(text)
    assert codec.decode(ids) == text
    assert codec.encode_prompt(text) == ids


def test_token_ids_are_special_tokens_then_the_sorted_alphabet() -> None:
    codec = TokenizerCodec(character_tokenizer("cabba"))
    assert codec.encode("abcx") == [3, 4, 5, 2]
    assert codec.end_id == 1
    assert codec.decode([0, 3, 1, 5, 2]) == "ac"
    assert len(codec.tokenizer) == 6


def test_the_character_tokenizer_survives_saving(tmp_path: Path) -> None:
    saved = character_tokenizer(ALPHABET)
    saved.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  a - b\n\n(c) → ß\t=𝒱 "
    assert loaded.encode(text) == saved.encode(text)
    assert TokenizerCodec(loaded).decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)


def test_a_prompt_is_rendered_by_the_chat_template() -> None:
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz[]")
    tokenizer.chat_template = TEMPLATE
    codec = TokenizerCodec(tokenizer)
    assert codec.decode(codec.encode_prompt("hello")) == "[user]hello[assistant]"
    assert codec.decode(codec.encode("hello")) == "hello"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
        ("{% if messages[0]['role'] != 'system' %}{{ messages[1]['content'] }}{% endif %}", "no element 1"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_a_chat_template_that_fails_is_told_with_its_model(template: str, message: str) -> None:
    tokenizer = character_tokenizer("ab")
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as caught:
        TokenizerCodec(tokenizer, "hub/tiny").encode_prompt("ab")
    assert "the chat template of hub/tiny cannot render a single user message: " in str(caught.value)
    assert message in str(caught.value)


def test_a_prompt_without_a_chat_template_begins_as_the_tokenizer_begins() -> None:
    """What the tokenizer puts first (here token 0) comes before a prompt, and not before later text."""
    tokenizer = character_tokenizer("ab")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{PAD} $A", special_tokens=[(PAD, 0)]
    )
    codec = TokenizerCodec(tokenizer)
    assert (codec.encode_prompt("ab"), codec.encode("ab")) == ([0, 3, 4], [3, 4])


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = character_tokenizer("ab")
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="the tokenizer of tiny has no end-of-sequence token"):
        TokenizerCodec(endless, "tiny")


# Models


def digest(model: torch.nn.Module) -> str:
    return checksum(weight_tensors(model))


def test_the_small_model_is_its_seeds_alone() -> None:
    torch.manual_seed(1)
    first = small_policy(SMALL, "abc", seed=5)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after  # the global generator was left as it was
    assert digest(small_policy(SMALL, "abc", seed=5).model) == digest(first.model)
    assert digest(small_policy(SMALL, "abc", seed=6).model) != digest(first.model)


def test_the_small_model_is_an_untied_llama_that_knows_its_tokens() -> None:
    policy = small_policy(SMALL, "abc", seed=0)
    model = policy.model
    assert isinstance(model, LlamaForCausalLM)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= weight_tensors(model).keys()
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight.shape == (6, 16)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert not model.training


def test_a_saved_policy_loads_as_the_same_policy(tmp_path: Path) -> None:
    policy = small_policy(SMALL, ALPHABET, seed=0)
    policy.save(tmp_path)
    loaded = load_policy(str(tmp_path), ModelConfig(context_length=1000))
    assert digest(loaded.model) == digest(policy.model)
    assert loaded.codec.encode("a+b") == policy.codec.encode("a+b")
    assert loaded.context_length == 32  # what the model supports
    assert load_policy(str(tmp_path), ModelConfig(context_length=9)).context_length == 9
    assert digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == digest(policy.model)


def test_a_policy_is_loaded_in_the_asked_number_type(tmp_path: Path) -> None:
    small_policy(SMALL, "abc", seed=0).save(tmp_path)
    loaded = load_policy(str(tmp_path), ModelConfig(dtype="bfloat16"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_rotary_frequencies_are_exact_in_every_number_type(tmp_path: Path) -> None:
    """10000^(-2i/d), by hand; in bfloat16 they would be off by up to 2^-9 of themselves."""
    policy = small_policy(SMALL, "abc", seed=0)
    policy.save(tmp_path)
    half = ModelConfig(dtype="bfloat16")
    made = small_policy(SMALL.model_copy(update={"dtype": "bfloat16"}), "abc", seed=0)
    size = SMALL.hidden_size // SMALL.heads
    expected = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    for model in (policy.model, load_policy(str(tmp_path), half).model, made.model):
        frequencies = model.get_buffer("model.rotary_emb.inv_freq").double()
        torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)


def drop_head(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, {"format": "pt"})


def remove_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "abacus"}')


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def adapter(folder: Path) -> None:
    remove_all(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def empty(folder: Path) -> None:
    remove_all(folder)
    folder.mkdir()


def sequence_to_sequence(folder: Path) -> None:
    T5Config(vocab_size=6).save_pretrained(folder)


def of_images_and_text(folder: Path) -> None:
    Gemma3Config().save_pretrained(folder)


def other_shapes(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 16', '"hidden_size": 24'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_all, "there is no such folder"),
        (empty, "config.json"),
        (remove_weights, "no file named model.safetensors"),
        (cut_weights, "invalid"),
        (drop_head, r"lack lm_head.weight \(1 missing\)"),
        (break_config, "not a valid JSON"),
        (unknown_architecture, "abacus"),
        (other_shapes, "size|shape"),
        (remove_tokenizer, "tokenizer"),
        (adapter, "it is an adapter; give the model it was merged into"),
        (sequence_to_sequence, "it is of the kind t5: give a causal language model"),
        (of_images_and_text, "it is of more than text: give the variant for text only"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "policy"
    small_policy(SMALL, "abc", seed=0).save(folder)
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_policy(str(folder), SMALL)
    message = str(caught.value)
    start = f"cannot load the model '{folder}': "
    assert message.startswith(start)
    assert re.search(reason, message.removeprefix(start))
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_a_hub_id_that_is_not_here_is_one_line() -> None:
    """Tests run offline, where an id that does not exist is one that was never fetched."""
    with pytest.raises(ModelError) as caught:
        load_policy("no-such-people/no-such-model", SMALL)
    message = str(caught.value)
    assert message.startswith("cannot load the model 'no-such-people/no-such-model': ")
    assert message.endswith("or a hub id that this machine can reach)")
    assert "\n" not in message


def test_an_encoder_is_refused_though_it_loads_as_a_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    BertLMHeadModel(BertConfig(vocab_size=6, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    character_tokenizer("abc").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertLMHeadModel sees the tokens to come"):
        load_policy(str(tmp_path), SMALL)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small_policy(SMALL, "abc", seed=0).save(tmp_path)
    character_tokenizer("abcdef").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its tokenizer has 9 tokens, its embedding 6"):
        load_policy(str(tmp_path), SMALL)


def test_flash_attention_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = SMALL.model_copy(update={"attention": "flash_attention_2", "dtype": "bfloat16"})
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ModelError, match=r"flash_attention_2.* pip install flash-attn"):
        small_policy(flash, "abc", seed=0)
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(ModelError, match=r'does not compute in float32: set model.dtype = "bfloat16"'):
        small_policy(flash.model_copy(update={"dtype": "float32"}), "abc", seed=0)


def test_layers_that_would_drop_activations_are_not_checkpointed(tmp_path: Path) -> None:
    """OPT applies dropout in the layer itself, which must be in training mode to be computed again."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    }
    OPTForCausalLM(OPTConfig(vocab_size=6, num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    character_tokenizer("abc").save_pretrained(tmp_path)
    load_policy(str(tmp_path), SMALL)
    with pytest.raises(ModelError, match="OPTForCausalLM drops activations in its layers"):
        load_policy(str(tmp_path), SMALL.model_copy(update={"activation_checkpointing": True}))


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    policy = small_policy(SMALL, "abc", seed=0)
    policy.save(tmp_path)
    remove_weights(tmp_path)
    torch.save(policy.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_policy(str(tmp_path), SMALL)


def test_a_program_of_the_model_is_never_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = tmp_path / "policy", tmp_path / "ran"
    small_policy(SMALL, "abc", seed=0).save(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "abacus", "auto_map": {"AutoConfig": "program.Abacus"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "program.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig\nclass Abacus(LlamaConfig): ...\n"
    )
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    with pytest.raises(ModelError, match="needs a program of its own, which vcpo never runs"):
        load_policy(str(folder), SMALL)
    assert not ran.exists()


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ModelError, match=f"cannot use device '{device}'.*set model.device"):
        small_policy(SMALL.model_copy(update={"device": device}), "abc", seed=0)
