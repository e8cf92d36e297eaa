"""Text from a decoder with a key-value cache: greedy, sampled, by beams; and the likelihood of given answers.

Rows of different prompt lengths are padded on the left, so that every row's last token stands in the last column and
each step adds one column to all. The image is read once, with the prompt; then rows are repeated to beams (a a b b).
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def generate(backbone, states, prompts: Sequence[str], max_new_tokens: int, num_beams: int, temperature: float,
             top_p: float, seed: int | Sequence[int]) -> list[str]:
    """See `Backbone.generate`. Beams are ranked by their mean log-probability per token, end mark included."""
    if not prompts:
        return []
    text, beams, device = backbone.text, num_beams, backbone.device
    sampler = build_sampler(len(prompts), num_beams, temperature, top_p, seed)
    starts = text.prompts(prompts, [1] * len(prompts))
    rows, width = len(starts), max(map(len, starts))
    tokens = torch.stack([F.pad(torch.tensor(s), (width - len(s), 0), value=text.pad_id) for s in starts]).to(device)
    sizes = torch.tensor([len(s) for s in starts], device=device)
    readable = torch.arange(width, device=device) >= width - sizes.unsqueeze(1)
    limits = (text.context_length - sizes).clamp(max=max_new_tokens)  # of new tokens, each row's own
    backbone.express()
    with backbone.cache.open() as cache:
        positions = (readable.cumsum(1) - 1).clamp(min=0)
        x = backbone.step(states, tokens, positions, readable)[:, -1]
        repeated = torch.arange(rows, device=device).repeat_interleave(beams)
        if beams > 1:
            cache.select(repeated)
        x, sizes, limits, readable = (part[repeated] for part in (x, sizes, limits, readable))
        said = torch.empty(rows * beams, 0, dtype=torch.long, device=device)
        # Only the first beam of a row is alive at the start, or all would be the same.
        scores = torch.full((rows, beams), float("-inf"), device=device)
        scores[:, 0] = 0.0
        lengths = torch.zeros(rows * beams, dtype=torch.long, device=device)
        done = torch.zeros(rows * beams, dtype=torch.bool, device=device)
        with _repeated(backbone, beams):
            for _ in range(int(limits.max())):
                logits = backbone.logits(x).float()
                if sampler is not None:
                    logits = sampler(logits)
                source, token, scores = _extend(logits, scores, lengths, done, beams, text.eos_id)
                if beams > 1:
                    cache.select(source)
                    said, lengths, done, readable = said[source], lengths[source], done[source], readable[source]
                lengths = lengths + (~done).long()
                said = torch.cat([said, token.unsqueeze(1)], dim=1)
                done = done | (token == text.eos_id) | (lengths >= limits)
                if bool(done.all()):
                    break
                readable = torch.cat([readable, readable.new_ones(len(readable), 1)], dim=1)
                at = (sizes + lengths - 1).clamp(max=text.context_length - 1)
                x = backbone.step(states, token.unsqueeze(1), at.unsqueeze(1), readable)[:, -1]
    winner = (scores / lengths.view(rows, beams).clamp(min=1)).argmax(dim=1) + torch.arange(rows, device=device) * beams
    return [text.decode(said[i, :lengths[i]].tolist()) for i in winner.tolist()]


def _extend(logits: Tensor, scores: Tensor, lengths: Tensor, done: Tensor, beams: int,
            eos_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows * beams, V) logits and the beams so far -> (row each comes from, its next token, (rows, beams) scores)."""
    rows = len(scores)
    logp = F.log_softmax(logits, dim=-1)
    # A finished beam stays as it is: its one continuation, the end mark, costs nothing.
    ended = torch.full_like(logp, float("-inf"))
    ended[:, eos_id] = 0.0
    total = scores.view(-1, 1) + torch.where(done.unsqueeze(1), ended, logp)
    size = lengths + (~done).long()
    mean = (total / size.clamp(min=1).unsqueeze(1)).view(rows, -1)
    best = mean.topk(beams, dim=1).indices
    vocabulary = logits.shape[1]
    source = best // vocabulary + torch.arange(rows, device=best.device).unsqueeze(1) * beams
    return source.flatten(), (best % vocabulary).flatten(), total.view(rows, -1).gather(1, best)


class RowSampler:
    """Draws each row's next token from a stream of its own, by nucleus sampling (arXiv 1904.09751)."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B, V), 0 at the token drawn and -inf elsewhere."""
        p, order = F.softmax(logits.float() / self.temperature, dim=-1).sort(dim=-1, descending=True)
        mass = p.cumsum(dim=-1)
        inside = mass - p < self.top_p  # up to the token that crosses the bound
        drawn = torch.stack([torch.rand((), generator=g) for g in self.generators]).to(logits.device)
        share = (p * inside).cumsum(dim=-1)
        at = (share < (drawn * share[:, -1]).unsqueeze(1)).sum(dim=1, keepdim=True).clamp(max=p.shape[1] - 1)
        return torch.full_like(logits, float("-inf")).scatter(1, order.gather(1, at), 0.0)


def build_sampler(rows: int, num_beams: int, temperature: float, top_p: float,
                  seed: int | Sequence[int]) -> RowSampler | None:
    """The sampler of a generation, None where it is greedy or by beams.

    Raises:
        ValueError: values out of their range, sampling together with beams, or another number of seeds than rows.
    """
    if num_beams < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected num_beams >= 1, temperature >= 0 and top_p in (0, 1], got {num_beams}, "
                         f"{temperature} and {top_p}")
    if temperature == 0:
        return None
    if num_beams > 1:
        raise ValueError("sampling (temperature above 0) and beam search (num_beams above 1) exclude each other")
    seeds = range(seed, seed + rows) if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"expected one seed per row ({rows}), got {len(seeds)}")
    return RowSampler(seeds, temperature, top_p)


@torch.no_grad()
def score_continuations(backbone, states, prompts: Sequence[str], candidates: Sequence[str]) -> Tensor:
    """(B, C): the mean log-probability per token of each candidate after each prompt, about each row's image.

    One pass over the rows scores all candidates of one token. A longer one is run out only where its first token leaves
    it a chance: else its entry is what it could reach at most, which is below the row's best.
    """
    text = backbone.text
    ends = text.ids(candidates)
    if not all(ends):
        raise ValueError(f"candidate {candidates[ends.index([])]!r} has no token")
    starts = text.prompts(prompts, [max(map(len, ends))] * len(prompts))
    lengths = torch.tensor([len(s) for s in starts], device=backbone.device)
    x = backbone.token_states(states, pad_ids(starts, text.pad_id).to(backbone.device))
    rows = torch.arange(len(starts), device=x.device)
    first = F.log_softmax(backbone.logits(x[rows, lengths - 1]).float(), dim=-1)
    sizes = torch.tensor([len(end) for end in ends], device=x.device)
    scores = first[:, torch.tensor([end[0] for end in ends], device=x.device)] / sizes  # no token after adds to it
    best = scores.masked_fill(sizes > 1, float("-inf")).max(dim=1).values
    for column in scores.max(dim=0).values.argsort(descending=True).tolist():
        end = ends[column]
        if len(end) == 1 or bool((scores[:, column] < best).all()):
            continue
        full = [[*start, *end[:-1]] for start in starts]
        x = backbone.token_states(states, pad_ids(full, text.pad_id).to(backbone.device))
        for offset, token in enumerate(end[1:]):
            logits = backbone.logits(x[rows, lengths + offset]).float()
            scores[:, column] += F.log_softmax(logits, dim=-1)[:, token] / len(end)
        best = torch.maximum(best, scores[:, column])
    return scores


@torch.no_grad()
def score_choices(backbone, states, prompts: Sequence[str], choices: Sequence[Sequence[str]],
                  pictures: int = 1) -> Tensor:
    """(B, C): the mean log-probability per token of each row's own choices after its prompt, about its pictures.

    pictures: of each row. C: the most choices of a row; -inf where a row has fewer, and for a choice without any token.
    """
    text = backbone.text
    ends = [text.ids(of_row) for of_row in choices]
    starts = text.prompts(prompts, [max(map(len, of_row)) for of_row in ends], [pictures] * len(prompts))
    scores = torch.full((len(starts), max(map(len, ends))), float("-inf"), device=backbone.device)
    for column in range(scores.shape[1]):
        own = [of_row[column] if column < len(of_row) else [] for of_row in ends]
        places = [(row, len(start) + j - 1, token) for row, (start, end) in enumerate(zip(starts, own))
                  for j, token in enumerate(end)]
        rows, at, tokens = torch.tensor(places, device=backbone.device).T
        full = [[*start, *end[:-1]] for start, end in zip(starts, own)]
        x = backbone.token_states(states, pad_ids(full, text.pad_id).to(backbone.device))
        found = F.log_softmax(backbone.logits(x[rows, at]).float(), dim=-1).gather(1, tokens[:, None]).squeeze(1)
        sizes = torch.tensor([len(end) for end in own], device=backbone.device)
        sums = torch.zeros(len(starts), device=backbone.device).index_add(0, rows, found)
        scores[:, column] = torch.where(sizes > 0, sums / sizes, float("-inf"))
    return scores


def pad_ids(rows: Sequence[Sequence[int]], pad_id: int = 0) -> Tensor:
    """Token id lists -> (B, longest), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=pad_id)


def marked_prompts(text, texts: Sequence[str], room: Sequence[int]) -> list[list[int]]:
    """`TextCodec.prompts` of a codec whose prompts are the begin mark and the text, cut at its end."""
    return [[text.bos_id, *ids][:max(1, text.context_length - more)] for ids, more in zip(text.ids(texts), room)]


def _repeated(backbone, times: int):
    if backbone.router is None or times == 1:
        return nullcontext()
    return backbone.router.repeat(**dict.fromkeys(backbone.text_towers, times))
