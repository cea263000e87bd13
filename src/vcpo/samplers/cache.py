"""A key-value cache of slots: sequences of any length side by side, each at its own position.

transformers' own caches append one column for the whole batch, so sequences that begin at different times
need padding or copying. Here a slot is a row of a preallocated table; token p of the sequence in slot s
lies in column p + 1, whatever its neighbours do. Column 0 takes the writes of padding. What a column
beyond a sequence's end still holds is hidden by the attention mask, so a slot is reused without clearing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

COLUMN_STEP = 64


class _SlotLayer(CacheLayerMixin):
    """One decoder layer's table; where to read and write is told by the owning :class:`SlotCache`."""

    is_sliding = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states.new_zeros(0), value_states.new_zeros(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._write(self.keys, key_states)
        self.values = self._write(self.values, value_states)
        return self._read(self.keys), self._read(self.values)

    def _write(self, table: Tensor | None, states: Tensor) -> Tensor:
        owner = self.owner
        shape = (owner.slots, states.shape[1], owner.columns, states.shape[3])
        if table is None or table.shape != shape:
            grown = states.new_zeros(shape)
            if table is not None and table.numel():
                grown[: table.shape[0], :, : table.shape[2]] = table
            table = grown
        # [b, heads, q, d] -> [b, q, heads, d], the order that two index tensors around a slice ask for.
        table[owner.rows[:, None], :, owner.write_columns] = states.transpose(1, 2)
        return table

    def _read(self, table: Tensor) -> Tensor:
        visible = table[:, :, : self.owner.visible]
        first, count = int(self.owner.first_row), len(self.owner.rows)
        if self.owner.contiguous:
            return visible[first : first + count]
        return visible.index_select(0, self.owner.rows)

    def copy_slots(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        for table in (self.keys, self.values):
            assert table is not None
            table[targets, :, :columns] = table[sources, :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.visible, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The tables of all layers and the plan of the next forward pass.

    Call :meth:`plan` before each forward; it returns the attention mask for it.
    """

    def __init__(self, layers: int, context_length: int, device: torch.device) -> None:
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])
        self.context_length, self.device = context_length, device
        self.slots, self.columns = 0, 0
        self.rows = self.write_columns = torch.zeros(0, dtype=torch.long, device=device)
        self.first_row, self.contiguous, self.visible = 0, True, 0

    def plan(self, rows: list[int], positions: Tensor, longest: int) -> Tensor:
        """Say where the next forward reads and writes.

        ``rows`` [b]: slot of each sequence; ``positions`` [b, q]: position of each fed token, -1 on padding;
        ``longest``: the length of the longest of these sequences after the feed. Returns [b, 1, q, visible]
        bool, true where a query may look: every earlier token of its own sequence and itself; padding looks
        at column 0 so that its softmax stays finite.
        """
        self.slots = max(self.slots, max(rows) + 1)
        self.columns = max(
            self.columns, min(-(-(longest + 1) // COLUMN_STEP) * COLUMN_STEP, self.context_length + 1)
        )
        self.visible = longest + 1
        self.rows = torch.tensor(rows, device=self.device)
        self.first_row = rows[0]
        self.contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        self.write_columns = positions + 1
        columns = torch.arange(self.visible, device=self.device)
        last = positions[:, None, :, None] + 1
        return (columns <= last) & ((columns > 0) | (last == 0))

    def clear(self) -> None:
        """Drop the tables; the next forward makes new ones."""
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            layer.is_initialized = False

    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Give each target slot the first ``length`` tokens of its source slot."""
        self.slots = max(self.slots, max(targets) + 1)
        source, target = (torch.tensor(x, device=self.device) for x in (sources, targets))
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            if layer.keys is not None and layer.keys.shape[0] < self.slots:
                layer.keys, layer.values = (self._more_slots(t) for t in (layer.keys, layer.values))
            layer.copy_slots(source, target, length + 1)

    def _more_slots(self, table: Tensor | None) -> Tensor:
        assert table is not None
        grown = table.new_zeros(self.slots, *table.shape[1:])
        grown[: table.shape[0]] = table
        return grown
