"""The weights' names, checksum and file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vcpo.errors import ModelError
from vcpo.weights import checksum, load_weights, read_weights, weight_tensors, write_weights

torch.set_num_threads(1)


class Tied(nn.Module):
    """Embedding and head share one matrix; a scale of zero dimensions and a buffer come along."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.rand(()))
        self.register_buffer("steps", torch.tensor([seed]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "b": torch.rand(2, 3),
        "a": torch.rand(4, dtype=torch.float64).to(torch.bfloat16),
        "c": torch.rand(()),
    }


def test_a_tied_tensor_and_no_scratch_buffer_is_listed_once() -> None:
    model = Tied()
    listed = weight_tensors(model)
    assert set(listed) == {"embedding.weight", "scale", "steps"}
    assert listed["embedding.weight"].data_ptr() == model.head.weight.data_ptr()
    assert not any(t.requires_grad for t in listed.values())


def test_loading_copies_in_place_and_keeps_the_tie() -> None:
    model, other = Tied(0), Tied(1)
    place = model.embedding.weight.data_ptr()
    load_weights(model, weight_tensors(other))
    assert model.embedding.weight.data_ptr() == place == model.head.weight.data_ptr()
    assert torch.equal(model.head.weight, other.head.weight)
    assert int(model.get_buffer("steps")) == 1
    assert checksum(weight_tensors(model)) == checksum(weight_tensors(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("scale"), "scale is in only one"),
        (lambda w: w.update(more=torch.zeros(1)), "more is in only one"),
        (lambda w: w.update(steps=torch.zeros(2)), r"steps has shape \(2,\), not \(1,\)"),
    ],
)
def test_other_names_or_shapes_are_refused_before_anything_is_copied(
    change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    model, others = Tied(0), dict(weight_tensors(Tied(1)))
    before = checksum(weight_tensors(model))
    change(others)
    with pytest.raises(ModelError, match=message):
        load_weights(model, others)
    assert checksum(weight_tensors(model)) == before


def test_the_checksum_is_a_digest_of_names_shapes_types_and_bytes() -> None:
    """blake2b of one float32 tensor written out by hand: little-endian 1.0 is 00 00 80 3f."""
    expected = hashlib.blake2b(b"w(1, 2)torch.float32" + bytes.fromhex("0000803f00000000"), digest_size=8)
    assert checksum({"w": torch.tensor([[1.0, 0.0]])}) == expected.hexdigest()


def test_the_checksum_does_not_depend_on_order_or_memory_layout() -> None:
    own = weights()
    scattered = {name: own[name] for name in sorted(own)}
    scattered["b"] = own["b"].t().contiguous().t()
    assert not scattered["b"].is_contiguous()
    assert checksum(scattered) == checksum(own)


def flip_a_bit(w: dict[str, Tensor]) -> None:
    w["b"].view(torch.int32)[1, 2] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(flip_a_bit, id="bit"),
        pytest.param(lambda w: w.update(d=w.pop("b")), id="name"),
        pytest.param(lambda w: w.update(b=w["b"].reshape(3, 2)), id="shape"),
        pytest.param(lambda w: w.update(a=w["a"].view(torch.int16)), id="type"),
        pytest.param(lambda w: w.pop("c"), id="missing"),
        pytest.param(lambda w: w.update(e=torch.zeros(0)), id="more"),
    ],
)
def test_the_checksum_sees_every_difference(change: Callable[[dict[str, Tensor]], object]) -> None:
    changed = weights()
    change(changed)
    assert checksum(changed) != checksum(weights())


def test_weights_pass_through_a_file_to_the_bit(tmp_path: Path) -> None:
    path, own = tmp_path / "weights-7.safetensors", weights()
    own["b"] = own["b"].t()  # a view that is not contiguous
    write_weights(path, {"only": torch.zeros(1)})
    write_weights(path, own)  # the second replaces the first
    back = read_weights(path)
    assert checksum(back) == checksum(own)
    assert {n: (t.dtype, t.shape) for n, t in back.items()} == {n: (t.dtype, t.shape) for n, t in own.items()}
    assert list(tmp_path.iterdir()) == [path]


def test_a_tied_model_passes_through_a_file(tmp_path: Path) -> None:
    sent, received = Tied(1), Tied(0)
    write_weights(tmp_path / "weights.safetensors", weight_tensors(sent))
    load_weights(received, read_weights(tmp_path / "weights.safetensors"))
    assert checksum(weight_tensors(received)) == checksum(weight_tensors(sent))
