"""One step with the optimal baseline, around a plain module: docs/scores.md explains it."""

import torch
from torch import nn

from vcpo import optimal_baseline
from vcpo.scores import ScoreTape

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 11))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tape = ScoreTape(model)  # once

lengths = torch.tensor([12, 9, 11, 8, 10, 7, 13, 10])  # 8 trajectories, packed in 2 rows of 40 positions
segments = torch.arange(8).repeat_interleave(lengths).view(2, 40)
tokens, groups = torch.randint(11, (2, 40)), torch.arange(8) // 4
rewards, log_weights = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0]), torch.randn(8).clamp(max=2.0)

with tape:
    log_probs = model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
sampled = segments[:, 1:] == segments[:, :-1]  # a trajectory's first token is its prompt
objective = (log_probs / (lengths[segments[:, 1:]] - 1))[sampled].sum()  # n = 1 / tokens sampled
record = tape.measure(objective, segments, count=8)
baseline = optimal_baseline(rewards, log_weights, record.squared_norms, groups)
record.backward(-log_weights.exp() * (rewards - baseline))  # minus: the optimizer descends
optimizer.step()
