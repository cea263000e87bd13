"""Tokens in and out: a codec around a Hugging Face tokenizer, and a character tokenizer for small models."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vcpo.errors import ModelError

PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character of ``alphabet`` and three special ones."""
    characters = sorted(set(alphabet))
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # "isolated" splits keep every character, whitespace and newlines included, as a token of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def stop_tokens(codec: TokenizerCodec, generation: object) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of a generation config (None: there is none)."""
    configured = getattr(generation, "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    return frozenset([codec.end_id, *(t for t in more if t is not None)])


class TokenizerCodec:
    """The codec that environments see (:class:`vcpo.environments.protocol.Codec`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the model") -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {name} has no end-of-sequence token: set eos_token in its config"
            )
        self.tokenizer, self._name = tokenizer, name
        self.end_id: int = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def encode_prompt(self, text: str) -> list[int]:
        """``text`` as one message of the user, by the chat template, up to where the answer begins; without
        a template the text itself, after what the tokenizer puts first (often a token for the beginning).

        Raises ModelError if the template cannot render such a conversation.
        """
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(text)
        messages = [{"role": "user", "content": text}]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, of whoever made the model
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(
                f"the chat template of {self._name} cannot render a single user message: {what}; change "
                "chat_template in its tokenizer folder, or remove it to show prompts as they are"
            ) from error
        return self.encode(str(rendered))
