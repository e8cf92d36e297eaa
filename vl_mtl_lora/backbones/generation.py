"""Text from a decoder: greedy and beam search over `token_states`, and the likelihood of given continuations.

Rows of different prompt lengths are padded on the right and each is read at its own last token. The image states are
computed once; the text is read anew at each step.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def generate(backbone, states, prompts: Sequence[str], max_new_tokens: int, num_beams: int) -> list[str]:
    """See `Backbone.generate`. Beams are ranked by their mean log-probability per token, end mark included."""
    if not prompts:
        return []
    text = backbone.text
    starts = [[text.bos_id, *ids][:text.context_length - 1] for ids in text.ids(prompts)]
    beams, rows = num_beams, len(starts)
    with _repeated(backbone, beams):
        states = _repeat(states, beams)
        lengths = torch.tensor([len(s) for s in starts]).repeat_interleave(beams)
        # Each row ends by its own length: what a row says does not depend on its neighbours.
        limits = (lengths + max_new_tokens).clamp(max=text.context_length)
        tokens = pad_ids(starts, int(limits.max())).repeat_interleave(beams, 0)
        tokens, lengths, limits = (part.to(backbone.device) for part in (tokens, lengths, limits))
        # Only the first beam of a row is alive at the start, or all would be the same.
        scores = torch.full((rows, beams), float("-inf"), device=tokens.device)
        scores[:, 0] = 0.0
        done = torch.zeros(rows, beams, dtype=torch.bool, device=tokens.device)
        start = lengths.clone()
        line = torch.arange(rows * beams, device=tokens.device)
        for _ in range(max_new_tokens):
            width = int(lengths.max())
            x = backbone.token_states(states, tokens[:, :width])
            logp = F.log_softmax(backbone.logits(x[line, lengths - 1]).float(), dim=-1).view(rows, beams, -1)
            vocabulary = logp.shape[-1]
            # A finished beam stays as it is: its one continuation, the end mark, costs nothing.
            ended = torch.full_like(logp, float("-inf"))
            ended[..., text.eos_id] = 0.0
            total = scores.unsqueeze(-1) + torch.where(done.unsqueeze(-1), ended, logp)
            # Beams of different length compete by their mean log-probability.
            size = (lengths - start).view(rows, beams) + (~done).long()
            mean = (total / size.clamp(min=1).unsqueeze(-1)).flatten(1)
            best = mean.topk(beams, dim=1).indices
            parent, token = best // vocabulary, best % vocabulary
            scores = total.flatten(1).gather(1, best)
            source = (parent + torch.arange(rows, device=tokens.device).unsqueeze(1) * beams).flatten()
            was_done = done.flatten()[source]
            tokens, lengths = tokens[source], lengths[source]
            grow = ~was_done
            tokens[line[grow], lengths[grow]] = token.flatten()[grow]
            lengths = lengths + grow.long()
            done = (was_done | (token.flatten() == text.eos_id) | (lengths == limits)).view(rows, beams)
            if bool(done.all()):
                break
    size = (lengths - start).view(rows, beams).clamp(min=1)
    winner = (scores / size).argmax(dim=1) + torch.arange(rows, device=tokens.device) * beams
    return [text.decode(tokens[i, start[i]:lengths[i]].tolist()) for i in winner.tolist()]


@torch.no_grad()
def score_continuations(backbone, states, prompts: Sequence[str], candidates: Sequence[str]) -> Tensor:
    """(B, C): the mean log-probability per token of each candidate after each prompt, about each row's image.

    One pass over the rows scores all candidates of one token; longer ones are run out one by one.
    """
    text = backbone.text
    ends = text.ids(candidates)
    if not all(ends):
        raise ValueError(f"candidate {candidates[ends.index([])]!r} has no token")
    room = text.context_length - max(map(len, ends))
    starts = [[text.bos_id, *ids][:room] for ids in text.ids(prompts)]
    lengths = torch.tensor([len(s) for s in starts], device=backbone.device)
    x = backbone.token_states(states, pad_ids(starts).to(backbone.device))
    last = x[torch.arange(len(starts), device=x.device), lengths - 1]
    first = F.log_softmax(backbone.logits(last).float(), dim=-1)
    scores = first[:, torch.tensor([end[0] for end in ends], device=x.device)]
    for column, end in enumerate(ends):
        if len(end) == 1:
            continue
        full = [[*start, *end[:-1]] for start in starts]
        x = backbone.token_states(states, pad_ids(full).to(backbone.device))
        for offset, token in enumerate(end[1:]):
            at = x[torch.arange(len(full), device=x.device), lengths + offset]
            scores[:, column] += F.log_softmax(backbone.logits(at).float(), dim=-1)[:, token]
        scores[:, column] /= len(end)
    return scores


def pad_ids(rows: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """Token id lists -> (B, width), padded with 0 on the right; without a width, as wide as the longest."""
    width = width or max(map(len, rows))
    out = torch.zeros(len(rows), width, dtype=torch.long)
    for line, ids in zip(out, rows):
        line[:len(ids)] = torch.tensor(ids)
    return out


def _repeat(states, times: int):
    return type(states)(*(part.repeat_interleave(times, 0) for part in states))


def _repeated(backbone, times: int):
    return backbone.router.repeat("text", times) if backbone.router is not None else nullcontext()
